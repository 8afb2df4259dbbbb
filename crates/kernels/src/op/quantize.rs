//! Activations as signed bytes, each block of 32 columns of a row with a scale of its own.
//!
//! Codes are `x * L / max |x|` to the nearest, ties to even, where `L` is that of 127, 126, 125 and 124 under which the codes lose least: a step a
//! little wider than need be often meets a block's 32 values better, an eighth less error on the whole. The scale is then the one that suits the
//! codes best (least squares). A block whose largest magnitude is below 1e-30 becomes zeros. A block with a NaN or an infinity gets the scale
//! NaN, so that every result of its row is NaN. The same bits on every instruction set: what is summed are whole numbers below 2^24, or 512ths.

use crate::panel::BLOCK;
use crate::panel::ints::META;
use crate::simd::{Op, Simd};

/// Below this a block counts as zeros: its scale's inverse would leave the range of f32.
const LEAST: f32 = 1e-30;

/// Quantizes one row, padded with zeros to whole blocks.
pub(crate) struct Quantize {
    pub(crate) x: *const f32,
    pub(crate) blocks: usize,
    /// `[blocks * 32]`.
    pub(crate) codes: *mut i8,
    /// [`META`] numbers for each block.
    pub(crate) meta: *mut f32,
    /// The matrix's zero.
    pub(crate) zero: i32,
    /// Whether its blocks have two scales each.
    pub(crate) sixteens: bool,
}

/// Vectors of a group of blocks, one for each, by lanes: room for the most lanes.
type Group = [f32; 16];

impl Op for Quantize {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // A group of as many blocks as there are lanes, step by step: what a block's steps need of all its values is made for all blocks at once, a lane
        // each. One block alone would wait for every step.
        let mut sums = [[[0.0f32; 16]; 16]; 4];
        let mut b = 0;
        while b < self.blocks {
            // SAFETY: the maker has rows as long.
            unsafe { self.group(s, b, S::LANES.min(self.blocks - b), sums.as_mut_ptr().cast()) };
            b += S::LANES;
        }
    }
}

/// Levels that are tried.
const LEVELS: [f32; 4] = [127.0, 126.0, 125.0, 124.0];
/// Added and taken off again, it leaves 512ths of a number below 1/2, whose products with 32 codes are summed without rounding.
const FINE: f32 = 1.5 * 16384.0;

impl Quantize {
    /// Blocks `first..first + n`, at most as many as lanes; `sums` are four squares of lanes.
    /// # Safety
    /// The row has these blocks.
    #[inline(always)]
    unsafe fn group<S: Simd>(&self, s: S, first: usize, n: usize, sums: *mut f32) {
        let none = s.splat(0.0);
        // SAFETY: as the caller promises; a group has room for all lanes.
        unsafe {
            let x = self.x.add(first * BLOCK);
            let mut tops: Group = [0.0; 16];
            let mut b = 0;
            while b < n {
                tops[b] = top(s, x.add(b * BLOCK));
                b += 1;
            }
            let top = s.load(tops.as_ptr());
            let inverse = s.select_lt(top, s.splat(LEAST), none, s.div(s.splat(1.0), top));
            // The level under which a block loses least; the highest of equals.
            let mut inverses: [Group; 4] = [[0.0; 16]; 4];
            let mut j = 0;
            while j < 4 {
                s.store(inverses[j].as_mut_ptr(), s.mul(s.splat(LEVELS[j]), inverse));
                j += 1;
            }
            b = 0;
            while b < n {
                lost(s, x.add(b * BLOCK), [inverses[0][b], inverses[1][b], inverses[2][b], inverses[3][b]], sums, b);
                b += 1;
            }
            let (mut least, mut level) = (s.splat(f32::INFINITY), s.splat(LEVELS[0]));
            j = 0;
            while j < 4 {
                // Errors in steps, comparable from one level to the next.
                let steps = s.splat(1.0 / (LEVELS[j] * LEVELS[j]));
                let lost = s.mul(s.row_sums(square::<S>(sums, j)), steps);
                level = s.select_lt(lost, least, s.splat(LEVELS[j]), level);
                least = s.select_lt(lost, least, lost, least);
                j += 1;
            }
            s.store(inverses[0].as_mut_ptr(), s.mul(level, inverse));
            let codes = self.codes.add(first * BLOCK);
            b = 0;
            while b < n {
                round(s, x.add(b * BLOCK), codes.add(b * BLOCK), inverses[0][b], sums, b);
                b += 1;
            }
            let parts = [s.row_sums(square::<S>(sums, 0)), s.row_sums(square::<S>(sums, 1))];
            let (squares, rests) = (s.row_sums(square::<S>(sums, 2)), s.row_sums(square::<S>(sums, 3)));
            // Exact in any order, and NaN where any value is not finite.
            let sum = s.add(parts[0], parts[1]);
            // At least one code is +-124 or more, but where all are zeros.
            let scale = s.mul(s.div(top, level), s.add(s.splat(1.0), s.div(rests, squares)));
            let scale = s.select_lt(top, s.splat(LEAST), none, scale);
            let mut all: [Group; 4] = [[0.0; 16]; 4];
            for (group, v) in all.iter_mut().zip([scale, parts[0], sum, s.mul(scale, sum)]) {
                s.store(group.as_mut_ptr(), v);
            }
            let meta = self.meta.cast::<[f32; META]>().add(first);
            b = 0;
            while b < n {
                let [scale, part, sum, scaled] = [all[0][b], all[1][b], all[2][b], all[3][b]];
                meta.add(b).write_unaligned(if sum.is_nan() {
                    codes.add(b * BLOCK).write_bytes(0, BLOCK);
                    [f32::NAN, 0.0, 0.0, f32::NAN]
                } else {
                    // Whole numbers of at most 32 * 127.
                    let (part, whole) = (part.to_int_unchecked::<i32>(), sum.to_int_unchecked::<i32>());
                    let bias = |sum: i32| f32::from_bits((-self.zero * sum) as u32);
                    if self.sixteens {
                        [scale, bias(part), bias(whole - part), 0.0]
                    } else {
                        [scale, bias(whole), f32::from_bits(whole as u32), scaled]
                    }
                });
                b += 1;
            }
        }
    }
}

/// Square `j` of lanes.
#[inline(always)]
fn square<S: Simd>(sums: *mut f32, j: usize) -> *mut f32 {
    sums.wrapping_add(j * S::LANES * S::LANES)
}

/// Squares of what the 32 values at `x` lose when they are rounded in steps of each of these inverses: partial sums, to row `b` of the four squares.
/// # Safety
/// `x` is readable for 32 values, the squares have that row.
#[inline(always)]
unsafe fn lost<S: Simd>(s: S, x: *const f32, inverses: [f32; 4], sums: *mut f32, b: usize) {
    let mut lost = [s.splat(0.0); 4];
    let mut i = 0;
    while i < BLOCK {
        // SAFETY: as the caller promises.
        let x = unsafe { s.load(x.add(i)) };
        let mut j = 0;
        while j < 4 {
            let rest = s.rest(x, s.splat(inverses[j]));
            lost[j] = s.fma(rest, rest, lost[j]);
            j += 1;
        }
        i += S::LANES;
    }
    let mut j = 0;
    while j < 4 {
        // SAFETY: as the caller promises.
        unsafe { s.store(square::<S>(sums, j).add(b * S::LANES), lost[j]) };
        j += 1;
    }
}

/// The largest magnitude of a block.
/// # Safety
/// `x` is readable for 32 values.
#[inline(always)]
unsafe fn top<S: Simd>(s: S, x: *const f32) -> f32 {
    let none = s.splat(0.0);
    let mut top = none;
    let mut i = 0;
    while i < BLOCK {
        // SAFETY: as the caller promises.
        let v = unsafe { s.load(x.add(i)) };
        top = s.max(s.max(v, s.sub(none, v)), top);
        i += S::LANES;
    }
    s.top(top)
}

/// Codes of the 32 values at `x` times `inverse`; partial sums of the first and last sixteen codes, of their squares, and of what rounding took off
/// times the code, to row `b` of the four squares.
/// # Safety
/// Both pointers are good for 32 values, the squares have that row.
#[inline(always)]
unsafe fn round<S: Simd>(s: S, x: *const f32, codes: *mut i8, inverse: f32, sums: *mut f32, b: usize) {
    let (inverse, fine) = (s.splat(inverse), s.splat(FINE));
    let mut all = [s.splat(0.0); 4];
    let mut i = 0;
    // SAFETY: as the caller promises.
    unsafe {
        while i < BLOCK {
            let exact = s.mul(s.load(x.add(i)), inverse);
            let v = s.round(exact);
            let rest = s.sub(s.add(s.sub(exact, v), fine), fine);
            let part = i / (BLOCK / 2);
            all[part] = s.add(all[part], v);
            all[2] = s.fma(v, v, all[2]);
            all[3] = s.fma(rest, v, all[3]);
            s.store_i8(codes.add(i), v);
            i += S::LANES;
        }
        let mut j = 0;
        while j < 4 {
            s.store(square::<S>(sums, j).add(b * S::LANES), all[j]);
            j += 1;
        }
    }
}
