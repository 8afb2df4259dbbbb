//! Row-major f32 matrices, owned and borrowed.

use std::ops::{Index, IndexMut};

/// An owned row-major matrix of f32, `[rows, cols]`, without padding.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Mat {
    rows: usize,
    cols: usize,
    data: Vec<f32>,
}

/// A borrowed row-major matrix, `[rows, cols]`; row `r` starts at `r * stride`.
#[derive(Clone, Copy, Debug)]
pub struct MatRef<'a> {
    rows: usize,
    cols: usize,
    stride: usize,
    data: &'a [f32],
}

/// A mutably borrowed row-major matrix, `[rows, cols]`; row `r` starts at `r * stride`.
#[derive(Debug)]
pub struct MatMut<'a> {
    rows: usize,
    cols: usize,
    stride: usize,
    data: &'a mut [f32],
}

#[track_caller]
fn check(rows: usize, cols: usize, stride: usize, len: usize) {
    assert!(stride >= cols, "row stride {stride} is shorter than {cols} columns");
    let need = if rows == 0 { 0 } else { (rows - 1) * stride + cols };
    assert!(len >= need, "a {rows} x {cols} matrix of stride {stride} needs {need} values, got {len}");
}

impl Mat {
    /// A matrix of zeros, `[rows, cols]`.
    pub fn zeros(rows: usize, cols: usize) -> Mat {
        Mat { rows, cols, data: vec![0.0; rows * cols] }
    }

    /// Takes `data` as a row-major `[rows, cols]` matrix. Panics where the length differs.
    #[track_caller]
    pub fn from_vec(rows: usize, cols: usize, data: Vec<f32>) -> Mat {
        assert_eq!(data.len(), rows * cols, "a {rows} x {cols} matrix needs {} values", rows * cols);
        Mat { rows, cols, data }
    }

    /// A matrix whose entry at `(r, c)` is `f(r, c)`.
    pub fn from_fn(rows: usize, cols: usize, mut f: impl FnMut(usize, usize) -> f32) -> Mat {
        let mut data = Vec::with_capacity(rows * cols);
        for r in 0..rows {
            for c in 0..cols {
                data.push(f(r, c));
            }
        }
        Mat { rows, cols, data }
    }

    /// The identity, `[n, n]`.
    pub fn identity(n: usize) -> Mat {
        Mat::from_fn(n, n, |r, c| if r == c { 1.0 } else { 0.0 })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Row `r`, `[cols]`.
    #[track_caller]
    pub fn row(&self, r: usize) -> &[f32] {
        &self.data[r * self.cols..(r + 1) * self.cols]
    }

    /// Row `r`, `[cols]`, to write.
    #[track_caller]
    pub fn row_mut(&mut self, r: usize) -> &mut [f32] {
        &mut self.data[r * self.cols..(r + 1) * self.cols]
    }

    /// All values, row-major.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// All values, row-major, to write.
    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// The values, row-major, given away.
    pub fn into_vec(self) -> Vec<f32> {
        self.data
    }

    /// A borrowed view of the whole.
    pub fn view(&self) -> MatRef<'_> {
        MatRef { rows: self.rows, cols: self.cols, stride: self.cols, data: &self.data }
    }

    /// A mutable view of the whole.
    pub fn view_mut(&mut self) -> MatMut<'_> {
        MatMut { rows: self.rows, cols: self.cols, stride: self.cols, data: &mut self.data }
    }

    /// The transpose, `[cols, rows]`.
    pub fn transpose(&self) -> Mat {
        self.view().transpose()
    }
}

impl Index<(usize, usize)> for Mat {
    type Output = f32;
    #[track_caller]
    fn index(&self, (r, c): (usize, usize)) -> &f32 {
        assert!(c < self.cols, "column {c} of {}", self.cols);
        &self.data[r * self.cols + c]
    }
}

impl IndexMut<(usize, usize)> for Mat {
    #[track_caller]
    fn index_mut(&mut self, (r, c): (usize, usize)) -> &mut f32 {
        assert!(c < self.cols, "column {c} of {}", self.cols);
        &mut self.data[r * self.cols + c]
    }
}

impl<'a> MatRef<'a> {
    /// Borrows `data` as a row-major `[rows, cols]` matrix without padding. Panics where it is too short.
    #[track_caller]
    pub fn new(rows: usize, cols: usize, data: &'a [f32]) -> MatRef<'a> {
        MatRef::with_stride(rows, cols, cols, data)
    }

    /// Borrows `data` as `[rows, cols]` with `stride` values from one row's start to the next.
    #[track_caller]
    pub fn with_stride(rows: usize, cols: usize, stride: usize, data: &'a [f32]) -> MatRef<'a> {
        check(rows, cols, stride, data.len());
        MatRef { rows, cols, stride, data }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Values from one row's start to the next one's.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Row `r`, `[cols]`.
    #[track_caller]
    pub fn row(&self, r: usize) -> &'a [f32] {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        &self.data[r * self.stride..r * self.stride + self.cols]
    }

    /// The entry at `(r, c)`.
    #[track_caller]
    pub fn at(&self, r: usize, c: usize) -> f32 {
        self.row(r)[c]
    }

    /// The underlying values, padding included.
    pub fn raw(&self) -> &'a [f32] {
        self.data
    }

    /// Columns `from..to` of every row.
    #[track_caller]
    pub fn columns(&self, from: usize, to: usize) -> MatRef<'a> {
        assert!(from <= to && to <= self.cols, "columns {from}..{to} of {}", self.cols);
        let data = if self.rows == 0 { &[] } else { &self.data[from..] };
        MatRef::with_stride(self.rows, to - from, self.stride, data)
    }

    /// Rows `from..to`.
    #[track_caller]
    pub fn rows_range(&self, from: usize, to: usize) -> MatRef<'a> {
        assert!(from <= to && to <= self.rows, "rows {from}..{to} of {}", self.rows);
        let data = if from == to { &[] } else { &self.data[from * self.stride..] };
        MatRef::with_stride(to - from, self.cols, self.stride, data)
    }

    /// An owned copy without padding.
    pub fn to_mat(&self) -> Mat {
        let mut data = Vec::with_capacity(self.rows * self.cols);
        for r in 0..self.rows {
            data.extend_from_slice(self.row(r));
        }
        Mat { rows: self.rows, cols: self.cols, data }
    }

    /// The transpose, `[cols, rows]`, owned.
    pub fn transpose(&self) -> Mat {
        let mut out = Mat::zeros(self.cols, self.rows);
        const B: usize = 32;
        for r0 in (0..self.rows).step_by(B) {
            for c0 in (0..self.cols).step_by(B) {
                for r in r0..(r0 + B).min(self.rows) {
                    for (c, &v) in self.row(r).iter().enumerate().take(c0 + B).skip(c0) {
                        out.data[c * self.rows + r] = v;
                    }
                }
            }
        }
        out
    }
}

impl<'a> MatMut<'a> {
    /// Borrows `data` as a row-major `[rows, cols]` matrix without padding. Panics where it is too short.
    #[track_caller]
    pub fn new(rows: usize, cols: usize, data: &'a mut [f32]) -> MatMut<'a> {
        MatMut::with_stride(rows, cols, cols, data)
    }

    /// Borrows `data` as `[rows, cols]` with `stride` values from one row's start to the next.
    #[track_caller]
    pub fn with_stride(rows: usize, cols: usize, stride: usize, data: &'a mut [f32]) -> MatMut<'a> {
        check(rows, cols, stride, data.len());
        MatMut { rows, cols, stride, data }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Values from one row's start to the next one's.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Row `r`, `[cols]`, to write.
    #[track_caller]
    pub fn row_mut(&mut self, r: usize) -> &mut [f32] {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        &mut self.data[r * self.stride..r * self.stride + self.cols]
    }

    /// The underlying values, padding included, to write.
    pub fn raw_mut(&mut self) -> &mut [f32] {
        self.data
    }

    /// The same matrix, read-only.
    pub fn as_ref(&self) -> MatRef<'_> {
        MatRef { rows: self.rows, cols: self.cols, stride: self.stride, data: self.data }
    }

    /// The same matrix, borrowed for a shorter time.
    pub fn reborrow(&mut self) -> MatMut<'_> {
        MatMut { rows: self.rows, cols: self.cols, stride: self.stride, data: self.data }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_and_transpose() {
        let m = Mat::from_fn(37, 70, |r, c| (r * 100 + c) as f32);
        let t = m.transpose();
        assert_eq!((t.rows(), t.cols()), (70, 37));
        for r in 0..37 {
            for c in 0..70 {
                assert_eq!(t[(c, r)], m[(r, c)]);
            }
        }
        let part = m.view().columns(10, 13).rows_range(5, 7);
        assert_eq!(part.row(1), &[610.0, 611.0, 612.0]);
        assert_eq!(part.to_mat().data(), &[510.0, 511.0, 512.0, 610.0, 611.0, 612.0]);
    }

    #[test]
    fn empty_views() {
        let m = Mat::zeros(0, 5);
        assert_eq!(m.view().columns(2, 4).to_mat().data(), &[] as &[f32]);
        assert_eq!(m.transpose().rows(), 5);
    }

    #[test]
    #[should_panic(expected = "needs 6 values")]
    fn short_data_is_refused() {
        let _ = MatRef::new(2, 3, &[0.0; 5]);
    }
}
