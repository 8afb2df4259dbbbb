//! Number formats: weights become floats of few bits, or the quantiles of a normal distribution, times a scale.
//!
//! **Paper.** Lakshmi Nair, Mikhail Bernadskiy, Arulselvan Madhavan, Craig Chan, Ayon Basumallik, Darius Bunandar,
//! "INT-FP-QSim: Mixed Precision and Formats For Large Language Models and Vision Transformers", 2023, arXiv 2307.03712.
//! The formats: Open Compute Project, "OCP Microscaling Formats (MX) Specification", 2023; NVIDIA, "NVFP4", 2025; Tim
//! Dettmers et al., "QLoRA", 2023, arXiv 2305.14314 (NF4).
//!
//! **Idea.** `w ≈ s · v` with `v` of a fixed list: for a format with `e` bits of exponent and `m` of mantissa,
//! `± (1 + f / 2^m) 2^(E - bias)` for `E ≥ 1` and `± f / 2^m · 2^(1 - bias)` for `E = 0`; for NF4 the sixteen quantiles of
//! QLoRA. `s` maps the largest weight of a group to the largest `v` (`scales = "float"`), or is the power of two
//! `2^(⌊log2 max |w|⌋ - ⌊log2 max v⌋)` (`"power-of-two"`, MX), or such a scale in E4M3 over one of the matrix that maps
//! the largest of them to 448 (`"e4m3"`, NVFP4).
//!
//! **Shapes and units.** `w` `[out, in]`; one table `[2^bits]` for the matrix, rising; scales `[out, groups]`. MXFP4 is
//! `fp4`, `power-of-two`, groups of 32 (4.25 bits a weight); NVFP4 is `fp4`, `e4m3`, groups of 16 (4.5 bits).
//!
//! **Cost.** One pass for the scales, and a search of `bits` steps for each weight.
//!
//! **Departs.** (1) Weights alone are rounded; the paper's activations are not. (2) What is common to a matrix (NVFP4's
//! f32 scale; a power of two, where MX has 8 bits of exponent and the scales here 5) is multiplied into the table, whose
//! products are f32. (3) Scales of powers of two reach 2^31 below the largest of the matrix, which groups below that
//! get. (4) Of two entries equally near, a weight takes the lower. (5) A format with fewer values than codes (no NaN is
//! kept, and 0 has two codes) repeats its largest.

use lacuna_base::{Mat, float};
use lacuna_contract::{Ability, Ask, Card, GridAsk, Made, Method, MethodError, Scaled, ScaledAsk, ScaledTable, Table};
use lacuna_format::{Float, ScaleCodec};
use serde::Deserialize;

use crate::make;

/// The list of values, and how a group's scale is found.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FloatFormat {
    /// Which values there are.
    format: Format,
    /// Which scales there are.
    scales: Scales,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
enum Format {
    /// E2M1, 4 bits.
    #[default]
    Fp4,
    /// E2M3, 6 bits.
    Fp6E2m3,
    /// E3M2, 6 bits.
    Fp6E3m2,
    /// E4M3 without infinities, 8 bits.
    Fp8E4m3,
    /// E5M2, 8 bits.
    Fp8E5m2,
    /// Quantiles of a normal distribution, 4 bits.
    Nf4,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
enum Scales {
    /// As the step's `scale` says.
    #[default]
    Float,
    /// Powers of two, a byte each.
    PowerOfTwo,
    /// E4M3, a byte each, under one f32 for the matrix.
    E4m3,
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "float-format",
            paper: "Nair, Bernadskiy, Madhavan, Chan, Basumallik, Bunandar: INT-FP-QSim: Mixed Precision and Formats \
             For Large Language Models and Vision Transformers, 2023",
            arxiv: "2307.03712",
            summary: "Weights become floats of 4, 6 or 8 bits or NF4 under scales of rows or groups: MXFP4, NVFP4 and \
             others.",
            system: None,
            verb: "quantize",
            needs: &[],
            abilities: &[Ability::Round, Ability::FixedMask],
        },
        keys: make::keys::<FloatFormat>,
        make: |given| {
            let p: FloatFormat = make::parameters("float-format", given)?;
            if p.format == Format::Nf4 && p.scales == Scales::PowerOfTwo {
                return Err(MethodError::new("format = \"nf4\" has no scales of powers of two; write \"float\""));
            }
            Ok(Made::Table(Box::new(p)))
        },
    }
}

/// NF4's values as QLoRA prints them.
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Magnitudes of a format, rising, without those above `largest`, which stand for infinities and NaN.
fn magnitudes(exponent: u32, mantissa: u32, bias: i32, largest: f32) -> Vec<f32> {
    let all = (0..1u32 << (exponent + mantissa)).map(|code| {
        let (e, f) = ((code >> mantissa) as i32, (code & ((1 << mantissa) - 1)) as f32 / (1 << mantissa) as f32);
        if e == 0 { f * 2f32.powi(1 - bias) } else { (1.0 + f) * 2f32.powi(e - bias) }
    });
    all.filter(|v| *v <= largest).collect()
}

impl Format {
    fn bits(self) -> u8 {
        match self {
            Format::Fp4 | Format::Nf4 => 4,
            Format::Fp6E2m3 | Format::Fp6E3m2 => 6,
            Format::Fp8E4m3 | Format::Fp8E5m2 => 8,
        }
    }

    /// `2^bits` values, rising.
    fn values(self) -> Vec<f32> {
        let positive = match self {
            Format::Nf4 => return NF4.to_vec(),
            Format::Fp4 => magnitudes(2, 1, 1, 6.0),
            Format::Fp6E2m3 => magnitudes(2, 3, 1, 7.5),
            Format::Fp6E3m2 => magnitudes(3, 2, 3, 28.0),
            Format::Fp8E4m3 => magnitudes(4, 3, 7, 448.0),
            Format::Fp8E5m2 => magnitudes(5, 2, 15, 57344.0),
        };
        let last = positive[positive.len() - 1];
        let mut all: Vec<f32> = positive.iter().skip(1).rev().map(|v| -v).chain(positive.iter().copied()).collect();
        all.resize(1 << self.bits(), last);
        all
    }
}

/// A number of 8 bits, 4 of exponent, nearest to `x` and not 0.
fn e4m3(x: f32) -> f32 {
    let near = Float::F8E4m3.encode(&[x.clamp(2f32.powi(-9), 448.0)]).map_or(0x7E, |bytes| bytes[0]);
    float::f8_e4m3(near)
}

/// `⌊log2 x⌋` of a number above 0.
fn exponent(x: f32) -> i32 {
    // log2 is right to a rounding, which may pass a power of two.
    let near = f64::from(x).log2().floor() as i32;
    if 2f64.powi(near + 1) <= f64::from(x) { near + 1 } else { near }
}

impl Table for FloatFormat {
    fn table(&self, _: &[f32], _: &[f32], bits: u8) -> Result<Vec<f32>, MethodError> {
        if bits != self.format.bits() {
            let (name, has) = (self.format, self.format.bits());
            return Err(MethodError::new(format!("{name:?} has {has} bits, not {bits}; write bits = {has}")));
        }
        Ok(self.format.values())
    }

    fn importance(&self) -> Option<Ask> {
        None
    }

    fn scaled(&self) -> Option<&dyn Scaled> {
        Some(self)
    }
}

impl FloatFormat {
    /// The factor of the table and the scales for groups with these largest magnitudes.
    fn scales(&self, most: &[f32], largest: f32, ask: &GridAsk) -> Result<(f32, Vec<f32>, ScaleCodec), MethodError> {
        let all = most.iter().copied().fold(0.0, f32::max);
        Ok(match self.scales {
            Scales::Float => {
                let of = |m: &f32| if *m == 0.0 { Ok(1.0) } else { super::rtn::stored(m / largest, ask.scale) };
                (1.0, most.iter().map(of).collect::<Result<_, _>>()?, ask.codec())
            }
            Scales::PowerOfTwo => {
                // E5M2 has the powers from -16 to 15.
                let power = |m: f32| if m == 0.0 { 0 } else { exponent(m) - exponent(largest) };
                let top = power(all) - 15;
                if !(-126..=100).contains(&top) {
                    return Err(MethodError::new(format!(
                        "the largest weight is {all}, too far from 1 for this format"
                    )));
                }
                let of = |m: &f32| if *m == 0.0 { 1.0 } else { 2f32.powi((power(*m) - top).max(-16)) };
                (2f32.powi(top), most.iter().map(of).collect(), ScaleCodec::F8E5m2)
            }
            Scales::E4m3 => {
                let whole = if all == 0.0 { 1.0 } else { all / (largest * 448.0) };
                if !whole.is_normal() {
                    return Err(MethodError::new(format!("the largest weight is {all}, too near 0 for this format")));
                }
                (whole, most.iter().map(|m| e4m3(m / largest / whole)).collect(), ScaleCodec::F8E4m3)
            }
        })
    }
}

impl Scaled for FloatFormat {
    fn fit(&self, ask: &ScaledAsk<'_>) -> Result<ScaledTable, MethodError> {
        let mut table = self.table(&[], &[], ask.ask.bits)?;
        make::finite(ask.w)?;
        let (rows, cols, group) = (ask.w.rows(), ask.w.cols(), ask.group.max(1));
        let groups = cols.div_ceil(group);
        let most = Mat::from_fn(rows, groups, |r, g| {
            let span = g * group..((g + 1) * group).min(cols);
            let kept = span.filter(|&c| ask.mask.is_none_or(|m| m.get(r, c)));
            kept.map(|c| ask.w.at(r, c).abs()).fold(0.0, f32::max)
        });
        let (factor, scales, codec) = self.scales(most.data(), table[table.len() - 1], &ask.ask)?;
        table.iter_mut().for_each(|v| *v *= factor);
        Ok(ScaledTable { table, scales: Mat::from_vec(rows, groups, scales), codec })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;
    use lacuna_format::{Mask, pack_scales};

    const FORMATS: [Format; 6] =
        [Format::Fp4, Format::Fp6E2m3, Format::Fp6E3m2, Format::Fp8E4m3, Format::Fp8E5m2, Format::Nf4];

    fn fit(format: Format, scales: Scales, w: &Mat, mask: Option<&Mask>, group: usize) -> ScaledTable {
        let ask = GridAsk { bits: format.bits(), symmetric: true, scale: Float::F16 };
        FloatFormat { format, scales }.fit(&ScaledAsk { w: w.view(), mask, ask, group }).expect("fits")
    }

    /// The values of each format by its definition, written out or from the bytes of the other decoders.
    #[test]
    fn values_are_those_of_the_definition() {
        let both = |positive: &[f32]| {
            let mut all: Vec<f32> = positive.iter().flat_map(|v| [*v, -v]).filter(|v| *v != 0.0).collect();
            all.push(0.0);
            all.sort_by(f32::total_cmp);
            all
        };
        let distinct = |f: Format| {
            let mut all = f.values();
            assert_eq!(all.len(), 1 << f.bits());
            assert!(all.windows(2).all(|p| p[0] <= p[1]));
            all.dedup();
            all
        };
        assert_eq!(distinct(Format::Fp4), both(&[0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]));
        let e3m2 = [
            0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.25, 1.5, 1.75, 2.0,
            2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 14.0, 16.0, 20.0, 24.0, 28.0,
        ];
        assert_eq!(distinct(Format::Fp6E3m2), both(&e3m2));
        let e2m3: Vec<f32> = (1..16)
            .map(|i| i as f32 / 8.0)
            .chain((8..16).map(|i| i as f32 / 4.0))
            .chain((8..16).map(|i| i as f32 / 2.0))
            .collect();
        assert_eq!(distinct(Format::Fp6E2m3), both(&e2m3));
        for (format, decode) in
            [(Format::Fp8E4m3, float::f8_e4m3 as fn(u8) -> f32), (Format::Fp8E5m2, float::f8_e5m2 as fn(u8) -> f32)]
        {
            let all: Vec<f32> = (0..128).map(decode).filter(|v| v.is_finite()).collect();
            assert_eq!(distinct(format), both(&all));
        }
        // QLoRA's quantiles, written out once more by their differences from even steps.
        assert_eq!((NF4[0], NF4[7], NF4[15]), (-1.0, 0.0, 1.0));
        assert!((NF4[1] + 0.6961928).abs() < 1e-6 && (NF4[14] - 0.7229568).abs() < 1e-6);
    }

    #[test]
    fn scales_of_every_kind_are_kept_exactly_and_reach_the_largest_weight() {
        for format in FORMATS {
            for scales in [Scales::Float, Scales::PowerOfTwo, Scales::E4m3] {
                if format == Format::Nf4 && scales == Scales::PowerOfTwo {
                    continue;
                }
                for (rows, cols, group) in [(3, 40, 16), (1, 1, 32), (4, 1, 1), (1, 64, 64)] {
                    let mut w = random(rows, cols, 7);
                    w.data_mut().iter_mut().for_each(|v| *v *= 0.03);
                    w.row_mut(rows - 1)[..cols / 2].fill(0.0);
                    let mask = Mask::from_fn(rows, cols, |r, c| (r + c) % 5 != 0);
                    for mask in [None, Some(&mask)] {
                        let got = fit(format, scales, &w, mask, group);
                        let mut read = vec![0.0; got.scales.cols()];
                        let packed = pack_scales(&got.scales, got.codec).expect("packs");
                        for r in 0..rows {
                            packed.row(r, &mut read);
                            assert_eq!(read, got.scales.row(r), "{format:?} {scales:?}");
                        }
                        let top = got.table[got.table.len() - 1];
                        for (r, c) in (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))) {
                            if mask.is_some_and(|m| !m.get(r, c)) {
                                continue;
                            }
                            // E4M3 rounds by a sixteenth; a power of two saturates from 6 to 8, at worst.
                            let reach =
                                got.scales[(r, c / group)] * top * if scales == Scales::Float { 1.001 } else { 1.34 };
                            assert!(w[(r, c)].abs() <= reach, "{format:?} {scales:?} {} {reach}", w[(r, c)]);
                        }
                    }
                }
            }
        }
    }

    /// MXFP4 and NVFP4 step by step from their definitions, in f64.
    #[test]
    fn mxfp4_and_nvfp4_are_as_defined() {
        let w = Mat::from_vec(
            2,
            32,
            (0..64).map(|i| ((i * 37 % 41) as f32 - 20.0) * if i < 32 { 0.01 } else { 0.3 }).collect(),
        );
        let most = |r: usize, from: usize, n: usize| {
            w.row(r)[from..from + n].iter().fold(0.0f64, |a, v| a.max(f64::from(v.abs())))
        };
        let mx = fit(Format::Fp4, Scales::PowerOfTwo, &w, None, 32);
        for r in 0..2 {
            let shared = 2f64.powi(most(r, 0, 32).log2().floor() as i32 - 2);
            let stored = f64::from(mx.scales[(r, 0)]) * f64::from(mx.table[15]) / 6.0;
            assert_eq!(stored, shared, "row {r}");
        }
        let nv = fit(Format::Fp4, Scales::E4m3, &w, None, 16);
        let whole = most(1, 0, 32).max(most(0, 0, 32)) / (6.0 * 448.0);
        let all: Vec<f64> = (0..127).map(|b| f64::from(float::f8_e4m3(b))).collect();
        for (r, g) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let want = most(r, 16 * g, 16) / 6.0 / whole;
            let near = all.iter().copied().min_by(|a, b| (a - want).abs().total_cmp(&(b - want).abs())).expect("some");
            assert_eq!(f64::from(nv.scales[(r, g)]), near);
        }
        assert!((f64::from(nv.table[15]) - 6.0 * whole).abs() < 1e-6 * whole);
        assert_eq!(nv.scales.data().iter().copied().fold(0.0, f32::max), 448.0);
    }

    #[test]
    fn edges_and_refusals() {
        for scales in [Scales::Float, Scales::PowerOfTwo, Scales::E4m3] {
            let zeros = fit(Format::Fp4, scales, &Mat::zeros(2, 8), None, 4);
            assert!(zeros.scales.data().iter().all(|s| *s > 0.0) && zeros.table.contains(&0.0));
        }
        // Far below the largest: the least scale there is, and no zero.
        let far = Mat::from_vec(1, 2, vec![1.0, 1e-30]);
        let got = fit(Format::Fp4, Scales::PowerOfTwo, &far, None, 1);
        assert_eq!(got.scales.data(), [2f32.powi(15), 2f32.powi(-16)]);
        for (x, e) in [(1.0, 0), (0.99999994, -1), (8.0, 3), (7.9999995, 2), (1e-30, -100)] {
            assert_eq!(exponent(x), e, "{x}");
        }
        let by = FloatFormat { format: Format::Fp8E4m3, scales: Scales::Float };
        assert!(by.table(&[], &[], 4).expect_err("refused").what.contains("bits = 8"));
        assert!((method().make)(serde_json::json!({ "format": "nf4", "scales": "power-of-two" })).is_err());
        assert!((method().make)(serde_json::json!({ "format": "fp5" })).is_err());
        let bad = Mat::from_vec(1, 2, vec![f32::NAN, 1.0]);
        let ask = GridAsk { bits: 4, symmetric: true, scale: Float::F16 };
        let by = FloatFormat::default();
        assert!(by.fit(&ScaledAsk { w: bad.view(), mask: None, ask, group: 2 }).is_err());
    }
}
