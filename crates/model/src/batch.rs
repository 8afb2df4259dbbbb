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
    /// Rows from which on a sequence's state goes on apart, rising.
    apart: Vec<usize>,
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
        self.apart.clear();
    }

    /// Becomes like another, in its own memory.
    pub(crate) fn become_like(&mut self, other: &Batch) {
        self.sequence.clone_from(&other.sequence);
        self.position.clone_from(&other.position);
        self.length.clone_from(&other.length);
        self.also.clone_from(&other.also);
        self.apart.clone_from(&other.apart);
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

    /// From row `row` on, the last that is there or one of those that come next, the state of that row's sequence goes on
    /// apart: what the rows before it made of the state stays as it is, and the rest of the sequence's rows go on from a
    /// copy ([`crate::KvStore::apart`]). A draft's rows do so, of which nobody knows yet whether they stay.
    #[track_caller]
    pub fn part_state(&mut self, row: usize) {
        assert!(self.apart.last().is_none_or(|last| *last < row), "row {row} behind {:?}", self.apart);
        self.apart.push(row);
    }

    /// As [`Batch::runs`], of each the rows that go on with the sequence's own state.
    pub fn own_runs(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        self.runs().map(|(sequence, rows)| {
            let end = self.parted(&rows).unwrap_or(rows.end);
            (sequence, rows.start..end)
        })
    }

    /// The rows whose state goes on apart, with the number of their run and their sequence.
    pub fn apart_runs(&self) -> impl Iterator<Item = (usize, usize, Range<usize>)> {
        let some = self.runs().enumerate().filter(|_| !self.apart.is_empty());
        some.filter_map(|(run, (sequence, rows))| Some((run, sequence, self.parted(&rows)?..rows.end)))
    }

    /// Where a run's state parts.
    fn parted(&self, rows: &Range<usize>) -> Option<usize> {
        // The first row of a run has nothing to part from.
        self.apart.iter().copied().find(|r| *r > rows.start && *r < rows.end)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_part_within_runs() {
        let mut b = Batch::new();
        b.push(4, 0..3);
        b.push(2, 5..6);
        b.push(7, 1..5);
        assert_eq!(b.own_runs().collect::<Vec<_>>(), b.runs().collect::<Vec<_>>());
        assert_eq!(b.apart_runs().count(), 0);
        b.part_state(1);
        b.part_state(6);
        assert_eq!(b.runs().collect::<Vec<_>>(), [(4, 0..3), (2, 3..4), (7, 4..8)]);
        assert_eq!(b.own_runs().collect::<Vec<_>>(), [(4, 0..1), (2, 3..4), (7, 4..6)]);
        assert_eq!(b.apart_runs().collect::<Vec<_>>(), [(0, 4, 1..3), (2, 7, 6..8)]);
        b.clear();
        b.push(1, 0..2);
        assert_eq!(b.apart_runs().count(), 0);
    }
}
