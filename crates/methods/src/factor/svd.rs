//! Truncated singular value decomposition: the nearest matrix of a given rank.
//!
//! **Paper.** Carl Eckart, Gale Young, "The approximation of one matrix by another of lower rank", Psychometrika, 1936.
//!
//! **Idea.** `W = U Σ Vᵀ`; the first `r` singular values and vectors minimise `‖W - A B‖` among all products of rank
//! `r`.
//!
//! **Shapes and units.** `w` `[out, in]`; `a = U_r Σ_r^½` `[out, r]`, `b = Σ_r^½ V_rᵀ` `[r, in]`.
//!
//! **Cost.** About `20 · out · in · min(out, in)` operations in f64; a few copies of the matrix in f64.
//!
//! **Departs.** The singular values are shared evenly between the factors, which keeps both within the range of f16.

use lacuna_base::{Mat, Mat64, MatRef, factor};
use lacuna_contract::{Ability, Card, Factor, Made, Method, MethodError, Stats};
use serde::Deserialize;

use crate::make;

/// No parameters.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Svd {}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "svd",
            paper: "Eckart, Young: The approximation of one matrix by another of lower rank, 1936",
            arxiv: "",
            summary: "Two thin matrices whose product is the nearest of its rank.",
            system: None,
            verb: "factor",
            needs: &[],
            abilities: &[Ability::Error],
        },
        keys: make::keys::<Svd>,
        make: |given| Ok(Made::Factor(Box::new(make::parameters::<Svd>("svd", given)?))),
    }
}

/// Refuses a rank that a matrix of this shape cannot have.
pub(super) fn check(w: MatRef<'_>, rank: usize) -> Result<(), MethodError> {
    if rank == 0 || rank > w.rows().min(w.cols()) {
        return Err(MethodError::new(format!(
            "rank {rank} of a {} x {} matrix; 1 to {} are possible",
            w.rows(),
            w.cols(),
            w.rows().min(w.cols())
        )));
    }
    make::finite(w)
}

/// The first `rank` singular triples as `(U Σ^½, Σ^½ Vᵀ)`.
pub(crate) fn halves(w: &Mat64, rank: usize) -> Result<(Mat64, Mat64), MethodError> {
    let factor::Svd { u, s, vt } = factor::svd(w).map_err(|e| MethodError::new(e.to_string()))?;
    let a = Mat64::from_fn(w.rows(), rank, |r, k| u[(r, k)] * s[k].sqrt());
    let b = Mat64::from_fn(rank, w.cols(), |k, c| s[k].sqrt() * vt[(k, c)]);
    Ok((a, b))
}

/// The same with the columns of `w` weighted by `scale`, which the right factor is rid of again; then each pair of a
/// column and a row is made of one size, which keeps both within the range of f16. Columns that weigh nothing, or less
/// than a millionth of the heaviest, weigh a millionth of it; all count alike where none weighs anything.
pub(super) fn weighted(w: MatRef<'_>, scale: &[f64], rank: usize) -> Result<(Mat, Mat), MethodError> {
    if let Some(j) = scale.iter().position(|s| !s.is_finite() || *s < 0.0) {
        return Err(MethodError::new(format!("input {j} would weigh {}; a number of 0 or more is needed", scale[j])));
    }
    let most = scale.iter().copied().fold(0.0, f64::max);
    let weight = |c: usize| if most > 0.0 { (scale[c] / most).max(1e-6) } else { 1.0 };
    let heavy = Mat64::from_fn(w.rows(), w.cols(), |r, c| f64::from(w.at(r, c)) * weight(c));
    let (a, mut b) = halves(&heavy, rank)?;
    for k in 0..rank {
        b.row_mut(k).iter_mut().enumerate().for_each(|(c, v)| *v /= weight(c));
    }
    Ok(balanced(a, b))
}

/// The same product, each column of `a` as long as its row of `b`.
pub(super) fn balanced(mut a: Mat64, mut b: Mat64) -> (Mat, Mat) {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    for k in 0..a.cols() {
        let (column, row) = (norm(&mut (0..a.rows()).map(|r| a[(r, k)])), norm(&mut b.row(k).iter().copied()));
        if column > 0.0 && row > 0.0 {
            let by = (row / column).sqrt();
            (0..a.rows()).for_each(|r| a[(r, k)] *= by);
            b.row_mut(k).iter_mut().for_each(|v| *v /= by);
        }
    }
    (a.to_f32(), b.to_f32())
}

impl Factor for Svd {
    fn factor(&self, w: MatRef<'_>, _: &Stats<'_>, rank: usize) -> Result<(Mat, Mat), MethodError> {
        check(w, rank)?;
        let (a, b) = halves(&Mat64::from_f32(w), rank)?;
        Ok((a.to_f32(), b.to_f32()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;

    fn square_error(w: &Mat, a: &Mat, b: &Mat) -> f64 {
        let mut sum = 0.0;
        for r in 0..w.rows() {
            for c in 0..w.cols() {
                let product: f64 = (0..a.cols()).map(|k| f64::from(a[(r, k)]) * f64::from(b[(k, c)])).sum();
                sum += (f64::from(w[(r, c)]) - product).powi(2);
            }
        }
        sum
    }

    /// Power iteration with deflation, from the definition of the largest singular value.
    fn brute_energy(w: &Mat, rank: usize) -> f64 {
        let mut rest: Vec<Vec<f64>> = (0..w.rows()).map(|r| w.row(r).iter().map(|&v| f64::from(v)).collect()).collect();
        for k in 0..rank {
            let mut v: Vec<f64> = (0..w.cols()).map(|c| 1.0 + ((c + 3 * k) as f64).sin()).collect();
            let mut u = vec![0.0; w.rows()];
            for _ in 0..3000 {
                let norm = v.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-100);
                v.iter_mut().for_each(|x| *x /= norm);
                u = rest.iter().map(|row| row.iter().zip(&v).map(|(a, b)| a * b).sum()).collect();
                v = (0..w.cols()).map(|c| rest.iter().zip(&u).map(|(row, x)| row[c] * x).sum()).collect();
            }
            let size = u.iter().map(|x| x * x).sum::<f64>().max(1e-100);
            for (row, x) in rest.iter_mut().zip(&u) {
                row.iter_mut().zip(&v).for_each(|(a, b)| *a -= x * b / size);
            }
        }
        rest.iter().flatten().map(|x| x * x).sum()
    }

    #[test]
    fn agrees_with_brute_force_energy() {
        for (out, cols, rank) in [(6, 4, 2), (4, 7, 1), (5, 1, 1), (1, 5, 1), (6, 6, 6)] {
            let mut w = random(out, cols, 4);
            (0..out).for_each(|r| w[(r, 0)] = 0.0);
            let (a, b) = Svd {}.factor(w.view(), &Stats::default(), rank).expect("factors");
            assert_eq!((a.rows(), a.cols(), b.rows(), b.cols()), (out, rank, rank, cols));
            let (got, want) = (square_error(&w, &a, &b), brute_energy(&w, rank));
            assert!((got - want).abs() < 1e-4 * (1.0 + want), "{out} {cols} {rank}: {got} {want}");
        }
        let w = random(3, 4, 1);
        assert!(Svd {}.factor(w.view(), &Stats::default(), 0).is_err());
        assert!(Svd {}.factor(w.view(), &Stats::default(), 4).is_err());
    }
}
