//! AWQ: input channels with large activations get larger weights before rounding, and smaller inputs to match.
//!
//! **Paper.** Ji Lin, Jiaming Tang, Haotian Tang, Shang Yang, Wei-Ming Chen, Wei-Chen Wang, Guangxuan Xiao, Xingyu
//! Dang, Chuang Gan, Song Han, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023,
//! arXiv 2306.00978.
//!
//! **Idea.** `W x = (W diag(s)) (diag(s)⁻¹ x)`. Rounding `W diag(s)` leaves the error `Δ/s` on channel `j`, so that the
//! channels that matter, those with large `|x|`, are protected. `s = s_X^α` with `s_X = mean |x_j|`, and `α` from 0 (no
//! scaling) to 1 is the one of `steps` that loses least: `argmin ‖Q(W diag(s)) diag(s)⁻¹ X - W X‖²`.
//!
//! **Shapes and units.** `w` `[out, in]`; `Σ|x|` `[in]` in the units of the activations; `XᵀX` `[in, in]`; the map is
//! `1/s`, `[in]`, without unit: `s` is divided by `√(max s · min s)`.
//!
//! **Cost.** `steps + 1` times the rounding and `rows · in²` for the loss; memory 4 `in²` bytes and three copies of
//! `rows` rows. Where the model runs, `in` multiplications a token for each matrix, and two bytes for each input.
//!
//! **Departs.** (1) The paper folds `1/s` into the operation before (a norm, `v`, `up`), which costs nothing; here it
//! is a map of the matrix, stored in f16, so that any matrix can have its own and the file's norms stay. (2) So q, k
//! and v, and gate and up, each search alone where the paper gives them one `s`. (3) The loss is worked out of the Gram
//! matrix over `rows` rows of the matrix, spread evenly; the paper runs the layer on a part of the text. (4) Channels
//! below 1e-4 of the largest count as that. (5) The clipping of weights that the authors' code adds is not done: it is
//! another grid.

use lacuna_base::{Mat, MatRef, dense, float};
use lacuna_contract::{Ask, Card, Grid, GridAsk, Made, Method, MethodError, Stats, Transform};
use lacuna_format::{Float, Map};
use serde::Deserialize;

use crate::grid::rtn::Rtn;
use crate::make;

/// The paper's parameters, and the rounding that the search is for.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Awq {
    /// Steps of `α` from 0 to 1; 1 to 1000.
    steps: usize,
    /// Bits of the rounding that follows; 2 to 8.
    bits: u8,
    /// Columns that share a scale there; 0: a whole row.
    group: usize,
    /// Without zero points there.
    symmetric: bool,
    /// Rows that the loss is worked out on, at the most; 1 or more.
    rows: usize,
}

impl Default for Awq {
    fn default() -> Awq {
        Awq { steps: 20, bits: 4, group: 64, symmetric: false, rows: 512 }
    }
}

/// What the smallest channel counts for at the least, of the largest.
const LEAST: f64 = 1e-4;

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "awq",
            paper: "Lin et al.: AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, 2023",
            arxiv: "2306.00978",
            summary: "Input channels with large activations are scaled up in the weights: rounding spares them.",
            system: None,
            verb: "transform",
            needs: &[Ask::InputGram, Ask::InputMagnitudes],
            abilities: &[],
        },
        keys: make::keys::<Awq>,
        make: |given| {
            let p: Awq = make::parameters("awq", given)?;
            let range = |name: &str, n: usize, low: usize, high: usize| match n {
                n if (low..=high).contains(&n) => Ok(()),
                n => Err(MethodError::new(format!("{name} is {n}; it must be {low} to {high}"))),
            };
            range("steps", p.steps, 1, 1000)?;
            range("bits", usize::from(p.bits), 2, 8)?;
            range("rows", p.rows, 1, 1 << 24)?;
            Ok(Made::Transform(Box::new(p)))
        },
    }
}

/// `1/s` as the file holds it, for mean sizes `m` of the inputs.
fn inverse_scales(m: &[f64], alpha: f64) -> Vec<f32> {
    let most = m.iter().copied().fold(0.0, f64::max);
    let s = |m: f64| if most > 0.0 { (m / most).max(LEAST).powf(alpha) } else { 1.0 };
    let (low, high) = m.iter().map(|m| s(*m)).fold((f64::INFINITY, 0.0f64), |(l, h), s| (l.min(s), h.max(s)));
    let middle = if high > 0.0 { (low * high).sqrt() } else { 1.0 };
    m.iter().map(|m| float::round_f16((middle / s(*m)) as f32)).collect()
}

impl Awq {
    /// `‖Q(W diag(s)) diag(s)⁻¹ X - W X‖²` over the mean square of an input, for `d = 1/s`.
    fn loss(&self, w: &Mat, d: &[f32], gram: &Mat) -> Result<f64, MethodError> {
        let mut error = Mat::zeros(w.rows(), w.cols());
        let mut scaled = w.clone();
        let ask = GridAsk { bits: self.bits, symmetric: self.symmetric, scale: Float::F16 };
        let group = if self.group == 0 { w.cols() } else { self.group };
        dense::each_row(&mut scaled, &mut error, &mut vec![(); w.rows()], |row, error, ()| {
            row.iter_mut().zip(d).for_each(|(w, d)| *w /= d);
            for ((row, error), d) in row.chunks(group).zip(error.chunks_mut(group)).zip(d.chunks(group)) {
                let grid = Rtn {}.fit(row, &ask)?;
                for ((w, e), d) in row.iter().zip(error).zip(d) {
                    *e = (w - grid.value(grid.code(*w, self.bits))) * d;
                }
            }
            Ok::<(), MethodError>(())
        })?;
        let out = dense::matmul_nn(error.view(), gram.view());
        Ok(out.data().iter().zip(error.data()).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum())
    }
}

impl Transform for Awq {
    fn maps(&self, w: MatRef<'_>, stats: &Stats<'_>) -> Result<Vec<Map>, MethodError> {
        make::finite(w)?;
        let cols = w.cols();
        let (gram, sizes) = (make::gram(stats, cols)?, stats.magnitudes()?);
        if sizes.len() != cols {
            return Err(MethodError::new(format!("sizes of {} inputs for a matrix of {cols}", sizes.len())));
        }
        let rows = w.rows().min(self.rows);
        let some = Mat::from_fn(rows, cols, |i, c| w.at(i * w.rows() / rows, c));
        let scale = gram.mean_diag().max(f64::MIN_POSITIVE);
        let gram = Mat::from_fn(cols, cols, |i, j| (gram.at(i, j) / scale) as f32);
        let mut best: Option<(f64, Vec<f32>)> = None;
        for step in 0..=self.steps {
            let d = inverse_scales(sizes, step as f64 / self.steps as f64);
            let loss = if rows == 0 || cols == 0 { 0.0 } else { self.loss(&some, &d, &gram)? };
            // Among equals the least scaling.
            if best.as_ref().is_none_or(|(least, _)| loss < *least) {
                best = Some((loss, d));
            }
        }
        let d = best.map_or_else(Vec::new, |(_, d)| d);
        Ok(vec![Map::diagonal(&d, Float::F16).map_err(|e| MethodError::new(e.what))?])
    }

    fn form(&self, inputs: usize) -> Result<Vec<Map>, MethodError> {
        Ok(vec![Map::diagonal(&vec![1.0; inputs], Float::F16).map_err(|e| MethodError::new(e.what))?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transform::testkit::{Rounding, found, heavy, output_error, rounded, stats, with_maps};
    use lacuna_base::testkit::random;

    fn scales(by: &Awq, w: &Mat, x: &Mat) -> Vec<f32> {
        let seen = found(x);
        let maps = by.maps(w.view(), &stats(&seen, x.rows())).expect("maps");
        let Map::Diagonal(Float::F16, bytes) = &maps[0] else { panic!("a diagonal") };
        bytes.chunks(2).map(|b| half(u16::from_le_bytes([b[0], b[1]]))).collect()
    }

    fn half(bits: u16) -> f32 {
        let mut out = [0.0];
        Float::F16.decode(&bits.to_le_bytes(), &mut out);
        out[0]
    }

    /// The definition on the inputs themselves: scale, round, unscale, multiply; the best of the steps.
    fn brute(by: &Awq, w: &Mat, x: &Mat) -> Vec<f64> {
        let tokens = x.rows() as f64;
        let mean = |c: usize| (0..x.rows()).map(|t| f64::from(x[(t, c)].abs())).sum::<f64>() / tokens;
        let mean: Vec<f64> = (0..w.cols()).map(mean).collect();
        let most = mean.iter().copied().fold(0.0, f64::max);
        let loss_of = |alpha: f64| {
            let s = |m: &f64| if most > 0.0 { (m / most).max(1e-4).powf(alpha) } else { 1.0 };
            let s: Vec<f64> = mean.iter().map(s).collect();
            let (low, high) = s.iter().fold((f64::INFINITY, 0.0f64), |(l, h), s| (l.min(*s), h.max(*s)));
            let s: Vec<f64> = s.iter().map(|s| s / (low * high).sqrt()).collect();
            let mut new = Mat::zeros(w.rows(), w.cols());
            for r in 0..w.rows() {
                let scaled: Vec<f32> = (0..w.cols()).map(|c| (f64::from(w[(r, c)]) * s[c]) as f32).collect();
                for (g, values) in scaled.chunks(by.group).enumerate() {
                    let ask = GridAsk { bits: by.bits, symmetric: by.symmetric, scale: Float::F16 };
                    let grid = Rtn {}.fit(values, &ask).expect("fits");
                    for (i, v) in values.iter().enumerate() {
                        let c = g * by.group + i;
                        new[(r, c)] = (f64::from(grid.value(grid.code(*v, by.bits))) / s[c]) as f32;
                    }
                }
            }
            output_error(w, &new, x)
        };
        (0..=by.steps).map(|k| loss_of(k as f64 / by.steps as f64)).collect()
    }

    #[test]
    fn agrees_with_brute_force() {
        let by = Awq { steps: 5, group: 8, bits: 3, ..Awq::default() };
        for (rows, cols) in [(6, 24), (1, 16), (4, 1), (3, 10)] {
            for seed in 0..4 {
                let (mut w, mut x) = heavy(rows, cols, 40, false, true, seed);
                // A channel that never moves, and one whose weights are all zero.
                (0..40).for_each(|t| x[(t, cols / 2)] = 0.0);
                (0..rows).for_each(|r| w[(r, cols / 3)] = 0.0);
                let (losses, d) = (brute(&by, &w, &x), scales(&by, &w, &x));
                let sizes: Vec<f64> = (0..cols).map(|c| (0..40).map(|t| f64::from(x[(t, c)].abs())).sum()).collect();
                let at = (0..=5).find(|k| inverse_scales(&sizes, f64::from(*k) / 5.0) == d).expect("one of the steps");
                let least = losses.iter().copied().fold(f64::INFINITY, f64::min);
                // But for what f16 does to the scales.
                let chosen = losses[at as usize];
                assert!(chosen <= least * 1.05 + 1e-9, "{rows} {cols} {seed}: {at} of {losses:?}");
            }
        }
    }

    #[test]
    fn large_inputs_are_spared_and_the_outputs_are_nearer() {
        for seed in 0..5 {
            let (w, x) = heavy(32, 128, 300, false, true, seed);
            for bits in [3, 4] {
                let by = Awq { bits, symmetric: true, ..Awq::default() };
                let turned = with_maps(&w, &x, &by);
                let how = Rounding { bits, group: 64, grid: &Rtn {}, solver: None };
                let (plain, scaled) = (rounded(&w, &x, None, &how), rounded(&w, &x, Some(&turned), &how));
                let (plain, scaled) = (output_error(&w, &plain, &x), output_error(&w, &scaled, &x));
                assert!(scaled < 0.8 * plain, "{bits} {seed}: {scaled} {plain}");
                let d = scales(&by, &w, &x);
                assert!(d[5] < d[6], "a channel of large inputs gets a larger s");
            }
        }
    }

    #[test]
    fn silence_and_numbers_out_of_range() {
        let (w, x) = (random(3, 8, 1), Mat::zeros(10, 8));
        assert!(scales(&Awq::default(), &w, &x).iter().all(|d| *d == 1.0));
        for keys in
            [serde_json::json!({ "steps": 0 }), serde_json::json!({ "bits": 9 }), serde_json::json!({ "rows": 0 })]
        {
            assert!((method().make)(keys.clone()).is_err(), "{keys}");
        }
        assert!(Awq::default().maps(w.view(), &Stats::default()).is_err());
    }
}
