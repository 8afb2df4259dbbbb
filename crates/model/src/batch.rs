//! Which rows of a call belong to which sequence.

use std::ops::Range;

/// The rows of one call: for each its sequence and its position in it.
///
/// Rows of one sequence stand together, at rising positions that follow what the store already has of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    sequence: Vec<usize>,
    position: Vec<usize>,
    extent: Vec<usize>,
}

impl Batch {
    /// No rows yet.
    pub fn new() -> Batch {
        Batch::default()
    }

    /// No rows any more.
    pub fn clear(&mut self) {
        self.sequence.clear();
        self.position.clear();
        self.extent.clear();
    }

    /// One sequence's positions `positions`.
    pub fn one(sequence: usize, positions: Range<usize>) -> Batch {
        let mut b = Batch::new();
        b.push(sequence, positions);
        b
    }

    /// Adds rows for `positions` of `sequence`.
    pub fn push(&mut self, sequence: usize, positions: Range<usize>) {
        self.push_extent(sequence, positions, 0);
    }

    /// As [`Batch::push`], for a sequence known to become `extent` tokens long. Only LongRoPE asks: it turns every row of a sequence that will
    /// pass the original context by the long factors. Without it, a row is long from its own position on.
    pub fn push_extent(&mut self, sequence: usize, positions: Range<usize>, extent: usize) {
        for p in positions {
            self.sequence.push(sequence);
            self.position.push(p);
            self.extent.push(extent);
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.position.len()
    }

    /// The sequence of row `r`.
    pub fn sequence(&self, r: usize) -> usize {
        self.sequence[r]
    }

    /// The position of every row.
    pub fn positions(&self) -> &[usize] {
        &self.position
    }

    /// Position and extent of every row.
    pub(crate) fn places(&self) -> impl ExactSizeIterator<Item = (usize, usize)> + Clone {
        self.position.iter().copied().zip(self.extent.iter().copied())
    }

    /// Runs of rows of one sequence: the sequence and its rows.
    pub fn runs(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let mut from = 0;
        self.sequence.chunk_by(|a, b| a == b).map(move |run| {
            let rows = from..from + run.len();
            from = rows.end;
            (run[0], rows)
        })
    }
}
