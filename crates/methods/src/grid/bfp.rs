//! BFP: block floating point, blocks of weights share one exponent.
//!
//! **Paper.** Nikita Trukhanov, Ilya Soloveychik, "Accurate Block Quantization in LLMs with Outliers", 2024, arXiv
//! 2403.20137 (the format; the rearrangement that goes with it is `rearrange`).
//!
//! **Idea.** A block's values are `m · 2^e` with signed mantissas `m` of `b` bits and one exponent, that of the
//! block's largest value: `e = ⌊log₂ max|w|⌋ - (b - 2)`.
//!
//! **Shapes and units.** The values of one group in the weights' units; the scale is `±2^e`, the zero `2^(b-1)`.
//!
//! **Cost.** One pass over the values.
//!
//! **Departs.** (1) The scale has the sign that gives the side of the largest value the code more that two's complement
//! has, so that the largest is never cut off. (2) With zero points, which block floating point has not, the scale is
//! the smallest power of two whose codes span the values. (3) The exponent is written as an f16 scale, two bytes
//! where a hardware format has one. (4) Only weights are rounded; the paper's rows are about the cache of keys.

use lacuna_contract::{Ability, Card, Grid, GridAsk, Made, Method, MethodError};
use lacuna_format::{Affine, Float};
use serde::Deserialize;

use crate::make;

/// No parameters.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Bfp {}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "bfp",
            paper: "Trukhanov, Soloveychik: Accurate Block Quantization in LLMs with Outliers, 2024",
            arxiv: "2403.20137",
            summary: "Blocks of weights share a power of two as their scale: block floating point.",
            system: None,
            verb: "quantize",
            needs: &[],
            abilities: &[Ability::Round, Ability::FixedMask],
        },
        keys: make::keys::<Bfp>,
        make: |given| Ok(Made::Grid(Box::new(make::parameters::<Bfp>("bfp", given)?))),
    }
}

/// `⌊log₂ v⌋` of a positive number, exactly.
fn exponent(v: f32) -> i32 {
    let e = (v.to_bits() >> 23) as i32;
    // Below the normal numbers the highest bit of the mantissa counts.
    if e == 0 { -149 + v.to_bits().ilog2() as i32 } else { e - 127 }
}

impl Grid for Bfp {
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
        let top = (1u32 << ask.bits) as f32 - 1.0;
        let mut e = if ask.symmetric {
            exponent(max.max(-min)) - (i32::from(ask.bits) - 2)
        } else {
            let step = (max / 2.0 - min / 2.0) / (top / 2.0);
            exponent(step) + i32::from(f64::from(step) > 2f64.powi(exponent(step)))
        };
        let (low, high) = match ask.scale {
            Float::F16 => (-24, 15),
            Float::Bf16 | Float::F32 => (-126, 127),
            other => return Err(MethodError::new(format!("scales in {other:?} are not supported; use f32 or f16"))),
        };
        if e > high {
            return Err(MethodError::new(format!(
                "a group needs the scale 2^{e}, which is beyond the range of {:?}; scale = \"f32\" holds it",
                ask.scale
            )));
        }
        e = e.max(low);
        let scale = 2f32.powi(e);
        if ask.symmetric {
            return Ok(Affine { scale: if max > -min { -scale } else { scale }, zero: middle });
        }
        Ok(Affine { scale, zero: (-min / scale).round_ties_even().clamp(0.0, top) as u8 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;

    /// The definition: the largest power of two at or below the largest value, then the nearest of all codes.
    #[test]
    fn agrees_with_the_definition_over_all_codes() {
        for seed in 0..30u64 {
            for bits in 2..=8u8 {
                for factor in [1.0, 3e-4, 700.0] {
                    let mut values = random(1, 1 + seed as usize, seed).into_vec();
                    values.iter_mut().for_each(|v| *v *= factor);
                    let ask = GridAsk { bits, symmetric: true, scale: Float::F16 };
                    let grid = Bfp {}.fit(&values, &ask).expect("fits");
                    let most = values.iter().map(|v| f64::from(v.abs())).fold(0.0, f64::max);
                    let mut power = 2f64.powi(40);
                    while power > most {
                        power /= 2.0;
                    }
                    let want = power / 2f64.powi(i32::from(bits) - 2);
                    assert_eq!(f64::from(grid.scale.abs()), want, "{values:?}");
                    for v in &values {
                        let near = (0..1u16 << bits).map(|c| (grid.value(c as u8) - v).abs()).fold(f32::MAX, f32::min);
                        assert!((grid.value(grid.code(*v, bits)) - v).abs() <= near * 1.000_01);
                        // Only the far side of the other sign is cut, by less than a step.
                        assert!(near <= grid.scale.abs(), "{v} {grid:?}");
                        let largest = f64::from(v.abs()) == most;
                        assert!(!largest || near <= grid.scale.abs() / 2.0, "{v} {grid:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn powers_of_two_zeros_and_nonsense() {
        let ask = GridAsk { bits: 4, symmetric: true, scale: Float::F16 };
        assert_eq!(Bfp {}.fit(&[1.0, -0.5], &ask), Ok(Affine { scale: -0.25, zero: 8 }));
        assert_eq!(Bfp {}.fit(&[-1.99, 0.5], &ask), Ok(Affine { scale: 0.25, zero: 8 }));
        assert_eq!(exponent(f32::MIN_POSITIVE / 4.0), -128);
        let affine = GridAsk { symmetric: false, ..ask };
        assert_eq!(Bfp {}.fit(&[-1.0, 2.0], &affine), Ok(Affine { scale: 0.25, zero: 4 }));
        assert_eq!(Bfp {}.fit(&[0.0, 15.0], &affine), Ok(Affine { scale: 1.0, zero: 0 }));
        for ask in [ask, affine] {
            let grid = Bfp {}.fit(&[0.0, -0.0], &ask).expect("fits");
            assert_eq!(grid.value(grid.code(0.0, 4)), 0.0);
            assert!(Bfp {}.fit(&[f32::NAN], &ask).is_err());
            assert!(Bfp {}.fit(&[1e30], &ask).expect_err("beyond f16").what.contains("f32"));
            assert!(Bfp {}.fit(&[1e-30, 0.0], &ask).expect("fits").scale.abs() > 0.0);
        }
    }
}
