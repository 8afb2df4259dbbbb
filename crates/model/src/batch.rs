//! Which rows of a call belong to which sequence.

use std::cell::RefCell;
use std::ops::Range;
use std::thread::LocalKey;

use crate::lent::Reuse;

/// The rows of one call: for each its sequence and its position in it.
///
/// Rows of one sequence stand together, at rising positions that follow what the store already has of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    sequence: Vec<usize>,
    position: Vec<usize>,
    length: Vec<usize>,
    /// Rows that are written to another sequence, too.
    also: Vec<(usize, usize)>,
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
        self.length.clear();
        self.also.clear();
    }

    /// Becomes like another, in its own memory.
    pub(crate) fn become_like(&mut self, other: &Batch) {
        self.sequence.clone_from(&other.sequence);
        self.position.clone_from(&other.position);
        self.length.clone_from(&other.length);
        self.also.clone_from(&other.also);
    }

    /// One sequence's positions `positions`, with which it ends.
    pub fn one(sequence: usize, positions: Range<usize>) -> Batch {
        let mut b = Batch::new();
        b.push(sequence, positions);
        b
    }

    /// Adds rows for `positions` of `sequence`, which ends with them.
    pub fn push(&mut self, sequence: usize, positions: Range<usize>) {
        let length = positions.end;
        self.push_part(sequence, positions, length);
    }

    /// As [`Batch::push`], for a sequence of `length` tokens, whose rest comes in other calls. Only LongRoPE asks: it
    /// turns every row of a sequence by the list that the whole sequence's length calls for, so that a row does not
    /// depend on how the sequence was cut.
    #[track_caller]
    pub fn push_part(&mut self, sequence: usize, positions: Range<usize>, length: usize) {
        assert!(positions.end <= length, "positions up to {} of a sequence of {length} tokens", positions.end);
        for p in positions {
            self.sequence.push(sequence);
            self.position.push(p);
            self.length.push(length);
        }
    }

    /// Writes the key and value of `row`, which is there already, to `sequence` as well, before that sequence's own rows.
    /// A draft's branches share their beginnings so: each row is computed once, in one sequence.
    #[track_caller]
    pub fn also(&mut self, row: usize, sequence: usize) {
        assert!(row < self.rows(), "row {row} of {}", self.rows());
        self.also.push((row, sequence));
    }

    /// The rows that are written to `sequence`: those of others, and its own, `rows`.
    pub fn written(&self, sequence: usize, rows: Range<usize>) -> impl Iterator<Item = usize> {
        self.also.iter().filter(move |(_, s)| *s == sequence).map(|(r, _)| *r).chain(rows)
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

    /// Position of every row, and the length of its sequence.
    pub(crate) fn places(&self) -> impl ExactSizeIterator<Item = (usize, usize)> + Clone {
        self.position.iter().copied().zip(self.length.iter().copied())
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

impl Reuse for Batch {
    fn store() -> &'static LocalKey<RefCell<Vec<Batch>>> {
        thread_local!(static FREE: RefCell<Vec<Batch>> = const { RefCell::new(Vec::new()) });
        &FREE
    }
    fn clear(&mut self) {
        Batch::clear(self);
    }
}
