//! How rows and columns of gradients go together.

use lacuna_base::{Gram, Mat};

use super::Fold;

/// Sums `G Gᵀ` and `Gᵀ G` of each sequence's gradient `G`, `[outputs, inputs]`, in f64: what either factor of a
/// Kronecker product near the empirical Fisher matrix is, up to scale, where the other is the identity.
#[derive(Clone, Debug)]
pub struct Sides {
    rows: Gram,
    columns: Gram,
}

impl Sides {
    /// The mean of `G Gᵀ` over `sequences`, those that did not reach the matrix included, `[outputs, outputs]`.
    pub fn rows(&self, sequences: u64) -> Mat {
        mean(&self.rows, sequences)
    }

    /// The mean of `Gᵀ G`, `[inputs, inputs]`.
    pub fn columns(&self, sequences: u64) -> Mat {
        mean(&self.columns, sequences)
    }
}

fn mean(gram: &Gram, sequences: u64) -> Mat {
    let n = sequences.max(1) as f64;
    Mat::from_vec(gram.n(), gram.n(), gram.data().iter().map(|v| (v / n) as f32).collect())
}

impl Fold for Sides {
    fn new(outputs: usize, inputs: usize) -> Sides {
        Sides { rows: Gram::new(outputs), columns: Gram::new(inputs) }
    }

    fn add(&mut self, gradient: &Mat) {
        self.columns.add(gradient.view());
        self.rows.add(gradient.transpose().view());
    }
}
