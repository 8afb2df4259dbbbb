//! Row-major f64 matrices for factorizations, where f32 loses the small directions.

use std::ops::{Index, IndexMut};

use crate::{Mat, MatRef};

/// An owned row-major matrix of f64, `[rows, cols]`, without padding.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Mat64 {
    rows: usize,
    cols: usize,
    data: Vec<f64>,
}

impl Mat64 {
    /// A matrix of zeros, `[rows, cols]`.
    pub fn zeros(rows: usize, cols: usize) -> Mat64 {
        Mat64 { rows, cols, data: vec![0.0; rows * cols] }
    }

    /// Takes `data` as a row-major `[rows, cols]` matrix. Panics where the length differs.
    #[track_caller]
    pub fn from_vec(rows: usize, cols: usize, data: Vec<f64>) -> Mat64 {
        assert_eq!(data.len(), rows * cols, "a {rows} x {cols} matrix needs {} values", rows * cols);
        Mat64 { rows, cols, data }
    }

    /// A matrix whose entry at `(r, c)` is `f(r, c)`.
    pub fn from_fn(rows: usize, cols: usize, mut f: impl FnMut(usize, usize) -> f64) -> Mat64 {
        let mut data = Vec::with_capacity(rows * cols);
        for r in 0..rows {
            for c in 0..cols {
                data.push(f(r, c));
            }
        }
        Mat64 { rows, cols, data }
    }

    /// The values of an f32 matrix.
    pub fn from_f32(m: MatRef<'_>) -> Mat64 {
        let mut data = Vec::with_capacity(m.rows() * m.cols());
        for r in 0..m.rows() {
            data.extend(m.row(r).iter().map(|&x| f64::from(x)));
        }
        Mat64 { rows: m.rows(), cols: m.cols(), data }
    }

    /// The nearest f32 values.
    pub fn to_f32(&self) -> Mat {
        Mat::from_vec(self.rows, self.cols, self.data.iter().map(|&x| x as f32).collect())
    }

    /// The identity, `[n, n]`.
    pub fn identity(n: usize) -> Mat64 {
        Mat64::from_fn(n, n, |r, c| if r == c { 1.0 } else { 0.0 })
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
    pub fn row(&self, r: usize) -> &[f64] {
        &self.data[r * self.cols..(r + 1) * self.cols]
    }

    /// Row `r`, `[cols]`, to write.
    #[track_caller]
    pub fn row_mut(&mut self, r: usize) -> &mut [f64] {
        &mut self.data[r * self.cols..(r + 1) * self.cols]
    }

    /// All values, row-major.
    pub fn data(&self) -> &[f64] {
        &self.data
    }

    /// All values, row-major, to write.
    pub fn data_mut(&mut self) -> &mut [f64] {
        &mut self.data
    }

    /// The first `rows` rows and `cols` columns, copied.
    #[track_caller]
    pub fn corner(&self, rows: usize, cols: usize) -> Mat64 {
        assert!(rows <= self.rows && cols <= self.cols, "{rows} x {cols} of {} x {}", self.rows, self.cols);
        Mat64::from_fn(rows, cols, |r, c| self[(r, c)])
    }

    /// The transpose, `[cols, rows]`.
    pub fn transpose(&self) -> Mat64 {
        Mat64::from_fn(self.cols, self.rows, |r, c| self.data[c * self.cols + r])
    }
}

impl Index<(usize, usize)> for Mat64 {
    type Output = f64;
    #[track_caller]
    fn index(&self, (r, c): (usize, usize)) -> &f64 {
        assert!(c < self.cols, "column {c} of {}", self.cols);
        &self.data[r * self.cols + c]
    }
}

impl IndexMut<(usize, usize)> for Mat64 {
    #[track_caller]
    fn index_mut(&mut self, (r, c): (usize, usize)) -> &mut f64 {
        assert!(c < self.cols, "column {c} of {}", self.cols);
        &mut self.data[r * self.cols + c]
    }
}
