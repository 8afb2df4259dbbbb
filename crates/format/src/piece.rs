//! Pieces, terms and stored matrices.

use crate::{Map, Pattern, Signed, Values};

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
    /// Signs times such a product.
    Signed(Signed),
}

/// A matrix as it is stored: the sum of its terms, `[rows, cols]`, between the maps of its ends ([`Map`]). A vector is
/// a matrix of one row.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// Rows (outputs).
    pub rows: usize,
    /// Columns (inputs).
    pub cols: usize,
    /// The summands; none means all zeros.
    pub terms: Vec<Term>,
    /// Maps of what is multiplied, `[cols]`, in the order in which they are applied; at most
    /// [`MOST_MAPS`](crate::MOST_MAPS).
    pub input: Vec<Map>,
    /// Maps of the result, `[rows]`, likewise.
    pub output: Vec<Map>,
}

impl Stored {
    /// The sum of `terms`, without maps.
    pub fn new(rows: usize, cols: usize, terms: Vec<Term>) -> Stored {
        Stored { rows, cols, terms, input: Vec::new(), output: Vec::new() }
    }

    /// A matrix of one piece.
    pub fn from_piece(piece: Piece) -> Stored {
        Stored::new(piece.rows, piece.cols, vec![Term::Piece(piece)])
    }
}
