//! Encoding to GGUF block types, from the layouts' definition.
//!
//! The types of 32 take their scale from the extreme value. The K types (256 values: runs with small integer scales
//! under one f16) are fitted: several spacings are tried for each run, each made better by least squares in turns with
//! rounding, and the best is kept. Errors count more where a weight is large (`rms + |w|`), since those meet the
//! largest products.

use half::f16;

use crate::GgufType;

impl GgufType {
    /// Encodes whole blocks; `None` for a type that Lacuna only reads. A scale beyond the range of f16 is clamped to
    /// the largest f16, so that a finite input never decodes to infinities. Panics where `values` are not whole blocks.
    #[track_caller]
    pub fn encode(self, values: &[f32]) -> Option<Vec<u8>> {
        let block: fn(&[f32], &mut Vec<u8>) = match self {
            GgufType::Q4_0 => q4_0,
            GgufType::Q5_0 => q5_0,
            GgufType::Q8_0 => q8_0,
            GgufType::Q4_K => q4_k,
            GgufType::Q6_K => q6_k,
            _ => return None,
        };
        assert_eq!(values.len() % self.block(), 0, "{} values are not whole blocks of {self:?}", values.len());
        let mut out = Vec::with_capacity(values.len() / self.block() * self.block_bytes());
        values.chunks_exact(self.block()).for_each(|v| block(v, &mut out));
        Some(out)
    }
}

/// A scale as f16, clamped to what f16 can say.
fn scale_f16(d: f32) -> f16 {
    f16::from_f32(d.clamp(-65504.0, 65504.0))
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// The signed value of largest magnitude.
fn extreme(v: &[f32]) -> f32 {
    v.iter().fold(0.0f32, |t, &x| if x.abs() > t.abs() { x } else { t })
}

/// Writes a block of 32 symmetric codes of 4, 5 or 8 bits (offset by half their range) under an f16 scale.
pub(crate) fn symmetric_block(kind: GgufType, d: f16, code: impl Fn(usize) -> u8, out: &mut Vec<u8>) {
    out.extend(d.to_le_bytes());
    match kind {
        GgufType::Q8_0 => out.extend((0..32).map(|j| code(j) ^ 0x80)),
        _ => {
            if kind == GgufType::Q5_0 {
                let high = (0..32).fold(0u32, |h, j| h | u32::from(code(j) >> 4) << j);
                out.extend(high.to_le_bytes());
            }
            out.extend((0..16).map(|j| code(j) & 15 | (code(j + 16) & 15) << 4));
        }
    }
}

/// Scale = the signed value of largest magnitude / -8, so that it is met exactly but for the rounding of the scale.
fn q4_0(v: &[f32], out: &mut Vec<u8>) {
    let d = extreme(v) / -8.0;
    let inverse = inverse(d);
    symmetric_block(GgufType::Q4_0, scale_f16(d), |j| (v[j] * inverse + 8.5).clamp(0.0, 15.0) as u8, out);
}

/// As Q4_0 with / -16.
fn q5_0(v: &[f32], out: &mut Vec<u8>) {
    let d = extreme(v) / -16.0;
    let inverse = inverse(d);
    symmetric_block(GgufType::Q5_0, scale_f16(d), |j| (v[j] * inverse + 16.5).clamp(0.0, 31.0) as u8, out);
}

/// Scale = the largest magnitude / 127.
fn q8_0(v: &[f32], out: &mut Vec<u8>) {
    let d = extreme(v).abs() / 127.0;
    let inverse = inverse(d);
    out.extend(scale_f16(d).to_le_bytes());
    out.extend(v.iter().map(|&x| (x * inverse).round().clamp(-127.0, 127.0) as i8 as u8));
}

/// How much an error at each value counts.
fn importance(v: &[f32], w: &mut [f32]) {
    let rms = (v.iter().map(|x| x * x).sum::<f32>() / v.len() as f32).sqrt();
    w.iter_mut().zip(v).for_each(|(w, x)| *w = rms + x.abs());
}

/// The code of `x` under `x = scale * code - min`, 0 to 15.
fn unsigned_code(x: f32, scale: f32, min: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { ((x + min) / scale).round().clamp(0.0, 15.0) }
}

/// Scale and minimum (`value = scale * code - min`, both at least 0, codes 0 to 15) that serve a run best.
fn fit_unsigned(v: &[f32], w: &[f32]) -> (f32, f32) {
    let low = v.iter().fold(0.0f32, |a, &b| a.min(b));
    let high = v.iter().fold(0.0f32, |a, &b| a.max(b));
    if high == low {
        return (0.0, 0.0);
    }
    let error = |s: f32, m: f32| -> f32 {
        v.iter().zip(w).map(|(&x, w)| (s * unsigned_code(x, s, m) - m - x).powi(2) * w).sum()
    };
    let mut best = ((high - low) / 15.0, -low);
    let mut least = error(best.0, best.1);
    for step in 0..24 {
        let (mut s, mut m) = ((high - low) / (13.0 + step as f32 * 0.15), -low);
        for _ in 0..3 {
            // Weighted least squares for the codes that this spacing gives.
            let (mut n, mut q1, mut q2, mut x1, mut xq) = (0.0f32, 0.0f32, 0.0f32, 0.0f32, 0.0f32);
            for (&x, &w) in v.iter().zip(w) {
                let q = unsigned_code(x, s, m);
                n += w;
                q1 += w * q;
                q2 += w * q * q;
                x1 += w * x;
                xq += w * x * q;
            }
            let det = n * q2 - q1 * q1;
            if det <= 0.0 {
                break;
            }
            (s, m) = ((n * xq - q1 * x1) / det, (q1 * xq - q2 * x1) / det);
            if m < 0.0 {
                (s, m) = (xq / q2, 0.0);
            }
            if !(s > 0.0 && s.is_finite() && m.is_finite()) {
                break;
            }
            let e = error(s, m);
            if e < least {
                (best, least) = ((s, m), e);
            }
        }
    }
    best
}

/// d, dmin, 6-bit scales and minima of eight runs of 32, 4-bit codes.
fn q4_k(v: &[f32], out: &mut Vec<u8>) {
    let mut w = [0.0; 256];
    importance(v, &mut w);
    let runs: [(f32, f32); 8] = std::array::from_fn(|g| fit_unsigned(&v[g * 32..][..32], &w[g * 32..][..32]));
    let top = runs.iter().fold((0.0f32, 0.0f32), |t, r| (t.0.max(r.0), t.1.max(r.1)));
    let (mut d, mut dmin) = (scale_f16(top.0 / 63.0), scale_f16(top.1 / 63.0));
    let (mut scales, mut mins) = ([0u8; 8], [0u8; 8]);
    let level = |x: f32, unit: f16| (x * inverse(unit.to_f32())).round().clamp(0.0, 63.0) as u8;
    for g in 0..8 {
        (scales[g], mins[g]) = (level(runs[g].0, d), level(runs[g].1, dmin));
    }
    let encode = |d: f16, dmin: f16, codes: &mut [u8; 256]| -> f32 {
        let mut error = 0.0;
        for (g, run) in v.chunks_exact(32).enumerate() {
            let (s, m) = (d.to_f32() * f32::from(scales[g]), dmin.to_f32() * f32::from(mins[g]));
            for (j, &x) in run.iter().enumerate() {
                let q = unsigned_code(x, s, m);
                codes[g * 32 + j] = q as u8;
                error += (s * q - m - x).powi(2) * w[g * 32 + j];
            }
        }
        error
    };
    let mut codes = [0; 256];
    let mut least = encode(d, dmin, &mut codes);
    // The two f16 again, by least squares for the integers found; kept while that helps.
    for _ in 0..3 {
        let (mut aa, mut ab, mut bb, mut ax, mut bx) = (0.0f64, 0.0f64, 0.0f64, 0.0f64, 0.0f64);
        for (i, &x) in v.iter().enumerate() {
            let (a, b) = (f64::from(scales[i / 32]) * f64::from(codes[i]), f64::from(mins[i / 32]));
            let w = f64::from(w[i]);
            aa += w * a * a;
            ab += w * a * b;
            bb += w * b * b;
            ax += w * a * f64::from(x);
            bx += w * b * f64::from(x);
        }
        let det = aa * bb - ab * ab;
        let (nd, nm) = if det > 0.0 {
            ((bb * ax - ab * bx) / det, (ab * ax - aa * bx) / det)
        } else if aa > 0.0 {
            (ax / aa, 0.0)
        } else {
            break;
        };
        if !(nd > 0.0 && nm >= 0.0) {
            break;
        }
        let (nd, nm, mut other) = (scale_f16(nd as f32), scale_f16(nm as f32), [0; 256]);
        let error = encode(nd, nm, &mut other);
        if error >= least {
            break;
        }
        (d, dmin, codes, least) = (nd, nm, other, error);
    }
    out.extend(d.to_le_bytes());
    out.extend(dmin.to_le_bytes());
    out.extend((0..4).map(|j| scales[j] | scales[j + 4] >> 4 << 6));
    out.extend((0..4).map(|j| mins[j] | mins[j + 4] >> 4 << 6));
    out.extend((4..8).map(|j| scales[j] & 15 | (mins[j] & 15) << 4));
    for pair in codes.chunks_exact(64) {
        out.extend((0..32).map(|j| pair[j] | pair[j + 32] << 4));
    }
}

/// The signed code of `x`, -32 to 31.
fn signed_code(x: f32, scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { (x / scale).round().clamp(-32.0, 31.0) }
}

/// The scale (of either sign) that serves a run best under codes -32 to 31.
fn fit_signed(v: &[f32], w: &[f32]) -> f32 {
    let top = extreme(v);
    if top == 0.0 {
        return 0.0;
    }
    let error = |s: f32| -> f32 { v.iter().zip(w).map(|(&x, w)| (s * signed_code(x, s) - x).powi(2) * w).sum() };
    let mut best = top / -32.0;
    let mut least = error(best);
    for step in -9..=9 {
        let mut s = top / (-32.0 + step as f32 * 0.15);
        for _ in 0..2 {
            let (mut xq, mut qq) = (0.0, 0.0);
            for (&x, &w) in v.iter().zip(w) {
                let q = signed_code(x, s);
                xq += w * x * q;
                qq += w * q * q;
            }
            if qq == 0.0 {
                break;
            }
            s = xq / qq;
            let e = error(s);
            if e < least {
                (best, least) = (s, e);
            }
        }
    }
    best
}

/// 6-bit codes in two parts, sixteen signed scales of 8 bits, d.
fn q6_k(v: &[f32], out: &mut Vec<u8>) {
    let mut w = [0.0; 256];
    importance(v, &mut w);
    let runs: [f32; 16] = std::array::from_fn(|g| fit_signed(&v[g * 16..][..16], &w[g * 16..][..16]));
    let d = scale_f16(extreme(&runs) / -128.0);
    let unit = d.to_f32();
    let scales = runs.map(|s| (s * inverse(unit)).round().clamp(-128.0, 127.0));
    let code = |i: usize| (signed_code(v[i], unit * scales[i / 16]) + 32.0) as u8;
    let at = out.len();
    out.resize(at + 210, 0);
    let b = &mut out[at..];
    for i in 0..256 {
        let (half, run, j, q) = (i / 128, i % 128 / 32, i % 32, code(i));
        b[half * 64 + run % 2 * 32 + j] |= (q & 15) << (run / 2 * 4);
        b[128 + half * 32 + j] |= (q >> 4) << (run * 2);
    }
    b[192..208].iter_mut().zip(scales).for_each(|(b, s)| *b = s as i8 as u8);
    b[208..].copy_from_slice(&d.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Rng;

    const WRITTEN: [GgufType; 5] = [GgufType::Q4_0, GgufType::Q5_0, GgufType::Q8_0, GgufType::Q4_K, GgufType::Q6_K];

    fn relative(kind: GgufType, v: &[f32]) -> f64 {
        let mut back = vec![0.0; v.len()];
        kind.decode(&kind.encode(v).unwrap(), &mut back);
        let sum = |f: &dyn Fn(usize) -> f32| (0..v.len()).map(|i| f64::from(f(i)).powi(2)).sum::<f64>();
        (sum(&|i| back[i] - v[i]) / sum(&|i| v[i])).sqrt()
    }

    /// Rounding of normal values costs what so many bits must cost, and no more.
    #[test]
    fn normal_values_come_back_within_their_bits() {
        let mut rng = Rng::new(7);
        let v: Vec<f32> = (0..256 * 64).map(|_| 0.02 * rng.normal()).collect();
        for (kind, most) in WRITTEN.into_iter().zip([0.095, 0.047, 0.0065, 0.074, 0.019]) {
            let e = relative(kind, &v);
            assert!(e < most, "{kind:?}: relative error {e}");
        }
    }

    /// Values on a type's own grid come back exactly.
    #[test]
    fn what_was_decoded_is_encoded_again_without_loss() {
        let mut rng = Rng::new(8);
        for kind in [GgufType::Q4_0, GgufType::Q5_0] {
            let top = if kind == GgufType::Q4_0 { 8.0 } else { 16.0 };
            // The lowest code is met in every block: the extreme tells the scale.
            let v: Vec<f32> = (0..32 * 64)
                .map(|i| if i % 32 == 5 { -top * 0.125 } else { (rng.below(2 * top as usize) as f32 - top) * 0.125 })
                .collect();
            assert_eq!(relative(kind, &v), 0.0, "{kind:?}");
        }
    }

    #[test]
    fn zeros_constants_and_extremes_stay_finite() {
        for kind in WRITTEN {
            for v in [
                vec![0.0; 256],
                vec![1.5; 256],
                vec![-1.5; 256],
                vec![3e38; 256],
                (0..256).map(|i| if i == 0 { 1e-30 } else { 0.0 }).collect(),
                (0..256).map(|i| if i % 2 == 0 { 60000.0 } else { -60000.0 }).collect::<Vec<f32>>(),
            ] {
                let bytes = kind.encode(&v).unwrap();
                assert_eq!(bytes.len(), 256 / kind.block() * kind.block_bytes());
                let mut back = vec![0.0; 256];
                kind.decode(&bytes, &mut back);
                assert!(back.iter().all(|x| x.is_finite()), "{kind:?} of {}", v[0]);
                if v.iter().all(|x| *x == 0.0) {
                    assert!(back.iter().all(|x| *x == 0.0), "{kind:?} of zeros");
                }
                if v[1].abs() == 1.5 {
                    assert!(back.iter().all(|x| (x - v[1]).abs() < 0.02), "{kind:?} of {}: {}", v[0], back[0]);
                }
            }
        }
        assert!(GgufType::Q2_K.encode(&[0.0; 256]).is_none());
    }
}
