//! ASVD: singular values of a matrix whose inputs are scaled by how large they are on calibration text.
//!
//! **Paper.** Zhihang Yuan, Yuzhang Shang, Yue Song, Dawei Yang, Qiang Wu, Yan Yan, Guangyu Sun, "ASVD:
//! Activation-aware Singular Value Decomposition for Compressing Large Language Models", 2023, arXiv 2312.05821.
//!
//! **Idea.** `W x = (W S)(S⁻¹ x)` with the diagonal `S_ii = (mean |x_i|)^α`: truncating `W S = U Σ Vᵀ` at rank `r`
//! keeps what meets large inputs, and `W' = (U_r Σ_r^½)(Σ_r^½ V_rᵀ S⁻¹)`.
//!
//! **Shapes and units.** `w` `[out, in]`; `Σ |x|` of each input over all tokens, `[in]`; `a` `[out, r]`, `b` `[r, in]`.
//!
//! **Cost.** About `20 · out · in · min(out, in)` operations in f64; a few copies of the matrix in f64.
//!
//! **Departs.** (1) The ranks are the family's, the same share for every matrix; the paper searches them by sensitivity
//! (a search step can). (2) Inputs that are always zero are scaled by a millionth of the largest. (3) After the way
//! back, sizes are shared evenly between the factors.

use lacuna_base::{Mat, MatRef};
use lacuna_contract::{Ability, Ask, Card, Factor, Made, Method, MethodError, Stats};
use serde::Deserialize;

use super::svd::{check, weighted};
use crate::make;

/// The paper's parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Asvd {
    /// The power of the inputs' mean size, 0 (plain singular values) to 4.
    alpha: f64,
}

impl Default for Asvd {
    fn default() -> Asvd {
        Asvd { alpha: 0.5 }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "asvd",
            paper: "Yuan et al.: ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language \
             Models, 2023",
            arxiv: "2312.05821",
            summary: "Two thin matrices, nearest where the inputs are large.",
            system: None,
            verb: "factor",
            needs: &[Ask::InputMagnitudes],
            abilities: &[Ability::Error],
        },
        keys: make::keys::<Asvd>,
        make: |given| {
            let p: Asvd = make::parameters("asvd", given)?;
            if !(0.0..=4.0).contains(&p.alpha) {
                return Err(MethodError::new(format!("alpha is {}; it must be 0 to 4 (the paper's is 0.5)", p.alpha)));
            }
            Ok(Made::Factor(Box::new(p)))
        },
    }
}

impl Factor for Asvd {
    fn factor(&self, w: MatRef<'_>, stats: &Stats<'_>, rank: usize) -> Result<(Mat, Mat), MethodError> {
        check(w, rank)?;
        let (sizes, tokens) = (stats.magnitudes()?, stats.tokens.max(1) as f64);
        if sizes.len() != w.cols() {
            return Err(MethodError::new(format!(
                "sizes of {} inputs for a matrix of {} x {}",
                sizes.len(),
                w.rows(),
                w.cols()
            )));
        }
        let scale: Vec<f64> = sizes.iter().map(|s| (s / tokens).powf(self.alpha)).collect();
        weighted(w, &scale, rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::factor::testkit::{case, column_error, column_optimum, output_error, product};
    use lacuna_base::testkit::{max_abs_diff, random};
    use lacuna_contract::Gathered;

    fn factored(w: &Mat, x: &Mat, alpha: f64, rank: usize) -> (Mat, Mat) {
        let size = |c: usize| (0..x.rows()).map(|t| f64::from(x[(t, c)]).abs()).sum();
        let found = [(Ask::InputMagnitudes, Gathered::Vector((0..x.cols()).map(size).collect()))];
        let stats = Stats { tokens: x.rows() as u64, found: &found, gradients: &[], sequences: 0, worked: None };
        Asvd { alpha }.factor(w.view(), &stats, rank).expect("factors")
    }

    #[test]
    fn agrees_with_the_brute_force_optimum_of_the_scaled_error() {
        for (out, inputs, rank) in [(6, 8, 3), (8, 5, 2), (1, 4, 1), (4, 1, 1), (5, 5, 5), (9, 4, 3)] {
            for alpha in [0.0, 0.5, 1.0] {
                let (w, x, _) = case(out, inputs);
                let mean = |c: usize| (0..50).map(|t| f64::from(x[(t, c)]).abs()).sum::<f64>() / 50.0;
                let weight: Vec<f64> = (0..inputs).map(|c| mean(c).powf(2.0 * alpha)).collect();
                let (a, b) = factored(&w, &x, alpha, rank);
                let (got, best) = (column_error(&w, &a, &b, &weight), column_optimum(&w, &weight, rank));
                assert!((got - best).abs() < 1e-4 * (1.0 + best), "{out} {inputs} {rank} {alpha}: {got} {best}");
            }
        }
    }

    #[test]
    fn outputs_are_nearer_than_without_scales_and_dead_inputs_are_no_obstacle() {
        let (w, x, _) = case(12, 16);
        let [plain, scaled] = [0.0, 0.5].map(|alpha| {
            let (a, b) = factored(&w, &x, alpha, 6);
            output_error(&w, &a, &b, &x)
        });
        assert!(scaled < plain, "{scaled} {plain}");
        let x = Mat::from_fn(50, 16, |t, c| if c % 3 == 0 { 0.0 } else { x[(t, c)] });
        let (a, b) = factored(&w, &x, 0.5, 12);
        assert!(max_abs_diff(product(&a, &b).view(), w.view()) < 1e-4);
        let (a, b) = factored(&w, &Mat::zeros(50, 16), 0.5, 12);
        assert!(max_abs_diff(product(&a, &b).view(), w.view()) < 1e-4);
    }

    #[test]
    fn what_is_wrong_is_refused() {
        let w = random(3, 4, 1);
        let found = [(Ask::InputMagnitudes, Gathered::Vector(vec![1.0; 3]))];
        let stats = Stats { tokens: 1, found: &found, gradients: &[], sequences: 0, worked: None };
        assert!(Asvd::default().factor(w.view(), &stats, 2).expect_err("refused").what.contains("3 inputs"));
        assert!(Asvd::default().factor(w.view(), &Stats::default(), 2).is_err());
        assert!((method().make)(serde_json::json!({ "alpha": -1 })).is_err());
    }
}
