//! What can go wrong between weights and logits.

use lacuna_format::{FormatError, WeightsError};
use lacuna_spec::Place;

/// A model that cannot be loaded or run.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ModelError {
    /// The description itself is impossible.
    #[error("the model's description: {0}")]
    Spec(#[from] lacuna_spec::SpecError),
    /// A tensor cannot be had.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A tensor that the network needs is not there.
    #[error("the tensor of {place} is missing")]
    Missing {
        /// Which.
        place: String,
    },
    /// A tensor has another shape than the description says.
    #[error("the tensor of {place} is {have_rows} x {have_cols}, expected {rows} x {cols}")]
    Shape {
        /// Which.
        place: String,
        /// Rows it has.
        have_rows: usize,
        /// Columns it has.
        have_cols: usize,
        /// Rows expected.
        rows: usize,
        /// Columns expected.
        cols: usize,
    },
    /// A tensor's data do not fit its description.
    #[error("the tensor of {place}: {what}")]
    Bad {
        /// Which.
        place: String,
        /// What is wrong, with the numbers.
        what: String,
    },
    /// A token that the vocabulary does not have.
    #[error("token {token} is not in the vocabulary of {vocab}")]
    Token {
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// Rows of another width than blocks hand to each other.
    #[error("rows of {cols} columns; what goes from block to block has {need}")]
    Carried {
        /// Columns they have.
        cols: usize,
        /// Columns expected.
        need: usize,
    },
    /// A position beyond the learned ones.
    #[error("position {position} is beyond the model's {rows} learned positions")]
    Position {
        /// The position.
        position: usize,
        /// How many there are.
        rows: usize,
    },
    /// A text without a token to predict has no loss.
    #[error("a sequence of {tokens} tokens has no next token to predict")]
    Short {
        /// How many there are.
        tokens: usize,
    },
    /// What says which keys a row reads gave no answer, or one that does not fit.
    #[error("the selector of keys: {what}")]
    Select {
        /// What, with the numbers.
        what: String,
    },
    /// A gate that cannot stand where it is meant to, or what says which channels a row needs gave no answer that fits.
    #[error("the gate of channels: {what}")]
    Gate {
        /// What, with the numbers.
        what: String,
    },
    /// The key-value store cannot take or give what was asked.
    #[error("the key-value store: {what}")]
    Store {
        /// What, with the numbers.
        what: String,
    },
}

impl ModelError {
    pub(crate) fn bad(place: &Place, e: FormatError) -> ModelError {
        ModelError::Bad { place: place.to_string(), what: e.what }
    }
}
