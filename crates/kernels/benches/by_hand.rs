//! What a person would write for one row of the table: 4-bit codes in groups of 32 against bytes, one row of x, AVX2. The generic kernel has to
//! come within a tenth of it.

/// Codes in panels of 16 rows as the crate has them, a scale in f16 for every row and block.
#[cfg(target_arch = "x86_64")]
pub struct Matrix {
    blocks: usize,
    codes: Vec<u8>,
    scales: Vec<u16>,
}

#[cfg(target_arch = "x86_64")]
impl Matrix {
    /// Any codes and scales: only time matters.
    pub fn new(rows: usize, cols: usize) -> Matrix {
        let blocks = cols / 32;
        let codes = (0..rows * cols / 2).map(|i| (i * 37) as u8).collect();
        Matrix { blocks, codes, scales: vec![0x2000; rows * blocks] }
    }

    /// `out = W x`, with x quantized here.
    pub fn multiply(&self, x: &[f32], codes: &mut [i8], meta: &mut [(f32, i32)], out: &mut [f32]) {
        assert!(
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
        );
        assert!(x.len() == self.blocks * 32 && codes.len() == x.len() && meta.len() == self.blocks);
        assert!(out.len() * x.len() == self.codes.len() * 2);
        // SAFETY: the features and lengths were just checked.
        unsafe {
            quantize(x, codes, meta);
            self.panels(codes, meta, out);
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn panels(&self, x: &[i8], meta: &[(f32, i32)], out: &mut [f32]) {
        use std::arch::x86_64::*;
        let (low, one) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
        for (p, out) in out.chunks_exact_mut(16).enumerate() {
            let (mut a, mut b) = (_mm256_setzero_ps(), _mm256_setzero_ps());
            for (k, &(xs, bias)) in meta.iter().enumerate() {
                // SAFETY: the caller checked the lengths.
                unsafe {
                    let codes = self.codes.as_ptr().add((p * self.blocks + k) * 256);
                    let scales = self.scales.as_ptr().add((p * self.blocks + k) * 16);
                    let x = x.as_ptr().add(32 * k).cast::<i32>();
                    let (mut s, mut t) = (_mm256_setzero_si256(), _mm256_setzero_si256());
                    for o in 0..4 {
                        let (x0, x1) = (_mm256_set1_epi32(*x.add(2 * o)), _mm256_set1_epi32(*x.add(2 * o + 1)));
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

/// Blocks of 32 to bytes, as the crate does it, with the instructions that the product uses: slower rounding here would flatter the other side.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quantize(x: &[f32], codes: &mut [i8], meta: &mut [(f32, i32)]) {
    use std::arch::x86_64::*;
    let sign = _mm256_set1_ps(-0.0);
    for ((x, codes), meta) in x.chunks_exact(32).zip(codes.chunks_exact_mut(32)).zip(meta.iter_mut()) {
        // SAFETY: chunks of 32 values.
        unsafe {
            let p = x.as_ptr();
            let v =
                [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8)), _mm256_loadu_ps(p.add(16)), _mm256_loadu_ps(p.add(24))];
            let a = _mm256_max_ps(_mm256_andnot_ps(sign, v[0]), _mm256_andnot_ps(sign, v[1]));
            let b = _mm256_max_ps(_mm256_andnot_ps(sign, v[2]), _mm256_andnot_ps(sign, v[3]));
            let t = _mm256_max_ps(a, b);
            let t = _mm_max_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps::<1>(t));
            let t = _mm_max_ps(t, _mm_movehl_ps(t, t));
            let top = _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
            let inverse = _mm256_set1_ps(if top < 1e-30 { 0.0 } else { 127.0 / top });
            // Conversion rounds to the nearest, ties to even.
            let mut q = [_mm256_setzero_si256(); 4];
            for i in 0..4 {
                q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
            }
            let sum = _mm256_add_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3]));
            let sum = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
            let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0x4E>(sum));
            let sum = _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32::<0xB1>(sum)));
            let bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            _mm256_storeu_si256(codes.as_mut_ptr().cast(), _mm256_permutevar8x32_epi32(bytes, order));
            *meta = (top / 127.0, -8 * sum);
        }
    }
}
