//! What a product loses at the outputs, from the definition.

use lacuna_base::testkit::random;
use lacuna_base::{Gram, Mat};

/// `‖(W - A B) Xᵀ‖² / tokens` token by token.
pub(crate) fn output_error(w: &Mat, a: &Mat, b: &Mat, x: &Mat) -> f64 {
    let mut sum = 0.0;
    for t in 0..x.rows() {
        for r in 0..w.rows() {
            let d: f64 = (0..w.cols())
                .map(|c| {
                    let product: f64 = (0..a.cols()).map(|k| f64::from(a[(r, k)]) * f64::from(b[(k, c)])).sum();
                    (f64::from(w[(r, c)]) - product) * f64::from(x[(t, c)])
                })
                .sum();
            sum += d * d;
        }
    }
    sum / x.rows() as f64
}

/// Weights, inputs with correlated channels of uneven size, and their Gram matrix.
pub(crate) fn case(out: usize, cols: usize) -> (Mat, Mat, Gram) {
    let (w, z) = (random(out, cols, 1), random(50, cols, 2));
    let x = Mat::from_fn(50, cols, |t, c| z[(t, c)] * if c % 2 == 0 { 5.0 } else { 0.3 } + z[(t, 0)]);
    let mut gram = Gram::new(cols);
    gram.add(x.view());
    (w, x, gram)
}

/// `a b`, entry by entry.
pub(crate) fn product(a: &Mat, b: &Mat) -> Mat {
    Mat::from_fn(a.rows(), b.cols(), |r, c| {
        (0..a.cols()).map(|k| f64::from(a[(r, k)]) * f64::from(b[(k, c)])).sum::<f64>() as f32
    })
}

/// `Σ (W - A B)²`, each column with its weight.
pub(crate) fn column_error(w: &Mat, a: &Mat, b: &Mat, weight: &[f64]) -> f64 {
    let p = product(a, b);
    let one = |r: usize, c: usize| (f64::from(w[(r, c)]) - f64::from(p[(r, c)])).powi(2) * weight[c];
    (0..w.rows()).map(|r| (0..w.cols()).map(|c| one(r, c)).sum::<f64>()).sum()
}

/// The least that it can be at a rank: the smallest eigenvalues of `W diag(weight) Wᵀ`.
pub(crate) fn column_optimum(w: &Mat, weight: &[f64], rank: usize) -> f64 {
    let one = |i: usize, j: usize, c: usize| f64::from(w[(i, c)]) * f64::from(w[(j, c)]) * weight[c];
    let of = |i: usize, j: usize| (0..w.cols()).map(|c| one(i, j, c)).sum::<f64>();
    tail((0..w.rows()).map(|i| (0..w.rows()).map(|j| of(i, j)).collect()).collect(), rank)
}

/// The sum of all but the `rank` largest eigenvalues of a symmetric matrix, by Jacobi rotations.
pub(crate) fn tail(mut m: Vec<Vec<f64>>, rank: usize) -> f64 {
    let n = m.len();
    for _ in 0..60 {
        for p in 0..n {
            for q in p + 1..n {
                let angle = 0.5 * (2.0 * m[p][q]).atan2(m[q][q] - m[p][p]);
                let (s, c) = angle.sin_cos();
                for row in &mut m {
                    let (a, b) = (row[p], row[q]);
                    (row[p], row[q]) = (c * a - s * b, s * a + c * b);
                }
                let (a, b) = (m[p].clone(), m[q].clone());
                m[p] = a.iter().zip(&b).map(|(a, b)| c * a - s * b).collect();
                m[q] = a.iter().zip(&b).map(|(a, b)| s * a + c * b).collect();
            }
        }
    }
    let mut values: Vec<f64> = (0..n).map(|i| m[i][i]).collect();
    values.sort_by(|a, b| b.total_cmp(a));
    values[rank.min(n)..].iter().sum()
}

/// The best rank-r outputs, from the definition: the outputs `Y = X Wᵀ` lose the smallest eigenvalues of `YᵀY`.
pub(crate) fn brute_error(w: &Mat, x: &Mat, rank: usize) -> f64 {
    let out = w.rows();
    let y: Vec<Vec<f64>> = (0..x.rows())
        .map(|t| (0..out).map(|r| (0..w.cols()).map(|c| f64::from(w[(r, c)]) * f64::from(x[(t, c)])).sum()).collect())
        .collect();
    let of = |i: usize, j: usize| y.iter().map(|v| v[i] * v[j]).sum::<f64>() / x.rows() as f64;
    tail((0..out).map(|i| (0..out).map(|j| of(i, j)).collect()).collect(), rank)
}
