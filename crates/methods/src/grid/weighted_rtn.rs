//! Weighted rounding: each group's scale and zero point are those of least square error, weighted by the inputs.
//!
//! **Paper.** Georgi Gerganov, Iwan Kawrakow and contributors, "llama.cpp: importance matrices and the fits of block
//! scales", 2024 (a program, no paper; the alternating least squares are those of Alex Gersho & Robert M. Gray, "Vector
//! Quantization and Signal Compression", 1992).
//!
//! **Idea.** `min Σ_c h_c (w_c - s (q_c - z))²` over the scale `s`, the zero point `z` and the codes `q`, with `h_c`
//! the mean square of input `c`: the error of the outputs where inputs do not correlate. By turns: for fixed `s` and
//! `z` each code is the nearest one; for fixed codes and each `z` there is, `s = Σ h w (q - z) / Σ h (q - z)²` takes
//! `(Σ h w (q - z))² / Σ h (q - z)²` off the error, and the best `z` is found from five sums. The turns start from the
//! best of a number of narrowed ranges: both ends, the lower or the upper alone.
//!
//! **Shapes and units.** The values of one group in the weights' units, `h` `[in]` in squared units of the inputs;
//! `scale` in the weights' units, `zero` a code from 0 to `2^b - 1`.
//!
//! **Cost.** `3 · candidates + turns` passes over the values, and `2^b` steps a pass.
//!
//! **Departs.** (1) The grid is the step's own, of any bits and group, instead of llama.cpp's block types with their
//! scales of scales. (2) `h` is not multiplied by the root of the weight's own square, as llama.cpp does for some block
//! types. (3) No answer is worse than plain rounding's: of the two the better is taken, after the scale is rounded to
//! its codec. (4) A solver that rounds to this grid weighs by its own prices, `1 / U_cc²` in GPTQ.

use lacuna_contract::{Ability, Ask, Card, Grid, GridAsk, Made, Method, MethodError};
use lacuna_format::Affine;
use serde::Deserialize;

use super::rtn::{self, Rtn};
use crate::make;

/// The search's parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct WeightedRtn {
    /// Weigh by the squares of the inputs; otherwise all weights count alike.
    weighted: bool,
    /// Ranges tried of each kind, 1 to 1000.
    candidates: usize,
    /// The narrowest, as a fraction of the whole range, above 0 to 1.
    narrowest: f64,
    /// Turns of least squares and rounding at the most.
    turns: usize,
}

impl Default for WeightedRtn {
    fn default() -> WeightedRtn {
        WeightedRtn { weighted: true, candidates: 12, narrowest: 0.3, turns: 12 }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "weighted-rtn",
            paper: "Gerganov, Kawrakow et al.: llama.cpp, importance matrices and the fits of block scales, 2024",
            arxiv: "",
            summary: "Rounding to nearest on the grid of least square error, each column weighted by the squares of \
             its inputs.",
            system: None,
            verb: "quantize",
            needs: &[Ask::InputSquares],
            abilities: &[Ability::Round, Ability::FixedMask],
        },
        keys: make::keys::<WeightedRtn>,
        make: |given| {
            let p: WeightedRtn = make::parameters("weighted-rtn", given)?;
            if !(1..=1000).contains(&p.candidates) {
                return Err(MethodError::new(format!("candidates is {}; write 1 to 1000", p.candidates)));
            }
            if !(p.narrowest > 0.0 && p.narrowest <= 1.0) {
                return Err(MethodError::new(format!("narrowest is {}; write a fraction above 0 to 1", p.narrowest)));
            }
            Ok(Made::Grid(Box::new(p)))
        },
    }
}

/// The values of a group and what each is worth.
struct Weighted<'a> {
    values: &'a [f32],
    /// Empty: all the same.
    worth: &'a [f32],
    /// The highest code.
    top: f32,
    /// Zero points that may be.
    zeros: std::ops::RangeInclusive<u8>,
}

/// A scale and a zero point with the square error that they take off that of rounding all to 0, for the codes that they
/// were found for: at least so much is off at the nearest codes.
#[derive(Clone, Copy)]
struct Found {
    scale: f64,
    zero: u8,
    off: f64,
}

impl Weighted<'_> {
    fn worth(&self, i: usize) -> f64 {
        self.worth.get(i).map_or(1.0, |w| f64::from(*w))
    }

    /// The best grid for the codes that are nearest on the grid of `scale` and `zero`.
    fn refit(&self, scale: f64, zero: u8) -> Found {
        // Adding and taking off 1.5 · 2^23 rounds halves to even.
        const ROUND: f32 = 12_582_912.0;
        let (by, z) = ((1.0 / scale) as f32, f32::from(zero));
        let (mut w, mut q, mut qq, mut x, mut xq) = (0.0f64, 0.0f64, 0.0f64, 0.0f64, 0.0f64);
        for (i, &v) in self.values.iter().enumerate() {
            let code = f64::from((v * by).clamp(-z, self.top - z) + ROUND - ROUND + z);
            let (h, v) = (self.worth(i), f64::from(v));
            w += h;
            q += h * code;
            qq += h * code * code;
            x += h * v;
            xq += h * v * code;
        }
        let mut best = Found { scale, zero, off: f64::NEG_INFINITY };
        for zero in self.zeros.clone() {
            let z = f64::from(zero);
            let (with, squares) = (xq - z * x, qq - 2.0 * z * q + z * z * w);
            if squares > 0.0 && with * with / squares > best.off {
                best = Found { scale: with / squares, zero, off: with * with / squares };
            }
        }
        best
    }

    /// `Σ h (v - nearest)²`.
    fn lost(&self, grid: Affine, bits: u8) -> f64 {
        let off = |v: f32| f64::from(v) - f64::from(grid.value(grid.code(v, bits)));
        self.values.iter().enumerate().map(|(i, v)| self.worth(i) * off(*v).powi(2)).sum()
    }
}

impl Grid for WeightedRtn {
    fn fit(&self, values: &[f32], ask: &GridAsk) -> Result<Affine, MethodError> {
        self.fit_weighted(values, &[], ask)
    }

    fn fit_weighted(&self, values: &[f32], importance: &[f32], ask: &GridAsk) -> Result<Affine, MethodError> {
        let plain = Rtn {}.fit(values, ask)?;
        if !importance.is_empty() && importance.len() != values.len() {
            return Err(MethodError::new(format!("{} importances of {} weights", importance.len(), values.len())));
        }
        if let Some(h) = importance.iter().find(|h| !h.is_finite() || **h < 0.0) {
            return Err(MethodError::new(format!("the mean square of an input is {h}")));
        }
        // Inputs that are all zero say nothing: then all weights count alike.
        let weigh = self.weighted && values.iter().zip(importance).any(|(v, h)| *v != 0.0 && *h > 0.0);
        let middle = 1u8 << (ask.bits - 1);
        let top = (1u32 << ask.bits) as f32 - 1.0;
        let zeros = if ask.symmetric { middle..=middle } else { 0..=top as u8 };
        let group = Weighted { values, worth: if weigh { importance } else { &[] }, top, zeros };
        let (low, high) = values.iter().fold((0.0f64, 0.0f64), |(a, b), &v| (a.min(v.into()), b.max(v.into())));
        if low == high {
            return Ok(plain);
        }
        let mut best = group.refit(f64::from(plain.scale), plain.zero);
        for k in 0..self.candidates {
            let f = 1.0 - (1.0 - self.narrowest) * k as f64 / (self.candidates.max(2) - 1) as f64;
            let starts = if ask.symmetric {
                let scale = f * high.max(-low) / f64::from(middle);
                vec![(scale, middle), (-scale, middle)]
            } else {
                let start = |low: f64, high: f64| {
                    let scale = (high - low) / f64::from(top);
                    (scale, (-low / scale).round().clamp(0.0, f64::from(top)) as u8)
                };
                vec![start(f * low, f * high), start(f * low, high), start(low, f * high)]
            };
            for (scale, zero) in starts.into_iter().filter(|(s, _)| *s != 0.0) {
                let found = group.refit(scale, zero);
                if found.off > best.off {
                    best = found;
                }
            }
        }
        for _ in 0..self.turns {
            if best.scale == 0.0 {
                break;
            }
            let next = group.refit(best.scale, best.zero);
            if next.off <= best.off {
                break;
            }
            best = next;
        }
        // A zero point at an end with a scale below 0 is a grid of the other sign: left to the symmetric ones.
        let sound = best.scale.is_finite() && (ask.symmetric || best.scale > 0.0);
        match rtn::stored(best.scale as f32, ask.scale) {
            Ok(scale) if sound && scale != 0.0 => {
                let grid = Affine { scale, zero: best.zero };
                let better = group.lost(grid, ask.bits) < group.lost(plain, ask.bits);
                Ok(if better { grid } else { plain })
            }
            _ => Ok(plain),
        }
    }

    fn importance(&self) -> Option<Ask> {
        self.weighted.then_some(Ask::InputSquares)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;
    use lacuna_format::Float;

    fn ask(bits: u8, symmetric: bool) -> GridAsk {
        GridAsk { bits, symmetric, scale: Float::F32 }
    }

    fn lost(values: &[f32], worth: &[f32], grid: Affine, bits: u8) -> f64 {
        let near = |v: f32| {
            (0..1u16 << bits).map(|c| f64::from(grid.value(c as u8) - v).powi(2)).fold(f64::INFINITY, f64::min)
        };
        values.iter().zip(worth).map(|(v, h)| f64::from(*h) * near(*v)).sum()
    }

    /// The least error there is: every code for every value, every zero point, the scale of least squares.
    fn brute(values: &[f32], worth: &[f32], bits: u8, symmetric: bool) -> f64 {
        let size = 1usize << bits;
        let zeros = if symmetric { size / 2..size / 2 + 1 } else { 0..size };
        let mut least = f64::INFINITY;
        for all in 0..size.pow(values.len() as u32) {
            for zero in zeros.clone() {
                let steps = |i: usize| ((all / size.pow(i as u32)) % size) as f64 - zero as f64;
                let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
                    (0..values.len()).map(|i| f64::from(worth[i]) * f(f64::from(values[i]), steps(i))).sum()
                };
                let squares = sum(&|_, q| q * q);
                let scale = if squares > 0.0 { sum(&|v, q| v * q) / squares } else { 0.0 };
                if symmetric || scale >= 0.0 {
                    least = least.min(sum(&|v, q| (v - scale * q).powi(2)));
                }
            }
        }
        least
    }

    #[test]
    fn agrees_with_brute_force_over_all_codes() {
        for symmetric in [false, true] {
            let (mut ours, mut best, mut plain) = (0.0, 0.0, 0.0);
            for seed in 0..60u64 {
                let n = 1 + seed as usize % 5;
                let mut values = random(1, n, seed).into_vec();
                let mut worth: Vec<f32> = random(1, n, seed + 500).into_vec().iter().map(|x| x * x).collect();
                match seed % 4 {
                    1 if n > 2 => values[1] = values[0],
                    2 if n > 2 => (values[1], worth[2]) = (0.0, 0.0),
                    3 => values.iter_mut().for_each(|v| *v += 2.0),
                    _ => {}
                }
                let grid = WeightedRtn::default().fit_weighted(&values, &worth, &ask(2, symmetric)).expect("fits");
                let (got, least) = (lost(&values, &worth, grid, 2), brute(&values, &worth, 2, symmetric));
                assert!(got >= least * 0.999 - 1e-6, "seed {seed}: {got} below the least, {least}");
                let to = Rtn {}.fit(&values, &ask(2, symmetric)).expect("fits");
                assert!(got <= lost(&values, &worth, to, 2) * 1.0001 + 1e-9, "seed {seed}");
                (ours, best, plain) = (ours + got, best + least, plain + lost(&values, &worth, to, 2));
            }
            assert!(ours < 1.05 * best && plain > 1.5 * best, "{symmetric}: {ours} {best} {plain}");
        }
    }

    #[test]
    fn weights_that_matter_are_nearer_and_the_less_bits_the_more_it_pays() {
        let values = random(1, 64, 3).into_vec();
        let worth: Vec<f32> = (0..64).map(|i| if i % 8 == 0 { 50.0 } else { 0.5 }).collect();
        for symmetric in [false, true] {
            let gain = |bits: u8| {
                let ask = ask(bits, symmetric);
                let all = |grid| lost(&values, &worth, grid, bits);
                let with = all(WeightedRtn::default().fit_weighted(&values, &worth, &ask).expect("fits"));
                let alike = all(WeightedRtn::default().fit(&values, &ask).expect("fits"));
                let plain = all(Rtn {}.fit(&values, &ask).expect("fits"));
                assert!(with <= alike && with <= plain, "{bits} {symmetric}: {with} {alike} {plain}");
                plain / with
            };
            assert!(gain(2) > 1.5 && gain(3) > 1.1, "{symmetric}: {} {}", gain(2), gain(3));
        }
    }

    #[test]
    fn edges_and_refusals() {
        let grid = WeightedRtn::default();
        for symmetric in [false, true] {
            for values in [&[][..], &[0.0; 3], &[0.7], &[-0.7; 4], &[1e-30, 0.0]] {
                let fitted = grid.fit(values, &ask(3, symmetric)).expect("fits");
                assert_eq!(fitted.value(fitted.code(0.0, 3)), 0.0);
                values.iter().for_each(|v| assert!((fitted.value(fitted.code(*v, 3)) - v).abs() <= 1e-6, "{values:?}"));
            }
            let all = [0.3, -0.9, 0.5];
            let same = grid.fit(&all, &ask(3, symmetric)).expect("fits");
            assert_eq!(grid.fit_weighted(&all, &[0.0; 3], &ask(3, symmetric)), Ok(same), "zeros say nothing");
            assert!(grid.fit_weighted(&all, &[1.0; 2], &ask(3, symmetric)).is_err());
            assert!(grid.fit_weighted(&all, &[1.0, -1.0, 1.0], &ask(3, symmetric)).is_err());
            let half = GridAsk { scale: Float::F16, ..ask(3, symmetric) };
            let scale = grid.fit(&all, &half).expect("fits").scale;
            assert_eq!(lacuna_base::float::round_f16(scale), scale, "kept exactly");
        }
        for bad in [serde_json::json!({ "candidates": 0 }), serde_json::json!({ "narrowest": 0 })] {
            assert!((method().make)(bad.clone()).is_err(), "{bad}");
        }
        assert_eq!(WeightedRtn { weighted: false, ..WeightedRtn::default() }.importance(), None);
    }
}
