//! The mean gradient.

use lacuna_base::Mat;

use super::{Fold, accumulate, map};

/// Sums each matrix's gradients, `[outputs, inputs]`: the gradient of the mean loss of all sequences, up to their
/// number.
#[derive(Clone, Debug)]
pub struct Mean {
    sum: Mat,
}

impl Mean {
    /// The mean over `sequences`, those that did not reach the matrix included.
    pub fn mean(&self, sequences: u64) -> Mat {
        map(&self.sum, |s| s / sequences.max(1) as f32)
    }
}

impl Fold for Mean {
    fn new(outputs: usize, inputs: usize) -> Mean {
        Mean { sum: Mat::zeros(outputs, inputs) }
    }
    fn add(&mut self, gradient: &Mat) {
        accumulate(&mut self.sum, gradient, |g| g);
    }
}
