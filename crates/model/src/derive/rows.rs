//! Loops over rows, shared between threads in chunks of a fixed size.

use lacuna_base::{MatMut, MatRef};
use rayon::prelude::*;

use crate::Lent;

/// Rows that one task takes.
pub(super) const ROWS: usize = 16;

/// Calls `f(first row, rows)` for chunks of `m`'s rows; what it gives, in order.
pub(super) fn chunks<T: Send>(mut m: MatMut<'_>, f: impl Fn(usize, MatMut<'_>) -> T + Sync) -> Vec<T> {
    let (rows, cols, stride) = (m.rows(), m.cols(), m.stride());
    if rows == 0 || cols == 0 {
        return Vec::new();
    }
    let used = &mut m.raw_mut()[..(rows - 1) * stride + cols];
    used.par_chunks_mut(ROWS * stride)
        .enumerate()
        .map(|(i, part)| f(i * ROWS, MatMut::with_stride(ROWS.min(rows - i * ROWS), cols, stride, part)))
        .collect()
}

/// Calls `f(r, row)` for every row of `m`.
pub(super) fn each(m: MatMut<'_>, f: impl Fn(usize, &mut [f32]) + Sync) {
    chunks(m, |first, mut part| (0..part.rows()).for_each(|i| f(first + i, part.row_mut(i))));
}

/// Sums side by side, so that the compiler adds in vectors.
const LANES: usize = 16;

/// The sum of `f(a, b)` over two rows, in a fixed order.
#[inline(always)]
pub(super) fn sum_of(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (xs, ys) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (x, y) in xs.0.iter().zip(ys.0) {
        for i in 0..LANES {
            lanes[i] += f(x[i], y[i]);
        }
    }
    let rest: f32 = xs.1.iter().zip(ys.1).map(|(&x, &y)| f(x, y)).sum();
    lanes.iter().sum::<f32>() + rest
}

/// `a · b`.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum_of(a, b, |x, y| x * y)
}

/// A copy.
pub(super) fn copy(x: MatRef<'_>) -> Lent {
    let mut out = Lent::new(x.rows(), x.cols());
    each(out.view_mut(), |r, row| row.copy_from_slice(x.row(r)));
    out
}

/// `[rows, cols]` of zeros.
pub(super) fn zeros(rows: usize, cols: usize) -> Lent {
    let mut out = Lent::new(rows, cols);
    each(out.view_mut(), |_, row| row.fill(0.0));
    out
}
