//! GFWSVD: singular values of a matrix whitened on both sides by a Kronecker product near the Fisher matrix.
//!
//! **Paper.** Viktoriia Chekalina, Daniil Moskovskiy, Daria Cherniuk, Maxim Kurkin, Andrey Kuznetsov, Evgeny Frolov,
//! "Generalized Fisher-Weighted SVD: Scalable Kronecker-Factored Fisher Approximation for Compressing Large Language
//! Models", 2025, arXiv 2505.17974.
//!
//! **Idea.** The loss rises by `vec(ΔW)ᵀ F vec(ΔW)`, `F = E[vec(G) vec(G)ᵀ]` the empirical Fisher matrix of the
//! gradients `G`. With `F` near a Kronecker product of `Y` (outputs) and `X` (inputs) that is `‖L_Yᵀ ΔW L_X‖²`, `Y =
//! L_Y L_Yᵀ`, `X = L_X L_Xᵀ` (Cholesky): truncating `L_Yᵀ W L_X = U Σ Vᵀ` at rank `r` is the optimum, and `W' = (L_Y⁻ᵀ
//! U_r Σ_r^½)(Σ_r^½ V_rᵀ L_X⁻¹)`. The nearest product solves `Y ∝ E[G X Gᵀ]`, `X ∝ E[Gᵀ Y G]`. FWSVD is the case `Y =
//! 1`, `X` diagonal.
//!
//! **Shapes and units.** `w` `[out, in]`; the means over sequences of `G Gᵀ` `[out, out]` and of `Gᵀ G` `[in, in]`, in
//! nats² a squared unit of weight, of which the scale does not matter; `a` `[out, r]`, `b` `[r, in]`.
//!
//! **Cost.** One backward pass a sequence, and `out · in · (out + in)` operations in f64 for what is gathered of it;
//! then `(out³ + in³) / 3` for the Cholesky factors, `out · in · (out + in)` to whiten and as much to come back, about
//! `20 · out · in · min(out, in)` for the singular values. About `24 (out² + in²)` bytes and a few copies of the matrix
//! in f64.
//!
//! **Departs.** (1) One step from the identity on both sides, `Y = E[G Gᵀ]`, `X = E[Gᵀ G]`, instead of steps until they
//! converge: that takes one backward pass and no gradients kept. Where `F` is such a product both are exact. (2) A
//! sample is a sequence and its mean loss on the source. (3) `damping` is added always; the authors' code mixes the
//! identity in only where a factor is not positive definite, and then 20% and more of it. (4) The sizes are shared
//! evenly between the factors.

use lacuna_base::dense::{matmul_nn_f64, matmul_tn_f64};
use lacuna_base::{Mat, Mat64, MatRef, factor};
use lacuna_contract::{Ask, Card, Factor, Made, Method, MethodError, Stats};
use serde::Deserialize;

use super::svd::{balanced, check, halves};
use crate::make;

/// The parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Gfwsvd {
    /// Added to the diagonal of either factor, as a fraction of its mean; above 0.
    damping: f64,
}

impl Default for Gfwsvd {
    fn default() -> Gfwsvd {
        Gfwsvd { damping: 0.01 }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "gfwsvd",
            paper: "Chekalina, Moskovskiy, Cherniuk, Kurkin, Kuznetsov, Frolov: Generalized Fisher-Weighted SVD: \
             Scalable Kronecker-Factored Fisher Approximation for Compressing Large Language Models, 2025",
            arxiv: "2505.17974",
            summary: "Two thin matrices, nearest by a Fisher matrix in which rows and columns go together.",
            system: None,
            verb: "factor",
            needs: &[Ask::GradientRowGram, Ask::GradientColumnGram],
            abilities: &[],
        },
        keys: make::keys::<Gfwsvd>,
        make: |given| {
            let p: Gfwsvd = make::parameters("gfwsvd", given)?;
            if !(p.damping > 0.0 && p.damping.is_finite()) {
                return Err(MethodError::new(format!("damping is {}; it must be above 0", p.damping)));
            }
            Ok(Made::Factor(Box::new(p)))
        },
    }
}

impl Gfwsvd {
    /// The Cholesky factor of one side, made of a mean diagonal of 1 and damped; the identity where no gradient was.
    fn root(&self, side: &Mat, n: usize, whose: &str) -> Result<Mat64, MethodError> {
        if (side.rows(), side.cols()) != (n, n) {
            return Err(MethodError::new(format!(
                "gradients of {} x {} {whose} for a matrix of {n}",
                side.rows(),
                side.cols()
            )));
        }
        let mean = (0..n).map(|i| f64::from(side[(i, i)])).sum::<f64>() / n as f64;
        if mean == 0.0 {
            return Ok(Mat64::identity(n));
        }
        let damped = |r: usize, c: usize| f64::from(side[(r, c)]) / mean + if r == c { self.damping } else { 0.0 };
        factor::cholesky(&Mat64::from_fn(n, n, damped)).map_err(|e| {
            MethodError::new(format!("the Fisher matrix's factor of the {whose}: {e}; a larger damping helps"))
        })
    }
}

impl Factor for Gfwsvd {
    fn factor(&self, w: MatRef<'_>, stats: &Stats<'_>, rank: usize) -> Result<(Mat, Mat), MethodError> {
        check(w, rank)?;
        let y = self.root(stats.matrix(Ask::GradientRowGram)?, w.rows(), "rows")?;
        let x = self.root(stats.matrix(Ask::GradientColumnGram)?, w.cols(), "columns")?;
        let whitened = matmul_nn_f64(&matmul_tn_f64(&y, &Mat64::from_f32(w)), &x);
        let (u, v) = halves(&whitened, rank)?;
        // L_Yᵀ a = u; b L_X = v, solved as L_Xᵀ bᵀ = vᵀ.
        let back =
            |l: &Mat64, m: &Mat64| factor::solve_lower_transposed(l, m).map_err(|e| MethodError::new(e.to_string()));
        Ok(balanced(back(&y, &u)?, back(&x, &v.transpose())?.transpose()))
    }

    fn scratch_bytes(&self, (rows, cols): (usize, usize)) -> u64 {
        let (m, n) = (rows as u64, cols as u64);
        32 * (m * m + n * n) + 64 * m * n
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::factor::testkit::{product, tail};
    use crate::factor::{asvd, fwsvd, svd};
    use lacuna_base::testkit::{max_abs_diff, random};
    use lacuna_contract::Gathered;

    /// Means over gradients, from the definition: `[(ask, [n, n] or [out, in])]`.
    fn gathered(gradients: &[Mat]) -> Vec<(Ask, Gathered)> {
        let (m, n, count) = (gradients[0].rows(), gradients[0].cols(), gradients.len() as f64);
        let mean = |f: &dyn Fn(&Mat) -> f64| (gradients.iter().map(f).sum::<f64>() / count) as f32;
        let at = |g: &Mat, r: usize, c: usize| f64::from(g[(r, c)]);
        let rows = Mat::from_fn(m, m, |i, j| mean(&|g| (0..n).map(|c| at(g, i, c) * at(g, j, c)).sum()));
        let columns = Mat::from_fn(n, n, |i, j| mean(&|g| (0..m).map(|r| at(g, r, i) * at(g, r, j)).sum()));
        let squares = Mat::from_fn(m, n, |r, c| mean(&|g| at(g, r, c).powi(2)));
        vec![
            (Ask::GradientRowGram, Gathered::Matrix(rows)),
            (Ask::GradientColumnGram, Gathered::Matrix(columns)),
            (Ask::GradientSquares, Gathered::Matrix(squares)),
        ]
    }

    fn square(found: &[(Ask, Gathered)], ask: Ask) -> Mat {
        match found.iter().find(|(a, _)| *a == ask) {
            Some((_, Gathered::Matrix(m))) => m.clone(),
            _ => panic!("gathered"),
        }
    }

    /// `tr(Y ΔW X ΔWᵀ)`, entry by entry.
    fn kronecker_error(delta: &Mat, y: &Mat, x: &Mat) -> f64 {
        let (m, n) = (delta.rows(), delta.cols());
        let mut sum = 0.0;
        for (i, j) in (0..m).flat_map(|i| (0..m).map(move |j| (i, j))) {
            for (p, q) in (0..n).flat_map(|p| (0..n).map(move |q| (p, q))) {
                sum +=
                    f64::from(y[(i, j)]) * f64::from(x[(p, q)]) * f64::from(delta[(i, p)]) * f64::from(delta[(j, q)]);
            }
        }
        sum
    }

    fn minus(w: &Mat, (a, b): &(Mat, Mat)) -> Mat {
        let p = product(a, b);
        Mat::from_fn(w.rows(), w.cols(), |r, c| w[(r, c)] - p[(r, c)])
    }

    /// Gradients whose rows and columns go together.
    fn gradients(m: usize, n: usize, count: u64) -> Vec<Mat> {
        let (left, right) = (random(m, m, 71), random(n, n, 72));
        (0..count)
            .map(|i| {
                let half = product(&left, &random(m, n, 100 + i));
                product(&half, &right)
            })
            .collect()
    }

    fn factored(damping: f64, w: &Mat, found: &[(Ask, Gathered)], rank: usize) -> (Mat, Mat) {
        let stats = Stats { tokens: 9, found: &[], gradients: found, sequences: 3, worked: None };
        Gfwsvd { damping }.factor(w.view(), &stats, rank).expect("factors")
    }

    /// The definition without any whitening: among all matrices of a rank, none is nearer in the damped norm. The least
    /// error is the tail of the eigenvalues of `Y^½ W X Wᵀ Y^½`, here by way of a symmetric root of `Y`.
    #[test]
    fn agrees_with_the_brute_force_optimum_of_the_kronecker_norm() {
        for (out, inputs, rank) in [(6, 8, 3), (8, 5, 2), (1, 4, 1), (4, 1, 1), (5, 5, 5), (9, 4, 3)] {
            let mut w = random(out, inputs, 1);
            (0..out).for_each(|r| w[(r, inputs / 2)] = 0.0);
            let found = gathered(&gradients(out, inputs, 40));
            let damping = 0.05;
            let damped = |ask| {
                let mut m = square(&found, ask);
                let n = m.rows();
                let mean = (0..n).map(|i| m[(i, i)]).sum::<f32>() / n as f32;
                m.data_mut().iter_mut().for_each(|v| *v /= mean);
                (0..n).for_each(|i| m[(i, i)] += damping as f32);
                m
            };
            let (y, x) = (damped(Ask::GradientRowGram), damped(Ask::GradientColumnGram));
            let got = kronecker_error(&minus(&w, &factored(damping, &w, &found, rank)), &y, &x);
            let factor::Eigen { values, q } =
                factor::symmetric_eigen(&Mat64::from_f32(y.view())).expect("eigenvectors");
            let root = Mat::from_fn(out, out, |i, j| {
                (0..out).map(|k| q[(i, k)] * values[k].max(0.0).sqrt() * q[(j, k)]).sum::<f64>() as f32
            });
            let whole = product(&product(&product(&root, &w), &x), &product(&w.transpose(), &root));
            let rows = (0..out).map(|i| whole.row(i).iter().map(|v| f64::from(*v)).collect()).collect();
            let best = tail(rows, rank);
            let all = kronecker_error(&w, &y, &x);
            assert!((got - best).abs() < 1e-4 * (1.0 + all), "{out} {inputs} {rank}: {got} {best}");
            // No small change of either factor is better.
            if rank < out.min(inputs) {
                let (a, b) = factored(damping, &w, &found, rank);
                for seed in 0..20 {
                    let (da, db) = (random(out, rank, seed), random(rank, inputs, seed + 50));
                    let near = |m: &Mat, d: &Mat| Mat::from_fn(m.rows(), m.cols(), |r, c| m[(r, c)] + 0.03 * d[(r, c)]);
                    let moved = kronecker_error(&minus(&w, &(near(&a, &da), near(&b, &db))), &y, &x);
                    assert!(moved >= got - 1e-4 * all, "{moved} {got}");
                }
            }
        }
    }

    #[test]
    fn its_error_is_below_those_that_see_less() {
        let (w, found) = (random(12, 10, 5), gathered(&gradients(12, 10, 200)));
        let stats = Stats { tokens: 9, found: &[], gradients: &found, sequences: 200, worked: None };
        // What went in looked like: |x| of the inputs' side of the gradients.
        let x = square(&found, Ask::GradientColumnGram);
        let sizes = [(Ask::InputMagnitudes, Gathered::Vector((0..10).map(|i| f64::from(x[(i, i)]).sqrt()).collect()))];
        let seen = Stats { tokens: 1, found: &sizes, gradients: &[], sequences: 0, worked: None };
        let by = |m: Method, stats: &Stats<'_>| {
            let Ok(Made::Factor(f)) = (m.make)(serde_json::Value::Null) else { panic!("factors") };
            let answer = f.factor(w.view(), stats, 4).expect("factors");
            kronecker_error(&minus(&w, &answer), &square(&found, Ask::GradientRowGram), &x)
        };
        let ours = by(method(), &stats);
        for (name, other) in [
            ("svd", by(svd::method(), &stats)),
            ("asvd", by(asvd::method(), &seen)),
            ("fwsvd", by(fwsvd::method(), &stats)),
        ] {
            assert!(ours < 0.9 * other, "{name}: {ours} {other}");
        }
    }

    #[test]
    fn of_a_fisher_matrix_that_is_a_product_both_sides_are_found() {
        // Gradients L Z R with every unit matrix for Z: their Fisher matrix is L Lᵀ beside Rᵀ R exactly.
        let (m, n) = (4, 3);
        let (left, right) = (random(m, m, 8), random(n, n, 9));
        let units = (0..m).flat_map(|i| (0..n).map(move |j| (i, j)));
        let all: Vec<Mat> = units.map(|(i, j)| Mat::from_fn(m, n, |r, c| left[(r, i)] * right[(j, c)])).collect();
        let found = gathered(&all);
        let same = |ask, want: &Mat| {
            let got = square(&found, ask);
            let by = want[(0, 0)] / got[(0, 0)];
            max_abs_diff(Mat::from_fn(got.rows(), got.cols(), |r, c| got[(r, c)] * by).view(), want.view())
        };
        assert!(same(Ask::GradientRowGram, &product(&left, &left.transpose())) < 1e-4);
        assert!(same(Ask::GradientColumnGram, &product(&right.transpose(), &right)) < 1e-4);
    }

    #[test]
    fn few_or_no_gradients_are_no_obstacle_and_what_is_wrong_is_refused() {
        let w = random(6, 7, 3);
        for found in [gathered(&gradients(6, 7, 1)), gathered(&[Mat::zeros(6, 7)])] {
            let (a, b) = factored(0.01, &w, &found, 6);
            assert!(max_abs_diff(product(&a, &b).view(), w.view()) < 1e-3);
        }
        let other = gathered(&gradients(6, 6, 2));
        let stats = Stats { tokens: 9, found: &[], gradients: &other, sequences: 2, worked: None };
        assert!(Gfwsvd::default().factor(w.view(), &stats, 2).expect_err("refused").what.contains("6 x 6"));
        assert!(Gfwsvd::default().factor(w.view(), &Stats::default(), 2).is_err());
        assert!((method().make)(serde_json::json!({ "damping": 0 })).is_err());
        let bad = [Mat::from_fn(6, 7, |_, _| f32::INFINITY)];
        let bad = gathered(&bad);
        let stats = Stats { tokens: 9, found: &[], gradients: &bad, sequences: 1, worked: None };
        assert!(Gfwsvd::default().factor(w.view(), &stats, 2).is_err());
    }
}
