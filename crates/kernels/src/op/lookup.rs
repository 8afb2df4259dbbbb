//! Products with codes whose rows have tables of their own ([`crate::panel::rowtables`]).
//!
//! Every output has one chain of fused operations a lane, columns rising a vector at a time, and the lanes are added in
//! a fixed tree in the end: the same bits for one row of x, whose weights are used as they are decoded, and for many,
//! for which four rows of weights are decoded first.

use super::matmul::Out;
use crate::panel::ints::octet;
use crate::panel::rowtables::{SIDE, STEP, head};
use crate::panel::{ROWS, View, fetch_far};
use crate::simd::{Op, Simd};

/// Scratch of [`Lookups`] for several rows of x, in f32 values: four decoded rows.
pub(crate) fn scratch(steps: usize) -> usize {
    SIDE * steps * STEP
}

/// Panels `from..to` times all rows of x.
pub(crate) struct Lookups<'a, const BITS: usize> {
    pub(crate) panels: View,
    /// Whether tables are f16.
    pub(crate) half: bool,
    /// Blocks of 128 columns.
    pub(crate) steps: usize,
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// Padded with zeros to whole blocks, `steps * 128` apart.
    pub(crate) x: *const f32,
    pub(crate) rows: usize,
    pub(crate) out: Out,
    /// For several rows of x.
    pub(crate) scratch: &'a mut [f32],
}

/// Four rows of a panel: their tables, and their codes block by block.
struct Four {
    tables: [[f32; 16]; SIDE],
    codes: *const u8,
}

/// Bytes from the codes that are multiplied to those that are prefetched meanwhile.
const PREFETCH: usize = 4096;

impl<const BITS: usize> Op for Lookups<'_, BITS> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        assert!(self.rows == 1 || self.scratch.len() >= scratch(self.steps), "room for four rows");
        let w = self.scratch.as_mut_ptr();
        let mut p = self.from;
        while p < self.to {
            let panel = self.panels.at(p);
            let mut q = 0;
            while q < ROWS / SIDE && p * ROWS + q * SIDE < self.panels.rows {
                // SAFETY: the maker has these panels and rows, and room in `out` and the scratch.
                unsafe {
                    let four = four::<S, BITS>(s, panel, self.half, q, self.steps);
                    let have = SIDE.min(self.panels.rows - p * ROWS - q * SIDE);
                    let out = self.out.beside(p * ROWS + q * SIDE);
                    if self.rows == 1 {
                        single::<S, BITS>(s, &four, self.steps, self.x, have, out);
                    } else {
                        decode::<S, BITS>(s, &four, self.steps, w);
                        many(s, w, self.steps * STEP, (self.x, self.rows), have, out);
                    }
                }
                q += 1;
            }
            p += 1;
        }
    }
}

/// # Safety
/// `panel` is a whole panel of so many blocks, and has rows `4 * q` on.
#[inline(always)]
unsafe fn four<S: Simd, const BITS: usize>(s: S, panel: *const u8, half: bool, q: usize, steps: usize) -> Four {
    let (mut tables, width) = ([[0.0f32; 16]; SIDE], if half { 2 } else { 4 });
    let mut i = 0;
    while i < SIDE {
        // SAFETY: as the caller promises; after a table of 8 entries there is the next one, or codes.
        unsafe {
            let from = panel.add(((q * SIDE + i) << BITS) * width);
            let mut c = 0;
            while c < 1 << BITS {
                let v = if half { s.load_f16(from.add(2 * c)) } else { s.load(from.add(4 * c).cast()) };
                s.store(tables[i].as_mut_ptr().add(c), v);
                c += S::LANES;
            }
        }
        i += 1;
    }
    Four { tables, codes: panel.wrapping_add(head(BITS, half) + q * steps * 64 * BITS) }
}

/// Columns `16 * j..` of row `i` of a block whose codes came out of [`octet`], half `h` of the lanes.
macro_rules! weights {
    ($s:expr, $four:expr, $codes:expr, $i:expr, $j:expr, $h:expr) => {
        $s.lookup($four.tables[$i].as_ptr(), 1 << BITS, $s.byte($codes[$h][$j / 4], $j % 4))
    };
}

/// The codes of row `i` of the block at `block`, for each half of the lanes.
/// # Safety
/// The block is there.
#[inline(always)]
unsafe fn codes<S: Simd, const BITS: usize>(s: S, block: *const u8, i: usize) -> [[S::I; 2]; 2] {
    // SAFETY: as the caller promises.
    unsafe {
        let first = octet::<S, BITS>(s, block, i);
        [first, if S::LANES == 16 { first } else { octet::<S, BITS>(s, block.add(32), i) }]
    }
}

/// Four rows times one row of x.
/// # Safety
/// As [`Lookups`] promises.
#[inline(always)]
unsafe fn single<S: Simd, const BITS: usize>(s: S, four: &Four, steps: usize, x: *const f32, have: usize, out: Out) {
    let mut acc = [s.splat(0.0); SIDE];
    let mut b = 0;
    while b < steps {
        // SAFETY: as the caller promises; codes are below the tables' length.
        unsafe {
            let (block, x) = (four.codes.add(b * 64 * BITS), x.add(b * STEP));
            let mut i = 0;
            while i < SIDE {
                if i < BITS {
                    fetch_far(block.wrapping_add(PREFETCH + 64 * i));
                }
                let codes = codes::<S, BITS>(s, block, i);
                let mut j = 0;
                while j < 8 {
                    let mut h = 0;
                    while h < 16 / S::LANES {
                        let w = weights!(s, four, codes, i, j, h);
                        acc[i] = s.fma(s.load(x.add(16 * j + h * S::LANES)), w, acc[i]);
                        h += 1;
                    }
                    j += 1;
                }
                i += 1;
            }
        }
        b += 1;
    }
    let mut i = 0;
    while i < have {
        // SAFETY: as the caller promises.
        unsafe { put(out, 0, i, s.sum(acc[i])) };
        i += 1;
    }
}

/// Four rows to f32, each whole.
/// # Safety
/// There is room for them.
#[inline(always)]
unsafe fn decode<S: Simd, const BITS: usize>(s: S, four: &Four, steps: usize, w: *mut f32) {
    let mut b = 0;
    while b < steps {
        let mut i = 0;
        while i < SIDE {
            // SAFETY: as the caller promises.
            unsafe {
                let codes = codes::<S, BITS>(s, four.codes.add(b * 64 * BITS), i);
                let to = w.add((i * steps + b) * STEP);
                let mut j = 0;
                while j < 8 {
                    let mut h = 0;
                    while h < 16 / S::LANES {
                        s.store(to.add(16 * j + h * S::LANES), weights!(s, four, codes, i, j, h));
                        h += 1;
                    }
                    j += 1;
                }
            }
            i += 1;
        }
        b += 1;
    }
}

/// Four decoded rows of `cols` columns times rows of x as long.
/// # Safety
/// All are there, and room in `out`.
#[inline(always)]
unsafe fn many<S: Simd>(s: S, w: *const f32, cols: usize, (x, rows): (*const f32, usize), have: usize, out: Out) {
    let mut r = 0;
    while r < rows {
        let left = rows - r;
        // SAFETY: as the caller promises.
        unsafe {
            r += if left >= 6 && S::LANES == 16 {
                tile::<S, 6>(s, w, cols, x.add(r * cols), have, out.below(r))
            } else if left >= 2 {
                tile::<S, 2>(s, w, cols, x.add(r * cols), have, out.below(r))
            } else {
                tile::<S, 1>(s, w, cols, x.add(r * cols), have, out.below(r))
            };
        }
    }
}

/// `M` rows of x; gives how many.
/// # Safety
/// As for [`many`].
#[inline(always)]
unsafe fn tile<S: Simd, const M: usize>(
    s: S,
    w: *const f32,
    cols: usize,
    x: *const f32,
    have: usize,
    out: Out,
) -> usize {
    let mut acc = [[s.splat(0.0); SIDE]; M];
    let mut c = 0;
    while c < cols {
        // SAFETY: as the caller promises.
        unsafe {
            let mut v = [s.splat(0.0); SIDE];
            let mut i = 0;
            while i < SIDE {
                v[i] = s.load(w.add(i * cols + c));
                i += 1;
            }
            let mut m = 0;
            while m < M {
                let x = s.load(x.add(m * cols + c));
                let mut i = 0;
                while i < SIDE {
                    acc[m][i] = s.fma(x, v[i], acc[m][i]);
                    i += 1;
                }
                m += 1;
            }
        }
        c += S::LANES;
    }
    let mut m = 0;
    while m < M {
        let mut i = 0;
        while i < have {
            // SAFETY: as the caller promises.
            unsafe { put(out, m, i, s.sum(acc[m][i])) };
            i += 1;
        }
        m += 1;
    }
    M
}

/// # Safety
/// The output is there.
#[inline(always)]
unsafe fn put(out: Out, r: usize, i: usize, v: f32) {
    // SAFETY: as the caller promises.
    unsafe {
        let at = out.data.add(r * out.stride + i);
        *at = if out.add { *at + v } else { v };
    }
}
