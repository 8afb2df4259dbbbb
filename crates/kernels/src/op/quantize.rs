//! Activations as signed bytes, each block of 32 columns of a row with a scale of its own.
//!
//! `scale = max |x| / 127`, codes to the nearest, ties to even; a block whose largest magnitude is below 1e-30 becomes zeros. A block with a
//! NaN or an infinity gets the scale NaN, so that every result of its row is NaN. The same bits on every instruction set.

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
        let mut b = 0;
        while b < self.blocks {
            // SAFETY: the maker has rows as long.
            unsafe {
                let m = block(s, self.x.add(b * BLOCK), self.codes.add(b * BLOCK), self.zero, self.sixteens);
                self.meta.add(b * META).cast::<[f32; META]>().write_unaligned(m);
            }
            b += 1;
        }
    }
}

/// Quantizes a block and gives what belongs to it.
/// # Safety
/// Both pointers are good for 32 values.
#[inline(always)]
unsafe fn block<S: Simd>(s: S, x: *const f32, codes: *mut i8, zero: i32, sixteens: bool) -> [f32; META] {
    let none = s.splat(0.0);
    let mut top = none;
    // SAFETY: as the caller promises.
    unsafe {
        let mut i = 0;
        while i < BLOCK {
            let v = s.load(x.add(i));
            top = s.max(s.max(v, s.sub(none, v)), top);
            i += S::LANES;
        }
        let top = s.top(top);
        let scale = top / 127.0;
        let inverse = s.splat(if top < LEAST { 0.0 } else { 127.0 / top });
        let mut totals = [none; 2];
        let mut i = 0;
        while i < BLOCK {
            let v = s.round(s.mul(s.load(x.add(i)), inverse));
            let part = i / (BLOCK / 2);
            totals[part] = s.add(totals[part], v);
            s.store_i8(codes.add(i), v);
            i += S::LANES;
        }
        // Whole numbers below 2^24: exact in any order, and NaN where any value is not finite.
        let sum = s.sum(s.add(totals[0], totals[1]));
        if sum.is_nan() {
            codes.write_bytes(0, BLOCK);
            return [f32::NAN, 0.0, 0.0, f32::NAN];
        }
        let scale = if top < LEAST { 0.0 } else { scale };
        let whole = sum as i32;
        if sixteens {
            let first = s.sum(totals[0]) as i32;
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
