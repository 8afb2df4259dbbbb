//! Rounding to nearest: evenly spaced values from the smallest to the largest weight of a group.
//!
//! **Paper.** Benoit Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
//! Inference", 2017, arXiv 1712.05877 (the affine scheme; as a baseline for language models: Tim Dettmers et al., arXiv
//! 2208.07339).
//!
//! **Idea.** With zero points: `scale = (max - min) / (2^b - 1)`, `zero = round(-min / scale)`, the range always
//! stretched to hold 0. Without: `scale = e / -2^(b-1)` for the value `e` of largest magnitude, so that the lowest code
//! is `e` exactly and no code is wasted on the side where `e` is not.
//!
//! **Shapes and units.** The values of one group in the weights' units; `scale` in the same, `zero` a code from 0 to
//! `2^b - 1`.
//!
//! **Cost.** One pass over the values.
//!
//! **Departs.** The scale is rounded to the codec it will be stored in *before* it is used, so that the decoded file
//! holds the values that rounding saw. With `type` the scales are those of GGUF blocks, fitted by least squares.

use lacuna_base::float;
use lacuna_contract::{Ability, Card, Grid, GridAsk, Made, Method, MethodError};
use lacuna_format::{Affine, Float};
use serde::Deserialize;

use crate::make;

/// No parameters.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Rtn {}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "rtn",
            paper: "Jacob et al.: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only \
             Inference, 2017",
            arxiv: "1712.05877",
            summary: "Every weight goes to the nearest of evenly spaced values between the extremes of its group.",
            system: None,
            verb: "quantize",
            needs: &[],
            abilities: &[Ability::Round, Ability::BlockTypes, Ability::FixedMask],
        },
        keys: make::keys::<Rtn>,
        make: |given| Ok(Made::Grid(Box::new(make::parameters::<Rtn>("rtn", given)?))),
    }
}

/// The scale as the file will hold it.
pub(super) fn stored(scale: f32, codec: Float) -> Result<f32, MethodError> {
    let near = match codec {
        Float::F32 => scale,
        Float::F16 => float::round_f16(scale),
        Float::Bf16 => float::round_bf16(scale),
        other => return Err(MethodError::new(format!("scales in {other:?} are not supported; use f32, f16 or bf16"))),
    };
    if !near.is_finite() {
        return Err(MethodError::new(format!(
            "a group needs the scale {scale}, which is beyond the range of {codec:?}; scale = \"f32\" holds it"
        )));
    }
    // Among the subnormal values of f16 the nearest may be so small that the grid would not reach the extremes: take
    // the next one.
    let short = codec == Float::F16 && near.abs() < scale.abs() * (1.0 - 2f32.powi(-10));
    Ok(if short { near + 2f32.powi(-24).copysign(scale) } else { near })
}

impl Grid for Rtn {
    fn fit(&self, values: &[f32], ask: &GridAsk) -> Result<Affine, MethodError> {
        if !(2..=8).contains(&ask.bits) {
            return Err(MethodError::new(format!("{} bits; 2 to 8 are possible", ask.bits)));
        }
        if let Some(v) = values.iter().find(|v| !v.is_finite()) {
            return Err(MethodError::new(format!("a weight is {v}, not a finite number")));
        }
        let middle = 1u8 << (ask.bits - 1);
        let (min, max) = values.iter().fold((0.0f32, 0.0f32), |(lo, hi), &v| (lo.min(v), hi.max(v)));
        if min == max {
            return Ok(Affine { scale: 1.0, zero: if ask.symmetric { middle } else { 0 } });
        }
        if ask.symmetric {
            let extreme = if -min >= max { min } else { max };
            return Ok(Affine { scale: stored(extreme / -f32::from(middle), ask.scale)?, zero: middle });
        }
        let top = (1u32 << ask.bits) as f32 - 1.0;
        let scale = stored((max - min) / top, ask.scale)?;
        let zero = if scale == 0.0 { 0.0 } else { (-min / scale).round_ties_even().clamp(0.0, top) };
        Ok(Affine { scale, zero: zero as u8 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;

    const CODECS: [Float; 3] = [Float::F32, Float::F16, Float::Bf16];

    #[test]
    fn every_value_is_within_half_a_step_and_zero_is_exact() {
        for seed in 0..40u64 {
            for bits in 2..=8u8 {
                let n = 1 + (seed as usize * 7) % 33;
                let mut values = random(1, n, seed).into_vec();
                let factor = [1.0, 1e-3, 1e-6, 3e3][seed as usize % 4];
                values.iter_mut().for_each(|v| *v = (*v + [0.0, 2.0, -3.0][seed as usize % 3]) * factor);
                values[n / 2] = 0.0;
                for codec in CODECS {
                    for symmetric in [false, true] {
                        let ask = GridAsk { bits, symmetric, scale: codec };
                        let grid = Rtn {}.fit(&values, &ask).expect("fits");
                        assert_eq!(grid.value(grid.code(0.0, bits)), 0.0);
                        assert_eq!(stored(grid.scale, codec), Ok(grid.scale), "kept exactly by {codec:?}");
                        // A scale rounded down by up to 2^-9 (bf16) misses the extremes by that much of the whole
                        // range.
                        let slack = (1u32 << bits) as f32 * 2f32.powi(-8);
                        // Without zero points the largest value of the other sign may lie one step beyond the last
                        // code.
                        let bound = if symmetric { 1.0 + slack } else { 0.5 + slack };
                        for v in &values {
                            let d = (grid.value(grid.code(*v, bits)) - v).abs();
                            assert!(d <= bound * grid.scale.abs() * 1.0001, "{v} {d} {grid:?} {ask:?}");
                        }
                    }
                }
            }
        }
    }

    /// The formula of the reference numbers, over the whole set of codes: no code is nearer than the one chosen.
    #[test]
    fn agrees_with_brute_force_over_all_codes() {
        let values = random(1, 64, 5).into_vec();
        for symmetric in [false, true] {
            let grid = Rtn {}.fit(&values, &GridAsk { bits: 4, symmetric, scale: Float::F32 }).expect("fits");
            for v in &values {
                let best = (0..16u8).map(|c| (grid.value(c) - v).abs()).fold(f32::INFINITY, f32::min);
                assert!((grid.value(grid.code(*v, 4)) - v).abs() <= best + 1e-6);
            }
        }
        let grid = Rtn {}.fit(&[-1.0, 2.0], &GridAsk { bits: 4, symmetric: false, scale: Float::F32 }).expect("fits");
        assert_eq!(grid, Affine { scale: 0.2, zero: 5 });
        let grid = Rtn {}.fit(&[-1.0, 2.0], &GridAsk { bits: 4, symmetric: true, scale: Float::F32 }).expect("fits");
        assert_eq!(grid, Affine { scale: -0.25, zero: 8 });
        let grid = Rtn {}.fit(&[3.0, 5.0], &GridAsk { bits: 2, symmetric: false, scale: Float::F32 }).expect("fits");
        assert_eq!((grid.zero, grid.value(3)), (0, 5.0), "the range reaches down to 0");
    }

    #[test]
    fn nothing_and_zeros_and_nonsense() {
        for symmetric in [false, true] {
            let ask = GridAsk { bits: 3, symmetric, scale: Float::F16 };
            for values in [&[][..], &[0.0, -0.0]] {
                let grid = Rtn {}.fit(values, &ask).expect("fits");
                assert_eq!(grid.value(grid.code(0.0, 3)), 0.0);
            }
            assert!(Rtn {}.fit(&[1.0, f32::INFINITY], &ask).is_err());
            assert!(Rtn {}.fit(&[1e30], &ask).is_err(), "beyond f16");
            assert!(Rtn {}.fit(&[1.0], &GridAsk { bits: 9, ..ask }).is_err());
            let tiny = Rtn {}.fit(&[1e-8, 0.0], &ask).expect("fits");
            assert!(tiny.scale.is_finite());
        }
    }
}
