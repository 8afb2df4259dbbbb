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

impl Op for Quantize {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // Step by step over all blocks: within one, every step waits long for the one before.
        let meta = self.meta.cast::<[f32; META]>();
        // SAFETY: the maker has rows as long.
        unsafe {
            let mut b = 0;
            while b < self.blocks {
                let top = top(s, self.x.add(b * BLOCK));
                let inverse_top = if top < LEAST { 0.0 } else { 1.0 / top };
                meta.add(b).write_unaligned([top, inverse_top, 0.0, 0.0]);
                b += 1;
            }
            b = 0;
            while b < self.blocks {
                let [top, inverse_top, ..] = meta.add(b).read_unaligned();
                let level = level(s, self.x.add(b * BLOCK), inverse_top);
                meta.add(b).write_unaligned([top, inverse_top, level, 0.0]);
                b += 1;
            }
            b = 0;
            while b < self.blocks {
                let [top, inverse_top, level, _] = meta.add(b).read_unaligned();
                let known = (top, inverse_top, level);
                let m = block(s, self.x.add(b * BLOCK), self.codes.add(b * BLOCK), known, (self.zero, self.sixteens));
                meta.add(b).write_unaligned(m);
                b += 1;
            }
        }
    }
}

/// Levels that are tried.
const LEVELS: [f32; 4] = [127.0, 126.0, 125.0, 124.0];
/// What makes errors in steps comparable from one level to the next.
const SQUARED_STEPS: [f32; 4] = {
    let [a, b, c, d] = LEVELS;
    [1.0 / (a * a), 1.0 / (b * b), 1.0 / (c * c), 1.0 / (d * d)]
};
/// Added and taken off again, it leaves 512ths of a number below 1/2, whose products with 32 codes are summed without rounding.
const FINE: f32 = 1.5 * 16384.0;

/// The level under which the 32 values at `x`, the largest of which is `1 / inverse_top`, lose least; the highest of equals.
/// # Safety
/// `x` is readable for 32 values.
#[inline(always)]
unsafe fn level<S: Simd>(s: S, x: *const f32, inverse_top: f32) -> f32 {
    let mut lost = [s.splat(0.0); 4];
    let mut i = 0;
    while i < BLOCK {
        // SAFETY: as the caller promises.
        let x = unsafe { s.load(x.add(i)) };
        let mut j = 0;
        while j < 4 {
            let rest = s.rest(x, s.splat(LEVELS[j] * inverse_top));
            lost[j] = s.fma(rest, rest, lost[j]);
            j += 1;
        }
        i += S::LANES;
    }
    let lost = s.sum4(lost);
    // As whole numbers with the level's index below them: which is least cannot be foretold, and a wrong guess costs more than the search.
    let mut least = u64::MAX;
    let mut j = 0;
    while j < 4 {
        least = least.min(u64::from((lost[j] * SQUARED_STEPS[j]).to_bits()) << 2 | j as u64);
        j += 1;
    }
    LEVELS[(least & 3) as usize]
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

/// Quantizes a block, the largest magnitude of which is `top`, at `level`, and gives what belongs to it.
/// # Safety
/// Both pointers are good for 32 values.
#[inline(always)]
unsafe fn block<S: Simd>(
    s: S,
    x: *const f32,
    codes: *mut i8,
    (top, inverse_top, level): (f32, f32, f32),
    (zero, sixteens): (i32, bool),
) -> [f32; META] {
    let none = s.splat(0.0);
    // SAFETY: as the caller promises.
    unsafe {
        let (inverse, fine) = (s.splat(level * inverse_top), s.splat(FINE));
        let mut totals = [none; 2];
        let (mut squares, mut rests) = (none, none);
        let mut i = 0;
        while i < BLOCK {
            let exact = s.mul(s.load(x.add(i)), inverse);
            let v = s.round(exact);
            let rest = s.sub(s.add(s.sub(exact, v), fine), fine);
            let part = i / (BLOCK / 2);
            totals[part] = s.add(totals[part], v);
            squares = s.fma(v, v, squares);
            rests = s.fma(rest, v, rests);
            s.store_i8(codes.add(i), v);
            i += S::LANES;
        }
        // Exact in any order, and NaN where any value is not finite.
        let [first, second, squares, rests] = s.sum4([totals[0], totals[1], squares, rests]);
        let sum = first + second;
        if sum.is_nan() {
            codes.write_bytes(0, BLOCK);
            return [f32::NAN, 0.0, 0.0, f32::NAN];
        }
        // At least one code is +-124 or more, but where all are zeros.
        let scale = if top < LEAST { 0.0 } else { top / level * (1.0 + rests / squares) };
        let whole = sum as i32;
        if sixteens {
            let first = first as i32;
            return [
                scale,
                f32::from_bits((-zero * first) as u32),
                f32::from_bits((-zero * (whole - first)) as u32),
                0.0,
            ];
        }
        [scale, f32::from_bits((-zero * whole) as u32), f32::from_bits(whole as u32), scale * sum]
    }
}
