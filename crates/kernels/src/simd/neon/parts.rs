//! What takes several instructions, and instructions in words.

use std::arch::aarch64::*;
use std::arch::asm;

use super::{I, V};
use crate::simd::masks::COMPRESS;

/// Adds something to a sum by an instruction of an extension, which the assembler is told of: what is compiled apart
/// from [`super::run_dot`] and its like, as tests are, does not enable it.
macro_rules! adds {
    ($($(#[$doc:meta])+ $extension:literal $name:ident $(<const $lane:ident>)?, $x:ty, $text:literal;)*) => {$(
        $(#[$doc])+
        /// # Safety
        /// The processor has the instruction.
        #[inline(always)]
        pub(super) unsafe fn $name $(<const $lane: u8>)? (mut sum: uint32x4_t, c: uint32x4_t, x: $x) -> uint32x4_t {
            // SAFETY: as the caller promises.
            unsafe {
                asm!(concat!(".arch_extension ", $extension), $text,
                    inlateout(vreg) sum, in(vreg) c, in(vreg) x, $(lane = const $lane,)?
                    options(pure, nomem, nostack, preserves_flags));
            }
            sum
        }
    )*};
}

adds! {
    /// Four signed bytes of `c` times four of `x`, in each lane.
    "dotprod" sdot, uint32x4_t, "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b";
    /// The same with four of `x` for all lanes.
    "dotprod" sdot_lane<const LANE>, int8x8_t, "sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[{lane}]";
    /// As `sdot` with unsigned bytes of `c`.
    "i8mm" usdot, uint32x4_t, "usdot {0:v}.4s, {1:v}.16b, {2:v}.16b";
    /// As `sdot_lane` with unsigned bytes of `c`.
    "i8mm" usdot_lane<const LANE>, int8x8_t, "usdot {0:v}.4s, {1:v}.16b, {2:v}.4b[{lane}]";
    /// Two rows of eight unsigned bytes of `c` times two of signed ones of `x`: the first of `c` with both, then the
    /// second.
    "i8mm" usmmla, int8x16_t, "usmmla {0:v}.4s, {1:v}.16b, {2:v}.16b";
}

/// Codes of 8 bits less 128, as signed bytes.
#[inline(always)]
pub(super) fn less_128(c: I) -> I {
    // SAFETY: every AArch64 processor has NEON.
    unsafe { both!(i => veorq_u32(c[i], vdupq_n_u32(0x8080_8080))) }
}

/// Adds to each lane the products of its four bytes in `c[0]` and `c[1]`, signed where they have 8 bits, and in `x`.
#[inline(always)]
pub(super) fn products(bits: usize, sum: uint32x4_t, c: [uint32x4_t; 2], x: [uint32x4_t; 2]) -> uint32x4_t {
    // SAFETY: every AArch64 processor has NEON.
    unsafe {
        let sum = vreinterpretq_s32_u32(sum);
        let [c, d] = both!(i => vreinterpretq_s8_u32(c[i]));
        let [x, y] = both!(i => vreinterpretq_s8_u32(x[i]));
        // Two products of 7 bits, or of 8 bits less 128, fit 16 bits; four do up to 6 bits.
        let low = vmlal_s8(vmull_s8(vget_low_s8(c), vget_low_s8(x)), vget_low_s8(d), vget_low_s8(y));
        let high = vmlal_high_s8(vmull_high_s8(c, x), d, y);
        let sum = if bits <= 6 {
            vpadalq_s16(sum, vpaddq_s16(low, high))
        } else {
            vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)))
        };
        vreinterpretq_u32_s32(sum)
    }
}

/// Adds to words the sums of two neighbouring signed bytes each.
#[inline(always)]
pub(super) fn words_of(words: uint32x4_t, x: uint32x4_t) -> uint32x4_t {
    // SAFETY: every AArch64 processor has NEON.
    unsafe { vreinterpretq_u32_s16(vpadalq_s8(vreinterpretq_s16_u32(words), vreinterpretq_s8_u32(x))) }
}

/// The bytes of lanes numbered in `row`; where 0x80 is, none.
#[inline(always)]
pub(super) fn lanes_of(row: uint8x8_t) -> [uint8x16_t; 2] {
    // SAFETY: every AArch64 processor has NEON.
    unsafe {
        let of = vreinterpretq_u8_u32(vdupq_n_u32(0x0302_0100));
        // 0x80 becomes 255, beyond every table.
        let row = vqshl_n_u8::<2>(row);
        let row = vcombine_u8(vzip1_u8(row, row), vzip2_u8(row, row));
        [vorrq_u8(vzip1q_u8(row, row), of), vorrq_u8(vzip2q_u8(row, row), of)]
    }
}

/// Eight f16.
#[inline(always)]
pub(super) fn from_f16(v: uint8x16_t) -> V {
    // SAFETY: every processor with NEON has them.
    unsafe {
        let (low, high);
        asm!("fcvtl {0:v}.4s, {1:v}.4h", lateout(vreg) low, in(vreg) v, options(pure, nomem, nostack, preserves_flags));
        asm!("fcvtl2 {0:v}.4s, {1:v}.8h", lateout(vreg) high, in(vreg) v,
            options(pure, nomem, nostack, preserves_flags));
        [low, high]
    }
}

/// Four entries of a table of `n`.
/// # Safety
/// It has them.
#[inline(always)]
pub(super) unsafe fn lookup(table: *const f32, n: usize, index: uint32x4_t) -> float32x4_t {
    // SAFETY: as the caller promises.
    unsafe {
        let t = table.cast::<u8>();
        let bytes = vmlaq_u32(vdupq_n_u32(0x0302_0100), index, vdupq_n_u32(0x0404_0404));
        let bytes = vreinterpretq_u8_u32(bytes);
        let v = match n {
            8 => vqtbl2q_u8(uint8x16x2_t(vld1q_u8(t), vld1q_u8(t.add(16))), bytes),
            16 => {
                let [a, b, c, d] = four!(i => vld1q_u8(t.add(16 * i)));
                vqtbl4q_u8(uint8x16x4_t(a, b, c, d), bytes)
            }
            _ => return gather(table, index),
        };
        vreinterpretq_f32_u8(v)
    }
}

/// See [`Simd::keep`](crate::simd::Simd::keep).
/// # Safety
/// As there.
#[inline(always)]
pub(super) unsafe fn keep(x: *const i8, mask: u32, out: *mut i8) {
    // SAFETY: as the caller promises: the last of the eight bytes that are written lies before `8 * i + 8`.
    unsafe {
        // Whoever reads it does so later: a load of what several stores have just written would wait for all of them.
        vst1q_s8(out, vdupq_n_s8(0));
        vst1q_s8(out.add(16), vdupq_n_s8(0));
        let (mut n, mut i) = (0, 0);
        while i < 4 {
            let m = (mask >> (8 * i) & 255) as usize;
            let row = vreinterpret_s8_u8(vld1_u8(COMPRESS[m].as_ptr()));
            vst1_s8(out.add(n), vtbl1_s8(vld1_s8(x.add(8 * i)), row));
            n += m.count_ones() as usize;
            i += 1;
        }
    }
}

/// Four entries of a table of any length.
/// # Safety
/// It has them.
#[inline(always)]
unsafe fn gather(table: *const f32, index: uint32x4_t) -> float32x4_t {
    // SAFETY: as the caller promises.
    unsafe {
        let v = vld1q_dup_f32(table.add(vgetq_lane_u32::<0>(index) as usize));
        let v = vld1q_lane_f32::<1>(table.add(vgetq_lane_u32::<1>(index) as usize), v);
        let v = vld1q_lane_f32::<2>(table.add(vgetq_lane_u32::<2>(index) as usize), v);
        vld1q_lane_f32::<3>(table.add(vgetq_lane_u32::<3>(index) as usize), v)
    }
}

/// The sums of four rows of eight, each in the tree of `sum`.
/// # Safety
/// `p` is readable for 32 values.
#[inline(always)]
pub(super) unsafe fn four_sums(p: *const f32) -> float32x4_t {
    // SAFETY: as the caller promises.
    unsafe {
        let [a, b, c, d] = four!(i => vaddq_f32(vld1q_f32(p.add(8 * i)), vld1q_f32(p.add(8 * i + 4))));
        vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))
    }
}

/// The largest of four rows of eight magnitudes, as bits: those of a NaN are larger than any number's.
/// # Safety
/// `p` is readable for 32 values.
#[inline(always)]
pub(super) unsafe fn four_tops(p: *const u32) -> uint32x4_t {
    // SAFETY: as the caller promises.
    unsafe {
        let [a, b, c, d] = four!(i => vmaxq_u32(vld1q_u32(p.add(8 * i)), vld1q_u32(p.add(8 * i + 4))));
        vpmaxq_u32(vpmaxq_u32(a, b), vpmaxq_u32(c, d))
    }
}

/// Four values without their signs, as bits.
/// # Safety
/// `p` is readable for four values.
#[inline(always)]
pub(super) unsafe fn magnitudes(p: *const f32) -> uint32x4_t {
    // SAFETY: as the caller promises.
    unsafe { vandq_u32(vld1q_u32(p.cast()), vdupq_n_u32(i32::MAX as u32)) }
}

/// Eight values times `by` as words.
/// # Safety
/// `p` is readable for eight values.
#[inline(always)]
pub(super) unsafe fn eight_words(p: *const f32, by: f32) -> int16x8_t {
    // SAFETY: as the caller promises.
    unsafe {
        let [a, b] = both!(i => vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(p.add(4 * i)), by)));
        vqmovn_high_s32(vqmovn_s32(a), b)
    }
}
