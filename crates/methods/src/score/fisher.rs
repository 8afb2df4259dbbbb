//! Fisher: the weights that the loss is most sensitive to, by the diagonal of the Fisher matrix.
//!
//! **Paper.** Sehoon Kim, Coleman Hooper, Amir Gholami, Zhen Dong, Xiuyu Li, Sheng Shen, Michael W. Mahoney, Kurt
//! Keutzer, "SqueezeLLM: Dense-and-Sparse Quantization", 2023, arXiv 2306.07629.
//!
//! **Idea.** The diagonal of the Fisher matrix, the mean of squared gradients, stands for the second derivative: the
//! weights with the largest `F_ii` (0.05% in the paper) are kept exact in a sparse term, beside those of largest size.
//!
//! **Shapes and units.** `w` `[out, in]`; means over samples of squared gradients `[out, in]`, in nats² a squared unit
//! of weight; they are the scores.
//!
//! **Cost.** One backward pass a sample, for the statistics.
//!
//! **Departs.** In nothing.

use lacuna_base::{Mat, MatRef};
use lacuna_contract::{Ability, Ask, Card, Made, Method, MethodError, Scope, Score, Stats};
use serde::Deserialize;

use crate::make;

/// No parameters.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Fisher {}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "fisher",
            paper: "Kim, Hooper, Gholami, Dong, Li, Shen, Mahoney, Keutzer: SqueezeLLM: Dense-and-Sparse Quantization, \
             2023",
            arxiv: "2306.07629",
            summary: "The weights with the largest mean squared gradients count most.",
            system: None,
            verb: "outliers",
            needs: &[Ask::GradientSquares],
            abilities: &[Ability::Unstructured, Ability::Nm, Ability::Blocks, Ability::FixedMask],
        },
        keys: make::keys::<Fisher>,
        make: |given| Ok(Made::Score(Box::new(make::parameters::<Fisher>("fisher", given)?))),
    }
}

impl Score for Fisher {
    fn score(&self, w: MatRef<'_>, stats: &Stats<'_>) -> Result<Mat, MethodError> {
        make::finite(w)?;
        let squares = stats.matrix(Ask::GradientSquares)?;
        if (squares.rows(), squares.cols()) != (w.rows(), w.cols()) {
            return Err(MethodError::new(format!(
                "squared gradients of {} x {} for a matrix of {} x {}",
                squares.rows(),
                squares.cols(),
                w.rows(),
                w.cols()
            )));
        }
        match squares.data().iter().position(|v| !(v.is_finite() && *v >= 0.0)) {
            None => Ok(squares.clone()),
            Some(i) => Err(MethodError::new(format!(
                "the mean squared gradient of ({}, {}) is {}",
                i / w.cols(),
                i % w.cols(),
                squares.data()[i]
            ))),
        }
    }

    fn scope(&self) -> Scope {
        Scope::Matrix
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;
    use lacuna_contract::Gathered;

    /// From the definition, sample by sample: who leads is who has the largest sum of squared gradients.
    #[test]
    fn agrees_with_brute_force() {
        for (out, inputs, samples) in [(1, 1, 1), (3, 5, 4), (4, 1, 3)] {
            let gs: Vec<Mat> = (0..samples).map(|s| random(out, inputs, 50 + s)).collect();
            let sum = |r: usize, c: usize| gs.iter().map(|g| f64::from(g[(r, c)]).powi(2)).sum::<f64>();
            let mean = Mat::from_fn(out, inputs, |r, c| (sum(r, c) / samples as f64) as f32);
            let gradients = [(Ask::GradientSquares, Gathered::Matrix(mean))];
            let stats = Stats { gradients: &gradients, sequences: samples, ..Stats::default() };
            let scores = Fisher {}.score(random(out, inputs, 1).view(), &stats).expect("scores");
            let all: Vec<(usize, usize)> = (0..out).flat_map(|r| (0..inputs).map(move |c| (r, c))).collect();
            for (&a, &b) in all.iter().flat_map(|a| all.iter().map(move |b| (a, b))) {
                assert!(sum(a.0, a.1) < sum(b.0, b.1) * (1.0 + 1e-6) || scores[a] >= scores[b], "{a:?} {b:?}");
            }
        }
    }

    #[test]
    fn wrong_statistics_are_refused() {
        let w = random(2, 3, 1);
        assert!(Fisher {}.score(w.view(), &Stats::default()).expect_err("refused").what.contains("gradients"));
        for bad in [Mat::from_fn(3, 2, |_, _| 1.0), Mat::from_fn(2, 3, |_, _| f32::NAN)] {
            let gradients = [(Ask::GradientSquares, Gathered::Matrix(bad))];
            assert!(Fisher {}.score(w.view(), &Stats { gradients: &gradients, ..Stats::default() }).is_err());
        }
    }
}
