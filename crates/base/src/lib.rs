//! The ground floor: matrices, dense operations, factorizations, small floats, seeded randomness, units of bytes.
//!
//! Everything here is plain arithmetic on plain data. It knows no files, models or methods.

pub mod float;
mod mat;
pub mod rng;
pub mod testkit;
pub mod units;

pub use mat::{Mat, MatMut, MatRef};
pub use rng::Rng;
