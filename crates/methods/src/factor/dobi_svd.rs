//! Dobi-SVD's rebuilt weights: the matrix whose outputs are the truncated outputs of the whole one.
//!
//! **Paper.** Qinsi Wang, Jinghan Ke, Masayoshi Tomizuka, Yiran Chen, Kurt Keutzer, Chenfeng Xu, "Dobi-SVD:
//! Differentiable SVD for LLM Compression and Some New Perspectives", ICLR 2025, arXiv 2502.02723.
//!
//! **Idea.** Truncate activations, not weights: of the outputs `Y = X Wᵀ` the best rank `k` is `Y V Vᵀ` with the first
//! `k` right singular vectors `V` of `Y`. (Eckart-Young-Mirsky.) So the weights to store are `W' = V Vᵀ W`: thin `V`
//! and `Vᵀ W`, and no inverse of anything is needed.
//!
//! **Shapes and units.** `w` `[out, in]`; `XᵀX` `[in, in]`, used as `C = XᵀX / tokens`; `V` are the first eigenvectors
//! of `W C Wᵀ` `[out, out]`; `a` `[out, k]`, `b` `[k, in]`.
//!
//! **Cost.** `out · in² + out² · in` for the outputs' second moment and about `9 out³` for its eigenvectors, in f64;
//! about `32 out² + 8 in²` bytes and a few copies of the matrix in f64.
//!
//! **Departs.** (1) Only the closed form: where to truncate is the family's `keep`, the same for every matrix, and not
//! learnt through a differentiable SVD for each (a search step may vary it). (2) `V` is of all calibration outputs at
//! once, from their second moment; the paper joins the `V` of single batches by an incremental principal component
//! analysis, which approximates that. (3) Ranks beyond what the outputs span go to the nearest product for what is left
//! of `W`. (4) The paper's remapping, which stores the `k` and the rest in mixed precision, is a quantize step's
//! matter.

use lacuna_base::dense::{matmul_nn_f64, matmul_nt_f64};
use lacuna_base::{Mat, Mat64, MatRef, factor};
use lacuna_contract::{Ability, Ask, Card, Factor, Made, Method, MethodError, Stats};
use serde::Deserialize;

use super::eora::spanned;
use super::svd::check;
use crate::make;

/// No parameters; the rank is the family's.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct DobiSvd {}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "dobi-svd",
            paper: "Wang, Ke, Tomizuka, Chen, Keutzer, Xu: Dobi-SVD: Differentiable SVD for LLM Compression and Some \
             New Perspectives, 2025",
            arxiv: "2502.02723",
            summary: "Two thin matrices rebuilt from truncated outputs on calibration text.",
            system: None,
            verb: "factor",
            needs: &[Ask::InputGram],
            abilities: &[Ability::Error],
        },
        keys: make::keys::<DobiSvd>,
        make: |given| Ok(Made::Factor(Box::new(make::parameters::<DobiSvd>("dobi-svd", given)?))),
    }
}

impl Factor for DobiSvd {
    fn factor(&self, w: MatRef<'_>, stats: &Stats<'_>, rank: usize) -> Result<(Mat, Mat), MethodError> {
        check(w, rank)?;
        let gram = make::gram(stats, w.cols())?;
        let w = Mat64::from_f32(w);
        let outputs = matmul_nt_f64(&matmul_nn_f64(&w, &gram.mean()), &w);
        let factor::Eigen { values, q } = factor::symmetric_eigen(&outputs)
            .map_err(|e| MethodError::new(format!("the outputs' second moment: {e}")))?;
        // Smallest first; what rounding left of a zero is no direction of the outputs.
        let (n, most) = (values.len(), values.last().copied().unwrap_or(0.0));
        let least = most * f64::EPSILON * n as f64;
        let count = values.iter().rev().take(rank).take_while(|v| **v > least).count();
        spanned(&w, Mat64::from_fn(n, count, |r, k| q[(r, n - 1 - k)]), rank)
    }

    fn scratch_bytes(&self, (rows, cols): (usize, usize)) -> u64 {
        let (m, n) = (rows as u64, cols as u64);
        32 * m * m + 8 * n * n + 56 * m * n
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::factor::testkit::{brute_error, case, output_error, product};
    use crate::factor::{svd, svd_llm};
    use lacuna_base::Gram;
    use lacuna_base::testkit::{max_abs_diff, random};
    use lacuna_contract::Gathered;

    fn by(method: Method, w: &Mat, x: &Mat, rank: usize) -> (Mat, Mat) {
        let mut gram = Gram::new(w.cols());
        gram.add(x.view());
        let found = [(Ask::InputGram, Gathered::Gram(gram))];
        let stats = Stats { tokens: x.rows() as u64, found: &found, gradients: &[], sequences: 0, worked: None };
        let Ok(Made::Factor(f)) = (method.make)(serde_json::Value::Null) else { panic!("factors") };
        f.factor(w.view(), &stats, rank).expect("factors")
    }

    #[test]
    fn agrees_with_brute_force_outputs_and_with_whitening() {
        for (out, cols, rank) in [(6, 8, 3), (8, 5, 2), (1, 4, 1), (4, 1, 1), (5, 5, 5), (9, 4, 3)] {
            let (w, x, _) = case(out, cols);
            let (a, b) = by(method(), &w, &x, rank);
            assert_eq!((a.rows(), a.cols(), b.rows(), b.cols()), (out, rank, rank, cols));
            let (got, best) = (output_error(&w, &a, &b, &x), brute_error(&w, &x, rank));
            assert!((got - best).abs() < 1e-3 * best + 1e-6, "{out} {cols} {rank}: {got} {best}");
            let (a, b) = by(svd_llm::method(), &w, &x, rank);
            let whitened = output_error(&w, &a, &b, &x);
            assert!((got - whitened).abs() < 1e-3 * best + 1e-6, "{out} {cols} {rank}: {got} {whitened}");
        }
    }

    #[test]
    fn truncating_activations_beats_truncating_weights() {
        let (w, x, _) = case(12, 16);
        let [ours, plain] = [method(), svd::method()].map(|m| {
            let (a, b) = by(m, &w, &x, 5);
            output_error(&w, &a, &b, &x)
        });
        assert!(ours < 0.9 * plain, "{ours} {plain}");
    }

    #[test]
    fn spare_ranks_and_dead_inputs() {
        let w = random(7, 4, 3);
        let x = Mat::from_fn(20, 4, |t, c| if c == 1 { 0.0 } else { ((t * 3 + c) as f32).sin() });
        let (a, b) = by(method(), &w, &x, 4);
        assert!(max_abs_diff(product(&a, &b).view(), w.view()) < 1e-4);
        let (a, b) = by(method(), &w, &Mat::zeros(20, 4), 4);
        assert!(max_abs_diff(product(&a, &b).view(), w.view()) < 1e-4);
        let (a, b) = by(method(), &Mat::zeros(7, 4), &x, 2);
        assert!(a.data().iter().chain(b.data()).all(|v| *v == 0.0));
    }
}
