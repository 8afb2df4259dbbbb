//! Panels of 4-bit codes of which half is there: 1:2, 2:4 and 4:8.
//!
//! A block of 32 columns keeps a bit for every entry (for 2:4 as many as the positions take) and the codes that are there; the others are
//! filled in with the matrix's zero, in registers. An octet of columns has 64 codes at most, so two octets share 64 bytes.

use lacuna_format::{Pattern, Piece};

use super::ints::{Bytes, Grid, grid, put_scale};
use super::source::{Line, Source};
use super::{BLOCK, Panels};
use crate::simd::Simd;

/// Bytes of a block: masks, then codes.
const BYTES: usize = 64 + 128;

/// Codes of 4 bits, half of them there.
#[derive(Clone)]
pub(crate) struct Halved(pub(crate) Grid);

impl Bytes for Halved {
    const BITS: usize = 4;
    const BLOCK_BYTES: usize = BYTES;
    #[inline(always)]
    fn grid(&self) -> &Grid {
        &self.0
    }
    #[inline(always)]
    unsafe fn octet<S: Simd>(&self, s: S, panel: *const u8, b: usize, o: usize, h: usize) -> [S::I; 2] {
        // SAFETY: the caller promises the block; loads of codes end within a vector's length after the panel, where there is room.
        unsafe {
            let block = panel.add(b * BYTES);
            let masks = block.add(16 * o).cast::<u64>();
            let (first, second) = (masks.read_unaligned(), masks.add(1).read_unaligned());
            let codes = block.add(64 + o / 2 * 64);
            let upper = o % 2 == 1;
            let below = |m: u64| if h == 0 { 0 } else { (m & 0xFFFF_FFFF).count_ones() as usize };
            let mine = |m: u64| if h == 0 { m } else { m >> 32 };
            let then = codes.add(first.count_ones() as usize);
            [
                s.place(codes.add(below(first)), upper, self.0.zero, mine(first)),
                s.place(then.add(below(second)), upper, self.0.zero, mine(second)),
            ]
        }
    }
}

/// Whether a piece with this source can be packed so.
pub(crate) fn fits(piece: &Piece, source: &Source) -> bool {
    let half = matches!(piece.pattern, Pattern::Nm { n, m, .. } if matches!((n, m), (1, 2) | (2, 4) | (4, 8)));
    half && source.bits == 4 && source.table.is_none() && !source.kind.zeros() && !source.kind.minima()
}

/// Panels of a piece that fits.
pub(crate) fn halved(piece: &Piece, source: &Source, read: &dyn Fn()) -> (Panels, Grid) {
    let (cols, blocks) = (piece.cols, piece.cols.div_ceil(BLOCK));
    let per = (source.run / BLOCK).clamp(1, blocks.max(1));
    let groups = blocks.div_ceil(per);
    let (grid, stride) = grid(source, groups, per, blocks * BYTES);
    let panels = Panels::build(piece.rows, cols, stride, read, |first, n, panel| {
        let (mut line, mut columns) = (Line::default(), Vec::new());
        let mut codes = vec![None; 16 * blocks * BLOCK];
        for lane in 0..n {
            (source.read)(first + lane, &mut line);
            piece.pattern.columns(first + lane, cols, &mut columns);
            for (&c, &code) in columns.iter().zip(&line.codes) {
                codes[c as usize * 16 + lane] = Some(code);
            }
            (0..groups).for_each(|g| put_scale(panel, &grid, lane, g, &line, g));
        }
        for octet in 0..blocks * 4 {
            let (block, o) = (&mut panel[octet / 4 * BYTES..][..BYTES], octet % 4);
            let mut next = 64 + o / 2 * 64;
            for quad in 0..2 {
                let mut mask = 0u64;
                for (lane, j) in (0..16).flat_map(|lane| (0..4).map(move |j| (lane, j))) {
                    if let Some(code) = codes[(octet * 8 + quad * 4 + j) * 16 + lane] {
                        mask |= 1 << (4 * lane + j);
                        block[next] |= code << (4 * (o % 2));
                        next += 1;
                    }
                }
                block[16 * o + 8 * quad..][..8].copy_from_slice(&mask.to_le_bytes());
            }
        }
    });
    (panels, grid)
}
