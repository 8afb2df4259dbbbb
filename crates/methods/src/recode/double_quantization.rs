//! Double quantization: the scales of a rounded matrix are rounded themselves; its codes stay.
//!
//! **Paper.** Tim Dettmers, Artidoro Pagnoni, Ari Holtzman, Luke Zettlemoyer, "QLoRA: Efficient Finetuning of Quantized
//! LLMs", 2023, arXiv 2305.14314, section 3.
//!
//! **Idea.** With a scale `s_g` and a minimum `m_g` for every group, `w = s_g q - m_g`: `s_g` becomes `S a_g` and `m_g`
//! becomes `M b_g`, with codes `a_g`, `b_g` of `bits` bits and one `S` and one `M` in 16 bits for every `per` groups.
//!
//! **Shapes and units.** A stored matrix `[out, in]` of codes with f16 scales and minima, `[out, groups]` each; the same
//! with integers in their place.
//!
//! **Cost.** One reading of the scales; no statistics, no new rounding of weights.
//!
//! **Departs.** (1) The scales of a file are recoded that somebody else rounded, so that its codes survive bit for bit.
//! (2) Scales are integers and not 8-bit floats, without a mean taken off: products read `S a_g` in registers. (3) Least
//! squares in turns with rounding instead of the largest magnitude alone. (4) A matrix without minima stays as it is: its
//! one f16 for 32 codes would save a fifth as much.

use lacuna_contract::{Card, Made, Method, MethodError, Recode};
use lacuna_format::Stored;
use serde::Deserialize;

use crate::make;

/// The paper's parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct DoubleQuantization {
    /// Bits of a scale's code, 2 to 8.
    bits: u8,
    /// Scales that share one of 16 bits; a multiple of 8, as products take them.
    per: usize,
}

impl Default for DoubleQuantization {
    fn default() -> DoubleQuantization {
        DoubleQuantization { bits: 8, per: 32 }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "double-quantization",
            paper: "Dettmers, Pagnoni, Holtzman, Zettlemoyer: QLoRA: Efficient Finetuning of Quantized LLMs, 2023",
            arxiv: "2305.14314",
            summary: "The scales of a rounded matrix are rounded themselves; its codes stay.",
            system: None,
            verb: "recode",
            needs: &[],
            abilities: &[],
        },
        keys: make::keys::<DoubleQuantization>,
        make: |given| {
            let p: DoubleQuantization = make::parameters("double-quantization", given)?;
            if !(2..=8).contains(&p.bits) {
                return Err(MethodError::new(format!("bits is {}; a scale's code has 2 to 8", p.bits)));
            }
            if p.per == 0 || !p.per.is_multiple_of(8) || p.per > 1 << 16 {
                return Err(MethodError::new(format!("per is {}; give a multiple of 8 up to 65536", p.per)));
            }
            Ok(Made::Recode(Box::new(p)))
        },
    }
}

impl Recode for DoubleQuantization {
    fn recode(&self, stored: &Stored) -> Result<Option<Stored>, MethodError> {
        stored.with_coded_scales(self.bits, self.per).map_err(|e| MethodError::new(e.what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Rng;
    use lacuna_format::{Float, GgufType, Pattern, Piece, Values};
    use serde_json::json;

    /// By the definition, scale for scale: every coded scale is within half a step of the best step that a fine search
    /// finds, and codes are those of the source.
    #[test]
    fn agrees_with_brute_force_over_steps() {
        let mut rng = Rng::new(3);
        let (rows, groups) = (4, 16);
        let (mut bytes, mut scales, mut minima, mut codes) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rows * groups {
            let number = |x: f32| Float::F16.encode(&[x]).expect("small");
            let (d, m) = (number(0.004 + 0.01 * rng.f32()), number(-0.05 - 0.05 * rng.f32()));
            bytes.extend([d.clone(), m.clone()].concat());
            let mut read = [0.0; 2];
            Float::F16.decode(&[d, m].concat(), &mut read);
            let quants: Vec<u8> = (0..16).map(|_| rng.u64() as u8).collect();
            codes.push(quants.clone());
            bytes.extend(quants);
            scales.push(read[0]);
            minima.push(-read[1]);
        }
        let values = Values::Gguf(GgufType::Q4_1, bytes.into());
        let before = Stored::from_piece(Piece { rows, cols: 32 * groups, pattern: Pattern::Dense, values });
        let method = DoubleQuantization { bits: 6, per: 8 };
        let after = method.recode(&before).expect("recodes").expect("has minima");
        let w = after.to_mat();
        // What one scale is worth in the result: the difference of two values with codes one apart.
        for (i, quants) in codes.iter().enumerate() {
            let (r, c) = (i / groups, i % groups * 32);
            let code = |j: usize| f32::from(if j < 16 { quants[j] & 15 } else { quants[j - 16] >> 4 });
            let (a, b) = (
                (0..32).min_by(|x, y| code(*x).total_cmp(&code(*y))).expect("a code"),
                (0..32).max_by(|x, y| code(*x).total_cmp(&code(*y))).expect("a code"),
            );
            let scale = (w[(r, c + b)] - w[(r, c + a)]) / (code(b) - code(a));
            let minimum = scale * code(a) - w[(r, c + a)];
            for (got, all, at) in [(scale, &scales, i), (minimum, &minima, i)] {
                let run = &all[i / 8 * 8..i / 8 * 8 + 8];
                let top = run.iter().fold(0.0f32, |m, v| m.max(*v));
                // No step above the largest over the codes there are can be better by more than rounding to f16.
                assert!((got - all[at]).abs() <= 0.6 * top / 63.0, "{got} for {} of {run:?}", all[at]);
            }
        }
        let error = |s: &Stored| -> f32 {
            let (x, y) = (before.to_mat(), s.to_mat());
            x.data().iter().zip(y.data()).map(|(x, y)| (x - y).powi(2)).sum()
        };
        let finer = DoubleQuantization { bits: 8, per: 8 }.recode(&before).expect("recodes").expect("has minima");
        assert!(error(&finer) < error(&after));
    }

    #[test]
    fn parameters_out_of_range_are_refused() {
        for (given, says) in [(json!({ "bits": 9 }), "bits is 9"), (json!({ "per": 12 }), "per is 12")] {
            let said = (method().make)(given).expect_err("refused").what;
            assert!(said.contains(says), "{said}");
        }
    }
}
