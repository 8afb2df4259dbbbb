//! What a model is worth: loss, perplexity, divergence from the dense model, tasks, tables and plots.

mod across;
mod finite;
pub mod html;
pub mod loss;
mod perplexity;
mod stream;
mod table;
pub mod tasks;
mod texts;
mod windows;

pub use across::{Across, Speaker, Told};
pub use perplexity::{Against, Eval, Judged, Reference};
pub use stream::{Means, Reader, TakeRows};
pub use table::Table;
pub use texts::{CALIBRATION, HELD_OUT, normal_lines};
pub use windows::cut;

/// An evaluation that cannot be made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{what}")]
pub struct EvalError {
    /// What is wrong, with the numbers.
    pub what: String,
    /// Whether it is that the model computes numbers that are not finite.
    pub not_finite: bool,
}

impl EvalError {
    /// An error that says `what`.
    pub fn new(what: impl Into<String>) -> EvalError {
        EvalError { what: what.into(), not_finite: false }
    }
}

impl From<lacuna_model::ModelError> for EvalError {
    fn from(e: lacuna_model::ModelError) -> EvalError {
        EvalError::new(e.to_string())
    }
}
