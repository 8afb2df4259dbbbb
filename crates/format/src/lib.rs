//! The packed model's vocabulary: a stored matrix is a sum of terms, a term is made of pieces, a piece is a pattern x a
//! codec.
//!
//! - [`Pattern`]: where values are (dense, N:M, bitmask or shared-row mask, CSR, blocks).
//! - [`Values`]: how a value is written (floats, grouped integers, codebook, ternary, every GGUF block type).
//! - [`Piece`]: a pattern and its values, `[rows, cols]`.
//! - [`Term`]: a piece, a product of two (low rank), or signs times such a product ([`Signed`]).
//! - [`Stored`]: a sum of terms, with [`Map`]s at its ends where there are any.
//!
//! Canonical on disk, row by row, so that any range of rows decodes alone. Kernels repack at load.

mod affine;
pub mod bits;
mod check;
mod decode;
pub mod gguf;
mod gguf_encode;
mod gguf_grid;
mod gguf_write;
mod integers;
pub mod lattice;
mod map;
mod mask;
mod narrow;
mod pack;
mod pack_scales;
mod pattern;
mod piece;
mod recode;
mod serial;
mod signed;
mod size;
mod unpacked;
mod values;
mod weights;

pub use affine::Affine;
pub use bytes::Bytes;
pub use gguf::GgufType;
pub use gguf_grid::{BlockGrid, RunGrid};
pub use integers::Integers;
pub use lattice::{Lattice, Points};
pub use map::{Axes, MOST_DENSE, MOST_MAPS, Map, Number, hadamard_core, hadamard_parts};
pub use mask::Mask;
pub use narrow::narrow;
pub use pack::{
    Codebook, PatternKind, ScaleCodec, Ternary, cheapest_pattern, exact_bytes, pack_codebook, pack_float,
    pack_integers, pack_integers_off, pack_ternary,
};
pub use pack_scales::{pack_multiples, pack_scales};
pub use pattern::Pattern;
pub use piece::{Piece, Stored, Term};
pub use recode::IntRows;
pub use serial::{
    Buffer, Descriptor, Elem, GroupDesc, MapDesc, PieceDesc, ScalesDesc, TablesDesc, TermDesc, ValuesDesc,
};
pub use signed::{Signed, terms_within};
pub use unpacked::{Code, Layout, Unpacked, UnpackedPiece, UnpackedSigned, UnpackedTerm};
pub use values::{Float, Group, Owner, Scales, Tables, Values, Zeros};
pub use weights::{Weights, WeightsError};

/// Data that do not fit their description: a wrong length, an index out of range, a scale that is no number.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{what}")]
pub struct FormatError {
    /// What is wrong, with the numbers.
    pub what: String,
}

impl FormatError {
    /// An error that says `what`.
    pub fn new(what: impl Into<String>) -> FormatError {
        FormatError { what: what.into() }
    }
}
