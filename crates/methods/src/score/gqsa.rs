//! GQSA, first stage: groups of a row go whole, those that the outputs seen in calibration need least.
//!
//! **Paper.** Chao Zeng, Songwei Liu, Shu Yang, Fangmin Chen, Xing Mei, Lean Fu, "GQSA: Group Quantization and
//! Sparsity for Accelerating Large Language Model Inference", 2024, arXiv 2412.17560.
//!
//! **Idea.** A weight's saliency is `w_ij² / [H⁻¹]_jj²` with `H = X Xᵀ`, a group's the sum of its weights'. Groups of
//! 16 neighbours in a row (pattern `block:1x16`) compete over the whole matrix, so that rows keep different numbers
//! of them; what stays is then rounded in the same groups of 16, to 4 bits.
//!
//! **Shapes and units.** `w` `[out, in]`; `XᵀX` of its inputs `[in, in]`, used as `H = XᵀX / tokens`; scores
//! `[out, in]`.
//!
//! **Cost.** `in³` for the factor, once an input; one pass over the matrix.
//!
//! **Departs.** (1) The paper's second stage, which trains the scales and zeros of the groups that stay block by block
//! and then end to end, is left out: rounding is another step of the recipe. (2) Weights of inputs that are zero in
//! every token have saliency 0.

use lacuna_base::{Mat, MatRef};
use lacuna_contract::{Ability, Ask, Card, Made, Method, MethodError, Scope, Score, Stats};
use serde::Deserialize;

use crate::make;
use crate::obs::Hessian;

/// The paper's parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Gqsa {
    /// Added to the diagonal of H, as a fraction of its mean; above 0.
    damping: f64,
}

impl Default for Gqsa {
    fn default() -> Gqsa {
        Gqsa { damping: 0.01 }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "gqsa",
            paper: "Zeng, Liu, Yang, Chen, Mei, Fu: GQSA: Group Quantization and Sparsity for Accelerating Large \
             Language Model Inference, 2024",
            arxiv: "2412.17560",
            summary: "Groups of weights go whole, those with the least sum of squares over the inverse Hessian's \
             diagonal squared.",
            system: None,
            verb: "prune",
            needs: &[Ask::InputGram],
            abilities: &[Ability::Unstructured, Ability::Nm, Ability::Blocks, Ability::FixedMask],
        },
        keys: make::keys::<Gqsa>,
        make: |given| {
            let p: Gqsa = make::parameters("gqsa", given)?;
            if !(p.damping > 0.0 && p.damping.is_finite()) {
                return Err(MethodError::new(format!("damping is {}; it must be above 0", p.damping)));
            }
            Ok(Made::Score(Box::new(p)))
        },
    }
}

impl Score for Gqsa {
    fn score(&self, w: MatRef<'_>, stats: &Stats<'_>) -> Result<Mat, MethodError> {
        make::finite(w)?;
        let n = w.cols();
        let h = Hessian::new(stats, n, false, self.damping)?;
        // H⁻¹ = UᵀU, so that its diagonal is the squared length of U's columns.
        let mut diagonal = vec![0.0f64; n];
        for i in 0..n {
            diagonal.iter_mut().zip(h.u.row(i)).for_each(|(d, u)| *d += f64::from(*u).powi(2));
        }
        let mut worth: Vec<f64> = diagonal.iter().map(|d| 1.0 / (d * d)).collect();
        h.dead.iter().for_each(|&j| worth[j] = 0.0);
        Ok(Mat::from_fn(w.rows(), n, |r, c| (f64::from(w.at(r, c)).powi(2) * worth[c]) as f32))
    }

    fn scope(&self) -> Scope {
        Scope::Matrix
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::select::{Scored, select};
    use crate::obs::slow;
    use lacuna_base::testkit::random;
    use lacuna_contract::{Gathered, Sparsity};

    /// The definition: a fresh inverse by Gauss and Jordan, and a full sort of the groups' sums.
    #[test]
    fn groups_agree_with_brute_force() {
        for (rows, cols, width, seed) in [(1, 16, 16, 1), (6, 48, 16, 2), (4, 12, 4, 3), (3, 1, 1, 4)] {
            let (mut w, gram) = (random(rows, cols, seed), slow::inputs(cols, 60, seed + 10));
            w.row_mut(0).fill(0.5);
            let found = [(Ask::InputGram, Gathered::Gram(gram.clone()))];
            let stats = Stats { tokens: 60, found: &found, ..Stats::default() };
            let scores = Gqsa::default().score(w.view(), &stats).expect("scores");
            let inverse = slow::inverse(&slow::hessian(&gram, 0.01));
            let saliency = |r: usize, c: usize| match gram.at(c, c) {
                0.0 => 0.0,
                _ => f64::from(w[(r, c)]).powi(2) / inverse[c][c].powi(2),
            };
            for (r, c) in (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))) {
                let (got, want) = (f64::from(scores[(r, c)]), saliency(r, c));
                assert!((got - want).abs() <= 1e-3 * want.abs(), "({r}, {c}): {got} {want}");
            }
            let pattern = Sparsity::Block { height: 1, width };
            let one = Scored { scores: &scores, before: None, sparsity: 0.5 };
            let mask = select(&[one], pattern, Gqsa::default().scope()).expect("masks").remove(0);
            let mut groups: Vec<(f64, usize, usize)> = (0..rows)
                .flat_map(|r| (0..cols / width).map(move |g| (r, g)))
                .map(|(r, g)| ((g * width..(g + 1) * width).map(|c| saliency(r, c)).sum(), r, g))
                .collect();
            groups.sort_by(|a, b| a.partial_cmp(b).expect("numbers"));
            let gone = (0.5 * groups.len() as f64).round() as usize;
            for (i, (_, r, g)) in groups.iter().enumerate() {
                assert!((g * width..(g + 1) * width).all(|c| mask.get(*r, c) == (i >= gone)), "group {g} of row {r}");
            }
        }
        assert!((method().make)(serde_json::json!({ "damping": 0 })).is_err());
    }
}
