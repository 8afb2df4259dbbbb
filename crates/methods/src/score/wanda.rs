//! Wanda: a weight matters as much as it and its input are large.
//!
//! **Paper.** Mingjie Sun, Zhuang Liu, Anna Bair, J. Zico Kolter, "A Simple and Effective Pruning Approach for Large
//! Language Models", 2023, arXiv 2306.11695.
//!
//! **Idea.** `S_ij = |W_ij| · ‖X_j‖₂`, compared within each output row: removing weight `ij` alone changes the row's
//! outputs on the calibration tokens by exactly `S_ij`.
//!
//! **Shapes and units.** `w` `[out, in]`; `Σ x²` of each input over the tokens, `[in]`; scores `[out, in]` in units of
//! the output times the square root of tokens.
//!
//! **Cost.** One pass over the matrix; the statistics are one number an input.
//!
//! **Departs.** The paper scales `Σ x²` by the number of tokens; within a row that changes no order.

use lacuna_base::{Mat, MatRef};
use lacuna_contract::{Ability, Ask, Card, Made, Method, MethodError, Scope, Score, Stats};
use serde::Deserialize;

use crate::make;

/// No parameters.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Wanda {}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "wanda",
            paper: "Sun, Liu, Bair, Kolter: A Simple and Effective Pruning Approach for Large Language Models, 2023",
            arxiv: "2306.11695",
            summary: "The weights go whose size times the norm of their input is smallest in each output row.",
            system: None,
            verb: "prune",
            needs: &[Ask::InputSquares],
            abilities: &[Ability::Unstructured, Ability::Nm, Ability::Blocks, Ability::FixedMask],
        },
        keys: make::keys::<Wanda>,
        make: |given| Ok(Made::Score(Box::new(make::parameters::<Wanda>("wanda", given)?))),
    }
}

impl Score for Wanda {
    fn score(&self, w: MatRef<'_>, stats: &Stats<'_>) -> Result<Mat, MethodError> {
        make::finite(w)?;
        let squares = stats.squares()?;
        if squares.len() != w.cols() {
            return Err(MethodError::new(format!("squares of {} inputs for a matrix of {}", squares.len(), w.cols())));
        }
        if let Some(j) = squares.iter().position(|s| !s.is_finite() || *s < 0.0) {
            return Err(MethodError::new(format!("the sum of squares of input {j} is {}", squares[j])));
        }
        let norms: Vec<f32> = squares.iter().map(|s| s.sqrt() as f32).collect();
        let mut scores = w.to_mat();
        for r in 0..scores.rows() {
            scores.row_mut(r).iter_mut().zip(&norms).for_each(|(v, n)| *v = v.abs() * n);
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

    /// Straight from the meaning: the norm of the change of a row's outputs when one weight goes.
    #[test]
    fn agrees_with_brute_force_change_of_the_outputs() {
        for (out, inputs, tokens) in [(1, 1, 1), (3, 5, 7), (4, 1, 3)] {
            let (w, mut x) = (random(out, inputs, 1), random(tokens, inputs, 2));
            (0..tokens).for_each(|t| x[(t, 0)] = 0.0);
            let squares: Vec<f64> =
                (0..inputs).map(|j| (0..tokens).map(|t| f64::from(x[(t, j)]).powi(2)).sum()).collect();
            let found = [(Ask::InputSquares, Gathered::Vector(squares))];
            let stats = Stats { tokens: tokens as u64, found: &found, gradients: &[], sequences: 0, worked: None };
            let scores = Wanda {}.score(w.view(), &stats).expect("scores");
            for r in 0..out {
                for j in 0..inputs {
                    let output = |t: usize, without: Option<usize>| -> f64 {
                        (0..inputs)
                            .filter(|&k| Some(k) != without)
                            .map(|k| f64::from(w[(r, k)]) * f64::from(x[(t, k)]))
                            .sum()
                    };
                    let change =
                        (0..tokens).map(|t| (output(t, None) - output(t, Some(j))).powi(2)).sum::<f64>().sqrt();
                    assert!((f64::from(scores[(r, j)]) - change).abs() < 1e-5, "({r}, {j})");
                }
            }
        }
    }

    #[test]
    fn missing_or_wrong_statistics_are_refused() {
        let w = random(2, 3, 1);
        assert!(Wanda {}.score(w.view(), &Stats::default()).is_err());
        for squares in [vec![1.0, 2.0], vec![1.0, f64::NAN, 1.0]] {
            let found = [(Ask::InputSquares, Gathered::Vector(squares))];
            let stats = Stats { tokens: 1, found: &found, gradients: &[], sequences: 0, worked: None };
            assert!(Wanda {}.score(w.view(), &stats).is_err());
        }
    }
}
