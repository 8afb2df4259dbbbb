//! What a walk is told, what it tells, and what it leaves behind.

use std::path::{Path, PathBuf};

use lacuna_checkpoint::{Imatrix, SaveError};
use lacuna_format::WeightsError;
use lacuna_model::ModelError;
use lacuna_spec::{Place, Spec};
use serde::Serialize;
use serde_json::Value;

use crate::recipe::RecipeError;

/// A compression that did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum CompressError {
    /// The recipe cannot be followed.
    #[error("recipe: {0}")]
    Recipe(#[from] RecipeError),
    /// A weight cannot be had.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The network cannot run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The result cannot be written.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// A method could not answer.
    #[error("{place}: step '{step}': {what}")]
    Method {
        /// The matrix.
        place: String,
        /// The step.
        step: String,
        /// What was wrong.
        what: String,
    },
    /// A weight that is no finite number: whatever multiplies with it is none either.
    #[error("{place}: {what}")]
    NotFinite {
        /// The tensor.
        place: String,
        /// The weight, and whose it is.
        what: String,
    },
    /// An imatrix that the recipe cannot be used with.
    #[error("--imatrix: {what}")]
    Imatrix {
        /// Why.
        what: String,
    },
    /// The scratch file failed.
    #[error("scratch file in {dir}: {source}")]
    Scratch {
        /// Its directory.
        dir: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The ceiling is below what the work needs.
    #[error(
        "--max-ram {asked} is below the floor of this work, {floor} (the largest block with its statistics, one \
         sequence, and what is \
         already in use); give at least {floor}"
    )]
    Memory {
        /// The ceiling.
        asked: String,
        /// The least that works.
        floor: String,
    },
    /// There is nothing to calibrate on.
    #[error("the calibration text has {tokens} tokens; at least 2 are needed")]
    NoText {
        /// Tokens there are.
        tokens: usize,
    },
}

/// What the walk is told besides the recipe.
pub struct Options<'a> {
    /// Where the packed model goes.
    pub out: &'a Path,
    /// Replace what is there.
    pub overwrite: bool,
    /// Go on with an interrupted run.
    pub resume: bool,
    /// Where scratch files go, which have no names and go with the process; beside the output where absent.
    pub scratch: Option<&'a Path>,
    /// Ceiling of the whole process in bytes.
    pub max_ram: Option<u64>,
    /// Put before each calibration sequence (its last token then goes), for models that need it.
    pub bos: Option<u32>,
    /// Squares of inputs from a file, in the place of those that the calibration text gives.
    pub imatrix: Option<&'a Imatrix>,
    /// What the model was made from, for the saved config and to recognise an interrupted run.
    pub source: Value,
}

/// Told as the walk goes on.
pub trait Progress {
    /// A phase of `total` units begins.
    fn phase(&mut self, name: &str, total: u64);
    /// `done` units of the phase are done; `what` is at hand.
    fn step(&mut self, done: u64, what: &str);
}

/// No progress is shown.
pub struct Quiet;

impl Progress for Quiet {
    fn phase(&mut self, _: &str, _: u64) {}
    fn step(&mut self, _: u64, _: &str) {}
}

/// What became of one tensor.
#[derive(Clone, Debug, Serialize)]
pub struct TensorReport {
    /// Which.
    pub place: Place,
    /// Entries.
    pub parameters: u64,
    /// Bytes in the source.
    pub bytes_before: u64,
    /// Bytes now.
    pub bytes_after: u64,
    /// How it is stored now.
    pub codec: String,
    /// Fraction of exact zeros by pattern.
    pub sparsity: f64,
    /// `‖(W - W') X‖² / ‖W X‖²` on the calibration text (without its statistics: of the weights alone); absent where
    /// nothing changed.
    pub error: Option<f64>,
}

/// What the walk leaves behind.
pub struct Outcomes {
    /// The packed model's directory.
    pub path: PathBuf,
    /// Bytes of all its tensors.
    pub bytes: u64,
    /// Its network.
    pub spec: Spec,
    /// Tensor by tensor.
    pub tensors: Vec<TensorReport>,
    /// Calibration sequences and their length.
    pub calibration: (usize, usize),
    /// The source's tokens that stay, by their old ids, where some went.
    pub kept: Option<Vec<usize>>,
    /// Things the user should know.
    pub notes: Vec<String>,
}
