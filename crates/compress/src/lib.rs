//! Recipe -> plan -> calibrate -> drive -> report.
//!
//! A recipe is parsed against a registry of methods and families handed over by the binary. The walk runs its
//! model-wide steps first, then block after block: one forward of the uncompressed block gathers the statistics that
//! the steps asked for, the block's matrices are edited, packed and written, and the outputs are computed anew from
//! their stored form. Steps, statistics, edits and the lab of a search are known here, and no family or method by name.

mod account;
mod activations;
mod calibrate;
mod drive;
mod edits;
mod error;
mod identity;
mod levels;
mod local;
pub mod memory;
mod model_wide;
mod overlay;
mod predict;
mod recipe;
mod rows;
mod scratch;
mod search;
mod sequences;
mod sizes;
mod trials;
mod vocabulary;

pub use account::{CompressError, Options, Outcomes, Progress, Quiet, TensorReport};
pub use drive::{compress, reads_imatrix};
pub use identity::{fingerprint, revision};
pub use levels::{AtLevel, Choice, Levels, Room, Stitch, levels};
pub use predict::{Planned, Shaped, forms, uses};
pub use recipe::{Calibration, Recipe, RecipeError, RecipeStep, Rest};
pub use sequences::{bytes_fingerprint, tokens_fingerprint};
