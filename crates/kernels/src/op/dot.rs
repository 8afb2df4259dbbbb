//! The integer product: quantized rows of `x` times panels of codes.
//!
//! A block of 32 columns is summed exactly, in integers; then `acc = fma(sum, weight's scale * activation's scale, acc)`, blocks in rising
//! order. Every instruction set gives the same bits, and so does any number of rows.

use super::matmul::Out;
use crate::panel::ints::{Bytes, META};
use crate::panel::{BLOCK, ROWS, View};
use crate::simd::{Op, Simd};

/// Quantized rows, see [`super::quantize`], with [`SPARE`] rows of anything after the last.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) codes: *const i8,
    pub(crate) meta: *const f32,
    pub(crate) rows: usize,
}

// SAFETY: only read.
unsafe impl Send for Rows {}
// SAFETY: see above.
unsafe impl Sync for Rows {}

/// Panels `from..to` times all rows.
pub(crate) struct Dots<'a, C> {
    pub(crate) panels: View,
    pub(crate) codec: &'a C,
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) x: Rows,
    pub(crate) out: Out,
}

/// Rows that may be read beyond the last.
pub(crate) const SPARE: usize = 7;

/// Bytes of quantized rows that should stay near while panels pass by.
const NEAR: usize = 192 << 10;

impl<C: Bytes> Op for Dots<'_, C> {
    type Out = ();
    const INTEGER: bool = true;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cols = self.panels.blocks * BLOCK;
        let chunk = (NEAR / cols.max(1)).next_multiple_of(8).max(8);
        let mut first = 0;
        while first < self.x.rows {
            let end = (first + chunk).min(self.x.rows);
            let mut p = self.from;
            while p < self.to {
                let mut r = first;
                // SAFETY: the maker has these panels and rows, and room in `out`.
                unsafe {
                    // Rows beyond the last are computed from whatever is there, and not written.
                    while r < end {
                        r += match end - r {
                            1 => rows::<S, C, 1>(s, &self, p, r, 1),
                            n if n > 4 && S::LANES == 16 => rows::<S, C, 8>(s, &self, p, r, n.min(8)),
                            n => rows::<S, C, 4>(s, &self, p, r, n.min(4)),
                        };
                    }
                }
                p += 1;
            }
            first = end;
        }
    }
}

/// Panel `p` times rows `r..r + M`, of which the first `have` are written; gives `have`.
/// # Safety
/// They are there.
#[inline(always)]
unsafe fn rows<S: Simd, C: Bytes, const M: usize>(s: S, g: &Dots<'_, C>, p: usize, r: usize, have: usize) -> usize {
    let (panel, blocks) = (g.panels.at(p), g.panels.blocks);
    let mut out = [[s.splat(0.0); 2]; M];
    let mut h = 0;
    while h < ROWS / S::LANES {
        let mut acc = [s.splat(0.0); M];
        let mut b = 0;
        while b < blocks {
            // SAFETY: as the caller promises.
            unsafe {
                let x = g.x.codes.add((r * blocks + b) * BLOCK);
                let meta = g.x.meta.add((r * blocks + b) * META);
                let mut sum = [s.splat_i(0); M];
                let mut m = 0;
                while m < M {
                    sum[m] = s.spread_i::<false>(meta.add(m * blocks * META + 1).cast());
                    m += 1;
                }
                let mut o = 0;
                while o < BLOCK / 8 {
                    let codes = g.codec.octet(s, panel, b, o, h);
                    let mut m = 0;
                    while m < M {
                        sum[m] = s.dot8::<false>(C::BITS, sum[m], codes, x.add(m * blocks * BLOCK + 8 * o));
                        m += 1;
                    }
                    o += 1;
                }
                let shared = g.codec.shared(s, panel, b, h);
                let mut m = 0;
                while m < M {
                    acc[m] = g.codec.close::<S, false>(s, &shared, sum[m], meta.add(m * blocks * META), acc[m]);
                    m += 1;
                }
            }
            b += 1;
        }
        let mut m = 0;
        while m < M {
            out[m][h] = acc[m];
            m += 1;
        }
        h += 1;
    }
    let mut m = 0;
    while m < M && m < have {
        // SAFETY: as the caller promises.
        unsafe { g.out.put(s, r + m, p, g.panels.rows, out[m]) };
        m += 1;
    }
    have
}
