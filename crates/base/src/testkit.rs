//! Helpers for tests of any crate: random matrices and honest comparisons.

use crate::{Mat, MatRef, Rng};

/// A matrix of standard normal values.
pub fn random(rows: usize, cols: usize, seed: u64) -> Mat {
    let mut rng = Rng::new(seed);
    Mat::from_fn(rows, cols, |_, _| rng.normal())
}

/// The largest absolute difference of two matrices of one shape; NaN anywhere gives infinity.
#[track_caller]
pub fn max_abs_diff(a: MatRef<'_>, b: MatRef<'_>) -> f32 {
    assert_eq!((a.rows(), a.cols()), (b.rows(), b.cols()), "shapes differ");
    let mut worst = 0.0f32;
    for r in 0..a.rows() {
        for (x, y) in a.row(r).iter().zip(b.row(r)) {
            let d = (x - y).abs();
            worst = if d.is_nan() { f32::INFINITY } else { worst.max(d) };
        }
    }
    worst
}

/// `a · bᵀ` in f64, one product after the other: the slow reference. `a` is `[m, k]`, `b` is `[n, k]`.
pub fn matmul_nt_f64(a: MatRef<'_>, b: MatRef<'_>) -> Mat {
    assert_eq!(a.cols(), b.cols(), "inner dimensions differ");
    Mat::from_fn(a.rows(), b.rows(), |r, c| {
        a.row(r).iter().zip(b.row(c)).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>() as f32
    })
}
