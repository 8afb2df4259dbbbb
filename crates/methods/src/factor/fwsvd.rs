//! FWSVD: singular values of a matrix whose inputs are weighted by how much the loss leans on their weights.
//!
//! **Paper.** Yen-Chang Hsu, Ting Hua, Sungen Chang, Qian Lou, Yilin Shen, Hongxia Jin, "Language Model Compression
//! with Weighted Low-Rank Factorization", ICLR 2022, arXiv 2207.00112.
//!
//! **Idea.** With `I_ij` the mean of squared gradients of `W_ij` (the diagonal of the empirical Fisher matrix), all
//! weights of a row share `Î_i = Σ_j I_ij`; then `min ‖Î^½ W - Î^½ A B‖` has the closed form `Î^½ W = U Σ Vᵀ`, `A =
//! Î^-½ U_r Σ_r`, `B = V_rᵀ`. The paper's `W` is `[in, out]` (`y = x W`): its rows are the inputs.
//!
//! **Shapes and units.** `w` `[out, in]`, the transpose of the paper's; means over sequences of squared gradients
//! `[out, in]`, in nats² a squared unit of weight, of which the columns are summed: `[in]`; `a` `[out, r]`, `b` `[r,
//! in]`.
//!
//! **Cost.** One backward pass a sequence for the statistic; about `20 · out · in · min(out, in)` operations in f64; a
//! few copies of the matrix in f64.
//!
//! **Departs.** (1) A sample is a sequence and its mean loss, the loss that of language modelling; the paper has a task
//! and its examples. (2) Inputs with no gradient at all weigh a millionth of the heaviest instead of nothing, so that
//! there is a way back. (3) The sizes are shared evenly between the factors. (4) No fine-tuning afterwards.

use lacuna_base::{Mat, MatRef};
use lacuna_contract::{Ask, Card, Factor, Made, Method, MethodError, Stats};
use serde::Deserialize;

use super::svd::{check, weighted};
use crate::make;

/// No parameters; the rank is the family's.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Fwsvd {}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "fwsvd",
            paper: "Hsu, Hua, Chang, Lou, Shen, Jin: Language Model Compression with Weighted Low-Rank Factorization, \
             2022",
            arxiv: "2207.00112",
            summary: "Two thin matrices, nearest where an input's weights have large gradients.",
            system: None,
            verb: "factor",
            needs: &[Ask::GradientSquares],
            abilities: &[],
        },
        keys: make::keys::<Fwsvd>,
        make: |given| Ok(Made::Factor(Box::new(make::parameters::<Fwsvd>("fwsvd", given)?))),
    }
}

impl Factor for Fwsvd {
    fn factor(&self, w: MatRef<'_>, stats: &Stats<'_>, rank: usize) -> Result<(Mat, Mat), MethodError> {
        check(w, rank)?;
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
        let mut sums = vec![0.0; w.cols()];
        for r in 0..squares.rows() {
            sums.iter_mut().zip(squares.row(r)).for_each(|(s, v)| *s += f64::from(*v));
        }
        // A negative sum has no root and is refused as a weight that is no number.
        let scale: Vec<f64> = sums.into_iter().map(f64::sqrt).collect();
        weighted(w, &scale, rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::factor::testkit::{column_error, column_optimum, product};
    use lacuna_base::testkit::{max_abs_diff, random};
    use lacuna_contract::Gathered;

    fn factored(w: &Mat, squares: &Mat, rank: usize) -> Result<(Mat, Mat), MethodError> {
        let gradients = [(Ask::GradientSquares, Gathered::Matrix(squares.clone()))];
        let stats = Stats { tokens: 9, found: &[], gradients: &gradients, sequences: 3, worked: None };
        Fwsvd {}.factor(w.view(), &stats, rank)
    }

    #[test]
    fn agrees_with_the_brute_force_optimum_of_the_weighted_error() {
        for (out, inputs, rank) in [(6, 8, 3), (8, 5, 2), (1, 4, 1), (4, 1, 1), (5, 5, 5), (9, 4, 3)] {
            let mut w = random(out, inputs, 1);
            (0..out).for_each(|r| w[(r, inputs / 2)] = 0.0);
            let g = random(out, inputs, 2);
            let squares = Mat::from_fn(out, inputs, |r, c| g[(r, c)].powi(2) * if c == 0 { 50.0 } else { 1.0 });
            // Paper: one weight for all that an input meets.
            let weight: Vec<f64> =
                (0..inputs).map(|c| (0..out).map(|r| f64::from(squares[(r, c)])).sum::<f64>()).collect();
            let (a, b) = factored(&w, &squares, rank).expect("factors");
            let (got, best) = (column_error(&w, &a, &b, &weight), column_optimum(&w, &weight, rank));
            assert!((got - best).abs() < 1e-4 * (1.0 + best), "{out} {inputs} {rank}: {got} {best}");
        }
    }

    #[test]
    fn inputs_without_gradients_come_last_and_what_is_wrong_is_refused() {
        let w = random(5, 6, 3);
        // Two inputs matter, and two ranks are there: those columns are exact.
        let squares = Mat::from_fn(5, 6, |_, c| if c < 2 { 1e-9 } else { 0.0 });
        let (a, b) = factored(&w, &squares, 2).expect("factors");
        let p = product(&a, &b);
        assert!((0..5).all(|r| (0..2).all(|c| (p[(r, c)] - w[(r, c)]).abs() < 1e-4)));
        // No gradient anywhere: the plain decomposition.
        let (a, b) = factored(&w, &Mat::zeros(5, 6), 5).expect("factors");
        assert!(max_abs_diff(product(&a, &b).view(), w.view()) < 1e-4);
        assert!(factored(&w, &Mat::zeros(5, 5), 2).expect_err("refused").what.contains("5 x 5"));
        let bad = Mat::from_fn(5, 6, |_, c| if c == 4 { -1.0 } else { 1.0 });
        assert!(factored(&w, &bad, 2).expect_err("refused").what.contains("input 4"));
        assert!(Fwsvd {}.factor(w.view(), &Stats::default(), 2).is_err());
    }
}
