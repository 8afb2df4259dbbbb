//! Factorizations in f64 over faer: Cholesky, inverses, triangular solves, singular values, symmetric eigenvalues.
//!
//! Every entry point refuses values that are not finite, so that nothing below can loop or panic on them, and runs on
//! one thread, so that the bits never depend on the machine's load. Callers run several matrices side by side.

use faer::diag::DiagMut;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{self as llt, LltError};
use faer::linalg::evd::{self, ComputeEigenvectors};
use faer::linalg::svd::{self as faer_svd, ComputeSvdVectors};
use faer::linalg::{triangular_inverse, triangular_solve};
use faer::{Mat as Work, MatRef as View, Par};
use rayon::prelude::*;

use crate::Mat64;
use crate::uppers::Uppers;

/// Why a factorization has no answer.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum FactorError {
    /// A Cholesky pivot was zero or negative.
    #[error("the {n} x {n} matrix is not positive definite: pivot {pivot} is not above zero")]
    NotPositiveDefinite {
        /// Rows of the matrix.
        n: usize,
        /// The first pivot that failed, in the order of elimination.
        pivot: usize,
    },
    /// A NaN or an infinity in the input.
    #[error("the entry at row {row}, column {col} is {value}, not a finite number")]
    NotFinite {
        /// Row of the first such entry.
        row: usize,
        /// Column of the first such entry.
        col: usize,
        /// What stands there.
        value: f64,
    },
    /// A triangular matrix with a zero on its diagonal.
    #[error("the {n} x {n} triangular matrix is singular: its diagonal is zero at {index}")]
    Singular {
        /// Rows of the matrix.
        n: usize,
        /// Where the diagonal is zero.
        index: usize,
    },
    /// An iteration that ended without an answer, or an answer beyond the range of f64.
    #[error("the {what} of the {rows} x {cols} matrix did not converge")]
    NoConvergence {
        /// Name of the factorization.
        what: &'static str,
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
    },
}

/// A thin singular value decomposition `a = u · diag(s) · vt` with `r = min(m, n)`.
#[derive(Clone, Debug)]
pub struct Svd {
    /// Left singular vectors as columns, `[m, r]`.
    pub u: Mat64,
    /// Singular values, largest first, `[r]`.
    pub s: Vec<f64>,
    /// Right singular vectors as rows, `[r, n]`.
    pub vt: Mat64,
}

/// A symmetric eigendecomposition `a = q · diag(values) · qᵀ`.
#[derive(Clone, Debug)]
pub struct Eigen {
    /// Eigenvalues, smallest first, `[n]`.
    pub values: Vec<f64>,
    /// Orthonormal eigenvectors as columns, `[n, n]`.
    pub q: Mat64,
}

fn view(m: &Mat64) -> View<'_, f64> {
    View::from_row_major_slice(m.data(), m.rows(), m.cols())
}

fn finite(m: &Mat64) -> Result<(), FactorError> {
    match m.data().iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(i) => Err(FactorError::NotFinite { row: i / m.cols(), col: i % m.cols(), value: m.data()[i] }),
    }
}

#[track_caller]
fn square(m: &Mat64) -> usize {
    assert_eq!(m.rows(), m.cols(), "a square matrix is needed, got {} x {}", m.rows(), m.cols());
    m.rows()
}

fn copied(v: View<'_, f64>) -> Mat64 {
    Mat64::from_fn(v.nrows(), v.ncols(), |r, c| v[(r, c)])
}

/// The lower Cholesky factor in faer's own storage; only the lower triangle of `a` is read and written.
fn cholesky_work(a: View<'_, f64>) -> Result<Work<f64>, FactorError> {
    let _clean = Uppers;
    let n = a.nrows();
    let mut l = a.to_owned();
    if n > 0 {
        let mut memory = MemBuffer::new(llt::cholesky_in_place_scratch::<f64>(n, Par::Seq, Default::default()));
        let stack = MemStack::new(&mut memory);
        llt::cholesky_in_place(l.as_mut(), Default::default(), Par::Seq, stack, Default::default())
            .map_err(|LltError::NonPositivePivot { index }| FactorError::NotPositiveDefinite { n, pivot: index })?;
    }
    match (0..n).find(|&i| !(l[(i, i)] > 0.0 && l[(i, i)].is_finite())) {
        None => Ok(l),
        Some(pivot) => Err(FactorError::NotPositiveDefinite { n, pivot }),
    }
}

/// L, lower triangular with a positive diagonal, `a = L Lᵀ`. Only the lower triangle of `a` is read.
#[track_caller]
pub fn cholesky(a: &Mat64) -> Result<Mat64, FactorError> {
    let n = square(a);
    finite(a)?;
    let l = cholesky_work(view(a))?;
    Ok(Mat64::from_fn(n, n, |r, c| if c <= r { l[(r, c)] } else { 0.0 }))
}

/// The inverse of a symmetric positive definite matrix, exactly symmetric.
#[track_caller]
pub fn spd_inverse(a: &Mat64) -> Result<Mat64, FactorError> {
    let _clean = Uppers;
    let n = square(a);
    finite(a)?;
    let l = cholesky_work(view(a))?;
    let mut inv = Work::<f64>::zeros(n, n);
    triangular_inverse::invert_lower_triangular(inv.as_mut(), l.as_ref(), Par::Seq);
    // a⁻¹ = L⁻ᵀ L⁻¹; the strict upper triangle of `inv` is still zero.
    let inv = copied(inv.as_ref());
    let mut out = crate::dense::matmul_tn_f64(&inv, &inv);
    for r in 0..n {
        for c in 0..r {
            out[(c, r)] = out[(r, c)];
        }
    }
    Ok(out)
}

/// U, upper triangular with a positive diagonal, `UᵀU = h⁻¹`: what GPTQ and SparseGPT walk along.
///
/// With `h = R Rᵀ`, R upper (a Cholesky factorization started from the last row), `h⁻¹ = R⁻ᵀ R⁻¹`, so that `U = R⁻¹`:
/// one factorization and one triangular inverse, and the inverse of `h` is never formed.
#[track_caller]
pub fn upper_cholesky_of_inverse(h: &Mat64) -> Result<Mat64, FactorError> {
    let _clean = Uppers;
    let n = square(h);
    finite(h)?;
    let l = cholesky_work(view(h).reverse_rows_and_cols())?;
    let mut inv = Work::<f64>::zeros(n, n);
    triangular_inverse::invert_lower_triangular(inv.as_mut(), l.as_ref(), Par::Seq);
    let inv = inv.as_ref().reverse_rows_and_cols();
    Ok(Mat64::from_fn(n, n, |r, c| if c >= r { inv[(r, c)] } else { 0.0 }))
}

fn nonsingular(l: &Mat64) -> Result<usize, FactorError> {
    let n = square(l);
    finite(l)?;
    match (0..n).find(|&i| l[(i, i)] == 0.0) {
        None => Ok(n),
        Some(index) => Err(FactorError::Singular { n, index }),
    }
}

/// The inverse of a lower triangular matrix. The strict upper triangle of `l` is not read.
#[track_caller]
pub fn lower_inverse(l: &Mat64) -> Result<Mat64, FactorError> {
    let _clean = Uppers;
    let n = nonsingular(l)?;
    let mut inv = Work::<f64>::zeros(n, n);
    triangular_inverse::invert_lower_triangular(inv.as_mut(), view(l), Par::Seq);
    Ok(copied(inv.as_ref()))
}

/// X of `L X = B`, `[n, k]`, with `l` `[n, n]` lower triangular and `b` `[n, k]`.
#[track_caller]
pub fn solve_lower(l: &Mat64, b: &Mat64) -> Result<Mat64, FactorError> {
    let _clean = Uppers;
    let n = nonsingular(l)?;
    assert_eq!(b.rows(), n, "a right side of {} rows for {n} unknowns", b.rows());
    finite(b)?;
    let mut x = view(b).to_owned();
    triangular_solve::solve_lower_triangular_in_place(view(l), x.as_mut(), Par::Seq);
    Ok(copied(x.as_ref()))
}

/// X of `Lᵀ X = B`, `[n, k]`, with `l` `[n, n]` lower triangular and `b` `[n, k]`.
#[track_caller]
pub fn solve_lower_transposed(l: &Mat64, b: &Mat64) -> Result<Mat64, FactorError> {
    let _clean = Uppers;
    let n = nonsingular(l)?;
    assert_eq!(b.rows(), n, "a right side of {} rows for {n} unknowns", b.rows());
    finite(b)?;
    let mut x = view(b).to_owned();
    triangular_solve::solve_upper_triangular_in_place(view(l).transpose(), x.as_mut(), Par::Seq);
    Ok(copied(x.as_ref()))
}

/// X of `A X = B`, `[n, k]`, with `a` `[n, n]` symmetric positive definite and `b` `[n, k]`.
#[track_caller]
pub fn spd_solve(a: &Mat64, b: &Mat64) -> Result<Mat64, FactorError> {
    let l = cholesky(a)?;
    solve_lower_transposed(&l, &solve_lower(&l, b)?)
}

/// A copy divided by the power of two just above its largest magnitude, and that power: products inside cannot
/// overflow.
fn scaled(a: &Mat64) -> (Work<f64>, f64) {
    let max = a.data().iter().fold(0.0f64, |m, v| m.max(v.abs()));
    let scale = if max > 0.0 { 2f64.powi((max.log2().ceil() as i32).clamp(-1000, 1000)) } else { 1.0 };
    (Work::from_fn(a.rows(), a.cols(), |r, c| a[(r, c)] / scale), scale)
}

/// The thin singular value decomposition of `a`, `[m, n]`.
pub fn svd(a: &Mat64) -> Result<Svd, FactorError> {
    let _clean = Uppers;
    finite(a)?;
    let (m, n) = (a.rows(), a.cols());
    let r = m.min(n);
    let (work, scale) = scaled(a);
    let (mut u, mut v, mut s) = (Work::<f64>::zeros(m, r), Work::<f64>::zeros(n, r), vec![0.0f64; r]);
    let failed = FactorError::NoConvergence { what: "singular value decomposition", rows: m, cols: n };
    if r > 0 {
        let thin = ComputeSvdVectors::Thin;
        let mut memory = MemBuffer::new(faer_svd::svd_scratch::<f64>(m, n, thin, thin, Par::Seq, Default::default()));
        let stack = MemStack::new(&mut memory);
        let diagonal = DiagMut::from_slice_mut(&mut s);
        let (left, right) = (Some(u.as_mut()), Some(v.as_mut()));
        faer_svd::svd(work.as_ref(), diagonal, left, right, Par::Seq, stack, Default::default())
            .map_err(|_| failed.clone())?;
    }
    s.iter_mut().for_each(|x| *x *= scale);
    let out = Svd { u: copied(u.as_ref()), s, vt: copied(v.as_ref().transpose()) };
    let sound = out.s.iter().all(|x| x.is_finite()) && finite(&out.u).is_ok() && finite(&out.vt).is_ok();
    if sound { Ok(out) } else { Err(failed) }
}

/// The singular values of `a` alone, largest first, by way of the smaller of its Gram matrices: at a quarter of the
/// cost, and exact to about a hundred-millionth of the largest.
pub fn singular_values(a: &Mat64) -> Result<Vec<f64>, FactorError> {
    finite(a)?;
    let (wide, rows, cols) = (a.rows() <= a.cols(), a.rows(), a.cols());
    let max = a.data().iter().fold(0.0f64, |m, v| m.max(v.abs()));
    if max == 0.0 {
        return Ok(vec![0.0; rows.min(cols)]);
    }
    let small = Mat64::from_vec(rows, cols, a.data().iter().map(|v| v / max).collect());
    let gram =
        if wide { crate::dense::matmul_nt_f64(&small, &small) } else { crate::dense::matmul_tn_f64(&small, &small) };
    Ok(symmetric_eigen(&gram)?.values.iter().rev().map(|v| max * v.max(0.0).sqrt()).collect())
}

/// `f` of each item, several side by side, in the order of the items; of several errors the first.
pub fn side_by_side<T: Sync, R: Send, E: Send>(
    items: &[T],
    f: impl Fn(&T) -> Result<R, E> + Send + Sync,
) -> Result<Vec<R>, E> {
    let all: Vec<Result<R, E>> = items.par_iter().map(f).collect();
    all.into_iter().collect()
}

/// Eigenvalues and vectors of a symmetric matrix, of which only the lower triangle is read.
#[track_caller]
pub fn symmetric_eigen(a: &Mat64) -> Result<Eigen, FactorError> {
    let _clean = Uppers;
    let n = square(a);
    finite(a)?;
    let (work, scale) = scaled(a);
    let (mut q, mut values) = (Work::<f64>::zeros(n, n), vec![0.0f64; n]);
    let failed = FactorError::NoConvergence { what: "eigendecomposition", rows: n, cols: n };
    if n > 0 {
        let yes = ComputeEigenvectors::Yes;
        let mut memory = MemBuffer::new(evd::self_adjoint_evd_scratch::<f64>(n, yes, Par::Seq, Default::default()));
        let stack = MemStack::new(&mut memory);
        let diagonal = DiagMut::from_slice_mut(&mut values);
        evd::self_adjoint_evd(work.as_ref(), diagonal, Some(q.as_mut()), Par::Seq, stack, Default::default())
            .map_err(|_| failed.clone())?;
    }
    values.iter_mut().for_each(|x| *x *= scale);
    let out = Eigen { values, q: copied(q.as_ref()) };
    if out.values.iter().all(|x| x.is_finite()) && finite(&out.q).is_ok() { Ok(out) } else { Err(failed) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dense::{matmul_nn_f64 as nn, matmul_nt_f64 as nt, matmul_tn_f64 as tn};
    use crate::testkit::random;

    fn random64(rows: usize, cols: usize, seed: u64) -> Mat64 {
        Mat64::from_f32(random(rows, cols, seed).view())
    }

    fn spd(n: usize, seed: u64) -> Mat64 {
        let x = random64(n + 3, n, seed);
        let mut h = tn(&x, &x);
        (0..n).for_each(|i| h[(i, i)] += 0.1);
        h
    }

    fn close(a: &Mat64, b: &Mat64, tolerance: f64) -> bool {
        assert_eq!((a.rows(), a.cols()), (b.rows(), b.cols()));
        a.data().iter().zip(b.data()).all(|(x, y)| (x - y).abs() <= tolerance)
    }

    #[test]
    fn singular_values_alone() {
        for (m, n) in [(1, 1), (5, 3), (3, 5), (1, 6), (6, 1), (40, 17)] {
            let a = random64(m, n, 3);
            let (got, want) = (singular_values(&a).expect("values"), svd(&a).expect("values").s);
            assert_eq!(got.len(), want.len());
            assert!(got.iter().zip(&want).all(|(g, w)| (g - w).abs() < 1e-7 * want[0]), "{got:?} {want:?}");
        }
        assert_eq!(singular_values(&Mat64::zeros(3, 2)), Ok(vec![0.0; 2]));
        assert!(singular_values(&Mat64::from_vec(1, 1, vec![f64::NAN])).is_err());
        let doubled: Result<Vec<i32>, ()> = side_by_side(&[1, 2, 3], |x| Ok(2 * x));
        assert_eq!(doubled, Ok(vec![2, 4, 6]));
        assert_eq!(side_by_side(&[1, 2, 3], |x| if *x > 1 { Err(*x) } else { Ok(()) }), Err(2));
    }

    #[test]
    fn cholesky_and_inverses() {
        for n in [0, 1, 2, 7, 64, 150] {
            let h = spd(n, n as u64);
            let l = cholesky(&h).expect("positive definite");
            assert!(close(&nt(&l, &l), &h, 1e-9 * (n + 1) as f64));
            let inv = spd_inverse(&h).expect("positive definite");
            assert!(close(&nn(&h, &inv), &Mat64::identity(n), 1e-8));
            let u = upper_cholesky_of_inverse(&h).expect("positive definite");
            assert!(close(&tn(&u, &u), &inv, 1e-8));
            assert!((0..n).all(|r| u[(r, r)] > 0.0 && (0..r).all(|c| u[(r, c)] == 0.0)));
            assert!(close(&nn(&l, &lower_inverse(&l).expect("regular")), &Mat64::identity(n), 1e-9));
            let b = random64(n, 3, 77);
            assert!(close(&nn(&l, &solve_lower(&l, &b).expect("regular")), &b, 1e-9));
            assert!(close(&tn(&l, &solve_lower_transposed(&l, &b).expect("regular")), &b, 1e-9));
            assert!(close(&nn(&h, &spd_solve(&h, &b).expect("positive definite")), &b, 1e-8));
        }
    }

    /// Cholesky as in a textbook, entry by entry.
    #[test]
    fn cholesky_agrees_with_the_definition() {
        let h = spd(9, 3);
        let mut l = Mat64::zeros(9, 9);
        for r in 0..9 {
            for c in 0..=r {
                let s: f64 = (0..c).map(|k| l[(r, k)] * l[(c, k)]).sum();
                l[(r, c)] = if r == c { (h[(r, r)] - s).sqrt() } else { (h[(r, c)] - s) / l[(c, c)] };
            }
        }
        assert!(close(&cholesky(&h).expect("positive definite"), &l, 1e-10));
    }

    #[test]
    fn svd_reconstructs_with_orthonormal_vectors() {
        for (m, n) in [(1, 1), (1, 9), (9, 1), (40, 40), (200, 17), (17, 200), (150, 140), (0, 3), (3, 0)] {
            let a = random64(m, n, 5);
            let Svd { u, s, vt } = svd(&a).expect("converges");
            let r = m.min(n);
            let us = Mat64::from_fn(m, r, |i, k| u[(i, k)] * s[k]);
            assert!(close(&nn(&us, &vt), &a, 1e-10), "{m} x {n}");
            assert!(close(&tn(&u, &u), &Mat64::identity(r), 1e-10), "{m} x {n}");
            assert!(close(&nt(&vt, &vt), &Mat64::identity(r), 1e-10), "{m} x {n}");
            assert!(s.windows(2).all(|w| w[0] >= w[1]) && s.iter().all(|&x| x >= 0.0));
        }
        let zero = svd(&Mat64::zeros(6, 4)).expect("converges");
        assert!(zero.s.iter().all(|&x| x == 0.0) && close(&tn(&zero.u, &zero.u), &Mat64::identity(4), 1e-12));
    }

    #[test]
    fn eigenvalues_reconstruct_and_match_the_singular_values() {
        for n in [0, 1, 2, 33, 150] {
            let h = spd(n, 8);
            let Eigen { values, q } = symmetric_eigen(&h).expect("converges");
            let scaled = Mat64::from_fn(n, n, |r, c| q[(r, c)] * values[c]);
            assert!(close(&nt(&scaled, &q), &h, 1e-9 * (n + 1) as f64));
            assert!(close(&tn(&q, &q), &Mat64::identity(n), 1e-10));
            let s = svd(&h).expect("converges").s;
            assert!(values.iter().rev().zip(&s).all(|(a, b)| (a - b).abs() < 1e-8 * (1.0 + b)));
        }
    }

    #[test]
    fn magnitudes_near_the_ends_of_f64() {
        for scale in [1e-300, 1e300] {
            let a = Mat64::from_fn(5, 4, |r, c| scale * ((r * 4 + c) as f64).sin());
            let Svd { u, s, vt } = svd(&a).expect("converges");
            let us = Mat64::from_fn(5, 4, |i, k| u[(i, k)] * (s[k] / scale));
            assert!(close(&nn(&us, &vt), &Mat64::from_fn(5, 4, |r, c| a[(r, c)] / scale), 1e-12));
        }
    }

    #[test]
    fn bad_numbers_and_bad_matrices_are_refused() {
        for bad in [f64::NAN, f64::INFINITY] {
            let mut a = spd(6, 1);
            a[(4, 2)] = bad;
            let refused = |e: FactorError| matches!(e, FactorError::NotFinite { row: 4, col: 2, .. });
            assert!(refused(cholesky(&a).expect_err("refused")));
            assert!(refused(spd_inverse(&a).expect_err("refused")));
            assert!(refused(upper_cholesky_of_inverse(&a).expect_err("refused")));
            assert!(refused(lower_inverse(&a).expect_err("refused")));
            assert!(refused(svd(&a).expect_err("refused")));
            assert!(refused(symmetric_eigen(&a).expect_err("refused")));
        }
        let indefinite = Mat64::from_fn(3, 3, |r, c| if r == c { [1.0, -1.0, 1.0][r] } else { 0.0 });
        assert_eq!(cholesky(&indefinite), Err(FactorError::NotPositiveDefinite { n: 3, pivot: 1 }));
        assert!(matches!(
            upper_cholesky_of_inverse(&Mat64::zeros(4, 4)),
            Err(FactorError::NotPositiveDefinite { n: 4, .. })
        ));
        assert_eq!(lower_inverse(&Mat64::zeros(2, 2)), Err(FactorError::Singular { n: 2, index: 0 }));
    }
}
