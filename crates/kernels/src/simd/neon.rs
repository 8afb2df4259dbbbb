//! NEON: eight lanes in two registers, of which AArch64 has twice as many as AVX2 has of its own. With dot products of
//! bytes (`sdot`) and products of matrices of bytes (`usmmla`) where the processor has them.
//!
//! The last two, and conversions of f16, are instructions in words: compilers have their functions, but not yet for
//! everybody.

use std::arch::aarch64::*;

use parts::*;

use super::masks::{COMPRESS, EXPAND, EXPAND_PAIRS};
use super::{Op, Simd};
use crate::Isa;

/// Nothing beyond NEON.
const PLAIN: u8 = 0;
/// Dot products of signed bytes.
const DOT: u8 = 1;
/// Dot products and products of matrices of unsigned and signed bytes, too.
const I8MM: u8 = 2;

/// Proof that the processor has NEON and `MORE`: made by [`run`], [`run_dot`] and [`run_i8mm`] alone.
#[derive(Clone, Copy)]
pub(crate) struct Neon<const MORE: u8>(());

/// Runs `op` with the instructions of [`Isa::Neon`] enabled.
pub(crate) fn run<O: Op>(op: O) -> O::Out {
    #[target_feature(enable = "neon")]
    fn inner<O: Op>(op: O, s: Neon<PLAIN>) -> O::Out {
        op.run(s)
    }
    assert!(Isa::Neon.available(), "this processor has no NEON");
    // SAFETY: the feature was just checked.
    unsafe { inner(op, Neon(())) }
}

/// Runs `op` with the instructions of [`Isa::NeonDot`] enabled.
pub(crate) fn run_dot<O: Op>(op: O) -> O::Out {
    #[target_feature(enable = "neon,dotprod")]
    fn inner<O: Op>(op: O, s: Neon<DOT>) -> O::Out {
        op.run(s)
    }
    assert!(Isa::NeonDot.available(), "this processor has no dot products of bytes");
    // SAFETY: the features were just checked.
    unsafe { inner(op, Neon(())) }
}

/// Runs `op` with the instructions of [`Isa::NeonI8mm`] enabled.
pub(crate) fn run_i8mm<O: Op>(op: O) -> O::Out {
    #[target_feature(enable = "neon,dotprod,i8mm")]
    fn inner<O: Op>(op: O, s: Neon<I8MM>) -> O::Out {
        op.run(s)
    }
    assert!(Isa::NeonI8mm.available(), "this processor has no products of matrices of bytes");
    // SAFETY: the features were just checked.
    unsafe { inner(op, Neon(())) }
}

/// What comes of each index, one after the other. No closures: they would be compiled without what the processor has
/// beyond NEON.
macro_rules! each {
    ($i:ident in $($n:literal)* => $e:expr) => {
        [$({
            let $i = $n;
            $e
        }),*]
    };
}

/// Both registers.
macro_rules! both {
    ($i:ident => $e:expr) => { each!($i in 0 1 => $e) };
}

/// All four registers of words.
macro_rules! four {
    ($i:ident => $e:expr) => { each!($i in 0 1 2 3 => $e) };
}

// Below the macros, which it uses.
mod parts;

/// A shift by what is known only when it inlines, as one that is known.
macro_rules! shift {
    ($f:ident, $a:expr, $n:expr, $($k:literal)*) => {
        match $n {
            $($k => $f::<$k>($a),)*
            _ => $a,
        }
    };
}

type V = [float32x4_t; 2];
type I = [uint32x4_t; 2];
/// 32 words in their order.
type W = [int16x8_t; 4];

// SAFETY, for every block below: the token proves the instructions exist, and pointers are good for as many values as
// the trait asks.
impl<const MORE: u8> Simd for Neon<MORE> {
    const LANES: usize = 8;
    type V = V;
    type I = I;
    type W = W;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        // SAFETY: see above.
        unsafe { [vdupq_n_f32(x); 2] }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> V {
        // SAFETY: see above.
        unsafe { [vld1q_f32(p), vld1q_f32(p.add(4))] }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: V) {
        // SAFETY: see above.
        unsafe {
            vst1q_f32(p, v[0]);
            vst1q_f32(p.add(4), v[1]);
        }
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        // SAFETY: see above.
        unsafe { both!(i => vfmaq_f32(c[i], a[i], b[i])) }
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        // SAFETY: see above.
        unsafe { both!(i => vaddq_f32(a[i], b[i])) }
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        // SAFETY: see above.
        unsafe { both!(i => vsubq_f32(a[i], b[i])) }
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        // SAFETY: see above.
        unsafe { both!(i => vmulq_f32(a[i], b[i])) }
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        // SAFETY: see above.
        unsafe { both!(i => vdivq_f32(a[i], b[i])) }
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        // SAFETY: see above.
        unsafe {
            // The processor's own gives a NaN, wherever it stands.
            both!(i => vbslq_f32(vcgtq_f32(a[i], b[i]), a[i], b[i]))
        }
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        // SAFETY: see above.
        unsafe { both!(i => vbslq_f32(vcltq_f32(a[i], b[i]), a[i], b[i])) }
    }
    #[inline(always)]
    fn select_lt(self, a: V, b: V, x: V, y: V) -> V {
        // SAFETY: see above.
        unsafe { both!(i => vbslq_f32(vcltq_f32(a[i], b[i]), x[i], y[i])) }
    }
    #[inline(always)]
    fn round(self, a: V) -> V {
        // SAFETY: see above.
        unsafe { both!(i => vrndnq_f32(a[i])) }
    }
    #[inline(always)]
    fn pow2(self, a: V) -> V {
        // SAFETY: see above.
        unsafe {
            both!(i => vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(vcvtq_s32_f32(a[i]), vdupq_n_s32(127)))))
        }
    }
    #[inline(always)]
    fn sum(self, v: V) -> f32 {
        // SAFETY: see above.
        unsafe {
            let v = vaddq_f32(v[0], v[1]);
            // The same tree as elsewhere: neighbours first.
            vpadds_f32(vpadd_f32(vget_low_f32(v), vget_high_f32(v)))
        }
    }
    #[inline(always)]
    unsafe fn row_sums(self, p: *const f32) -> V {
        // SAFETY: see above.
        unsafe { both!(i => four_sums(p.add(32 * i))) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> V {
        // SAFETY: see above.
        unsafe { from_f16(vld1q_u8(p)) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> V {
        // SAFETY: see above.
        unsafe {
            let v = vreinterpretq_u16_u8(vld1q_u8(p));
            [
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(v))),
                vreinterpretq_f32_u32(vshll_high_n_u16::<16>(v)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> V {
        // SAFETY: see above.
        unsafe {
            let v = vmovl_s8(vld1_s8(p));
            [vcvtq_f32_s32(vmovl_s16(vget_low_s16(v))), vcvtq_f32_s32(vmovl_high_s16(v))]
        }
    }
    #[inline(always)]
    fn fused(self, a: V, b: V, c: V) -> V {
        self.fma(a, b, c)
    }
    #[inline(always)]
    fn top(self, a: V) -> f32 {
        // SAFETY: see above.
        unsafe { vmaxvq_f32(vmaxq_f32(a[0], a[1])) }
    }
    #[inline(always)]
    fn compress(self, a: V, mask: u32) -> V {
        // SAFETY: see above; the table has a row for every byte.
        unsafe {
            let row = vld1_u8(COMPRESS[(mask & 255) as usize].as_ptr());
            let table = uint8x16x2_t(vreinterpretq_u8_f32(a[0]), vreinterpretq_u8_f32(a[1]));
            both!(i => vreinterpretq_f32_u8(vqtbl2q_u8(table, lanes_of(row)[i])))
        }
    }
    #[inline(always)]
    fn flip(self, a: V, mask: u32) -> V {
        // SAFETY: see above; four values.
        unsafe {
            // Bit `i` goes to the top of lane `i`.
            static UP: [[i32; 4]; 2] = [[31, 30, 29, 28], [27, 26, 25, 24]];
            both!(i => {
                let up = vshlq_u32(vdupq_n_u32(mask), vld1q_s32(UP[i].as_ptr()));
                let sign = vandq_u32(up, vdupq_n_u32(1 << 31));
                vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(a[i]), sign))
            })
        }
    }
    #[inline(always)]
    fn interleave(self, a: V, b: V) -> [V; 2] {
        // SAFETY: see above.
        unsafe { both!(i => [vzip1q_f32(a[i], b[i]), vzip2q_f32(a[i], b[i])]) }
    }
    #[inline(always)]
    unsafe fn keep(self, x: *const i8, mask: u32, out: *mut i8) {
        // SAFETY: see above.
        unsafe { keep(x, mask, out) }
    }
    #[inline(always)]
    unsafe fn turns(self, a: *const i8, b: *const i8, out: *mut i8) {
        // SAFETY: see above.
        unsafe {
            let [a, b] = [self.load_i(a.cast()), self.load_i(b.cast())];
            let mut i = 0;
            while i < 2 {
                vst1q_u8(out.add(32 * i).cast(), vreinterpretq_u8_u32(vzip1q_u32(a[i], b[i])));
                vst1q_u8(out.add(32 * i + 16).cast(), vreinterpretq_u8_u32(vzip2q_u32(a[i], b[i])));
                i += 1;
            }
        }
    }
    #[inline(always)]
    unsafe fn expand_f16(self, p: *const u8, mask: u32) -> V {
        // SAFETY: see above; the table has a row for every byte.
        unsafe { from_f16(vqtbl1q_u8(vld1q_u8(p), vld1q_u8(EXPAND_PAIRS[(mask & 255) as usize].as_ptr()))) }
    }
    #[inline(always)]
    unsafe fn expand_f32(self, p: *const u8, mask: u32) -> V {
        // SAFETY: see above; the table has a row for every byte.
        unsafe {
            let row = vld1_u8(EXPAND[(mask & 255) as usize].as_ptr());
            let table = uint8x16x2_t(vld1q_u8(p), vld1q_u8(p.add(16)));
            both!(i => vreinterpretq_f32_u8(vqtbl2q_u8(table, lanes_of(row)[i])))
        }
    }
    #[inline(always)]
    unsafe fn spread<const PAIR: bool>(self, p: *const f32) -> V {
        // SAFETY: see above.
        unsafe {
            if PAIR {
                [vreinterpretq_f32_u64(vdupq_n_u64(p.cast::<u64>().read_unaligned())); 2]
            } else {
                self.splat(*p)
            }
        }
    }
    #[inline(always)]
    unsafe fn lookup(self, table: *const f32, n: usize, index: I) -> V {
        // SAFETY: see above.
        unsafe { both!(i => lookup(table, n, index[i])) }
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> I {
        // SAFETY: see above.
        unsafe { [vdupq_n_u32(x as u32); 2] }
    }
    #[inline(always)]
    unsafe fn spread_i<const PAIR: bool>(self, p: *const i32) -> I {
        // SAFETY: see above.
        unsafe {
            if PAIR {
                [vreinterpretq_u32_u64(vdupq_n_u64(p.cast::<u64>().read_unaligned())); 2]
            } else {
                [vdupq_n_u32(p.cast::<u32>().read_unaligned()); 2]
            }
        }
    }
    #[inline(always)]
    unsafe fn load_i(self, p: *const u8) -> I {
        // SAFETY: see above.
        unsafe { both!(i => vreinterpretq_u32_u8(vld1q_u8(p.add(16 * i)))) }
    }
    #[inline(always)]
    unsafe fn store_i(self, p: *mut u8, a: I) {
        // SAFETY: see above.
        unsafe {
            vst1q_u8(p, vreinterpretq_u8_u32(a[0]));
            vst1q_u8(p.add(16), vreinterpretq_u8_u32(a[1]));
        }
    }
    #[inline(always)]
    unsafe fn widen(self, p: *const u8) -> I {
        // SAFETY: see above.
        unsafe {
            let v = vmovl_u8(vld1_u8(p));
            [vmovl_u16(vget_low_u16(v)), vmovl_high_u16(v)]
        }
    }
    #[inline(always)]
    unsafe fn widen_words(self, p: *const u8) -> I {
        // SAFETY: see above.
        unsafe {
            let v = vreinterpretq_u16_u8(vld1q_u8(p));
            [vmovl_u16(vget_low_u16(v)), vmovl_high_u16(v)]
        }
    }
    #[inline(always)]
    fn and_i(self, a: I, byte: u8) -> I {
        // SAFETY: see above.
        unsafe { both!(i => vandq_u32(a[i], vreinterpretq_u32_u8(vdupq_n_u8(byte)))) }
    }
    #[inline(always)]
    fn or_i(self, a: I, b: I) -> I {
        // SAFETY: see above.
        unsafe { both!(i => vorrq_u32(a[i], b[i])) }
    }
    #[inline(always)]
    fn shr_i(self, a: I, n: u32) -> I {
        // SAFETY: see above.
        unsafe {
            both!(i => {
                let a = vreinterpretq_u16_u32(a[i]);
                vreinterpretq_u32_u16(shift!(vshrq_n_u16, a, n, 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15))
            })
        }
    }
    #[inline(always)]
    fn shl_i(self, a: I, n: u32) -> I {
        // SAFETY: see above.
        unsafe {
            both!(i => {
                let a = vreinterpretq_u16_u32(a[i]);
                vreinterpretq_u32_u16(shift!(vshlq_n_u16, a, n, 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15))
            })
        }
    }
    #[inline(always)]
    fn moved(self, a: I, from: usize, to: usize, mask: u8) -> I {
        // SAFETY: see above.
        unsafe {
            // Bytes shift as bytes here, so that what comes from their ends needs no mask.
            both!(i => {
                let a = vreinterpretq_u8_u32(a[i]);
                let a = shift!(vshrq_n_u8, a, from.saturating_sub(to), 1 2 3 4 5 6 7);
                let a = shift!(vshlq_n_u8, a, to.saturating_sub(from), 1 2 3 4 5 6 7);
                vreinterpretq_u32_u8(vandq_u8(a, vdupq_n_u8(mask << to)))
            })
        }
    }
    #[inline(always)]
    fn byte(self, a: I, j: usize) -> I {
        // SAFETY: see above.
        unsafe {
            both!(i => match j {
                0 => vandq_u32(a[i], vdupq_n_u32(255)),
                1 => vandq_u32(vshrq_n_u32::<8>(a[i]), vdupq_n_u32(255)),
                2 => vandq_u32(vshrq_n_u32::<16>(a[i]), vdupq_n_u32(255)),
                _ => vshrq_n_u32::<24>(a[i]),
            })
        }
    }
    #[inline(always)]
    fn float(self, a: I) -> V {
        // SAFETY: see above.
        unsafe { both!(i => vcvtq_f32_s32(vreinterpretq_s32_u32(a[i]))) }
    }
    #[inline(always)]
    fn sub_i(self, a: I, b: I) -> I {
        // SAFETY: see above.
        unsafe { both!(i => vsubq_u32(a[i], b[i])) }
    }
    #[inline(always)]
    fn sub_bytes(self, a: I, b: I) -> I {
        // SAFETY: see above.
        unsafe { both!(i => vreinterpretq_u32_u8(vsubq_u8(vreinterpretq_u8_u32(a[i]), vreinterpretq_u8_u32(b[i])))) }
    }
    #[inline(always)]
    fn less_product(self, a: I, b: I, c: I) -> I {
        // SAFETY: see above.
        unsafe { both!(i => vmlsq_u32(a[i], b[i], c[i])) }
    }
    #[inline(always)]
    fn total(self, bits: usize, [a, b]: [I; 2]) -> I {
        // SAFETY: see above.
        unsafe {
            if bits < 8 || MORE == I8MM {
                return a;
            }
            // Codes were taken less 128: 64 times x went apart, or x itself, in words.
            if MORE == DOT {
                return both!(i => vaddq_u32(a[i], vshlq_n_u32::<1>(b[i])));
            }
            both!(i => {
                let given = vreinterpretq_u32_s32(vpaddlq_s16(vreinterpretq_s16_u32(b[i])));
                vaddq_u32(a[i], vshlq_n_u32::<7>(given))
            })
        }
    }
    #[inline(always)]
    fn dot(self, bits: usize, [a, b]: [I; 2], c: [I; 2], x: [I; 2]) -> [I; 2] {
        // SAFETY: see above.
        unsafe {
            if MORE == I8MM {
                return [both!(i => usdot(usdot(a[i], c[0][i], x[0][i]), c[1][i], x[1][i])), b];
            }
            let c = if bits == 8 { [less_128(c[0]), less_128(c[1])] } else { c };
            if MORE == PLAIN {
                let sums = both!(i => products(bits, a[i], [c[0][i], c[1][i]], [x[0][i], x[1][i]]));
                return [sums, if bits == 8 { both!(i => words_of(words_of(b[i], x[0][i]), x[1][i])) } else { b }];
            }
            let sums = both!(i => sdot(sdot(a[i], c[0][i], x[0][i]), c[1][i], x[1][i]));
            let each = vreinterpretq_u32_u8(vdupq_n_u8(64));
            [sums, if bits == 8 { both!(i => sdot(sdot(b[i], each, x[0][i]), each, x[1][i])) } else { b }]
        }
    }
    #[inline(always)]
    unsafe fn dot8<const PAIR: bool>(self, bits: usize, [a, b]: [I; 2], c: [I; 2], x: *const i8) -> [I; 2] {
        // SAFETY: see above.
        unsafe {
            if PAIR || MORE == PLAIN {
                let second = x.add(if PAIR { 8 } else { 4 });
                let x = [self.spread_i::<PAIR>(x.cast()), self.spread_i::<PAIR>(second.cast())];
                return self.dot(bits, [a, b], c, x);
            }
            // Both fours in one register, of which the instruction takes one.
            let x = vld1_s8(x);
            if MORE == I8MM {
                return [both!(i => usdot_lane::<1>(usdot_lane::<0>(a[i], c[0][i], x), c[1][i], x)), b];
            }
            if bits < 8 {
                return [both!(i => sdot_lane::<1>(sdot_lane::<0>(a[i], c[0][i], x), c[1][i], x)), b];
            }
            let c = [less_128(c[0]), less_128(c[1])];
            let each = vreinterpretq_u32_u8(vdupq_n_u8(64));
            // All lanes come to the same, and compilers see it.
            let given = both!(i => sdot_lane::<1>(sdot_lane::<0>(b[i], each, x), each, x));
            [both!(i => sdot_lane::<1>(sdot_lane::<0>(a[i], c[0][i], x), c[1][i], x)), given]
        }
    }
    #[inline(always)]
    unsafe fn dot8_both(self, bits: usize, state: [[I; 2]; 2], c: [I; 2], x: [*const i8; 2]) -> [[I; 2]; 2] {
        // SAFETY: see above.
        unsafe {
            let [[a, mut first], [b, mut last]] = state;
            if MORE < I8MM {
                return both!(i => self.dot8::<false>(bits, state[i], c, x[i]));
            }
            // Two rows of eight codes times the two of x: four sums. Those of a register's first two rows are kept
            // with the first row of x, the others with the second.
            let x = vcombine_s8(vld1_s8(x[0]), vld1_s8(x[1]));
            first = both!(i => usmmla(first[i], vzip1q_u32(c[0][i], c[1][i]), x));
            last = both!(i => usmmla(last[i], vzip2q_u32(c[0][i], c[1][i]), x));
            [[a, first], [b, last]]
        }
    }
    #[inline(always)]
    fn total_both(self, bits: usize, state: [[I; 2]; 2]) -> [I; 2] {
        // SAFETY: see above.
        unsafe {
            if MORE < I8MM {
                return both!(i => self.total(bits, state[i]));
            }
            let [[a, first], [b, last]] = state;
            [
                both!(i => vaddq_u32(a[i], vuzp1q_u32(first[i], last[i]))),
                both!(i => vaddq_u32(b[i], vuzp2q_u32(first[i], last[i]))),
            ]
        }
    }
    #[inline(always)]
    unsafe fn pick(self, x: *const i8, index: I) -> I {
        // SAFETY: see above.
        unsafe {
            let x = vld1q_u8(x.cast());
            both!(i => vreinterpretq_u32_u8(vqtbl1q_u8(x, vreinterpretq_u8_u32(index[i]))))
        }
    }
    #[inline(always)]
    fn up_i(self, a: I, n: I) -> I {
        // SAFETY: see above.
        unsafe { both!(i => vshlq_u32(a[i], vreinterpretq_s32_u32(n[i]))) }
    }
    #[inline(always)]
    fn xor_i(self, a: I, b: I) -> I {
        // SAFETY: see above.
        unsafe { both!(i => veorq_u32(a[i], b[i])) }
    }
    #[inline(always)]
    unsafe fn tops(self, p: *const f32) -> V {
        // SAFETY: see above.
        unsafe {
            both!(i => {
                let p = p.add(4 * i);
                let low = vmaxq_u32(magnitudes(p), magnitudes(p.add(8)));
                vreinterpretq_f32_u32(vmaxq_u32(low, vmaxq_u32(magnitudes(p.add(16)), magnitudes(p.add(24)))))
            })
        }
    }
    #[inline(always)]
    unsafe fn row_tops(self, p: *const f32) -> V {
        // SAFETY: see above.
        unsafe { both!(i => vreinterpretq_f32_u32(four_tops(p.add(32 * i).cast()))) }
    }
    #[inline(always)]
    unsafe fn words(self, p: *const f32, by: f32) -> W {
        // SAFETY: see above.
        unsafe { four!(i => eight_words(p.add(8 * i), by)) }
    }
    #[inline(always)]
    unsafe fn load_w(self, p: *const i16) -> W {
        // SAFETY: see above.
        unsafe { four!(i => vld1q_s16(p.add(8 * i))) }
    }
    #[inline(always)]
    unsafe fn store_w(self, p: *mut i16, a: W) {
        // SAFETY: see above.
        unsafe {
            let mut i = 0;
            while i < 4 {
                vst1q_s16(p.add(8 * i), a[i]);
                i += 1;
            }
        }
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut i8, a: W) {
        // SAFETY: see above.
        unsafe {
            vst1q_s8(p, vqmovn_high_s16(vqmovn_s16(a[0]), a[1]));
            vst1q_s8(p.add(16), vqmovn_high_s16(vqmovn_s16(a[2]), a[3]));
        }
    }
    #[inline(always)]
    fn splat_w(self, first: i16, second: i16) -> W {
        // SAFETY: see above.
        unsafe {
            let [a, b] = [vdupq_n_s16(first), vdupq_n_s16(second)];
            [a, a, b, b]
        }
    }
    #[inline(always)]
    fn sub_w(self, a: W, b: W) -> W {
        // SAFETY: see above.
        unsafe { four!(i => vsubq_s16(a[i], b[i])) }
    }
    #[inline(always)]
    fn low_w(self, a: W, b: W) -> W {
        // SAFETY: see above.
        unsafe { four!(i => vmulq_s16(a[i], b[i])) }
    }
    #[inline(always)]
    fn high_w(self, a: W, b: W) -> W {
        // SAFETY: see above.
        unsafe { four!(i => vqrdmulhq_s16(a[i], b[i])) }
    }
    #[inline(always)]
    fn down_w<const N: u32>(self, a: W) -> W {
        // SAFETY: see above.
        unsafe { four!(i => vshlq_s16(a[i], vdupq_n_s16(-(N as i16)))) }
    }
    #[inline(always)]
    fn products_w(self, a: W, b: W) -> I {
        // SAFETY: see above.
        unsafe {
            both!(i => {
                let ([a, c], [b, d]) = ([a[2 * i], a[2 * i + 1]], [b[2 * i], b[2 * i + 1]]);
                let sum = vmlal_high_s16(vmull_s16(vget_low_s16(a), vget_low_s16(b)), a, b);
                vreinterpretq_u32_s32(vmlal_high_s16(vmlal_s16(sum, vget_low_s16(c), vget_low_s16(d)), c, d))
            })
        }
    }
}
