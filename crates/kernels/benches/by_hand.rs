//! What a person would write for one row of the table: 4-bit codes in groups of 32 against bytes, one row of x, AVX2.
//! The generic kernel has to come within a tenth of it. It does the same work to the same bits, the search for a
//! block's level included, which the bench holds it to.

use std::arch::x86_64::*;

/// Codes in panels of 16 rows as the crate has them, a scale in f16 for every row and block.
pub struct Matrix {
    blocks: usize,
    codes: Vec<u8>,
    scales: Vec<u16>,
}

impl Matrix {
    /// Of `codes`, `[rows, cols]`, with one scale, whose zero is 8. Rows come in sixteens, columns in 256s.
    pub fn new(rows: usize, cols: usize, codes: &[u8], scale: half::f16) -> Matrix {
        assert!(rows.is_multiple_of(16) && cols.is_multiple_of(256) && codes.len() == rows * cols);
        let blocks = cols / 32;
        let mut packed = vec![0; rows * cols / 2];
        for (r, row) in codes.chunks_exact(cols).enumerate() {
            for (c, code) in row.iter().enumerate() {
                let block = &mut packed[(r / 16 * blocks + c / 32) * 256..][..256];
                block[c % 32 / 8 * 64 + r % 16 * 4 + c % 4] |= code << (c % 8 / 4 * 4);
            }
        }
        Matrix { blocks, codes: packed, scales: vec![scale.to_bits(); rows * blocks] }
    }

    /// `out = W x`, with x quantized here; with `PREFETCH`, the matrix is prefetched a kilobyte ahead, which is good
    /// where it comes from memory.
    pub fn multiply<const PREFETCH: bool>(
        &self,
        x: &[f32],
        codes: &mut [i8],
        meta: &mut [(f32, i32)],
        out: &mut [f32],
    ) {
        assert!(
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
        );
        assert!(x.len() == self.blocks * 32 && codes.len() == x.len() && meta.len() == self.blocks);
        assert!(out.len() * x.len() == self.codes.len() * 2);
        // SAFETY: the features and lengths were just checked.
        unsafe {
            quantize(x, codes, meta);
            self.panels::<PREFETCH>(codes, meta, out);
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn panels<const PREFETCH: bool>(&self, x: &[i8], meta: &[(f32, i32)], out: &mut [f32]) {
        let (low, one) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
        for (p, out) in out.chunks_exact_mut(16).enumerate() {
            let (mut a, mut b) = (_mm256_setzero_ps(), _mm256_setzero_ps());
            for (k, &(xs, bias)) in meta.iter().enumerate() {
                // SAFETY: the caller checked the lengths; what is asked for need not be there.
                unsafe {
                    let codes = self.codes.as_ptr().add((p * self.blocks + k) * 256);
                    let scales = self.scales.as_ptr().add((p * self.blocks + k) * 16);
                    if PREFETCH {
                        for line in 0..4 {
                            _mm_prefetch::<_MM_HINT_T1>(codes.wrapping_add(1024 + 64 * line).cast());
                        }
                        _mm_prefetch::<_MM_HINT_T0>(scales.wrapping_add(512).cast());
                    }
                    let x = x.as_ptr().add(32 * k).cast::<i32>();
                    let (mut s, mut t) = (_mm256_setzero_si256(), _mm256_setzero_si256());
                    for o in 0..4 {
                        let x0 = _mm256_set1_epi32(x.add(2 * o).read_unaligned());
                        let x1 = _mm256_set1_epi32(x.add(2 * o + 1).read_unaligned());
                        let c = _mm256_loadu_si256(codes.add(64 * o).cast());
                        let d = _mm256_loadu_si256(codes.add(64 * o + 32).cast());
                        s = _mm256_add_epi16(s, _mm256_maddubs_epi16(_mm256_and_si256(c, low), x0));
                        t = _mm256_add_epi16(t, _mm256_maddubs_epi16(_mm256_and_si256(d, low), x0));
                        let (c, d) = (_mm256_srli_epi16::<4>(c), _mm256_srli_epi16::<4>(d));
                        s = _mm256_add_epi16(s, _mm256_maddubs_epi16(_mm256_and_si256(c, low), x1));
                        t = _mm256_add_epi16(t, _mm256_maddubs_epi16(_mm256_and_si256(d, low), x1));
                    }
                    let bias = _mm256_set1_epi32(bias);
                    let s = _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(s, one), bias));
                    let t = _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(t, one), bias));
                    let xs = _mm256_set1_ps(xs);
                    let u = _mm256_cvtph_ps(_mm_loadu_si128(scales.cast()));
                    let v = _mm256_cvtph_ps(_mm_loadu_si128(scales.add(8).cast()));
                    a = _mm256_fmadd_ps(s, _mm256_mul_ps(u, xs), a);
                    b = _mm256_fmadd_ps(t, _mm256_mul_ps(v, xs), b);
                }
            }
            // SAFETY: a chunk of 16.
            unsafe {
                _mm256_storeu_ps(out.as_mut_ptr(), a);
                _mm256_storeu_ps(out.as_mut_ptr().add(8), b);
            }
        }
    }
}

/// Eight vectors of eight to one that has all of each in a lane, by `$op`.
macro_rules! fold {
    ($rows:expr, $op:ident) => {{
        let r = $rows;
        let [a, b, c, d] = [0, 1, 2, 3].map(|i: usize| {
            $op(_mm256_permute2x128_si256::<0x20>(r[i], r[i + 4]), _mm256_permute2x128_si256::<0x31>(r[i], r[i + 4]))
        });
        let ab = $op(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
        let cd = $op(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
        $op(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd))
    }};
}

/// Blocks of 32 to bytes as the crate does it, eight at a time: to words, then to codes under the one of four levels
/// that loses least, with the scale that suits the codes best. Of finite x.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quantize(x: &[f32], codes: &mut [i8], meta: &mut [(f32, i32)]) {
    let (magnitude, least) = (_mm256_set1_epi32(i32::MAX), _mm256_set1_ps(1e-30));
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let nothing = _mm256_setzero_si256();
    let squared = |a: [__m256i; 2], b: [__m256i; 2]| {
        _mm256_add_epi32(_mm256_madd_epi16(a[0], b[0]), _mm256_madd_epi16(a[1], b[1]))
    };
    for ((x, codes), meta) in x.chunks_exact(256).zip(codes.chunks_exact_mut(256)).zip(meta.chunks_exact_mut(8)) {
        // SAFETY: eight blocks of each.
        unsafe {
            let mut rows = [nothing; 8];
            for (b, row) in rows.iter_mut().enumerate() {
                let p = x.as_ptr().add(32 * b).cast::<__m256i>();
                let v = [0, 1, 2, 3].map(|i| _mm256_and_si256(magnitude, _mm256_loadu_si256(p.add(i))));
                *row = _mm256_max_epi32(_mm256_max_epi32(v[0], v[1]), _mm256_max_epi32(v[2], v[3]));
            }
            let top = _mm256_castsi256_ps(fold!(rows, _mm256_max_epi32));
            let some = _mm256_cmp_ps::<_CMP_GE_OQ>(top, least);
            let mut by = [0.0f32; 8];
            _mm256_storeu_ps(by.as_mut_ptr(), _mm256_and_ps(some, _mm256_div_ps(_mm256_set1_ps(32767.0), top)));
            let (mut words, mut lost) = ([[nothing; 2]; 8], [[nothing; 8]; 4]);
            for b in 0..8 {
                let (p, by) = (x.as_ptr().add(32 * b), _mm256_set1_ps(by[b]));
                let q = [0, 8, 16, 24].map(|i| _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(p.add(i)), by)));
                let w = [_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3])];
                words[b] = w;
                let mut rest = w.map(|w| _mm256_mullo_epi16(w, _mm256_set1_epi16(254)));
                for lost in &mut lost {
                    let near = rest.map(|r| _mm256_srai_epi16::<7>(r));
                    lost[b] = squared(near, near);
                    rest = [0, 1].map(|i: usize| _mm256_sub_epi16(rest[i], _mm256_add_epi16(w[i], w[i])));
                }
            }
            let (mut best, mut level) = (_mm256_set1_ps(f32::INFINITY), _mm256_set1_ps(127.0));
            for (lost, l) in lost.iter().zip([127.0f32, 126.0, 125.0, 124.0]) {
                let lost = _mm256_cvtepi32_ps(fold!(lost, _mm256_add_epi32));
                let lost = _mm256_mul_ps(lost, _mm256_set1_ps(1.0 / (l * l)));
                level = _mm256_blendv_ps(level, _mm256_set1_ps(l), _mm256_cmp_ps::<_CMP_LT_OQ>(lost, best));
                best = _mm256_min_ps(lost, best);
            }
            let mut levels = [0i32; 8];
            _mm256_storeu_si256(levels.as_mut_ptr().cast(), _mm256_cvtps_epi32(level));
            let (mut sums, mut powers, mut rests) = ([nothing; 8], [nothing; 8], [nothing; 8]);
            for b in 0..8 {
                let (w, level) = (words[b], levels[b] as i16);
                let code = w.map(|w| _mm256_mulhrs_epi16(w, _mm256_set1_epi16(level)));
                let bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(code[0], code[1]), order);
                _mm256_storeu_si256(codes.as_mut_ptr().add(32 * b).cast(), bytes);
                let rest = w.map(|w| _mm256_srai_epi16::<4>(_mm256_mullo_epi16(w, _mm256_set1_epi16(2 * level))));
                sums[b] = squared(code, [_mm256_set1_epi16(1); 2]);
                powers[b] = squared(code, code);
                rests[b] = squared(rest, code);
            }
            let mut sum = [0i32; 8];
            _mm256_storeu_si256(sum.as_mut_ptr().cast(), fold!(sums, _mm256_add_epi32));
            let powers = _mm256_cvtepi32_ps(fold!(powers, _mm256_add_epi32));
            let rests = _mm256_cvtepi32_ps(fold!(rests, _mm256_add_epi32));
            let fit = _mm256_mul_ps(_mm256_div_ps(rests, powers), _mm256_set1_ps(1.0 / 4096.0));
            let step = _mm256_div_ps(top, _mm256_mul_ps(level, _mm256_set1_ps(32767.0 / 32768.0)));
            let scale = _mm256_and_ps(some, _mm256_mul_ps(step, _mm256_add_ps(_mm256_set1_ps(1.0), fit)));
            let mut scales = [0.0f32; 8];
            _mm256_storeu_ps(scales.as_mut_ptr(), scale);
            for b in 0..8 {
                meta[b] = (scales[b], -8 * sum[b]);
            }
        }
    }
}
