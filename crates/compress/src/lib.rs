//! Recipe -> plan -> calibrate -> drive -> report.
//!
//! A recipe is parsed against a registry of methods handed over by the binary. The walk runs its model-wide steps first, then block after
//! block: one forward of the uncompressed block gathers the statistics that the methods asked for, the block's matrices are compressed and
//! written, and the outputs are computed anew from their stored form.

mod account;
mod activations;
mod drive;
mod identity;
mod matrix;
pub mod memory;
mod overlay;
mod predict;
mod recipe;
mod select;
mod sequences;
mod stats;

pub use account::{CompressError, Options, Outcomes, Progress, Quiet, TensorReport};
pub use activations::SpilledInputs;
pub use drive::compress;
pub use identity::{fingerprint, revision};
pub use predict::{Form, Shaped, forms};
pub use recipe::{Calibration, PruneKeys, QuantizeKeys, Recipe, RecipeError, Rest, Step};
