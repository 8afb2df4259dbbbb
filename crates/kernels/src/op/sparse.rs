//! Products with lists of entries: what lies outside of every pattern, a percent of a matrix or so.

use super::matmul::Out;
use crate::panel::float::Width;
use crate::panel::slices::HEAD;
use crate::panel::{BLOCK, ROWS, View};
use crate::simd::{Op, Simd};

/// Panels `from..to` times all rows of x. Every output is one chain of fused operations over its own list.
pub(crate) struct Sparse<W> {
    pub(crate) panels: View,
    pub(crate) _width: W,
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// Padded with zeros to whole blocks and one more zero, `blocks * 32 + 1` apart.
    pub(crate) x: *const f32,
    pub(crate) rows: usize,
    pub(crate) out: Out,
}

impl<W: Width> Op for Sparse<W> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (cols, entry) = (self.panels.blocks * BLOCK + 1, ROWS * (4 + W::BYTES));
        let mut p = self.from;
        while p < self.to {
            let panel = self.panels.at(p);
            // SAFETY: the maker has these panels and rows, and room in `out`; columns are below `cols`.
            unsafe {
                let length = panel.cast::<u32>().read_unaligned() as usize;
                let mut r = 0;
                while r < self.rows {
                    let x = self.x.add(r * cols);
                    let (mut acc, mut i) = ([s.splat(0.0); 2], 0);
                    while i < length {
                        let place = panel.add(HEAD + i * entry);
                        let mut h = 0;
                        while h < ROWS / S::LANES {
                            let columns = s.load_i(place.add(4 * h * S::LANES));
                            let w = W::lanes(s, place.add(4 * ROWS + h * S::LANES * W::BYTES));
                            // More than 16 columns: the table is read where it lies.
                            acc[h] = s.fma(s.lookup(x, cols, columns), w, acc[h]);
                            h += 1;
                        }
                        i += 1;
                    }
                    self.out.put(s, r, p, self.panels.rows, acc);
                    r += 1;
                }
            }
            p += 1;
        }
    }
}
