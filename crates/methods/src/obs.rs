//! The walk that SparseGPT and GPTQ share: column after column of the weights is fixed, and the columns after it make
//! up for the error.
//!
//! With `H⁻¹ = UᵀU`, U upper triangular, fixing column `j` of a row at `q` costs `e_j² = ((w_j - q) / U_jj)²` of
//! calibration error and the best answer of the later columns is `w_k -= e_j U_jk` (Frantar & Alistarh 2022, Optimal
//! Brain Compression, in the order-for-all-rows form of GPTQ). Columns are walked in blocks: within one every row goes
//! alone, in parallel; what a block owes to the columns after it is one matrix product.

use std::ops::Range;
use std::sync::Arc;

use lacuna_base::{Mat, Mat64, MatMut, MatRef, dense, factor};
use lacuna_contract::{MethodError, Stats};

use crate::make;

/// The calibration Hessian, factorized for the walk.
pub(crate) struct Hessian {
    /// U, `[in, in]`, upper triangular, `UᵀU = H⁻¹`, its axes in the order of the walk.
    pub u: Mat,
    /// Positions (in the order of the walk) of inputs that were zero in every token: their weights do nothing.
    pub dead: Vec<usize>,
    /// The input at each position of the walk.
    pub order: Vec<usize>,
}

impl Hessian {
    /// From `H = XᵀX / tokens + damping · mean(diag) · 1` with its axes as they are, or largest diagonal first
    /// (`by_size`); shared by all matrices of the same input.
    pub fn new(stats: &Stats<'_>, n: usize, by_size: bool, damping: f64) -> Result<Arc<Hessian>, MethodError> {
        stats.shared(format!("hessian {n} {by_size} {damping}"), || Hessian::factorized(stats, n, by_size, damping))
    }

    fn factorized(stats: &Stats<'_>, n: usize, by_size: bool, damping: f64) -> Result<Hessian, MethodError> {
        let gram = make::gram(stats, n)?;
        let mut order: Vec<usize> = (0..n).collect();
        if by_size {
            let squares = gram.diag();
            order.sort_by(|&a, &b| squares[b].total_cmp(&squares[a]));
        }
        let scale = 1.0 / gram.tokens() as f64;
        let mean = gram.mean_diag() * scale;
        let mut h = Mat64::from_fn(n, n, |r, c| gram.at(order[r], order[c]) * scale);
        let dead: Vec<usize> = (0..n).filter(|&j| h[(j, j)] == 0.0).collect();
        for &j in &dead {
            h[(j, j)] = if mean > 0.0 { mean } else { 1.0 };
        }
        (0..n).for_each(|j| h[(j, j)] += damping * mean);
        let u = factor::upper_cholesky_of_inverse(&h).map_err(|e| {
            MethodError::new(format!("the calibration Hessian: {e}; more samples or a larger damping help"))
        })?;
        Ok(Hessian { u: u.to_f32(), dead, order })
    }

    /// `w` as it is walked: columns in the order of the walk, those of dead inputs zero.
    pub fn ordered(&self, w: MatRef<'_>) -> Mat {
        let mut w = permuted(w, &self.order);
        for r in 0..w.rows() {
            self.dead.iter().for_each(|&j| w[(r, j)] = 0.0);
        }
        w
    }
}

/// `H` as [`Hessian`] factorizes it, its axes as they are; shared by all matrices of the same input.
pub(crate) fn damped(stats: &Stats<'_>, n: usize, damping: f64) -> Result<Arc<Mat>, MethodError> {
    stats.shared(format!("damped {n} {damping}"), || {
        let gram = make::gram(stats, n)?;
        let scale = 1.0 / gram.tokens() as f64;
        let mean = gram.mean_diag() * scale;
        let dead = if mean > 0.0 { mean } else { 1.0 };
        let diagonal = |j: usize| if gram.at(j, j) == 0.0 { dead } else { gram.at(j, j) * scale } + damping * mean;
        Ok(Mat::from_fn(n, n, |r, c| (if r == c { diagonal(r) } else { gram.at(r, c) * scale }) as f32))
    })
}

/// `w` with its columns in `order`.
pub(crate) fn permuted(w: MatRef<'_>, order: &[usize]) -> Mat {
    Mat::from_fn(w.rows(), w.cols(), |r, j| w.at(r, order[j]))
}

/// One row in the middle of its block, as a decision about a column sees it.
pub(crate) struct Row<'a> {
    /// The column to decide on.
    pub at: usize,
    values: &'a [f32],
    errors: &'a [f32],
    block: Range<usize>,
    u: &'a Mat,
}

impl Row<'_> {
    /// Walks the next `n` columns, which belong to the block, for a try: `quant` answers for each (given as its distance
    /// from the current one) what it would be rounded to. The error that this would leave.
    pub fn attempt(&self, n: usize, mut quant: impl FnMut(usize, f32) -> f32) -> f32 {
        let from = self.at;
        let mut values = self.values[from..from + n].to_vec();
        let mut error = 0.0;
        for j in 0..n {
            let u = &self.u.row(from + j)[from..from + n];
            let e = (values[j] - quant(j, values[j])) / u[j];
            error += e * e;
            values[j + 1..].iter_mut().zip(&u[j + 1..]).for_each(|(v, u)| *v -= e * u);
        }
        error
    }

    /// The weight of column `c`, at or after the current one, with everything that earlier columns owe it.
    pub fn current(&self, c: usize) -> f32 {
        if c < self.block.end {
            return self.values[c];
        }
        let owed: f32 = self.errors.iter().enumerate().map(|(i, e)| e * self.u[(self.block.start + i, c)]).sum();
        self.values[c] - owed
    }
}

/// Walks `w`, `[out, in]`, and leaves in it what `decide` answered for each column of each row.
///
/// `states` holds whatever a row's decisions need, one for each row. `before` runs ahead of each block of `block`
/// columns, when all weights are up to date, and sees all rows.
pub(crate) fn walk<S: Send>(
    w: &mut Mat,
    u: &Mat,
    block: usize,
    states: &mut [S],
    mut before: impl FnMut(&Mat, Range<usize>, &mut [S]) -> Result<(), MethodError>,
    decide: impl Fn(&mut S, &Row<'_>) -> Result<f32, MethodError> + Sync,
) -> Result<(), MethodError> {
    let (m, n) = (w.rows(), w.cols());
    assert_eq!((u.rows(), u.cols(), states.len()), (n, n, m), "a factor and states for other weights");
    if m == 0 || n == 0 {
        return Ok(());
    }
    for from in (0..n).step_by(block) {
        let to = (from + block).min(n);
        before(w, from..to, states)?;
        let mut errors = Mat::zeros(m, to - from);
        dense::each_row(w, &mut errors, states, |values, errors, state| {
            for at in from..to {
                let seen = Row { at, values, errors: &errors[..at - from], block: from..to, u };
                let q = decide(state, &seen)?;
                let e = (values[at] - q) / u[(at, at)];
                values[at] = q;
                errors[at - from] = e;
                if e != 0.0 {
                    values[at + 1..to].iter_mut().zip(&u.row(at)[at + 1..to]).for_each(|(v, u)| *v -= e * u);
                }
            }
            Ok(())
        })?;
        if to < n {
            let later = MatMut::with_stride(m, n - to, n, &mut w.data_mut()[to..]);
            dense::add_matmul_nn(later, -1.0, errors.view(), u.view().rows_range(from, to).columns(to, n));
        }
    }
    make::finite(w.view())
}

#[cfg(test)]
pub(crate) mod slow {
    //! The definition, without the triangular factor: what is left is solved anew after every column.

    use lacuna_base::{Gram, Mat};

    /// `H` as the methods define it, entry by entry.
    pub fn hessian(gram: &Gram, damping: f64) -> Vec<Vec<f64>> {
        let (n, t) = (gram.n(), gram.tokens() as f64);
        let mean = (0..n).map(|i| gram.at(i, i) / t).sum::<f64>() / n as f64;
        let entry = |i: usize, j: usize| match gram.at(i, j) / t {
            _ if i != j => gram.at(i, j) / t,
            0.0 => (if mean > 0.0 { mean } else { 1.0 }) + damping * mean,
            d => d + damping * mean,
        };
        (0..n).map(|i| (0..n).map(|j| entry(i, j)).collect()).collect()
    }

    /// The inverse by Gauss and Jordan.
    pub fn inverse(a: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let n = a.len();
        let mut m: Vec<Vec<f64>> = (0..n)
            .map(|i| a[i].iter().copied().chain((0..n).map(|j| if i == j { 1.0 } else { 0.0 })).collect())
            .collect();
        for p in 0..n {
            let best = (p..n).max_by(|&x, &y| m[x][p].abs().total_cmp(&m[y][p].abs())).expect("rows");
            m.swap(p, best);
            let d = m[p][p];
            m[p].iter_mut().for_each(|v| *v /= d);
            for r in (0..n).filter(|&r| r != p) {
                let (f, pivot) = (m[r][p], m[p].clone());
                m[r].iter_mut().zip(pivot).for_each(|(v, q)| *v -= f * q);
            }
        }
        m.into_iter().map(|row| row[n..].to_vec()).collect()
    }

    /// The inverse of `h` over columns `j..`: its first entry is the price of column `j`, its first row the way the
    /// others answer.
    pub fn rest(h: &[Vec<f64>], j: usize) -> Vec<Vec<f64>> {
        inverse(&h[j..].iter().map(|row| row[j..].to_vec()).collect::<Vec<_>>())
    }

    /// Fixes column `j` of a row at `q`.
    pub fn fix(row: &mut [f64], inv: &[Vec<f64>], j: usize, q: f64) {
        let e = (row[j] - q) / inv[0][0];
        (j..row.len()).for_each(|k| row[k] -= e * inv[0][k - j]);
        row[j] = q;
    }

    /// Inputs with correlated channels, and channel 1 (if any) always zero.
    pub fn inputs(n: usize, tokens: usize, seed: u64) -> Gram {
        let (a, b) = (lacuna_base::testkit::random(tokens, n, seed), lacuna_base::testkit::random(tokens, 1, seed + 1));
        let x = Mat::from_fn(tokens, n, |t, c| if c == 1 { 0.0 } else { a[(t, c)] + 1.5 * b[(t, 0)] });
        let mut gram = Gram::new(n);
        gram.add(x.view());
        gram
    }
}
