//! What a search may ask.

use crate::card::MethodError;

/// A set of places that are decided on together.
#[derive(Clone, Debug)]
pub struct Slot {
    /// Its name, for reports: `layers.3.attn.q`, `layers.3`.
    pub name: String,
    /// Weights in it.
    pub parameters: u64,
    /// Slots of one group may exchange levels: a matrix's kind, or the kind of a part.
    pub group: usize,
}

/// One choice for a slot.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Level {
    /// The value of the key that varies (bits, sparsity, ...); for parts the share that is there, 0 to 1.
    pub value: f64,
    /// What the budget counts: bytes (nanoseconds, where a step on sizes was given times).
    pub bytes: u64,
    /// Relative error on the source's calibration text, weighted by the weights of each matrix.
    pub error: f64,
    /// The same as it is, not relative: `‖(W - W') X‖²` over all tokens of that text.
    pub lost: f64,
}

/// A level for each slot, by index.
pub type Assignment = Vec<usize>;

/// What an assignment led to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Nats a token on the calibration text.
    pub loss: f64,
    /// KL(source || trial), nats a token.
    pub kl: f64,
    /// Bytes of all slots.
    pub bytes: u64,
}

/// A database of levels with a way to measure what is stitched from it.
pub trait Lab {
    /// What is decided on.
    fn slots(&self) -> &[Slot];

    /// The levels of a slot, in the order of the values that vary.
    fn levels(&self, slot: usize) -> &[Level];

    /// Measures assignments on the first `tokens` calibration tokens (at least one sequence). An error when the budget
    /// of trials is spent.
    fn measure(&mut self, batch: &[Assignment], tokens: usize) -> Result<Vec<Outcome>, MethodError>;

    /// What the search's look at a slot gave.
    fn looked(&self, slot: usize) -> f64 {
        let _ = slot;
        0.0
    }

    /// Bytes at 16 bits a weight that a token reads beside the slots.
    fn rest_bytes(&self) -> u64 {
        0
    }

    /// A level as the recipe writes its value.
    fn name(&self, slot: usize, level: usize) -> String {
        self.levels(slot)[level].value.to_string()
    }

    /// Something for the report, beside what was chosen.
    fn note(&mut self, text: String) {
        let _ = text;
    }
}
