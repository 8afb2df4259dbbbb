//! Products with lists of entries: what lies outside of every pattern, a percent of a matrix or so.

use super::matmul::Out;
use crate::panel::float::Width;
use crate::panel::slices::{HEAD, Lists, NAMES, NONE};
use crate::panel::{BLOCK, ROWS};
use crate::simd::{Op, Simd};

/// Panels `from..to` times all rows of x. Every output is one chain of fused operations over its own list.
pub(crate) struct Sparse<'a, W> {
    pub(crate) lists: &'a Lists,
    pub(crate) _width: W,
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// Padded with zeros to whole blocks and one more zero, `blocks * 32 + 1` apart.
    pub(crate) x: *const f32,
    pub(crate) rows: usize,
    pub(crate) out: Out,
}

impl<W: Width> Op for Sparse<'_, W> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if self.lists.wide { self.all::<S, 4>(s) } else { self.all::<S, 2>(s) }
    }
}

impl<W: Width> Sparse<'_, W> {
    /// With columns of so many bytes.
    #[inline(always)]
    fn all<S: Simd, const COLUMN: usize>(self, s: S) {
        let (cols, entry) = (self.lists.blocks * BLOCK + 1, ROWS * (COLUMN + W::BYTES));
        let mut p = self.from;
        while p < self.to {
            let panel = self.lists.at(p);
            // SAFETY: the maker has these panels, and room in `out` for the rows they name; columns are below `cols`.
            unsafe {
                let length = panel.cast::<u32>().read_unaligned() as usize;
                let names = panel.add(NAMES).cast::<u32>();
                let mut r = 0;
                while r < self.rows {
                    let x = self.x.add(r * cols);
                    let (mut acc, mut i) = ([s.splat(0.0); 2], 0);
                    while i < length {
                        let place = panel.add(HEAD + i * entry);
                        let mut h = 0;
                        while h < ROWS / S::LANES {
                            let columns = place.add(COLUMN * h * S::LANES);
                            let columns = if COLUMN == 4 { s.load_i(columns) } else { s.widen_words(columns) };
                            let w = W::lanes(s, place.add(COLUMN * ROWS + h * S::LANES * W::BYTES));
                            // More than 16 columns: the table is read where it lies.
                            acc[h] = s.fma(s.lookup(x, cols, columns), w, acc[h]);
                            h += 1;
                        }
                        i += 1;
                    }
                    let mut all = [0.0f32; ROWS];
                    let mut h = 0;
                    while h < ROWS / S::LANES {
                        s.store(all.as_mut_ptr().add(h * S::LANES), acc[h]);
                        h += 1;
                    }
                    let out = self.out.data.add(r * self.out.stride);
                    let mut i = 0;
                    while i < ROWS && names.add(i).read_unaligned() != NONE {
                        let out = out.add(names.add(i).read_unaligned() as usize);
                        *out = if self.out.add { *out + all[i] } else { all[i] };
                        i += 1;
                    }
                    r += 1;
                }
            }
            p += 1;
        }
    }
}
