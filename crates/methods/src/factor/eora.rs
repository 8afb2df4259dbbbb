//! EoRA: a correction of low rank for what compression lost, nearest where the inputs are large.
//!
//! **Paper.** Shih-Yang Liu, Maksim Khadkevich, Nai Chit Fung, Charbel Sakr, Chao-Han Huck Yang, Chien-Yi Wang, Saurav
//! Muralidharan, Hongxu Yin, Kwang-Ting Cheng, Jan Kautz, Yu-Chiang Frank Wang, Pavlo Molchanov, Min-Hung Chen, "EoRA:
//! Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation", 2024, arXiv 2410.21271.
//!
//! **Idea.** With `ΔW` the error and `X Xᵀ = Q Λ Qᵀ`: `ΔW' = ΔW Q Λ^½`, truncated as `U_r Σ_r V_rᵀ`, then back with
//! `Λ^-½ Qᵀ`. Since `‖ΔW'‖ = ‖ΔW X‖`, no product of rank `r` leaves a smaller error of the outputs. Any root of `X Xᵀ`
//! serves: SVD-LLM's Cholesky factor is another one and its answer the same; this root exists where inputs are
//! dependent or zero, without anything added to the diagonal.
//!
//! **Shapes and units.** `w` (here `ΔW`) `[out, in]`; `XᵀX` `[in, in]`, used as `H = XᵀX / tokens`; `a` `[out, r]`, `b`
//! `[r, in]`.
//!
//! **Cost.** About `9 in³` for the eigenvectors, `out · in²` for `ΔW'`, about `20 · out · in · min(out, in)` for the
//! singular values, all in f64; memory about 32 `in²` bytes and a few copies of the matrix in f64.
//!
//! **Departs.** (1) `U_r Σ_r V_rᵀ Λ^-½ Qᵀ = U_r U_rᵀ ΔW`, which needs no inverse, is used instead. For inputs as seen
//! it is what the pseudo-inverse gives; along directions that no input had, it takes the same projection of the error
//! instead of none of it. (2) Ranks that the seen directions leave over (a singular value of 0) go to the nearest
//! product for what is left of `ΔW`. (3) The paper trains the correction afterwards where it is used for a task; that
//! is no part of this.

use lacuna_base::dense::{matmul_nn_f64, matmul_tn_f64};
use lacuna_base::{Gram, Mat, Mat64, MatRef, factor};
use lacuna_contract::{Ability, Ask, Card, Factor, Made, Method, MethodError, Stats};
use serde::Deserialize;

use super::svd::check;
use crate::make;

/// No parameters; the rank is the family's.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Eora {}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "eora",
            paper: "Liu et al.: EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank \
             Approximation, 2024",
            arxiv: "2410.21271",
            summary: "Two thin matrices for the error of compression, nearest in the eigenspace of the inputs.",
            system: Some(189),
            verb: "factor",
            needs: &[Ask::InputGram],
            abilities: &[Ability::Error],
        },
        keys: make::keys::<Eora>,
        make: |given| Ok(Made::Factor(Box::new(make::parameters::<Eora>("eora", given)?))),
    }
}

/// The first left singular vectors of `m`, at most `rank`, as columns; those whose singular value is 0 to working
/// precision are left out.
fn left(m: &Mat64, rank: usize) -> Result<Mat64, MethodError> {
    let factor::Svd { u, s, .. } = factor::svd(m).map_err(|e| MethodError::new(e.to_string()))?;
    let least = s.first().copied().unwrap_or(0.0) * f64::EPSILON * m.rows().max(m.cols()) as f64;
    let count = s.iter().take(rank).take_while(|x| **x > least).count();
    Ok(u.corner(m.rows(), count))
}

/// `Q Λ^½` of the inputs' mean outer product.
fn root(gram: &Gram) -> Result<Mat64, MethodError> {
    let factor::Eigen { values, mut q } = factor::symmetric_eigen(&gram.mean())
        .map_err(|e| MethodError::new(format!("the inputs' second moment: {e}")))?;
    // What rounding left of a zero must not count as a direction.
    let least = values.last().copied().unwrap_or(0.0) * f64::EPSILON * gram.n() as f64;
    for (k, value) in values.iter().enumerate() {
        let root = if *value > least { value.sqrt() } else { 0.0 };
        (0..gram.n()).for_each(|r| q[(r, k)] *= root);
    }
    Ok(q)
}

impl Factor for Eora {
    fn factor(&self, w: MatRef<'_>, stats: &Stats<'_>, rank: usize) -> Result<(Mat, Mat), MethodError> {
        check(w, rank)?;
        let gram = make::gram(stats, w.cols())?;
        let q = stats.shared("eora".into(), || root(gram))?;
        let w = Mat64::from_f32(w);
        let seen = left(&matmul_nn_f64(&w, &q), rank)?;
        spanned(&w, seen, rank)
    }
}

/// `(u, uᵀ w)` of rank `rank` for the orthonormal columns `u` of `seen` and, where those are fewer, the first left
/// singular vectors of what they leave of `w`.
pub(super) fn spanned(w: &Mat64, seen: Mat64, rank: usize) -> Result<(Mat, Mat), MethodError> {
    let mut rest = w.clone();
    let mut halves = Vec::new();
    halves.push(project(&mut rest, seen));
    if halves[0].0.cols() < rank {
        let unseen = left(&rest, rank - halves[0].0.cols())?;
        halves.push(project(&mut rest, unseen));
    }
    // Ranks that a matrix of fewer directions does not need stay zero.
    let (mut a, mut b) = (Mat64::zeros(w.rows(), rank), Mat64::zeros(rank, w.cols()));
    let mut at = 0;
    for (u, v) in &halves {
        for k in 0..u.cols() {
            // Sharing the size evenly keeps both within the range of f16.
            let size = v.row(k).iter().map(|x| x * x).sum::<f64>().sqrt().sqrt();
            if size > 0.0 {
                (0..w.rows()).for_each(|r| a[(r, at)] = u[(r, k)] * size);
                b.row_mut(at).iter_mut().zip(v.row(k)).for_each(|(b, v)| *b = v / size);
            }
            at += 1;
        }
    }
    Ok((a.to_f32(), b.to_f32()))
}

/// Takes the projection on the columns of `u` out of `rest`: `u` and `uᵀ rest`.
fn project(rest: &mut Mat64, u: Mat64) -> (Mat64, Mat64) {
    let v = matmul_tn_f64(&u, rest);
    let gone = matmul_nn_f64(&u, &v);
    for r in 0..rest.rows() {
        rest.row_mut(r).iter_mut().zip(gone.row(r)).for_each(|(x, g)| *x -= g);
    }
    (u, v)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::factor::testkit::{brute_error, case, output_error};
    use lacuna_base::testkit::{max_abs_diff, random};
    use lacuna_contract::Gathered;

    fn factored(w: &Mat, x: &Mat, rank: usize) -> (Mat, Mat) {
        let mut gram = Gram::new(w.cols());
        gram.add(x.view());
        let found = [(Ask::InputGram, Gathered::Gram(gram))];
        let stats = Stats { tokens: x.rows() as u64, found: &found, gradients: &[], sequences: 0, worked: None };
        let (a, b) = Eora {}.factor(w.view(), &stats, rank).expect("factors");
        assert_eq!((a.rows(), a.cols(), b.rows(), b.cols()), (w.rows(), rank, rank, w.cols()));
        (a, b)
    }

    fn near(got: f64, best: f64) -> bool {
        got <= best * 1.001 + 1e-6 && got >= best * 0.999 - 1e-6
    }

    #[test]
    fn agrees_with_brute_force_outputs() {
        for (out, cols, rank) in [(6, 8, 3), (8, 5, 2), (1, 4, 1), (4, 1, 1), (5, 5, 5), (9, 4, 3)] {
            let (w, x, _) = case(out, cols);
            let (a, b) = factored(&w, &x, rank);
            let (got, best) = (output_error(&w, &a, &b, &x), brute_error(&w, &x, rank));
            assert!(near(got, best), "{out} {cols} {rank}: {got} {best}");
        }
    }

    #[test]
    fn dependent_and_dead_inputs_cost_nothing() {
        for (out, cols, rank) in [(7, 9, 3), (12, 6, 4)] {
            let (w, x, _) = case(out, cols);
            // Channel 2 is twice channel 0, channel 4 never moves: two zero eigenvalues.
            let x = Mat::from_fn(x.rows(), cols, |t, c| match c {
                2 => 2.0 * x[(t, 0)],
                4 => 0.0,
                _ => x[(t, c)],
            });
            let (a, b) = factored(&w, &x, rank);
            let (got, best) = (output_error(&w, &a, &b, &x), brute_error(&w, &x, rank));
            assert!(near(got, best), "{out} {cols} {rank}: {got} {best}");
        }
    }

    #[test]
    fn spare_ranks_go_to_what_no_input_showed() {
        // Inputs of one direction: one rank says all of the outputs, the others are free for the matrix itself.
        let w = random(5, 4, 3);
        let x = Mat::from_fn(20, 4, |t, c| ((t + 1) as f32).sin() * (c as f32 - 1.5));
        let (a, b) = factored(&w, &x, 4);
        let product = lacuna_base::dense::matmul_nn(a.view(), b.view());
        assert!(max_abs_diff(product.view(), w.view()) < 1e-4);
        let (a, b) = factored(&w, &x, 1);
        assert!(output_error(&w, &a, &b, &x) < 1e-8);
        // No input at all, and nothing to correct.
        let silent = Mat::zeros(20, 4);
        let (a, b) = factored(&w, &silent, 4);
        assert!(max_abs_diff(lacuna_base::dense::matmul_nn(a.view(), b.view()).view(), w.view()) < 1e-4);
        let (a, b) = factored(&Mat::zeros(5, 4), &x, 2);
        assert!(a.data().iter().chain(b.data()).all(|v| *v == 0.0));
    }
}
