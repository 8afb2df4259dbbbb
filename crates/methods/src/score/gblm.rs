//! GBLM-Pruner: a weight matters as much as it is large, its input is large and the loss leans on it.
//!
//! **Paper.** Rocktim Jyoti Das, Mingjie Sun, Liqun Ma, Zhiqiang Shen, "Beyond Size: How Gradients Shape Pruning
//! Decisions in Large Language Models", 2023, arXiv 2311.04902.
//!
//! **Idea.** `S_ij = |W_ij| · ‖X_j‖₂ + α · |W_ij| · ‖G_ij‖_p`, compared within each output row: `X_j` are the inputs of
//! a sample, `G` the gradients of each sample's mean loss, their norm taken over samples; the first-order Taylor term
//! of the loss beside Wanda's.
//!
//! **Shapes and units.** `w` `[out, in]`; `Σ x²` of each input over all tokens, `[in]`; means over samples of `G²` or
//! `|G|`, `[out, in]`, in nats a unit of weight; scores `[out, in]`. As in the authors' code `‖X_j‖₂² = Σ x² / N` and
//! `‖G‖₂² = Σ G²`, `‖G‖₁ = Σ |G|` for `N` samples.
//!
//! **Cost.** One backward pass a sample for the statistics, in f32; then one pass over the matrix.
//!
//! **Departs.** Gradients are accumulated in f32 where the authors' code sums the 1-norm in f16. Samples are as long as
//! the recipe says (the paper: 128 of 2048 tokens); `alpha` is the paper's for those.

use lacuna_base::{Mat, MatRef};
use lacuna_contract::{Ability, Ask, Card, Made, Method, MethodError, Scope, Score, Stats};
use serde::Deserialize;

use crate::make;

/// The paper's parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Gblm {
    /// Weight of the gradients' term; 0 or more.
    alpha: f64,
    /// The norm over samples, 1 or 2.
    norm: u8,
}

impl Default for Gblm {
    fn default() -> Gblm {
        Gblm { alpha: 100.0, norm: 2 }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "gblm",
            paper: "Das, Sun, Ma, Shen: Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models, \
             2023",
            arxiv: "2311.04902",
            summary: "The weights go whose size times input norm plus gradient norm is smallest in each output row.",
            system: Some(69),
            verb: "prune",
            needs: &[Ask::InputSquares, Ask::GradientSquares, Ask::GradientAbsolute],
            abilities: &[Ability::Unstructured, Ability::Nm, Ability::Blocks, Ability::FixedMask],
        },
        keys: make::keys::<Gblm>,
        make: |given| {
            let p: Gblm = make::parameters("gblm", given)?;
            if !(p.alpha >= 0.0 && p.alpha.is_finite()) {
                return Err(MethodError::new(format!(
                    "alpha is {}; it must be 0 or more (the paper's is 100)",
                    p.alpha
                )));
            }
            if !(1..=2).contains(&p.norm) {
                return Err(MethodError::new(format!("norm is {}; it must be 1 or 2", p.norm)));
            }
            Ok(Made::Score(Box::new(p)))
        },
    }
}

impl Score for Gblm {
    fn score(&self, w: MatRef<'_>, stats: &Stats<'_>) -> Result<Mat, MethodError> {
        make::finite(w)?;
        let (squares, samples) = (stats.squares()?, stats.sequences as f64);
        let gradients = stats.matrix(if self.norm == 2 { Ask::GradientSquares } else { Ask::GradientAbsolute })?;
        if squares.len() != w.cols() || (gradients.rows(), gradients.cols()) != (w.rows(), w.cols()) {
            return Err(MethodError::new(format!(
                "squares of {} inputs and gradients of {} x {} for a matrix of {} x {}",
                squares.len(),
                gradients.rows(),
                gradients.cols(),
                w.rows(),
                w.cols()
            )));
        }
        if let Some(j) = squares.iter().position(|s| !s.is_finite() || *s < 0.0) {
            return Err(MethodError::new(format!("the sum of squares of input {j} is {}", squares[j])));
        }
        let inputs: Vec<f64> = squares.iter().map(|s| (s / samples.max(1.0)).sqrt()).collect();
        let mut scores = w.to_mat();
        for r in 0..scores.rows() {
            let row = scores.row_mut(r).iter_mut().zip(&inputs).zip(gradients.row(r));
            for ((v, x), g) in row {
                // Means over samples, back to sums.
                let g = f64::from(*g) * samples;
                let g = if self.norm == 2 { g.sqrt() } else { g };
                *v = (f64::from(v.abs()) * (x + self.alpha * g)) as f32;
            }
        }
        Ok(scores)
    }

    fn scope(&self) -> Scope {
        Scope::Row
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;
    use lacuna_contract::Gathered;

    /// From the definition: samples' inputs and gradients one by one.
    #[test]
    fn agrees_with_brute_force() {
        for (out, inputs, samples) in [(1, 1, 1), (3, 5, 4), (4, 1, 3), (2, 6, 2)] {
            let w = random(out, inputs, 1);
            let xs: Vec<Mat> = (0..samples).map(|s| random(7, inputs, 10 + s)).collect();
            let gs: Vec<Mat> = (0..samples).map(|s| random(out, inputs, 50 + s)).collect();
            let n = samples as f64;
            let all =
                |j: usize| xs.iter().flat_map(move |x| (0..7).map(move |t| f64::from(x[(t, j)]))).map(|x| x * x).sum();
            let squares: Vec<f64> = (0..inputs).map(all).collect();
            let mean = |f: &dyn Fn(f64) -> f64| {
                Mat::from_fn(out, inputs, |r, c| (gs.iter().map(|g| f(f64::from(g[(r, c)]))).sum::<f64>() / n) as f32)
            };
            let found = [(Ask::InputSquares, Gathered::Vector(squares))];
            let gradients = [
                (Ask::GradientSquares, Gathered::Matrix(mean(&|g| g * g))),
                (Ask::GradientAbsolute, Gathered::Matrix(mean(&f64::abs))),
            ];
            let stats =
                Stats { tokens: 7 * samples, found: &found, gradients: &gradients, sequences: samples, worked: None };
            for norm in [1, 2] {
                let scores = Gblm { alpha: 3.0, norm }.score(w.view(), &stats).expect("scores");
                for (r, c) in (0..out).flat_map(|r| (0..inputs).map(move |c| (r, c))) {
                    let x = (xs.iter().map(|x| (0..7).map(|t| f64::from(x[(t, c)]).powi(2)).sum::<f64>()).sum::<f64>()
                        / n)
                        .sqrt();
                    let p = f64::from(norm);
                    let g = gs.iter().map(|g| f64::from(g[(r, c)]).abs().powf(p)).sum::<f64>().powf(1.0 / p);
                    let want = f64::from(w[(r, c)]).abs() * (x + 3.0 * g);
                    assert!((f64::from(scores[(r, c)]) / want - 1.0).abs() < 1e-4, "({r}, {c}) norm {norm}");
                }
            }
        }
    }

    #[test]
    fn missing_statistics_and_wrong_parameters_are_refused() {
        let w = random(2, 3, 1);
        let found = [(Ask::InputSquares, Gathered::Vector(vec![1.0; 3]))];
        let stats = Stats { tokens: 1, found: &found, gradients: &[], sequences: 1, worked: None };
        let said = Gblm::default().score(w.view(), &stats).expect_err("refused").what;
        assert!(said.contains("gradients"), "{said}");
        assert!((method().make)(serde_json::json!({ "alpha": -1 })).is_err());
        assert!((method().make)(serde_json::json!({ "norm": 3 })).is_err());
    }
}
