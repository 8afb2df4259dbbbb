//! The one door to a model's weights, whatever file they lie in.

use std::sync::Arc;

use lacuna_spec::{Place, Spec};

use crate::{FormatError, Stored};

/// A model's weights by place, decoded by nobody until asked.
pub trait Weights: Send + Sync {
    /// The network these weights belong to.
    fn spec(&self) -> &Spec;

    /// The tensor at `place` as it is stored, its buffers mapped rather than copied where the file allows. `None` where
    /// the network has no such tensor. Vectors are `[1, n]`.
    fn get(&self, place: &Place) -> Result<Option<Arc<Stored>>, WeightsError>;

    /// Says that the tensor at `place` will not be needed for a while: its mapped pages may leave memory.
    fn release(&self, place: &Place) {
        let _ = place;
    }
}

/// A tensor that cannot be had.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WeightsError {
    /// A tensor that the network needs is not in the file.
    #[error("{file}: the tensor of {place} is missing{hint}")]
    Missing {
        /// The file or directory.
        file: String,
        /// What was asked for.
        place: String,
        /// The name looked for, or what to do.
        hint: String,
    },
    /// A tensor is there but not as it should be.
    #[error("{file}: tensor {tensor}: {what}")]
    Bad {
        /// The file.
        file: String,
        /// Its name in the file.
        tensor: String,
        /// What is wrong, with the numbers.
        what: String,
    },
}

impl WeightsError {
    /// A format error of `tensor` in `file`.
    pub fn bad(file: impl Into<String>, tensor: impl Into<String>, e: FormatError) -> WeightsError {
        WeightsError::Bad { file: file.into(), tensor: tensor.into(), what: e.what }
    }
}
