//! SVD-LLM: the product of a given rank whose *outputs* on calibration text are nearest.
//!
//! **Paper.** Xin Wang, Yu Zheng, Zhongwei Wan, Mi Zhang, "SVD-LLM: Truncation-aware Singular Value Decomposition for
//! Large Language Model Compression", 2024, arXiv 2403.07378.
//!
//! **Idea.** With `X Xᵀ = S Sᵀ` (Cholesky), `‖(W - W')X‖ = ‖(W - W')S‖`: truncating `W S = U Σ Vᵀ` at rank `r` loses
//! exactly the dropped singular values, and `W' = (U_r Σ_r^½)(Σ_r^½ V_rᵀ S⁻¹)`.
//!
//! With `root = "svd"` (SVD-LLM V2) the root of `X Xᵀ` is `U_s S^½` from its own singular values, `X Xᵀ = U_s S U_sᵀ`,
//! and the way back `S^-½ U_sᵀ`.
//!
//! **Shapes and units.** `w` `[out, in]`; `XᵀX` `[in, in]`, used as `H = XᵀX / tokens + whiten · mean(diag) · 1`; `a`
//! `[out, r]`, `b` `[r, in]`.
//!
//! **Cost.** `in³ / 3` for the Cholesky factor, or about `9 in³` for the other root, `out · in²` for `W S`, about `20 ·
//! out · in · min(out, in)` for the singular values, all in f64; memory about 32 `in²` bytes and a few copies of the
//! matrix in f64.
//!
//! **Departs.** (1) `whiten` is fixed instead of searched for when the factorization fails. (2) `update` solves for `a`
//! once `b` is known, `a = W H bᵀ (b H bᵀ)⁻¹` with H as measured, without `whiten`. The paper truncates on the inputs
//! of the whole model and then updates on those that the compressed earlier layers put out; here both are the latter,
//! always, and for them the truncated `a` solves that equation already: `b H bᵀ = Σ_r` and `W H bᵀ = U_r Σ_r^³⁄₂`. So
//! the update is an identity but for what `whiten` adds, and off by default. Where `b H bᵀ` is singular the truncation
//! stands. (3) V2's root is taken of `H` as above, by eigenvectors, which for a symmetric matrix are its singular
//! vectors.

use lacuna_base::dense::{matmul_nn_f64, matmul_nt_f64};
use lacuna_base::{FactorError, Mat, Mat64, MatRef, factor};
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
    /// The root of H: "cholesky", or "svd", which V2 takes.
    root: Root,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
enum Root {
    Cholesky,
    Svd,
}

impl Default for SvdLlm {
    fn default() -> SvdLlm {
        SvdLlm { whiten: 1e-6, update: false, root: Root::Cholesky }
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

/// A root `S` of H, `H = S Sᵀ`, and how to get back from it.
struct Rooted {
    forth: Mat64,
    /// S⁻¹; absent where `S` is lower triangular.
    inverse: Option<Mat64>,
}

impl Rooted {
    /// b of `b S = bs`.
    fn back(&self, bs: Mat64) -> Result<Mat64, MethodError> {
        match &self.inverse {
            Some(inverse) => Ok(matmul_nn_f64(&bs, inverse)),
            // Solved as Sᵀ bᵀ = bsᵀ.
            None => factor::solve_lower_transposed(&self.forth, &bs.transpose())
                .map(|b| b.transpose())
                .map_err(|e| MethodError::new(e.to_string())),
        }
    }
}

impl SvdLlm {
    fn root(&self, h: &Mat64) -> Result<Rooted, FactorError> {
        if self.root == Root::Cholesky {
            return Ok(Rooted { forth: factor::cholesky(h)?, inverse: None });
        }
        let n = h.rows();
        let factor::Eigen { values, q } = factor::symmetric_eigen(h)?;
        // Rounding may leave less than the ridge, or less than nothing, of the least of them.
        let least = values.last().copied().unwrap_or(0.0) * f64::EPSILON * n as f64;
        let roots: Vec<f64> = values.iter().map(|v| v.max(least).sqrt()).collect();
        let forth = Mat64::from_fn(n, n, |r, k| q[(r, k)] * roots[k]);
        let inverse = Mat64::from_fn(n, n, |k, c| q[(c, k)] / roots[k]);
        Ok(Rooted { forth, inverse: Some(inverse) })
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
        let s = stats.shared(format!("svd-llm {} {:?}", self.whiten, self.root), || {
            let mut whitened = h.clone();
            (0..w.cols()).for_each(|i| whitened[(i, i)] += ridge);
            self.root(&whitened).map_err(|e| {
                MethodError::new(format!("the calibration Hessian: {e}; more samples or a larger whiten help"))
            })
        })?;
        let w = Mat64::from_f32(w);
        let (mut a, bs) = halves(&matmul_nn_f64(&w, &s.forth), rank)?;
        let b = s.back(bs)?;
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
    use lacuna_base::testkit::{max_abs_diff, random};
    use lacuna_contract::Gathered;

    #[test]
    fn agrees_with_brute_force_outputs() {
        for (out, cols, rank) in [(6, 8, 3), (8, 5, 2), (1, 4, 1), (4, 1, 1), (5, 5, 5)] {
            let (w, x, gram) = case(out, cols);
            let found = [(Ask::InputGram, Gathered::Gram(gram.clone()))];
            let stats = Stats { tokens: 50, found: &found, gradients: &[], sequences: 0, worked: None };
            let best = brute_error(&w, &x, rank);
            for (update, root) in [(false, Root::Cholesky), (true, Root::Cholesky), (false, Root::Svd)] {
                let method = SvdLlm { update, root, ..SvdLlm::default() };
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
                let (a, b) =
                    SvdLlm { whiten, update, ..SvdLlm::default() }.factor(w.view(), &stats, 4).expect("factors");
                output_error(&w, &a, &b, &x)
            });
            assert!(updated <= plain * 1.000_01, "{updated} {plain}");
        }
    }

    #[test]
    fn singular_values_say_what_is_lost() {
        // From the definition: outputs token by token lose the squares of the singular values that go.
        let (w, x, gram) = case(7, 9);
        let s = factor::cholesky(&gram.mean()).expect("positive definite");
        let values = factor::svd(&matmul_nn_f64(&Mat64::from_f32(w.view()), &s)).expect("values").s;
        let found = [(Ask::InputGram, Gathered::Gram(gram))];
        let stats = Stats { tokens: 50, found: &found, gradients: &[], sequences: 0, worked: None };
        for root in [Root::Cholesky, Root::Svd] {
            for rank in 1..7 {
                let (a, b) = SvdLlm { root, ..SvdLlm::default() }.factor(w.view(), &stats, rank).expect("factors");
                let (lost, gone) = (output_error(&w, &a, &b, &x), values[rank..].iter().map(|v| v * v).sum::<f64>());
                assert!((lost / gone - 1.0).abs() < 1e-3, "{root:?} {rank}: {lost} {gone}");
            }
        }
    }

    #[test]
    fn the_update_is_an_identity_on_the_inputs_that_were_whitened() {
        let (w, x, gram) = case(7, 9);
        let other = Mat::from_fn(50, 9, |t, c| x[(t, c)] * (1.0 + 0.5 * ((t * c) as f32).sin()));
        let mut shifted = Gram::new(9);
        shifted.add(other.view());
        let by = |gram: &Gram, update: bool| {
            let found = [(Ask::InputGram, Gathered::Gram(gram.clone()))];
            let stats = Stats { tokens: 50, found: &found, gradients: &[], sequences: 0, worked: None };
            SvdLlm { whiten: 1e-9, update, ..SvdLlm::default() }.factor(w.view(), &stats, 4).expect("factors")
        };
        let ((a, b), (updated, same)) = (by(&gram, false), by(&gram, true));
        assert_eq!(b, same);
        assert!(max_abs_diff(a.view(), updated.view()) < 1e-3);
        // Truncated on other inputs it is none; but then truncating on these is better still.
        let (stale, b) = by(&shifted, false);
        let (h, b64) = (gram.mean(), Mat64::from_f32(b.view()));
        let hb = matmul_nt_f64(&h, &b64);
        let right = matmul_nn_f64(&Mat64::from_f32(w.view()), &hb).transpose();
        let fresh = factor::spd_solve(&matmul_nn_f64(&b64, &hb), &right).expect("solved").transpose().to_f32();
        let (before, after) = (output_error(&w, &stale, &b, &x), output_error(&w, &fresh, &b, &x));
        assert!(after < before && output_error(&w, &a, &same, &x) < after, "{before} {after}");
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
            for root in [Root::Cholesky, Root::Svd] {
                let method = SvdLlm { update: true, root, ..SvdLlm::default() };
                let (a, b) = method.factor(w.view(), &stats, 4).expect("factors");
                assert!(output_error(&w, &a, &b, &x) < 1e-6);
            }
        }
    }
}
