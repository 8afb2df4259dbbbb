//! Panels of signs times a product of two thin matrices: `w[r, c] = ±Σ_k left[r, k] · right[k, c]`, made column by column
//! in registers.
//!
//! A panel: 16 scales, one a row (f32), the left factor's rows side by side, 16 values for every `k`, and for every column
//! the signs of 16 rows (u16). The right factor is there once for all panels: for every octet of columns and every `k`
//! eight values. Factors of 8-bit codes with a scale a row are kept as bytes, others as f32.

use std::sync::Arc;

use lacuna_format::{Group, Pattern, Piece, Signed, Values, bits};

use super::{BLOCK, Codec, Panels, ROWS};
use crate::simd::Simd;

/// Bytes of a panel's scales.
const SCALES: usize = 4 * ROWS;

/// How factors are kept: `BYTES` as signed bytes, else as f32.
#[derive(Clone)]
pub(crate) struct Signs<const BYTES: bool> {
    rank: usize,
    /// `[octets, rank, 8]` values, and what a vector reads beyond the last.
    right: Arc<[u8]>,
    /// One for every `k`.
    scales: Arc<[f32]>,
}

impl<const BYTES: bool> Signs<BYTES> {
    const WIDTH: usize = if BYTES { 1 } else { 4 };
}

/// Where a block is being read.
#[derive(Clone, Copy)]
pub(crate) struct At {
    left: *const u8,
    signs: *const u8,
    right: *const u8,
    half: usize,
}

impl<const BYTES: bool> Codec for Signs<BYTES> {
    type Block<S: Simd> = At;

    fn beside(&self) -> u64 {
        (self.right.len() + 4 * self.scales.len()) as u64
    }

    fn work(&self) -> u64 {
        1 + self.rank as u64
    }

    #[inline(always)]
    unsafe fn block<S: Simd>(&self, _: S, panel: *const u8, b: usize, h: usize) -> At {
        // SAFETY: the caller promises the block; the right factor has all of them.
        unsafe {
            let left = panel.add(SCALES);
            let signs = left.add(self.rank * ROWS * Self::WIDTH + 2 * BLOCK * b);
            At { left, signs, right: self.right.as_ptr().add(b * BLOCK * self.rank * Self::WIDTH), half: h }
        }
    }

    unsafe fn gathered<S: Simd>(&self, _: S, _: *const u8, _: *const u8, _: usize, _: usize) -> [S::V; 8] {
        unreachable!("columns that rows share have no signs")
    }

    #[inline(always)]
    unsafe fn eight<S: Simd>(&self, s: S, at: &mut At, o: usize) -> [S::V; 8] {
        let mut out = [s.splat(0.0); 8];
        let shift = at.half * S::LANES;
        let mut room = [0.0f32; 16];
        // SAFETY: the caller promises the block, whose lanes and octets are there; a vector of 16 lanes reads eight values
        // more than the octet has, for which the right factor has room.
        unsafe {
            let mut k = 0;
            while k < self.rank {
                let left = at.left.add((k * ROWS + shift) * Self::WIDTH);
                let right = at.right.add((o * self.rank + k) * 8 * Self::WIDTH);
                let mut values = right.cast::<f32>();
                let u = if BYTES {
                    s.store(room.as_mut_ptr(), s.load_i8(right.cast()));
                    values = room.as_ptr();
                    s.mul(s.load_i8(left.cast()), s.splat(*self.scales.as_ptr().add(k)))
                } else {
                    s.load(left.cast())
                };
                let mut j = 0;
                while j < 8 {
                    out[j] = s.fma(u, s.splat(*values.add(j)), out[j]);
                    j += 1;
                }
                k += 1;
            }
            let scale = s.load(at.left.sub(SCALES).cast::<f32>().add(shift));
            let mut j = 0;
            while j < 8 {
                let turned = u32::from(at.signs.add(2 * (8 * o + j)).cast::<u16>().read_unaligned());
                let w = if BYTES { s.mul(out[j], scale) } else { out[j] };
                out[j] = s.flip(w, turned >> shift);
                j += 1;
            }
        }
        out
    }
}

/// Rows of a factor.
struct Rows<'a> {
    piece: &'a Piece,
    bytes: bool,
}

impl Rows<'_> {
    /// Row `r` as it is kept, with its scale.
    fn row(&self, r: usize, out: &mut Vec<u8>) -> f32 {
        let cols = self.piece.cols;
        out.clear();
        match &self.piece.values {
            Values::Int { codes, scales, .. } if self.bytes => {
                out.resize(cols, 0);
                bits::unpack(codes, 8, r * cols, out);
                // Stored with an offset of 128; the top bit turned is that number as a signed byte.
                out.iter_mut().for_each(|c| *c ^= 0x80);
                let mut scale = [0.0];
                scales.row(r, &mut scale);
                scale[0]
            }
            _ => {
                let mut row = vec![0.0; cols];
                self.piece.row(r, &mut row);
                out.extend(row.iter().flat_map(|v| v.to_le_bytes()));
                1.0
            }
        }
    }
}

/// Whether a factor is bytes with a scale a row.
fn is_bytes(p: &Piece) -> bool {
    let whole = |g: &Group| matches!(g, Group::Run(n) if *n >= p.cols);
    p.pattern == Pattern::Dense && matches!(&p.values, Values::Int { bits: 8, zeros: None, group, .. } if whole(group))
}

/// Whether both factors can be kept as bytes.
pub(crate) fn fits(signed: &Signed) -> bool {
    is_bytes(&signed.left) && is_bytes(&signed.right)
}

/// Panels of a term that has passed its check; `BYTES` only where that [`fits`].
pub(crate) fn pack<const BYTES: bool>(signed: &Signed, read: &dyn Fn()) -> (Panels, Signs<BYTES>) {
    let (rows, cols, rank, width) = (signed.left.rows, signed.right.cols, signed.rank(), Signs::<BYTES>::WIDTH);
    let blocks = cols.div_ceil(BLOCK);
    let mut right = vec![0u8; (blocks * BLOCK * rank + 8) * width];
    let (mut row, mut scales) = (Vec::new(), Vec::with_capacity(rank));
    for k in 0..rank {
        scales.push(Rows { piece: &signed.right, bytes: BYTES }.row(k, &mut row));
        for (o, octet) in row.chunks(8 * width).enumerate() {
            right[(o * rank + k) * 8 * width..][..octet.len()].copy_from_slice(octet);
        }
    }
    let head = SCALES + rank * ROWS * width;
    let panels = Panels::build(rows, cols, head + 2 * BLOCK * blocks, read, |first, n, panel| {
        let mut row = Vec::new();
        for i in 0..n {
            let scale = Rows { piece: &signed.left, bytes: BYTES }.row(first + i, &mut row);
            panel[4 * i..4 * i + 4].copy_from_slice(&scale.to_le_bytes());
            for (k, v) in row.chunks_exact(width).enumerate() {
                panel[SCALES + (k * ROWS + i) * width..][..width].copy_from_slice(v);
            }
            let turned = signed.row_signs(first + i);
            for c in (0..cols).filter(|c| turned[c / 8] >> (c % 8) & 1 == 1) {
                panel[head + 2 * c + i / 8] |= 1 << (i % 8);
            }
        }
    });
    (panels, Signs { rank, right: right.into(), scales: scales.into() })
}
