//! Gradients kept one by one.

use lacuna_base::Mat;

use super::Fold;

/// Keeps each sequence's gradient, `[outputs, inputs]`, one below the other.
#[derive(Clone, Debug)]
pub struct Each {
    inputs: usize,
    rows: Vec<f32>,
}

impl Each {
    /// All of them, `[sequences * outputs, inputs]`, those that did not reach the matrix left out.
    pub fn into_mat(self) -> Mat {
        let rows = self.rows.len().checked_div(self.inputs).unwrap_or(0);
        Mat::from_vec(rows, self.inputs, self.rows)
    }
}

impl Fold for Each {
    fn new(_: usize, inputs: usize) -> Each {
        Each { inputs, rows: Vec::new() }
    }
    fn add(&mut self, gradient: &Mat) {
        self.rows.extend_from_slice(gradient.data());
    }
}
