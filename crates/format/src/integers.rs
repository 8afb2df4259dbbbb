//! Grouped integers as a method answers them, before they are packed.

use lacuna_base::Mat;

use crate::{Affine, Group};

/// Codes and their grids, `value[r, c] = scale[r, g] * (code[r, c] - zero[r, g])` with `g = group.of(c)`.
#[derive(Clone, Debug)]
pub struct Integers {
    /// Rows (outputs).
    pub rows: usize,
    /// Columns (inputs).
    pub cols: usize,
    /// 2 to 8.
    pub bits: u8,
    /// One code a byte, `[rows, cols]`, row-major. Entries that a mask drops are ignored.
    pub codes: Vec<u8>,
    /// `[rows, groups]`.
    pub scales: Mat,
    /// Zero points, `[rows, groups]`; absent: all are `2^(bits-1)`.
    pub zeros: Option<Vec<u8>>,
    /// Zero points that are any numbers, `[rows, groups]`, in the place of `zeros` and written as the scales are.
    pub offsets: Option<Mat>,
    /// Which columns share a scale.
    pub group: Group,
}

impl Integers {
    /// The grid of group `g` of row `r`; none of `offsets`, which [`Integers::value`] alone reads.
    pub fn affine(&self, r: usize, g: usize) -> Affine {
        let zero = match &self.zeros {
            Some(z) => z[r * self.scales.cols() + g],
            None => 1 << (self.bits - 1),
        };
        Affine { scale: self.scales[(r, g)], zero }
    }

    /// The value at `(r, c)`.
    pub fn value(&self, r: usize, c: usize) -> f32 {
        let (g, code) = (self.group.of(c), self.codes[r * self.cols + c]);
        match &self.offsets {
            Some(z) => self.scales[(r, g)] * (f32::from(code) - z[(r, g)]),
            None => self.affine(r, g).value(code),
        }
    }
}
