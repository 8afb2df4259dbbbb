//! Which weights stay: a bit for every entry of a matrix.

/// A keep-mask, `[rows, cols]`; every row starts at a whole word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask {
    rows: usize,
    cols: usize,
    words: Vec<u64>,
}

impl Mask {
    /// A mask that keeps everything (`true`) or nothing.
    pub fn all(rows: usize, cols: usize, keep: bool) -> Mask {
        Mask::from_fn(rows, cols, |_, _| keep)
    }

    /// A mask that keeps `(r, c)` where `keep(r, c)`.
    pub fn from_fn(rows: usize, cols: usize, mut keep: impl FnMut(usize, usize) -> bool) -> Mask {
        let mut m = Mask { rows, cols, words: vec![0; rows * cols.div_ceil(64)] };
        for r in 0..rows {
            for c in 0..cols {
                if keep(r, c) {
                    m.words[r * cols.div_ceil(64) + c / 64] |= 1 << (c % 64);
                }
            }
        }
        m
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Whether `(r, c)` is kept.
    #[track_caller]
    pub fn get(&self, r: usize, c: usize) -> bool {
        assert!(r < self.rows && c < self.cols, "({r}, {c}) of {} x {}", self.rows, self.cols);
        self.words[r * self.cols.div_ceil(64) + c / 64] >> (c % 64) & 1 == 1
    }

    /// Keeps or drops `(r, c)`.
    #[track_caller]
    pub fn set(&mut self, r: usize, c: usize, keep: bool) {
        assert!(r < self.rows && c < self.cols, "({r}, {c}) of {} x {}", self.rows, self.cols);
        let w = &mut self.words[r * self.cols.div_ceil(64) + c / 64];
        if keep { *w |= 1 << (c % 64) } else { *w &= !(1 << (c % 64)) }
    }

    /// The bits of row `r`, 64 columns a word, column 0 in the lowest bit; bits beyond the last column are 0.
    pub fn row(&self, r: usize) -> &[u64] {
        let w = self.cols.div_ceil(64);
        &self.words[r * w..(r + 1) * w]
    }

    /// How many entries are kept.
    pub fn kept(&self) -> usize {
        self.words.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// Fraction of entries dropped.
    pub fn sparsity(&self) -> f64 {
        let n = self.rows * self.cols;
        if n == 0 { 0.0 } else { 1.0 - self.kept() as f64 / n as f64 }
    }

    /// Drops what `other` drops, too. Panics where shapes differ.
    #[track_caller]
    pub fn intersect(&mut self, other: &Mask) {
        assert_eq!((self.rows, self.cols), (other.rows, other.cols), "masks of two shapes");
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a &= b;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_bits() {
        let mut m = Mask::from_fn(3, 70, |r, c| (r + c) % 2 == 0);
        assert_eq!(m.kept(), 105);
        assert!(m.get(0, 68) && !m.get(0, 69));
        m.set(0, 68, false);
        m.intersect(&Mask::from_fn(3, 70, |_, c| c != 0));
        assert_eq!(m.kept(), 102);
        assert_eq!(Mask::all(2, 65, true).row(0)[1], 1);
    }
}
