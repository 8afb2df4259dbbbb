//! Models for other programs: GGUF, Hugging Face, compressed-tensors, PEFT.
//!
//! Every saver goes tensor by tensor, a run of rows at a time, so that memory holds a piece of one matrix and never the
//! model. Files are written under a temporary name, brought to the disk and renamed. What a form cannot say exactly is
//! counted: values that came out otherwise, and zeros that did not stay zeros.

mod arrange;
mod compressed_tensors;
mod dir;
mod gguf;
mod gguf_pairs;
mod hf;
mod peft;
mod place;

use std::path::PathBuf;

use serde::Serialize;

pub use compressed_tensors::{PackQuantized, Rounding, save_compressed_tensors};
pub(crate) use dir::OutDir;
pub use gguf::{GgufKind, save_gguf};
pub(crate) use gguf_pairs::Pairs;
pub use hf::save_hf;
pub use peft::save_peft;
pub(crate) use place::OutFile;

/// Told how many of how many tensors are done.
pub type Progress<'a> = &'a mut dyn FnMut(usize, usize);

/// Takes a tensor's bytes, in order.
pub(crate) type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> Result<(), crate::SaveError>;

/// A model that was written.
#[derive(Debug, Clone, Serialize)]
pub struct Saved {
    /// Where it lies.
    pub path: PathBuf,
    /// Bytes of its weight files.
    pub bytes: u64,
    /// Its tensors.
    pub tensors: Vec<Written>,
    /// What else a reader should know, a sentence each.
    pub notes: Vec<String>,
}

/// A tensor that was written.
#[derive(Debug, Clone, Serialize)]
pub struct Written {
    /// Its name in the file.
    pub name: String,
    /// How its source was stored.
    pub from: String,
    /// How it is stored now.
    pub to: String,
    /// The type that was asked for, where its rows do not divide into that type's blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instead_of: Option<String>,
    /// What that changed.
    #[serde(flatten)]
    pub loss: Loss,
}

/// What a change of form did to values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Loss {
    /// Values written.
    pub values: u64,
    /// Those that are not exactly what they were.
    pub changed: u64,
    /// Zeros that are none any more.
    pub zeros_lost: u64,
    /// Sum of squared differences.
    #[serde(skip)]
    pub error: f64,
    /// Sum of squares of what was.
    #[serde(skip)]
    pub energy: f64,
}

impl Loss {
    /// Compares what was with what is.
    pub fn count(&mut self, was: &[f32], is: &[f32]) {
        self.values += was.len() as u64;
        for (&a, &b) in was.iter().zip(is) {
            if a != b {
                self.changed += 1;
                self.zeros_lost += u64::from(a == 0.0);
                self.error += f64::from(a - b).powi(2);
            }
            self.energy += f64::from(a).powi(2);
        }
    }

    /// Adds another's counts.
    pub fn add(&mut self, other: &Loss) {
        self.values += other.values;
        self.changed += other.changed;
        self.zeros_lost += other.zeros_lost;
        self.error += other.error;
        self.energy += other.energy;
    }

    /// Root of the mean squared difference over the root of the mean square.
    pub fn relative(&self) -> f64 {
        if self.energy == 0.0 { 0.0 } else { (self.error / self.energy).sqrt() }
    }
}
