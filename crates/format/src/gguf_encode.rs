//! Encoding to GGUF block types: the scales of a block from its values and how much each of their errors counts.
//!
//! Several spacings are tried for each run, each made better by least squares in turns with rounding, and the best is
//! kept. Where scales of runs are integers under f16 of the block, the integers' neighbours and the f16 are then tried
//! again against the errors of the whole, in turns, as long as that helps.

use crate::GgufType;
use crate::gguf_grid::{BlockGrid, Form, as_f16, inverse};

impl GgufType {
    /// Encodes whole blocks. Symmetric blocks of 32 take their scale from the extreme value, as is common; all others
    /// are fitted, where errors count more at large weights (`rms + |w|`), since those meet the largest products. A
    /// scale beyond the range of f16 is clamped to the largest f16, so that a finite input never decodes to infinities.
    /// Panics where `values` are not whole blocks, and for types that are only read (`is_written`).
    #[track_caller]
    pub fn encode(self, values: &[f32]) -> Vec<u8> {
        self.encode_by(values, |block, _| match self {
            GgufType::Q4_0 | GgufType::Q5_0 | GgufType::Q8_0 => self.to_extreme(block),
            _ => self.fit(block, &by_size(block)),
        })
    }

    /// Encodes whole blocks, every scale fitted; the error of `values[i]` counts `weights[i]`, which is not negative.
    /// Without any weights as [`GgufType::encode`] weighs.
    #[track_caller]
    pub fn encode_weighted(self, values: &[f32], weights: &[f32]) -> Vec<u8> {
        assert!(weights.is_empty() || weights.len() == values.len(), "weights of other values");
        self.encode_by(values, |block, at| match weights.get(at..at + block.len()) {
            Some(weights) if !weights.is_empty() => self.fit(block, weights),
            _ => self.fit(block, &by_size(block)),
        })
    }

    #[track_caller]
    fn encode_by(self, values: &[f32], grid: impl Fn(&[f32], usize) -> BlockGrid) -> Vec<u8> {
        let n = self.block();
        assert_eq!(values.len() % n, 0, "{} values are not whole blocks of {self:?}", values.len());
        let mut out = Vec::with_capacity(values.len() / n * self.block_bytes());
        let mut codes = vec![0; n];
        for (b, block) in values.chunks_exact(n).enumerate() {
            let grid = grid(block, b * n);
            codes.iter_mut().enumerate().for_each(|(i, code)| *code = grid.code(i, block[i]));
            grid.write(&codes, &mut out);
        }
        out
    }

    /// The scale that meets the signed value of largest magnitude with the lowest level.
    fn to_extreme(self, block: &[f32]) -> BlockGrid {
        let form = self.form();
        let top = extreme(block);
        let s = if self == GgufType::Q8_0 { top.abs() / form.levels.1 } else { top / form.levels.0 };
        BlockGrid { kind: self, d: as_f16(s), dmin: 0.0, scales: [1; 16], mins: [0; 16] }
    }

    /// The scales of one block that serve its `values` best, where the error of each counts its weight (none negative;
    /// all zero: all the same). What is no finite number counts nothing. Panics where there are not as many of both as
    /// the block has values.
    #[track_caller]
    pub fn fit(self, values: &[f32], weights: &[f32]) -> BlockGrid {
        let (n, form) = (self.block(), self.form());
        assert_eq!((values.len(), weights.len()), (n, n), "values and weights of a block of {self:?}");
        let size = values.iter().filter(|x| x.is_finite()).fold(0.0f32, |a, x| a.max(x.abs()));
        let most = weights.iter().filter(|x| x.is_finite()).fold(0.0f32, |a, &x| a.max(x));
        let empty = BlockGrid { kind: self, d: 0.0, dmin: 0.0, scales: [1; 16], mins: [0; 16] };
        if size < 1e-30 {
            return empty;
        }
        // Of size 1, so that squares neither vanish nor overflow. A floor keeps least squares solvable.
        let (mut v, mut w) = ([0.0f32; 256], [1.0f32; 256]);
        for i in 0..n {
            if values[i].is_finite() {
                v[i] = values[i] / size;
                w[i] = if most > 0.0 { (weights[i] / most).clamp(1e-6, 1.0) } else { 1.0 };
            } else {
                w[i] = 0.0;
            }
        }
        let (v, w) = (&v[..n], &w[..n]);
        let mut runs = [(0.0f32, 0.0f32); 16];
        for ((run, v), w) in runs.iter_mut().zip(v.chunks_exact(form.run)).zip(w.chunks_exact(form.run)) {
            *run = fit_run(&form, v, w);
        }
        let runs = &mut runs[..n / form.run];
        let mut grid = empty;
        if form.scales == (1, 1) {
            (grid.d, grid.dmin) = (as_f16(runs[0].0 * size), as_f16(runs[0].1 * size));
            grid.mins = [form.mins as u8; 16];
            return grid;
        }
        // The integers of the largest scale and minimum are the ends of their ranges.
        let scale = runs.iter().fold(0.0f32, |t, r| if r.0.abs() > t.abs() { r.0 } else { t });
        let end = if form.scales.0 < 0 { form.scales.0 } else { form.scales.1 };
        grid.d = as_f16(scale * size / end as f32);
        if form.mins > 0 {
            grid.dmin = as_f16(runs.iter().fold(0.0f32, |t, r| t.max(r.1)) * size / form.mins as f32);
        }
        let (unit, min_unit) = (inverse(grid.d) * size, inverse(grid.dmin) * size);
        for (r, (s, m)) in runs.iter().enumerate() {
            grid.scales[r] = (s * unit).round().clamp(form.scales.0 as f32, form.scales.1 as f32) as i16;
            grid.mins[r] = (m * min_unit).round().clamp(0.0, form.mins as f32) as u8;
        }
        improved(&form, grid, size, v, w)
    }
}

/// `grid` with other integers for its runs and other f16, as long as the error falls. Values are in units of `size`.
fn improved(form: &Form, mut grid: BlockGrid, size: f32, v: &[f32], w: &[f32]) -> BlockGrid {
    let n = form.run;
    let error = |grid: &BlockGrid, r: usize| {
        let (s, m) = grid.affine(r);
        run_error(form, &v[r * n..][..n], &w[r * n..][..n], s / size, m / size)
    };
    let mut errors = [0.0f32; 16];
    let runs = v.len() / n;
    (0..runs).for_each(|r| errors[r] = error(&grid, r));
    for _ in 0..3 {
        for (r, least) in errors.iter_mut().enumerate().take(runs) {
            let mut best = grid;
            for moved in grid.neighbours(r) {
                let e = error(&moved, r);
                if e < *least {
                    (best, *least) = (moved, e);
                }
            }
            grid = best;
        }
        // value = d a - dmin b for the codes found.
        let (mut aa, mut ab, mut bb, mut ax, mut bx) = (0.0f64, 0.0f64, 0.0f64, 0.0f64, 0.0f64);
        for r in 0..runs {
            let (s, m) = grid.affine(r);
            let sums = sums(form, &v[r * n..][..n], &w[r * n..][..n], s / size, m / size);
            let (a, b) = (f64::from(grid.scales[r]), f64::from(grid.mins[r]));
            let [n, q1, q2, x1, xq, _] = sums.map(f64::from);
            aa += a * a * q2;
            ab -= a * b * q1;
            bb += b * b * n;
            ax += a * xq;
            bx -= b * x1;
        }
        let det = aa * bb - ab * ab;
        let (d, dmin) = if bb > 0.0 && det > 1e-12 * aa * bb {
            ((bb * ax - ab * bx) / det, (aa * bx - ab * ax) / det)
        } else if aa > 0.0 {
            (ax / aa, 0.0)
        } else {
            break;
        };
        let Some(other) = grid.with_units(d as f32 * size, dmin as f32 * size) else { break };
        let mut those = [0.0f32; 16];
        (0..runs).for_each(|r| those[r] = error(&other, r));
        if those.iter().sum::<f32>() >= errors.iter().sum() {
            break;
        }
        (grid, errors) = (other, those);
    }
    grid
}

/// The signed value of largest magnitude.
fn extreme(v: &[f32]) -> f32 {
    v.iter().fold(0.0f32, |t, &x| if x.abs() > t.abs() { x } else { t })
}

/// How much an error at each value counts where nothing is known.
fn by_size(v: &[f32]) -> Vec<f32> {
    let size = extreme(v).abs().max(f32::MIN_POSITIVE);
    let rms = (v.iter().map(|x| (x / size) * (x / size)).sum::<f32>() / v.len() as f32).sqrt();
    v.iter().map(|x| rms + x.abs() / size).collect()
}

/// The weighted error of a run under a scale and a minimum.
fn run_error(form: &Form, v: &[f32], w: &[f32], s: f32, m: f32) -> f32 {
    let inverse = inverse(s);
    let mut lanes = [0.0f32; 8];
    for (v, w) in v.chunks_exact(8).zip(w.chunks_exact(8)) {
        for i in 0..8 {
            let e = s * form.nearest((v[i] + m) * inverse) - m - v[i];
            lanes[i] += e * e * w[i];
        }
    }
    lanes.iter().sum()
}

/// Σw, Σwq, Σwq², Σwx, Σwxq, Σwx² over a run, q the nearest levels.
fn sums(form: &Form, v: &[f32], w: &[f32], s: f32, m: f32) -> [f32; 6] {
    let inverse = inverse(s);
    let mut lanes = [[0.0f32; 8]; 6];
    for (v, w) in v.chunks_exact(8).zip(w.chunks_exact(8)) {
        for i in 0..8 {
            let q = form.nearest((v[i] + m) * inverse);
            let (wq, wx) = (w[i] * q, w[i] * v[i]);
            lanes[0][i] += w[i];
            lanes[1][i] += wq;
            lanes[2][i] += wq * q;
            lanes[3][i] += wx;
            lanes[4][i] += wx * q;
            lanes[5][i] += wx * v[i];
        }
    }
    lanes.map(|l| l.iter().sum())
}

/// The scale and the minimum that serve a run best: several starts, each brought nearer by least squares.
fn fit_run(form: &Form, v: &[f32], w: &[f32]) -> (f32, f32) {
    let mut best = (0.0f32, 0.0f32);
    let mut least = f32::INFINITY;
    let mut attempt = |mut s: f32, mut m: f32| {
        for turn in 0..3 {
            let e = run_error(form, v, w, s, m);
            if e < least {
                (best, least) = ((s, m), e);
            }
            if turn == 2 {
                break;
            }
            let [n, q1, q2, x1, xq, _] = sums(form, v, w, s, m);
            if form.mins == 0 {
                s = xq / q2;
            } else {
                let det = n * q2 - q1 * q1;
                (s, m) = ((n * xq - q1 * x1) / det, (q1 * xq - q2 * x1) / det);
                if m < 0.0 && form.mins > 1 {
                    (s, m) = (xq / q2, 0.0);
                }
            }
            if !(s.is_finite() && m.is_finite() && (s > 0.0 || form.mins == 0)) {
                break;
            }
        }
    };
    if form.mins == 0 {
        let top = extreme(v);
        if top == 0.0 {
            return (0.0, 0.0);
        }
        // Both ends of the levels at the extreme, and nearer levels: values beyond the last are cut off.
        let unit = if form.table { 16.0 } else { 1.0 };
        for end in [form.levels.0, form.levels.1] {
            let reach = end.abs() / unit;
            let (near, far) = ((0.35 * reach).min(3.0), 0.8);
            for step in 0..=12 {
                let t = reach + far - (near + far) * step as f32 / 12.0;
                attempt(top / (t * unit).copysign(end), 0.0);
            }
            attempt(top / end, 0.0);
        }
        return best;
    }
    let (low, high) = v.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), &x| (a.min(x), b.max(x)));
    let low = if form.mins > 1 { low.min(0.0) } else { low };
    if high <= low {
        return (0.0, -low);
    }
    // The ends of the range, and ends some way inside it.
    let inside = (high - low) * 0.3 / (form.levels.1 + 1.0);
    for below in 0..4 {
        for above in 0..4 {
            let from = low + below as f32 * inside;
            let s = (high - above as f32 * inside - from) / form.levels.1;
            attempt(s, if form.mins > 1 { (-from).max(0.0) } else { -from });
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Rng;

    use crate::gguf::WRITTEN;

    fn relative(kind: GgufType, v: &[f32]) -> f64 {
        let mut back = vec![0.0; v.len()];
        kind.decode(&kind.encode(v), &mut back);
        let sum = |f: &dyn Fn(usize) -> f32| (0..v.len()).map(|i| f64::from(f(i)).powi(2)).sum::<f64>();
        (sum(&|i| back[i] - v[i]) / sum(&|i| v[i])).sqrt()
    }

    /// Rounding of normal values costs what so many bits must cost, and no more.
    #[test]
    fn normal_values_come_back_within_their_bits() {
        let mut rng = Rng::new(7);
        let v: Vec<f32> = (0..256 * 64).map(|_| 0.02 * rng.normal()).collect();
        let most = [0.095, 0.084, 0.047, 0.041, 0.0065, 0.33, 0.16, 0.074, 0.037, 0.019, 0.085, 0.085];
        for (kind, most) in WRITTEN.into_iter().zip(most) {
            let e = relative(kind, &v);
            assert!(e < most, "{kind:?}: relative error {e}");
            assert!(e > 0.5 * most, "{kind:?}: relative error {e} is below what so many bits can do");
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
                let bytes = kind.encode(&v);
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
        for kind in WRITTEN {
            let (mut v, mut back) = (vec![0.25; 256], vec![0.0; 256]);
            (v[3], v[40]) = (f32::NAN, f32::INFINITY);
            kind.decode(&kind.encode_weighted(&v, &[f32::NAN; 256]), &mut back);
            assert!(back.iter().all(|x| x.is_finite()), "{kind:?} of a NaN");
            assert!((back[200] - 0.25).abs() < 0.01, "{kind:?}: a NaN spoils its neighbours");
        }
    }

    /// What a code is worth by the grid is what the decoder makes of the bytes.
    #[test]
    fn grids_say_what_the_decoder_gives() {
        let mut rng = Rng::new(11);
        for kind in WRITTEN {
            let n = kind.block();
            for round in 0..40 {
                let size = [0.02, 1e-7, 3e4][round % 3];
                let v: Vec<f32> = (0..n).map(|_| size * (rng.normal() + (round % 4) as f32 - 1.0)).collect();
                let w: Vec<f32> = (0..n).map(|_| rng.normal().abs()).collect();
                let grid = kind.fit(&v, &w);
                // Codes of all kinds, not only those that the values get.
                let codes: Vec<u8> = (0..n)
                    .map(|i| if i % 2 == 0 { grid.code(i, v[i]) } else { grid.code(i, size * 9.0 * rng.normal()) })
                    .collect();
                let (mut bytes, mut back) = (Vec::new(), vec![0.0; n]);
                grid.write(&codes, &mut bytes);
                assert_eq!(bytes.len(), kind.block_bytes(), "{kind:?}");
                kind.decode(&bytes, &mut back);
                for i in 0..n {
                    assert_eq!(back[i], grid.value(i, codes[i]), "{kind:?} at {i} of block {round}");
                    let (a, b) = grid.parts(i, codes[i]);
                    let (d, dmin) = grid.units();
                    assert!((d * a - dmin * b - back[i]).abs() <= 1e-5 * (d * a).abs().max(dmin * b).max(1e-30));
                    // No other code of the place is nearer.
                    let near = grid.value(i, grid.code(i, v[i]));
                    for code in 0..=grid.code(i, f32::INFINITY).max(grid.code(i, f32::NEG_INFINITY)) {
                        let other = grid.value(i, code.max(u8::from(kind == GgufType::Q8_0)));
                        assert!((near - v[i]).abs() <= (other - v[i]).abs() * 1.001 + 1e-12, "{kind:?} {i} {code}");
                    }
                }
            }
        }
    }

    #[test]
    fn weights_lower_the_weighted_error() {
        let mut rng = Rng::new(12);
        let v: Vec<f32> = (0..256 * 16).map(|_| 0.02 * rng.normal()).collect();
        let w: Vec<f32> = (0..v.len()).map(|_| rng.normal().powi(4)).collect();
        for kind in WRITTEN {
            let error = |bytes: &[u8]| -> f64 {
                let mut back = vec![0.0; v.len()];
                kind.decode(bytes, &mut back);
                (0..v.len()).map(|i| f64::from(back[i] - v[i]).powi(2) * f64::from(w[i])).sum()
            };
            let (with, without) = (error(&kind.encode_weighted(&v, &w)), error(&kind.encode_weighted(&v, &[])));
            assert!(with <= without, "{kind:?}: {with} with weights, {without} without");
            let same = error(&kind.encode_weighted(&v, &vec![0.0; v.len()]));
            assert!(same < 2.0 * without, "{kind:?}: no weights at all");
            assert!(without <= 1.02 * error(&kind.encode(&v)), "{kind:?}: a fit is not worse than the extreme's scale");
        }
    }
}
