//! SVD-LLM: the product of a given rank whose *outputs* on calibration text are nearest.
//!
//! **Paper.** Xin Wang, Yu Zheng, Zhongwei Wan, Mi Zhang, "SVD-LLM: Truncation-aware Singular Value Decomposition for
//! Large Language Model Compression", 2024, arXiv 2403.07378.
//!
//! **Idea.** With `X Xᵀ = S Sᵀ` (Cholesky), `‖(W - W')X‖ = ‖(W - W')S‖`: truncating `W S = U Σ Vᵀ` at rank `r` loses
//! exactly the dropped singular values, and `W' = (U_r Σ_r^½)(Σ_r^½ V_rᵀ S⁻¹)`.
//!
//! **Shapes and units.** `w` `[out, in]`; `XᵀX` `[in, in]`, used as `H = XᵀX / tokens + whiten · mean(diag) · 1`; `a`
//! `[out, r]`, `b` `[r, in]`.
//!
//! **Cost.** `in³ / 3` for the Cholesky factor, `out · in²` for `W S`, about `20 · out · in · min(out, in)` for the
//! singular values, all in f64; memory about 32 `in²` bytes and a few copies of the matrix in f64.
//!
//! **Departs.** (1) `whiten` is fixed instead of searched for when the factorization fails. (2) `update` solves for `a`
//! once `b` is known, `a = W H bᵀ (b H bᵀ)⁻¹` with H as measured, without `whiten`: the paper's closed form on the
//! inputs that the compressed earlier blocks produce, which are the inputs here anyway; so it moves little. Where
//! `b H bᵀ` is singular the truncation stands.

use lacuna_base::dense::{matmul_nn_f64, matmul_nt_f64};
use lacuna_base::{Mat, Mat64, MatRef, factor};
use lacuna_contract::{Ability, Ask, Card, Factor, Made, Method, MethodError, Stats};
use serde::Deserialize;

use super::svd::{check, halves};
use crate::make;

/// The paper's parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct SvdLlm {
    /// Added to the diagonal of H, as a fraction of its mean, so that it has a Cholesky factor; above 0.
    whiten: f64,
    /// Solve for the left factor once the right one is known.
    update: bool,
}

impl Default for SvdLlm {
    fn default() -> SvdLlm {
        SvdLlm { whiten: 1e-6, update: false }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "svd-llm",
            paper: "Wang, Zheng, Wan, Zhang: SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language \
             Model Compression, 2024",
            arxiv: "2403.07378",
            summary: "Two thin matrices whose outputs on calibration text are the nearest of their rank.",
            system: Some(224),
            verb: "factor",
            needs: &[Ask::InputGram],
            abilities: &[Ability::Error],
        },
        keys: make::keys::<SvdLlm>,
        make: |given| {
            let p: SvdLlm = make::parameters("svd-llm", given)?;
            if !(p.whiten > 0.0 && p.whiten.is_finite()) {
                return Err(MethodError::new(format!("whiten is {}; it must be above 0", p.whiten)));
            }
            Ok(Made::Factor(Box::new(p)))
        },
    }
}

impl Factor for SvdLlm {
    fn factor(&self, w: MatRef<'_>, stats: &Stats<'_>, rank: usize) -> Result<(Mat, Mat), MethodError> {
        check(w, rank)?;
        let gram = make::gram(stats, w.cols())?;
        let h = gram.mean();
        let mean = gram.mean_diag() / gram.tokens() as f64;
        // Inputs that are all zero say nothing about any direction: then all count alike.
        let ridge = if mean > 0.0 { self.whiten * mean } else { 1.0 };
        let s = stats.shared(format!("svd-llm {}", self.whiten), || {
            let mut whitened = h.clone();
            (0..w.cols()).for_each(|i| whitened[(i, i)] += ridge);
            factor::cholesky(&whitened).map_err(|e| {
                MethodError::new(format!("the calibration Hessian: {e}; more samples or a larger whiten help"))
            })
        })?;
        let w = Mat64::from_f32(w);
        let (mut a, bs) = halves(&matmul_nn_f64(&w, &s), rank)?;
        // b S = bs, solved as Sᵀ bᵀ = bsᵀ.
        let b = factor::solve_lower_transposed(&s, &bs.transpose())
            .map_err(|e| MethodError::new(e.to_string()))?
            .transpose();
        if self.update {
            let hb = matmul_nt_f64(&h, &b);
            if let Ok(at) = factor::spd_solve(&matmul_nn_f64(&b, &hb), &matmul_nn_f64(&w, &hb).transpose()) {
                a = at.transpose();
            }
        }
        Ok((a.to_f32(), b.to_f32()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::factor::testkit::{brute_error, case, output_error};
    use lacuna_base::Gram;
    use lacuna_base::testkit::random;
    use lacuna_contract::Gathered;

    #[test]
    fn agrees_with_brute_force_outputs() {
        for (out, cols, rank) in [(6, 8, 3), (8, 5, 2), (1, 4, 1), (4, 1, 1), (5, 5, 5)] {
            let (w, x, gram) = case(out, cols);
            let found = [(Ask::InputGram, Gathered::Gram(gram.clone()))];
            let stats = Stats { tokens: 50, found: &found, gradients: &[], sequences: 0, worked: None };
            let best = brute_error(&w, &x, rank);
            for update in [false, true] {
                let method = SvdLlm { update, ..SvdLlm::default() };
                let (a, b) = method.factor(w.view(), &stats, rank).expect("factors");
                let got = output_error(&w, &a, &b, &x);
                assert!(got <= best * 1.001 + 1e-6 && got >= best * 0.999 - 1e-6, "{out} {cols} {rank}: {got} {best}");
            }
        }
    }

    #[test]
    fn the_update_never_makes_outputs_worse() {
        let (w, x, gram) = case(7, 9);
        let found = [(Ask::InputGram, Gathered::Gram(gram.clone()))];
        let stats = Stats { tokens: 50, found: &found, gradients: &[], sequences: 0, worked: None };
        for whiten in [1e-6, 0.5] {
            let [plain, updated] = [false, true].map(|update| {
                let (a, b) = SvdLlm { whiten, update }.factor(w.view(), &stats, 4).expect("factors");
                output_error(&w, &a, &b, &x)
            });
            assert!(updated <= plain * 1.000_01, "{updated} {plain}");
        }
    }

    #[test]
    fn dead_inputs_and_silence_are_no_obstacle() {
        let w = random(4, 6, 1);
        for live in [0, 2] {
            let x = Mat::from_fn(20, 6, |t, c| if c < live { ((t * 3 + c) as f32).sin() } else { 0.0 });
            let mut gram = Gram::new(6);
            gram.add(x.view());
            let found = [(Ask::InputGram, Gathered::Gram(gram.clone()))];
            let stats = Stats { tokens: 20, found: &found, gradients: &[], sequences: 0, worked: None };
            let (a, b) = SvdLlm { update: true, ..SvdLlm::default() }.factor(w.view(), &stats, 4).expect("factors");
            assert!(output_error(&w, &a, &b, &x) < 1e-6);
        }
    }
}
