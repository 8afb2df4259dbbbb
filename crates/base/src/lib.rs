//! The ground floor: matrices, dense operations, factorizations, small floats, seeded randomness, units of bytes,
//! Python's JSON; and outputs that are not whole yet.
//!
//! Nearly everything here is plain arithmetic on plain data. It knows no models or methods.

pub mod dense;
pub mod factor;
pub mod float;
pub mod json;
mod mat;
mod mat64;
pub mod rng;
pub mod testkit;
pub mod unfinished;
pub mod units;
mod uppers;

pub use dense::{Gram, GramError};
pub use factor::FactorError;
pub use mat::{Mat, MatMut, MatRef};
pub use mat64::Mat64;
pub use rng::Rng;
