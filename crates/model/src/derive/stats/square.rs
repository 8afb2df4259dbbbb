//! The mean square of gradients.

use lacuna_base::Mat;

use super::{Fold, accumulate, map};

/// Sums the squares of each matrix's gradients, `[outputs, inputs]`: the diagonal of the empirical Fisher matrix, a
/// sample being one sequence.
#[derive(Clone, Debug)]
pub struct Square {
    sum: Mat,
}

impl Square {
    /// The mean square over `sequences`, those that did not reach the matrix included.
    pub fn mean(&self, sequences: u64) -> Mat {
        map(&self.sum, |s| s / sequences.max(1) as f32)
    }
}

impl Fold for Square {
    fn new(outputs: usize, inputs: usize) -> Square {
        Square { sum: Mat::zeros(outputs, inputs) }
    }
    fn add(&mut self, gradient: &Mat) {
        accumulate(&mut self.sum, gradient, |g| g * g);
    }
}
