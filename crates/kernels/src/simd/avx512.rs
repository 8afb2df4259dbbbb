//! AVX-512: sixteen lanes.

use std::arch::x86_64::*;

use super::{Op, Simd};
use crate::Isa;

/// Proof that the processor has AVX-512 F, BW, DQ and VL, and with `VNNI` also VNNI and VBMI2: made by [`run`] and
/// [`run_vnni`] alone.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const VNNI: bool>(());

/// Runs `op` with the instructions of [`Isa::Avx512`] enabled.
pub(crate) fn run<O: Op>(op: O) -> O::Out {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt,bmi1,bmi2")]
    fn inner<O: Op>(op: O, s: Avx512<false>) -> O::Out {
        op.run(s)
    }
    assert!(Isa::Avx512.available(), "this processor has no AVX-512 F, BW, DQ and VL");
    // SAFETY: the features were just checked.
    unsafe { inner(op, Avx512(())) }
}

/// Runs `op` with the instructions of [`Isa::Avx512Vnni`] enabled.
pub(crate) fn run_vnni<O: Op>(op: O) -> O::Out {
    #[target_feature(
        enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt,bmi1,bmi2"
    )]
    fn inner<O: Op>(op: O, s: Avx512<true>) -> O::Out {
        op.run(s)
    }
    assert!(Isa::Avx512Vnni.available(), "this processor has no AVX-512 VNNI and VBMI2");
    // SAFETY: the features were just checked.
    unsafe { inner(op, Avx512(())) }
}

// SAFETY, for every block below: the token proves the instructions exist, and pointers are good for as many values as
// the trait asks.
impl<const VNNI: bool> Simd for Avx512<VNNI> {
    const LANES: usize = 16;
    type V = __m512;
    type I = __m512i;
    type W = __m512i;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m512) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn select_lt(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x) }
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn pow2(self, a: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let e = _mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(e))
        }
    }
    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        // SAFETY: see above.
        unsafe {
            let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v)));
            let v = _mm256_add_ps(_mm512_castps512_ps256(v), upper);
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_hadd_ps(v, v);
            _mm_cvtss_f32(_mm_hadd_ps(v, v))
        }
    }
    #[inline(always)]
    unsafe fn row_sums(self, p: *const f32) -> __m512 {
        // SAFETY: see above.
        unsafe {
            // Quarter k of what comes of row i belongs to row 4k + i, so that adding inside quarters leaves the rows in
            // order.
            let [a, b, c, d] = [fold(p), fold(p.add(16)), fold(p.add(32)), fold(p.add(48))];
            let ab = _mm512_add_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xDD>(a, b));
            let cd = _mm512_add_ps(_mm512_shuffle_ps::<0x88>(c, d), _mm512_shuffle_ps::<0xDD>(c, d));
            _mm512_add_ps(_mm512_shuffle_ps::<0x88>(ab, cd), _mm512_shuffle_ps::<0xDD>(ab, cd))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())))) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    fn fused(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        self.fma(a, b, c)
    }
    #[inline(always)]
    fn top(self, a: __m512) -> f32 {
        // SAFETY: see above.
        unsafe { _mm512_reduce_max_ps(a) }
    }
    #[inline(always)]
    fn compress(self, a: __m512, mask: u32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_maskz_compress_ps(mask as u16, a) }
    }
    #[inline(always)]
    fn flip(self, a: __m512, mask: u32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mask_xor_ps(a, mask as u16, a, _mm512_set1_ps(-0.0)) }
    }
    #[inline(always)]
    unsafe fn expand_f16(self, p: *const u8, mask: u32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_maskz_expand_ps(mask as u16, _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn expand_two_f16(self, p: *const u8, mask: u32) -> [__m512; 2] {
        // SAFETY: see above; VBMI2 only where the token says so.
        unsafe {
            if VNNI {
                let both = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(p.cast()));
                let then = _mm512_extracti64x4_epi64::<1>(both);
                return [_mm512_cvtph_ps(_mm512_castsi512_si256(both)), _mm512_cvtph_ps(then)];
            }
            let then = p.add(2 * (mask & 0xFFFF).count_ones() as usize);
            [self.expand_f16(p, mask & 0xFFFF), self.expand_f16(then, mask >> 16)]
        }
    }
    #[inline(always)]
    unsafe fn expand_f32(self, p: *const u8, mask: u32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_maskz_expand_ps(mask as u16, _mm512_loadu_ps(p.cast())) }
    }
    #[inline(always)]
    unsafe fn spread<const PAIR: bool>(self, p: *const f32) -> __m512 {
        // SAFETY: see above.
        unsafe {
            if PAIR { _mm512_castpd_ps(_mm512_set1_pd(p.cast::<f64>().read_unaligned())) } else { _mm512_set1_ps(*p) }
        }
    }
    #[inline(always)]
    unsafe fn lookup(self, table: *const f32, n: usize, index: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe {
            if n <= 16 {
                // A short table is loaded as far as it goes.
                let t = _mm512_maskz_loadu_ps((0xFFFFu32 >> (16 - n)) as u16, table);
                _mm512_permutexvar_ps(index, t)
            } else {
                _mm512_i32gather_ps::<4>(index, table)
            }
        }
    }
    #[inline(always)]
    unsafe fn entries(self, table: *const u32, index: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_i32gather_epi32::<4>(index, table.cast()) }
    }
    #[inline(always)]
    fn signed(self, a: __m512i, signs: __m512i, from: usize, zero: u8) -> __m512i {
        // SAFETY: see above.
        unsafe {
            // The byte with the bits, for all four of its lane.
            let lane = _mm512_set4_epi32(0x0C0C_0C0C, 0x0808_0808, 0x0404_0404, 0);
            let signs = _mm512_shuffle_epi8(signs, _mm512_add_epi8(lane, _mm512_set1_epi8(from as i8 / 8)));
            let minus = _mm512_test_epi8_mask(signs, _mm512_set1_epi32(0x0804_0201 << (from % 8)));
            let zero = _mm512_set1_epi8(zero as i8);
            _mm512_mask_sub_epi8(_mm512_add_epi8(zero, a), minus, zero, a)
        }
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_set1_epi32(x) }
    }
    #[inline(always)]
    unsafe fn spread_i<const PAIR: bool>(self, p: *const i32) -> __m512i {
        // SAFETY: see above.
        unsafe {
            if PAIR {
                _mm512_set1_epi64(p.cast::<i64>().read_unaligned())
            } else {
                _mm512_set1_epi32(p.read_unaligned())
            }
        }
    }
    #[inline(always)]
    unsafe fn load_i(self, p: *const u8) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store_i(self, p: *mut u8, a: __m512i) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_si512(p.cast(), a) }
    }
    #[inline(always)]
    unsafe fn widen(self, p: *const u8) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn widen_words(self, p: *const u8) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    fn and_i(self, a: __m512i, byte: u8) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_and_si512(a, _mm512_set1_epi8(byte as i8)) }
    }
    #[inline(always)]
    fn or_i(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    fn shr_i(self, a: __m512i, n: u32) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_srl_epi16(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    fn shl_i(self, a: __m512i, n: u32) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_sll_epi16(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    fn byte(self, a: __m512i, j: usize) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_and_si512(_mm512_srl_epi32(a, _mm_cvtsi32_si128(8 * j as i32)), _mm512_set1_epi32(255)) }
    }
    #[inline(always)]
    fn float(self, a: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(a) }
    }
    #[inline(always)]
    fn sub_i(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_sub_epi32(a, b) }
    }
    #[inline(always)]
    fn sub_bytes(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_sub_epi8(a, b) }
    }
    #[inline(always)]
    fn less_product(self, a: __m512i, b: __m512i, c: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_sub_epi32(a, _mm512_mullo_epi32(b, c)) }
    }
    #[inline(always)]
    fn total(self, bits: usize, state: [__m512i; 2]) -> __m512i {
        if bits > 4 || VNNI {
            return state[0];
        }
        // SAFETY: see above.
        unsafe { _mm512_add_epi32(state[0], _mm512_madd_epi16(state[1], _mm512_set1_epi16(1))) }
    }
    #[inline(always)]
    fn dot(self, bits: usize, state: [__m512i; 2], c: [__m512i; 2], x: [__m512i; 2]) -> [__m512i; 2] {
        // SAFETY: see above; VNNI only where the token says so.
        unsafe {
            if VNNI {
                return [_mm512_dpbusd_epi32(_mm512_dpbusd_epi32(state[0], c[0], x[0]), c[1], x[1]), state[1]];
            }
            let one = _mm512_set1_epi16(1);
            // Of sums of two products of b bits, one fits 16 bits up to b = 7, two up to b = 6, and all eight of a
            // block up to b = 4.
            if bits == 8 {
                let (a, b) = pairs([self.and_i(c[0], 15), self.and_i(c[1], 15)], x);
                let low = _mm512_madd_epi16(_mm512_add_epi16(a, b), one);
                let (a, b) = pairs([self.and_i(self.shr_i(c[0], 4), 15), self.and_i(self.shr_i(c[1], 4), 15)], x);
                let high = _mm512_madd_epi16(_mm512_add_epi16(a, b), _mm512_set1_epi16(16));
                return [_mm512_add_epi32(state[0], _mm512_add_epi32(low, high)), state[1]];
            }
            let (a, b) = pairs(c, x);
            if bits <= 4 {
                return [state[0], _mm512_add_epi16(state[1], _mm512_add_epi16(a, b))];
            }
            let sum = if bits <= 6 {
                _mm512_madd_epi16(_mm512_add_epi16(a, b), one)
            } else {
                _mm512_add_epi32(_mm512_madd_epi16(a, one), _mm512_madd_epi16(b, one))
            };
            [_mm512_add_epi32(state[0], sum), state[1]]
        }
    }
    #[inline(always)]
    fn interleave(self, a: __m512, b: __m512) -> [__m512; 2] {
        // SAFETY: see above.
        unsafe {
            let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
            [_mm512_permutex2var_ps(a, low, b), _mm512_permutex2var_ps(a, high, b)]
        }
    }
    #[inline(always)]
    unsafe fn keep(self, x: *const i8, mask: u32, out: *mut i8) {
        // SAFETY: see above; VBMI2 only where the token says so.
        unsafe {
            if !VNNI {
                return super::avx2::keep(x, mask, out);
            }
            let x = _mm256_loadu_si256(x.cast());
            _mm256_storeu_si256(out.cast(), _mm256_maskz_compress_epi8(mask, x));
        }
    }
    #[inline(always)]
    unsafe fn turns(self, a: *const i8, b: *const i8, out: *mut i8) {
        // SAFETY: see above.
        unsafe {
            let (a, b) = (_mm256_loadu_si256(a.cast()), _mm256_loadu_si256(b.cast()));
            let turns = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let both = _mm512_permutex2var_epi32(_mm512_castsi256_si512(a), turns, _mm512_castsi256_si512(b));
            _mm512_storeu_si512(out.cast(), both);
        }
    }
    #[inline(always)]
    unsafe fn pick(self, x: *const i8, index: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(x.cast())), index) }
    }
    #[inline(always)]
    fn up_i(self, a: __m512i, n: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_sllv_epi32(a, n) }
    }
    #[inline(always)]
    fn xor_i(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_xor_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn tops(self, p: *const f32) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let magnitude = _mm512_set1_epi32(i32::MAX);
            let (a, b) = (_mm512_loadu_si512(p.cast()), _mm512_loadu_si512(p.add(16).cast()));
            let (a, b) = (_mm512_and_si512(a, magnitude), _mm512_and_si512(b, magnitude));
            _mm512_castsi512_ps(_mm512_max_epi32(a, b))
        }
    }
    #[inline(always)]
    unsafe fn row_tops(self, p: *const f32) -> __m512 {
        // SAFETY: see above.
        unsafe {
            // As for `row_sums`.
            let [a, b, c, d] = [fold_tops(p), fold_tops(p.add(16)), fold_tops(p.add(32)), fold_tops(p.add(48))];
            let ab = larger(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xDD>(a, b));
            let cd = larger(_mm512_shuffle_ps::<0x88>(c, d), _mm512_shuffle_ps::<0xDD>(c, d));
            larger(_mm512_shuffle_ps::<0x88>(ab, cd), _mm512_shuffle_ps::<0xDD>(ab, cd))
        }
    }
    #[inline(always)]
    unsafe fn words(self, p: *const f32, by: f32) -> __m512i {
        // SAFETY: see above.
        unsafe {
            let by = _mm512_set1_ps(by);
            let a = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(p), by));
            let b = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(p.add(16)), by));
            let order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
            _mm512_permutexvar_epi64(order, _mm512_packs_epi32(a, b))
        }
    }
    #[inline(always)]
    unsafe fn load_w(self, p: *const i16) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store_w(self, p: *mut i16, a: __m512i) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_si512(p.cast(), a) }
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut i8, a: __m512i) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtsepi16_epi8(a)) }
    }
    #[inline(always)]
    fn splat_w(self, first: i16, second: i16) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_inserti64x4::<1>(_mm512_set1_epi16(first), _mm256_set1_epi16(second)) }
    }
    #[inline(always)]
    fn sub_w(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_sub_epi16(a, b) }
    }
    #[inline(always)]
    fn low_w(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_mullo_epi16(a, b) }
    }
    #[inline(always)]
    fn high_w(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_mulhrs_epi16(a, b) }
    }
    #[inline(always)]
    fn down_w<const N: u32>(self, a: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_srai_epi16::<N>(a) }
    }
    #[inline(always)]
    fn products_w(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_madd_epi16(a, b) }
    }
}

/// The larger lanes of two vectors of magnitudes, as bits.
/// # Safety
/// The processor has AVX-512.
#[inline(always)]
unsafe fn larger(a: __m512, b: __m512) -> __m512 {
    // SAFETY: as the caller promises.
    unsafe { _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b))) }
}

/// As [`fold`] for the largest of each.
/// # Safety
/// As there.
#[inline(always)]
unsafe fn fold_tops(p: *const f32) -> __m512 {
    // SAFETY: as the caller promises.
    unsafe {
        let load =
            [_mm512_loadu_ps(p), _mm512_loadu_ps(p.add(64)), _mm512_loadu_ps(p.add(128)), _mm512_loadu_ps(p.add(192))];
        let [a, b, c, d] = load;
        let ab = larger(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xEE>(a, b));
        let cd = larger(_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xEE>(c, d));
        larger(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xDD>(ab, cd))
    }
}

/// Sums of two neighbouring products each, for two vectors. A function, as a closure would be compiled without the
/// instruction set.
/// # Safety
/// The processor has the instruction; sums fit 16 bits.
#[inline(always)]
unsafe fn pairs(c: [__m512i; 2], x: [__m512i; 2]) -> (__m512i, __m512i) {
    // SAFETY: as the caller promises.
    unsafe { (_mm512_maddubs_epi16(c[0], x[0]), _mm512_maddubs_epi16(c[1], x[1])) }
}

/// Of the vectors at `p` and at every fourth after it, the quarters of each added up: a quarter for each.
/// # Safety
/// `p` is readable for 13 vectors of 16; the processor has AVX-512.
#[inline(always)]
unsafe fn fold(p: *const f32) -> __m512 {
    // SAFETY: as the caller promises.
    unsafe {
        let load =
            [_mm512_loadu_ps(p), _mm512_loadu_ps(p.add(64)), _mm512_loadu_ps(p.add(128)), _mm512_loadu_ps(p.add(192))];
        let [a, b, c, d] = load;
        let ab = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xEE>(a, b));
        let cd = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xEE>(c, d));
        _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xDD>(ab, cd))
    }
}
