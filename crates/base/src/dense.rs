//! Dense products and the Gram matrix XᵀX.
//!
//! The inner loops are faer's, chosen at run time for the processor, and run on one thread a call. Parallelism is over
//! blocks of rows of a fixed size, so that a result never depends on the number of threads.

use faer::traits::ComplexField;
use faer::{Accum, Par};
use rayon::prelude::*;

use crate::uppers::Uppers;
use crate::{Mat, Mat64, MatMut, MatRef};

/// Rows of the result that one task computes.
const BLOCK_ROWS: usize = 128;
/// Tokens converted to f64 and multiplied at a time by [`Gram::add`]: 512 x 1536 x 8 bytes = 6 MB of scratch.
const GRAM_TOKENS: usize = 512;

type View<'a, T> = faer::MatRef<'a, T>;

fn view(m: MatRef<'_>) -> View<'_, f32> {
    View::from_row_major_slice_with_stride(m.raw(), m.rows(), m.cols(), m.stride())
}

fn view64(m: &Mat64) -> View<'_, f64> {
    View::from_row_major_slice(m.data(), m.rows(), m.cols())
}

/// `[rows, cols]` to write. faer 0.24.4's `from_row_major_slice_with_stride_mut` takes the strides for a column-major
/// matrix's, and so writes beyond the slice: this goes through the transpose, which does not.
fn row_major_mut<T>(data: &mut [T], rows: usize, cols: usize, stride: usize) -> faer::MatMut<'_, T> {
    faer::MatMut::from_column_major_slice_with_stride_mut(data, cols, rows, stride).transpose_mut()
}

/// `c (+)= alpha · a · b` over blocks of rows; `c` is row-major `[a.nrows(), b.ncols()]` with rows `stride` apart.
fn blocked<T>(c: &mut [T], stride: usize, accum: Accum, alpha: T, a: View<'_, T>, b: View<'_, T>)
where
    T: ComplexField + Copy + Send + Sync,
{
    let (m, n) = (a.nrows(), b.ncols());
    if m == 0 || n == 0 {
        return;
    }
    let used = &mut c[..(m - 1) * stride + n];
    used.par_chunks_mut(BLOCK_ROWS * stride).enumerate().for_each(|(i, block)| {
        let from = i * BLOCK_ROWS;
        let rows = BLOCK_ROWS.min(m - from);
        let dst = row_major_mut(block, rows, n, stride);
        let _clean = Uppers;
        faer::linalg::matmul::matmul(dst, accum, a.subrows(from, rows), b, alpha, Par::Seq);
    });
}

#[track_caller]
fn same_inner(a: usize, b: usize) {
    assert_eq!(a, b, "inner dimensions differ: {a} and {b}");
}

/// `a · bᵀ`, `[m, n]`, of `a` `[m, k]` and `b` `[n, k]`.
#[track_caller]
pub fn matmul_nt(a: MatRef<'_>, b: MatRef<'_>) -> Mat {
    same_inner(a.cols(), b.cols());
    let mut c = Mat::zeros(a.rows(), b.rows());
    blocked(c.data_mut(), b.rows(), Accum::Replace, 1.0, view(a), view(b).transpose());
    c
}

/// `a · b`, `[m, n]`, of `a` `[m, k]` and `b` `[k, n]`.
#[track_caller]
pub fn matmul_nn(a: MatRef<'_>, b: MatRef<'_>) -> Mat {
    same_inner(a.cols(), b.rows());
    let mut c = Mat::zeros(a.rows(), b.cols());
    blocked(c.data_mut(), b.cols(), Accum::Replace, 1.0, view(a), view(b));
    c
}

/// `aᵀ · b`, `[m, n]`, of `a` `[k, m]` and `b` `[k, n]`.
#[track_caller]
pub fn matmul_tn(a: MatRef<'_>, b: MatRef<'_>) -> Mat {
    same_inner(a.rows(), b.rows());
    let mut c = Mat::zeros(a.cols(), b.cols());
    blocked(c.data_mut(), b.cols(), Accum::Replace, 1.0, view(a).transpose(), view(b));
    c
}

/// `c += alpha · a · b` in place, of `c` `[m, n]`, `a` `[m, k]` and `b` `[k, n]`.
#[track_caller]
pub fn add_matmul_nn(mut c: MatMut<'_>, alpha: f32, a: MatRef<'_>, b: MatRef<'_>) {
    same_inner(a.cols(), b.rows());
    assert_eq!((c.rows(), c.cols()), (a.rows(), b.cols()), "the result's shape differs from the product's");
    let stride = c.stride();
    blocked(c.raw_mut(), stride, Accum::Add, alpha, view(a), view(b));
}

/// `c += alpha · a · bᵀ` in place, of `c` `[m, n]`, `a` `[m, k]` and `b` `[n, k]`.
#[track_caller]
pub fn add_matmul_nt(mut c: MatMut<'_>, alpha: f32, a: MatRef<'_>, b: MatRef<'_>) {
    same_inner(a.cols(), b.cols());
    assert_eq!((c.rows(), c.cols()), (a.rows(), b.rows()), "the result's shape differs from the product's");
    let stride = c.stride();
    blocked(c.raw_mut(), stride, Accum::Add, alpha, view(a), view(b).transpose());
}

/// `c += alpha · aᵀ · b` in place, of `c` `[m, n]`, `a` `[k, m]` and `b` `[k, n]`.
#[track_caller]
pub fn add_matmul_tn(mut c: MatMut<'_>, alpha: f32, a: MatRef<'_>, b: MatRef<'_>) {
    same_inner(a.rows(), b.rows());
    assert_eq!((c.rows(), c.cols()), (a.cols(), b.cols()), "the result's shape differs from the product's");
    let stride = c.stride();
    blocked(c.raw_mut(), stride, Accum::Add, alpha, view(a).transpose(), view(b));
}

/// `a · bᵀ` in f64, `[m, n]`, of `a` `[m, k]` and `b` `[n, k]`.
#[track_caller]
pub fn matmul_nt_f64(a: &Mat64, b: &Mat64) -> Mat64 {
    same_inner(a.cols(), b.cols());
    let mut c = Mat64::zeros(a.rows(), b.rows());
    blocked(c.data_mut(), b.rows(), Accum::Replace, 1.0, view64(a), view64(b).transpose());
    c
}

/// `a · b` in f64, `[m, n]`, of `a` `[m, k]` and `b` `[k, n]`.
#[track_caller]
pub fn matmul_nn_f64(a: &Mat64, b: &Mat64) -> Mat64 {
    same_inner(a.cols(), b.rows());
    let mut c = Mat64::zeros(a.rows(), b.cols());
    blocked(c.data_mut(), b.cols(), Accum::Replace, 1.0, view64(a), view64(b));
    c
}

/// `aᵀ · b` in f64, `[m, n]`, of `a` `[k, m]` and `b` `[k, n]`.
#[track_caller]
pub fn matmul_tn_f64(a: &Mat64, b: &Mat64) -> Mat64 {
    same_inner(a.rows(), b.rows());
    let mut c = Mat64::zeros(a.cols(), b.cols());
    blocked(c.data_mut(), b.cols(), Accum::Replace, 1.0, view64(a).transpose(), view64(b));
    c
}

/// Runs `f` on row `r` of `a`, row `r` of `b` and `states[r]` for every `r`, rows in parallel; an error of any row ends
/// the work. Both matrices have columns.
#[track_caller]
pub fn each_row<S: Send, E: Send>(
    a: &mut Mat,
    b: &mut Mat,
    states: &mut [S],
    f: impl Fn(&mut [f32], &mut [f32], &mut S) -> Result<(), E> + Sync,
) -> Result<(), E> {
    assert_eq!((a.rows(), b.rows()), (states.len(), states.len()), "rows and states differ in number");
    let (wide_a, wide_b) = (a.cols(), b.cols());
    assert!(wide_a > 0 && wide_b > 0, "matrices without columns have no rows to run on");
    let rows = a.data_mut().par_chunks_mut(wide_a).zip(b.data_mut().par_chunks_mut(wide_b)).zip(states);
    rows.with_min_len(8).try_for_each(|((a, b), s)| f(a, b, s))
}

/// XᵀX of a matrix's inputs, `[n, n]`, summed in f64 over any number of calls. Not divided by the number of tokens.
///
/// The bits depend on how the tokens were cut into calls (in multiples of 512 they do not), never on the number of
/// threads.
#[derive(Clone, Debug, PartialEq)]
pub struct Gram {
    n: usize,
    tokens: u64,
    data: Vec<f64>,
}

/// Bytes that are not a [`Gram`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GramError {
    /// Shorter than the header.
    #[error("{bytes} bytes are too few for the 16-byte header of a Gram matrix")]
    NoHeader {
        /// Bytes given.
        bytes: usize,
    },
    /// A length that does not fit the header.
    #[error("a Gram matrix of {n} columns needs {need} bytes, got {bytes}")]
    Length {
        /// Columns the header names.
        n: u64,
        /// Bytes such a matrix has.
        need: u128,
        /// Bytes given.
        bytes: usize,
    },
}

impl Gram {
    /// Zero, over no tokens, for inputs of `n` columns.
    pub fn new(n: usize) -> Gram {
        Gram { n, tokens: 0, data: vec![0.0; n * n] }
    }

    /// Adds `xᵀx` of `x`, `[tokens, n]`.
    #[track_caller]
    pub fn add(&mut self, x: MatRef<'_>) {
        let n = self.n;
        assert_eq!(x.cols(), n, "inputs of {} columns for a Gram matrix of {n}", x.cols());
        self.tokens += x.rows() as u64;
        if n == 0 || x.rows() == 0 {
            return;
        }
        // Transposed, [n, tokens], so that both factors are read along the tokens; the padding keeps rows out of one
        // cache set.
        let stride = GRAM_TOKENS.min(x.rows()) + 8;
        let mut wide = vec![0.0f64; n * stride];
        for from in (0..x.rows()).step_by(GRAM_TOKENS) {
            let part = x.rows_range(from, (from + GRAM_TOKENS).min(x.rows()));
            wide.par_chunks_mut(32 * stride).enumerate().for_each(|(i, chunk)| {
                for t in 0..part.rows() {
                    let values = &part.row(t)[i * 32..];
                    chunk[t..].iter_mut().step_by(stride).zip(values).for_each(|(w, &v)| *w = f64::from(v));
                }
            });
            let wide = View::from_row_major_slice_with_stride(&wide, n, part.rows(), stride);
            // Only the blocks on and below the diagonal; the last panel is the widest and starts first.
            self.data.par_chunks_mut(BLOCK_ROWS * n).enumerate().rev().for_each(|(i, panel)| {
                let top = i * BLOCK_ROWS;
                let rows = BLOCK_ROWS.min(n - top);
                let dst = row_major_mut(panel, rows, top + rows, n);
                let (lhs, rhs) = (wide.subrows(top, rows), wide.subrows(0, top + rows).transpose());
                let _clean = Uppers;
                faer::linalg::matmul::matmul(dst, Accum::Add, lhs, rhs, 1.0, Par::Seq);
            });
        }
        self.mirror();
    }

    /// Copies the lower triangle over the upper one, tile by tile.
    fn mirror(&mut self) {
        const TILE: usize = 32;
        let n = self.n;
        for r0 in (0..n).step_by(TILE) {
            for c0 in (0..=r0).step_by(TILE) {
                for r in r0..(r0 + TILE).min(n) {
                    for c in c0..(c0 + TILE).min(r) {
                        self.data[c * n + r] = self.data[r * n + c];
                    }
                }
            }
        }
    }

    /// Columns of the inputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Rows added so far.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The sum of squares of each input column, `[n]`.
    pub fn diag(&self) -> Vec<f64> {
        (0..self.n).map(|i| self.data[i * self.n + i]).collect()
    }

    /// The mean of [`Gram::diag`]; 0 for no columns.
    pub fn mean_diag(&self) -> f64 {
        if self.n == 0 { 0.0 } else { self.diag().iter().sum::<f64>() / self.n as f64 }
    }

    /// The entry at `(i, j)`.
    #[track_caller]
    pub fn at(&self, i: usize, j: usize) -> f64 {
        assert!(i < self.n && j < self.n, "entry ({i}, {j}) of a Gram matrix of {} columns", self.n);
        self.data[i * self.n + j]
    }

    /// The full symmetric matrix, `[n, n]`, row-major.
    pub fn data(&self) -> &[f64] {
        &self.data
    }

    /// XᵀX / tokens, `[n, n]`; zero where no token was seen.
    pub fn mean(&self) -> Mat64 {
        let scale = 1.0 / self.tokens.max(1) as f64;
        Mat64::from_vec(self.n, self.n, self.data.iter().map(|&v| v * scale).collect())
    }

    /// The same of inputs `M x`: `M XᵀX Mᵀ`, where `turn` applies `M` to `n` values.
    pub fn turned(&self, turn: impl Fn(&mut [f64]) + Sync) -> Gram {
        let n = self.n;
        let rows = |data: &mut [f64]| data.par_chunks_mut(n.max(1)).for_each(&turn);
        let mut m = Mat64::from_vec(n, n, self.data.clone());
        rows(m.data_mut());
        m = m.transpose();
        rows(m.data_mut());
        let mut gram = Gram { n, tokens: self.tokens, data: m.data().to_vec() };
        gram.mirror();
        gram
    }

    /// The lower triangle for a scratch file: columns and tokens as little-endian u64, then the values, f64, row by
    /// row.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(16 + self.n * (self.n + 1) * 4);
        out.extend_from_slice(&(self.n as u64).to_le_bytes());
        out.extend_from_slice(&self.tokens.to_le_bytes());
        for r in 0..self.n {
            for v in &self.data[r * self.n..r * self.n + r + 1] {
                out.extend_from_slice(&v.to_le_bytes());
            }
        }
        out
    }

    /// Reads what [`Gram::to_bytes`] wrote.
    pub fn from_bytes(bytes: &[u8]) -> Result<Gram, GramError> {
        let word =
            |i: usize| bytes.get(i * 8..i * 8 + 8).map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes")));
        let (Some(n), Some(tokens)) = (word(0), word(1)) else {
            return Err(GramError::NoHeader { bytes: bytes.len() });
        };
        let need = (u128::from(n) * (u128::from(n) + 1)).saturating_mul(4).saturating_add(16);
        if need != bytes.len() as u128 {
            return Err(GramError::Length { n, need, bytes: bytes.len() });
        }
        let mut gram = Gram { tokens, ..Gram::new(n as usize) };
        let mut values = bytes[16..].chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("eight bytes")));
        for r in 0..gram.n {
            for (slot, v) in gram.data[r * gram.n..r * gram.n + r + 1].iter_mut().zip(&mut values) {
                *slot = v;
            }
        }
        gram.mirror();
        Ok(gram)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::{matmul_nt_f64 as slow_nt, max_abs_diff, random};

    const SHAPES: [(usize, usize, usize); 8] =
        [(1, 1, 1), (3, 5, 2), (1, 40, 17), (40, 1, 17), (129, 130, 1), (300, 65, 33), (7, 9, 700), (0, 4, 3)];

    #[test]
    fn products_agree_with_the_slow_reference() {
        for (m, n, k) in SHAPES {
            let (a, b) = (random(m, k, 1), random(n, k, 2));
            let slow = slow_nt(a.view(), b.view());
            let tolerance = 1e-5 * (k as f32 + 10.0);
            for (name, got) in [
                ("nt", matmul_nt(a.view(), b.view())),
                ("nn", matmul_nn(a.view(), b.transpose().view())),
                ("tn", matmul_tn(a.transpose().view(), b.transpose().view())),
            ] {
                assert!(max_abs_diff(got.view(), slow.view()) < tolerance, "{name} {m} {n} {k}");
            }
            let (a64, b64) = (Mat64::from_f32(a.view()), Mat64::from_f32(b.view()));
            for (name, got) in [
                ("nt", matmul_nt_f64(&a64, &b64)),
                ("nn", matmul_nn_f64(&a64, &b64.transpose())),
                ("tn", matmul_tn_f64(&a64.transpose(), &b64.transpose())),
            ] {
                assert!(max_abs_diff(got.to_f32().view(), slow.view()) < 1e-5, "{name} f64 {m} {n} {k}");
            }
        }
        assert_eq!(matmul_nn(Mat::zeros(3, 0).view(), Mat::zeros(0, 2).view()), Mat::zeros(3, 2));
    }

    #[test]
    fn adding_in_place_touches_only_the_view() {
        let (a, b) = (random(150, 20, 1), random(20, 11, 2));
        let start = random(150, 30, 3);
        let mut c = start.clone();
        let product = matmul_nn(a.view(), b.view());
        {
            let data = &mut c.data_mut()[5..];
            add_matmul_nn(MatMut::with_stride(150, 11, 30, data), -1.0, a.view(), b.view());
        }
        for transposed in ["a", "b"] {
            let mut d = start.clone();
            let into = MatMut::with_stride(150, 11, 30, &mut d.data_mut()[5..]);
            match transposed {
                "a" => add_matmul_tn(into, -1.0, a.transpose().view(), b.view()),
                _ => add_matmul_nt(into, -1.0, a.view(), b.transpose().view()),
            }
            assert!(max_abs_diff(d.view(), c.view()) < 1e-4, "{transposed} transposed");
        }
        for r in 0..150 {
            for col in 0..30 {
                let want = start[(r, col)] - if (5..16).contains(&col) { product[(r, col - 5)] } else { 0.0 };
                assert!((c[(r, col)] - want).abs() < 1e-4, "({r}, {col})");
            }
        }
    }

    #[test]
    fn rows_meet_their_own_state() {
        let (mut a, mut b) = (Mat::from_fn(100, 3, |r, _| r as f32), Mat::zeros(100, 2));
        let mut states: Vec<usize> = (0..100).collect();
        let run = |a: &mut [f32], b: &mut [f32], s: &mut usize| {
            b.fill(a.iter().sum());
            *s += 1;
            if a[0] < 1e6 { Ok(()) } else { Err("too large") }
        };
        assert_eq!(each_row(&mut a, &mut b, &mut states, run), Ok(()));
        assert!((0..100).all(|r| b.row(r) == [3.0 * r as f32; 2] && states[r] == r + 1));
        a[(50, 0)] = 1e7;
        assert_eq!(each_row(&mut a, &mut b, &mut states, run), Err("too large"));
    }

    #[test]
    fn strided_views_multiply() {
        let wide = random(50, 64, 4);
        let part = wide.view().columns(10, 31);
        let got = matmul_nt(part, part);
        assert!(max_abs_diff(got.view(), slow_nt(part, part).view()) < 1e-4);
    }

    #[test]
    fn gram_is_the_sum_of_outer_products() {
        for (tokens, n) in [(1, 1), (700, 3), (5, 300), (513, 130), (0, 4)] {
            let x = random(tokens, n, 9);
            let mut gram = Gram::new(n);
            gram.add(x.view());
            let t = x.transpose();
            let slow = slow_nt(t.view(), t.view());
            for i in 0..n {
                for j in 0..n {
                    assert!((gram.at(i, j) as f32 - slow[(i, j)]).abs() < 1e-4 * (1.0 + slow[(i, j)].abs()));
                    assert_eq!(gram.at(i, j), gram.data()[j * n + i]);
                }
            }
            assert_eq!(gram.tokens(), tokens as u64);
            assert_eq!(Gram::from_bytes(&gram.to_bytes()), Ok(gram));
        }
    }

    #[test]
    fn results_do_not_depend_on_threads_or_on_aligned_cuts() {
        let x = random(2048, 260, 5);
        let run = |threads: usize, step: usize| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool").install(|| {
                let mut gram = Gram::new(260);
                for from in (0..2048).step_by(step) {
                    gram.add(x.view().rows_range(from, from + step));
                }
                (gram, matmul_nt(x.view(), x.view().rows_range(0, 70)))
            })
        };
        let one = run(1, 2048);
        assert_eq!(one, run(3, 2048));
        assert_eq!(one, run(2, 512));
    }

    #[test]
    fn strange_bytes_are_refused() {
        assert_eq!(Gram::from_bytes(&[0; 15]), Err(GramError::NoHeader { bytes: 15 }));
        let mut bytes = vec![0xFF; 16];
        assert!(matches!(Gram::from_bytes(&bytes), Err(GramError::Length { n: u64::MAX, .. })));
        bytes[..8].copy_from_slice(&2u64.to_le_bytes());
        assert!(matches!(Gram::from_bytes(&bytes), Err(GramError::Length { n: 2, need: 40, bytes: 16 })));
    }
}
