//! Norms of gradients over sequences.

use lacuna_base::Mat;

use super::{Fold, accumulate, map};

/// For every weight the 1-norm and the 2-norm of its gradients over sequences.
#[derive(Clone, Debug)]
pub struct Norms {
    magnitudes: Mat,
    squares: Mat,
}

impl Norms {
    /// The mean magnitude over `sequences`, those that did not reach the matrix included, `[outputs, inputs]`.
    pub fn mean_abs(&self, sequences: u64) -> Mat {
        map(&self.magnitudes, |s| s / sequences.max(1) as f32)
    }

    /// The root of the sum of squares, `[outputs, inputs]`: not divided by the number of sequences.
    pub fn root_sum_of_squares(&self) -> Mat {
        map(&self.squares, f32::sqrt)
    }
}

impl Fold for Norms {
    fn new(outputs: usize, inputs: usize) -> Norms {
        Norms { magnitudes: Mat::zeros(outputs, inputs), squares: Mat::zeros(outputs, inputs) }
    }
    fn add(&mut self, gradient: &Mat) {
        accumulate(&mut self.magnitudes, gradient, f32::abs);
        accumulate(&mut self.squares, gradient, |g| g * g);
    }
}
