//! Pieces, terms and stored matrices.

use crate::{Pattern, Values};

/// A pattern and its values.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// Rows (outputs).
    pub rows: usize,
    /// Columns (inputs).
    pub cols: usize,
    /// Where values are.
    pub pattern: Pattern,
    /// What they are.
    pub values: Values,
}

/// One summand of a stored matrix.
// A handful of terms a matrix: their size does not matter, an allocation behind each would only be in the way.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug, PartialEq)]
pub enum Term {
    /// A piece as it is.
    Piece(Piece),
    /// `left · right`: `[rows, rank] · [rank, cols]`.
    Product(Piece, Piece),
}

/// A matrix as it is stored: the sum of its terms, `[rows, cols]`. A vector is a matrix of one row.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// Rows (outputs).
    pub rows: usize,
    /// Columns (inputs).
    pub cols: usize,
    /// The summands; none means all zeros.
    pub terms: Vec<Term>,
}
