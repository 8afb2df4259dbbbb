//! Panels of 4-bit codes of which two in every four columns are there: 2:4, and 1:2, which is a kind of it.
//!
//! A block of 32 columns has two parts of 16. A part's four quads keep eight codes a row: two vectors of 16 rows and
//! four bytes each, one in the lower and one in the upper halves of 64 bytes. A vector before them says for every code
//! which column of its quad it is, in two bits: those of the first part's two vectors, then of the second's. A single
//! row of x is brought to the codes, 16 of its bytes at a time; for several the codes are brought to their columns.

use lacuna_format::{Pattern, Piece};

use super::ints::{Bytes, GroupLayout, put_scale};
use super::source::{Line, Source};
use super::{BLOCK, Panels};
use crate::simd::Simd;

/// Bytes of what says where a block's codes are, and of all of it.
const PLACES: usize = 64;
const BYTES: usize = PLACES + 128;

/// Codes of 4 bits, half of them there.
#[derive(Clone)]
pub(crate) struct Halved(pub(crate) GroupLayout);

impl Bytes for Halved {
    const BITS: usize = 4;
    const BLOCK_BYTES: usize = BYTES;
    const PICKS: bool = true;
    #[inline(always)]
    fn grid(&self) -> &GroupLayout {
        &self.0
    }
    #[inline(always)]
    unsafe fn octet<S: Simd>(&self, s: S, block: *const u8, o: usize, h: usize) -> [S::I; 2] {
        // SAFETY: the caller promises the block.
        let (codes, places) = unsafe {
            let block = block.add(h * 4 * S::LANES);
            (s.load_i(block.add(PLACES + 64 * (o / 2))), s.load_i(block))
        };
        let codes = s.and_i(if o % 2 == 1 { s.shr_i(codes, 4) } else { codes }, 15);
        // Each code's bits, turned against the zero's that fill the lane, as far up as its column is: eight bits a
        // column.
        let codes = s.xor_i(codes, s.and_i(s.splat_i(-1), self.0.zero));
        let up = s.shl_i(s.and_i(s.shr_i(places, 2 * o as u32), 3), 3);
        let mut out = [s.and_i(s.splat_i(-1), self.0.zero); 2];
        let mut k = 0;
        while k < 4 {
            out[k / 2] = s.xor_i(out[k / 2], s.up_i(s.byte(codes, k), s.byte(up, k)));
            k += 1;
        }
        out
    }
    #[inline(always)]
    unsafe fn picks<S: Simd>(&self, s: S, block: *const u8, part: usize, h: usize) -> [[S::I; 2]; 2] {
        // SAFETY: the caller promises the block.
        let (codes, places) = unsafe {
            let block = block.add(h * 4 * S::LANES);
            (s.load_i(block.add(PLACES + 64 * part)), s.load_i(block))
        };
        // The first column of each code's quad.
        let (first, second) = (s.splat_i(0x0404_0000), s.splat_i(0x0C0C_0808));
        let places = s.shr_i(places, 4 * part as u32);
        let places = [s.or_i(s.and_i(places, 3), first), s.or_i(s.and_i(s.shr_i(places, 2), 3), second)];
        [[s.and_i(codes, 15), s.and_i(s.shr_i(codes, 4), 15)], places]
    }
}

/// Whether a piece with this source can be packed so.
pub(crate) fn fits(piece: &Piece, source: &Source) -> bool {
    let half = matches!(piece.pattern, Pattern::Nm { n, m, .. } if matches!((n, m), (1, 2) | (2, 4)));
    half && source.bits == 4
        && source.table.is_none()
        && !source.kind.zeros()
        && !source.kind.minima()
        && piece.cols.is_multiple_of(4)
}

/// Panels of a piece that fits.
pub(crate) fn halved(piece: &Piece, source: &Source, read: &dyn Fn()) -> (Panels, GroupLayout) {
    let (cols, blocks) = (piece.cols, piece.cols.div_ceil(BLOCK));
    let per = (source.run / BLOCK).clamp(1, blocks.max(1));
    let groups = blocks.div_ceil(per);
    let grid = GroupLayout::dense(source, per, BYTES);
    let panels = Panels::build(piece.rows, cols, grid.dense_bytes(blocks, BYTES), read, |first, n, panel| {
        let (mut line, mut columns) = (Line::default(), Vec::new());
        for lane in 0..n {
            (source.read)(first + lane, &mut line);
            piece.pattern.columns(first + lane, cols, &mut columns);
            for (k, (&c, &code)) in columns.iter().zip(&line.codes).enumerate() {
                // Two codes a quad, so that the k-th lies in quad k / 2.
                let (block, octet, byte) = (k / 16, k / 4 % 4, 4 * lane + k % 4);
                let block = &mut panel[grid.codes::<false>(block, BYTES)..][..BYTES];
                block[PLACES + 64 * (octet / 2) + byte] |= code << (4 * (octet % 2));
                block[byte] |= ((c % 4) as u8) << (2 * octet);
            }
            (0..groups).for_each(|g| put_scale(panel, &grid, lane, g, &line, g));
        }
    });
    (panels, grid)
}
