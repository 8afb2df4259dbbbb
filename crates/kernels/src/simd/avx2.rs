//! AVX2 with FMA and F16C: eight lanes.

use std::arch::x86_64::*;

use super::masks::{COMPRESS, EXPAND, EXPAND_PAIRS};
use super::{Op, Simd};
use crate::Isa;

/// Proof that the processor has AVX2, FMA and F16C: made by [`run`] alone.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

/// Runs `op` with these instructions enabled.
pub(crate) fn run<O: Op>(op: O) -> O::Out {
    #[target_feature(enable = "avx2,fma,f16c,popcnt,bmi1,bmi2")]
    fn inner<O: Op>(op: O, s: Avx2) -> O::Out {
        op.run(s)
    }
    assert!(Isa::Avx2.available(), "this processor has no AVX2 with FMA and F16C");
    // SAFETY: the features were just checked.
    unsafe { inner(op, Avx2(())) }
}

// SAFETY, for every block below: the token proves the instructions exist, and pointers are good for as many values as
// the trait asks.
impl Simd for Avx2 {
    const LANES: usize = 8;
    type V = __m256;
    type I = __m256i;
    type W = [__m256i; 2];

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m256) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    fn select_lt(self, a: __m256, b: __m256, x: __m256, y: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)) }
    }
    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn pow2(self, a: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe {
            let e = _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(e))
        }
    }
    #[inline(always)]
    fn sum(self, v: __m256) -> f32 {
        // SAFETY: see above.
        unsafe {
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_hadd_ps(v, v);
            _mm_cvtss_f32(_mm_hadd_ps(v, v))
        }
    }
    #[inline(always)]
    unsafe fn row_sums(self, p: *const f32) -> __m256 {
        // SAFETY: see above.
        unsafe {
            let (a, b) = (quarter_sums(p), quarter_sums(p.add(32)));
            _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
    }
    #[inline(always)]
    fn fused(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        self.fma(a, b, c)
    }
    #[inline(always)]
    fn top(self, a: __m256) -> f32 {
        // SAFETY: see above.
        unsafe {
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
        }
    }
    #[inline(always)]
    fn compress(self, a: __m256, mask: u32) -> __m256 {
        // SAFETY: see above; the table has a row for every byte.
        unsafe {
            let row = COMPRESS[(mask & 255) as usize].as_ptr();
            _mm256_permutevar8x32_ps(a, _mm256_cvtepu8_epi32(_mm_loadl_epi64(row.cast())))
        }
    }
    #[inline(always)]
    fn flip(self, a: __m256, mask: u32) -> __m256 {
        // SAFETY: see above.
        unsafe {
            // Bit `i` goes to the top of lane `i`.
            let up =
                _mm256_sllv_epi32(_mm256_set1_epi32(mask as i32), _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24));
            let sign = _mm256_and_si256(up, _mm256_set1_epi32(i32::MIN));
            _mm256_xor_ps(a, _mm256_castsi256_ps(sign))
        }
    }
    #[inline(always)]
    unsafe fn expand_f16(self, p: *const u8, mask: u32) -> __m256 {
        // SAFETY: see above; the table has a row for every byte.
        unsafe {
            let row = _mm_loadu_si128(EXPAND_PAIRS[(mask & 255) as usize].as_ptr().cast());
            _mm256_cvtph_ps(_mm_shuffle_epi8(_mm_loadu_si128(p.cast()), row))
        }
    }
    #[inline(always)]
    unsafe fn expand_f32(self, p: *const u8, mask: u32) -> __m256 {
        // SAFETY: see above; the table has a row for every byte, 0x80 where a lane is empty.
        unsafe {
            let row = _mm256_cvtepi8_epi32(_mm_loadl_epi64(EXPAND[(mask & 255) as usize].as_ptr().cast()));
            let v = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p.cast()), row);
            _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32::<31>(row)), v)
        }
    }
    #[inline(always)]
    unsafe fn spread<const PAIR: bool>(self, p: *const f32) -> __m256 {
        // SAFETY: see above.
        unsafe {
            if PAIR { _mm256_castpd_ps(_mm256_set1_pd(p.cast::<f64>().read_unaligned())) } else { _mm256_set1_ps(*p) }
        }
    }
    #[inline(always)]
    unsafe fn lookup(self, table: *const f32, n: usize, index: __m256i) -> __m256 {
        // SAFETY: see above.
        unsafe {
            match n {
                8 => _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index),
                16 => {
                    // Of the two halves of the table the one that the index's fourth bit names: moved up, it is the
                    // sign.
                    let low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
                    let high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.add(8)), index);
                    _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index)))
                }
                _ => _mm256_i32gather_ps::<4>(table, index),
            }
        }
    }
    #[inline(always)]
    unsafe fn entries(self, table: *const u32, index: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_i32gather_epi32::<4>(table.cast(), index) }
    }
    #[inline(always)]
    fn signed(self, a: __m256i, signs: __m256i, from: usize, zero: u8) -> __m256i {
        // SAFETY: see above.
        unsafe {
            // The byte with the bits, for all four of its lane.
            let lane =
                _mm256_setr_epi32(0, 0x0404_0404, 0x0808_0808, 0x0C0C_0C0C, 0, 0x0404_0404, 0x0808_0808, 0x0C0C_0C0C);
            let signs = _mm256_shuffle_epi8(signs, _mm256_add_epi8(lane, _mm256_set1_epi8(from as i8 / 8)));
            let bits = _mm256_set1_epi32(0x0804_0201 << (from % 8));
            let minus = _mm256_cmpeq_epi8(_mm256_and_si256(signs, bits), bits);
            let a = _mm256_sub_epi8(_mm256_xor_si256(a, minus), minus);
            _mm256_add_epi8(a, _mm256_set1_epi8(zero as i8))
        }
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_set1_epi32(x) }
    }
    #[inline(always)]
    unsafe fn spread_i<const PAIR: bool>(self, p: *const i32) -> __m256i {
        // SAFETY: see above.
        unsafe {
            if PAIR {
                _mm256_set1_epi64x(p.cast::<i64>().read_unaligned())
            } else {
                _mm256_set1_epi32(p.read_unaligned())
            }
        }
    }
    #[inline(always)]
    unsafe fn load_i(self, p: *const u8) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store_i(self, p: *mut u8, a: __m256i) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_si256(p.cast(), a) }
    }
    #[inline(always)]
    unsafe fn widen(self, p: *const u8) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())) }
    }
    #[inline(always)]
    unsafe fn widen_words(self, p: *const u8) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    fn and_i(self, a: __m256i, byte: u8) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_and_si256(a, _mm256_set1_epi8(byte as i8)) }
    }
    #[inline(always)]
    fn or_i(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_or_si256(a, b) }
    }
    #[inline(always)]
    fn shr_i(self, a: __m256i, n: u32) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_srl_epi16(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    fn shl_i(self, a: __m256i, n: u32) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_sll_epi16(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    fn byte(self, a: __m256i, j: usize) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_and_si256(_mm256_srl_epi32(a, _mm_cvtsi32_si128(8 * j as i32)), _mm256_set1_epi32(255)) }
    }
    #[inline(always)]
    fn float(self, a: __m256i) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtepi32_ps(a) }
    }
    #[inline(always)]
    fn sub_i(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_sub_epi32(a, b) }
    }
    #[inline(always)]
    fn sub_bytes(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_sub_epi8(a, b) }
    }
    #[inline(always)]
    fn less_product(self, a: __m256i, b: __m256i, c: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_sub_epi32(a, _mm256_mullo_epi32(b, c)) }
    }
    #[inline(always)]
    fn total(self, bits: usize, state: [__m256i; 2]) -> __m256i {
        if bits > 4 {
            return state[0];
        }
        // SAFETY: see above.
        unsafe { _mm256_add_epi32(state[0], _mm256_madd_epi16(state[1], _mm256_set1_epi16(1))) }
    }
    #[inline(always)]
    fn dot(self, bits: usize, state: [__m256i; 2], c: [__m256i; 2], x: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: see above.
        unsafe {
            let one = _mm256_set1_epi16(1);
            // Of sums of two products of b bits, one fits 16 bits up to b = 7, two up to b = 6, and all eight of a
            // block up to b = 4.
            if bits == 8 {
                let (a, b) = pairs([self.and_i(c[0], 15), self.and_i(c[1], 15)], x);
                let low = _mm256_madd_epi16(_mm256_add_epi16(a, b), one);
                let (a, b) = pairs([self.and_i(self.shr_i(c[0], 4), 15), self.and_i(self.shr_i(c[1], 4), 15)], x);
                let high = _mm256_madd_epi16(_mm256_add_epi16(a, b), _mm256_set1_epi16(16));
                return [_mm256_add_epi32(state[0], _mm256_add_epi32(low, high)), state[1]];
            }
            let (a, b) = pairs(c, x);
            if bits <= 4 {
                return [state[0], _mm256_add_epi16(state[1], _mm256_add_epi16(a, b))];
            }
            let sum = if bits <= 6 {
                _mm256_madd_epi16(_mm256_add_epi16(a, b), one)
            } else {
                _mm256_add_epi32(_mm256_madd_epi16(a, one), _mm256_madd_epi16(b, one))
            };
            [_mm256_add_epi32(state[0], sum), state[1]]
        }
    }
    #[inline(always)]
    fn interleave(self, a: __m256, b: __m256) -> [__m256; 2] {
        // SAFETY: see above.
        unsafe {
            let (low, high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            [_mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high)]
        }
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
            let (a, b) = (_mm256_loadu_si256(a.cast()), _mm256_loadu_si256(b.cast()));
            let (low, high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
            _mm256_storeu_si256(out.cast(), _mm256_permute2x128_si256::<0x20>(low, high));
            _mm256_storeu_si256(out.add(32).cast(), _mm256_permute2x128_si256::<0x31>(low, high));
        }
    }
    #[inline(always)]
    unsafe fn pick(self, x: *const i8, index: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(x.cast())), index) }
    }
    #[inline(always)]
    fn up_i(self, a: __m256i, n: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_sllv_epi32(a, n) }
    }
    #[inline(always)]
    fn xor_i(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_xor_si256(a, b) }
    }
    #[inline(always)]
    unsafe fn tops(self, p: *const f32) -> __m256 {
        // SAFETY: see above.
        unsafe {
            let a = larger(_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(8).cast()));
            let b = larger(_mm256_loadu_si256(p.add(16).cast()), _mm256_loadu_si256(p.add(24).cast()));
            _mm256_castsi256_ps(_mm256_max_epi32(a, b))
        }
    }
    #[inline(always)]
    unsafe fn row_tops(self, p: *const f32) -> __m256 {
        // SAFETY: see above.
        unsafe {
            let [a, b, c, d] = [half_tops(p), half_tops(p.add(8)), half_tops(p.add(16)), half_tops(p.add(24))];
            let ab = _mm256_max_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
            let cd = _mm256_max_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
            let all = _mm256_max_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
            _mm256_castsi256_ps(all)
        }
    }
    #[inline(always)]
    unsafe fn words(self, p: *const f32, by: f32) -> [__m256i; 2] {
        // SAFETY: see above.
        unsafe {
            let by = _mm256_set1_ps(by);
            [two_to_words(p, by), two_to_words(p.add(16), by)]
        }
    }
    #[inline(always)]
    unsafe fn load_w(self, p: *const i16) -> [__m256i; 2] {
        // SAFETY: see above.
        unsafe { [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(16).cast())] }
    }
    #[inline(always)]
    unsafe fn store_w(self, p: *mut i16, a: [__m256i; 2]) {
        // SAFETY: see above.
        unsafe {
            _mm256_storeu_si256(p.cast(), a[0]);
            _mm256_storeu_si256(p.add(16).cast(), a[1]);
        }
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut i8, a: [__m256i; 2]) {
        // SAFETY: see above.
        unsafe {
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            let bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a[0], a[1]), order);
            _mm256_storeu_si256(p.cast(), bytes);
        }
    }
    #[inline(always)]
    fn splat_w(self, first: i16, second: i16) -> [__m256i; 2] {
        // SAFETY: see above.
        unsafe { [_mm256_set1_epi16(first), _mm256_set1_epi16(second)] }
    }
    #[inline(always)]
    fn sub_w(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: see above.
        unsafe { [_mm256_sub_epi16(a[0], b[0]), _mm256_sub_epi16(a[1], b[1])] }
    }
    #[inline(always)]
    fn low_w(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: see above.
        unsafe { [_mm256_mullo_epi16(a[0], b[0]), _mm256_mullo_epi16(a[1], b[1])] }
    }
    #[inline(always)]
    fn high_w(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: see above.
        unsafe { [_mm256_mulhrs_epi16(a[0], b[0]), _mm256_mulhrs_epi16(a[1], b[1])] }
    }
    #[inline(always)]
    fn down_w<const N: u32>(self, a: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: see above.
        unsafe {
            let n = _mm_cvtsi32_si128(N as i32);
            [_mm256_sra_epi16(a[0], n), _mm256_sra_epi16(a[1], n)]
        }
    }
    #[inline(always)]
    fn products_w(self, a: [__m256i; 2], b: [__m256i; 2]) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_add_epi32(_mm256_madd_epi16(a[0], b[0]), _mm256_madd_epi16(a[1], b[1])) }
    }
}

/// Of the vectors at `p` and four after it, the larger lanes of both halves of each: a half for each.
/// # Safety
/// `p` is readable for 40 values; the processor has AVX2.
#[inline(always)]
unsafe fn half_tops(p: *const f32) -> __m256i {
    // SAFETY: as the caller promises.
    unsafe {
        let (a, b) = (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast()));
        _mm256_max_epi32(_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b))
    }
}

/// The larger of two vectors of f32 without their signs, as bits: those of a NaN are larger than any number's.
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn larger(a: __m256i, b: __m256i) -> __m256i {
    // SAFETY: as the caller promises.
    unsafe {
        let magnitude = _mm256_set1_epi32(i32::MAX);
        _mm256_max_epi32(_mm256_and_si256(a, magnitude), _mm256_and_si256(b, magnitude))
    }
}

/// 16 values times `by` as words, the quarters of each eight by turns.
/// # Safety
/// `p` is readable for 16 values; the processor has AVX2.
#[inline(always)]
unsafe fn two_to_words(p: *const f32, by: __m256) -> __m256i {
    // SAFETY: as the caller promises.
    unsafe {
        let a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(p), by));
        let b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(p.add(8)), by));
        _mm256_packs_epi32(a, b)
    }
}

/// Sums of the lower halves of four vectors, and of their upper halves.
/// # Safety
/// `p` is readable for 32 values; the processor has AVX.
#[inline(always)]
unsafe fn quarter_sums(p: *const f32) -> __m256 {
    // SAFETY: as the caller promises.
    unsafe {
        let a = _mm256_hadd_ps(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8)));
        _mm256_hadd_ps(a, _mm256_hadd_ps(_mm256_loadu_ps(p.add(16)), _mm256_loadu_ps(p.add(24))))
    }
}

/// See [`Simd::keep`].
/// # Safety
/// As there; the processor has AVX2 and POPCNT.
#[inline(always)]
pub(super) unsafe fn keep(x: *const i8, mask: u32, out: *mut i8) {
    // SAFETY: as the caller promises: the last of the eight bytes that are written lies before `8 * i + 8`.
    unsafe {
        // Whoever reads it does so later: a load of what several stores have just written would wait for all of them.
        _mm256_storeu_si256(out.cast(), _mm256_setzero_si256());
        let (mut n, mut i) = (0, 0);
        while i < 4 {
            let m = (mask >> (8 * i) & 255) as usize;
            let order = _mm_loadl_epi64(COMPRESS[m].as_ptr().cast());
            let v = _mm_shuffle_epi8(_mm_loadl_epi64(x.add(8 * i).cast()), order);
            _mm_storel_epi64(out.add(n).cast(), v);
            n += m.count_ones() as usize;
            i += 1;
        }
    }
}

/// Sums of two neighbouring products each, for two vectors. A function, as a closure would be compiled without the
/// instruction set.
/// # Safety
/// The processor has the instruction; sums fit 16 bits.
#[inline(always)]
unsafe fn pairs(c: [__m256i; 2], x: [__m256i; 2]) -> (__m256i, __m256i) {
    // SAFETY: as the caller promises.
    unsafe { (_mm256_maddubs_epi16(c[0], x[0]), _mm256_maddubs_epi16(c[1], x[1])) }
}
