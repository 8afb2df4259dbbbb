//! Block tables: which pages of a layer are a sequence's.

use std::ops::Range;

use crate::Batch;

/// The block table of one sequence in one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table<'a> {
    /// Numbers of its layer's pages, the one of slot 0 first.
    pub blocks: &'a [u32],
    /// Positions written when the step is over.
    pub tokens: usize,
    /// Positions whose entries were evicted, as many in each head and layer: what is written for a position lies in
    /// slot `position - shift`. Slots keep the order of their positions; which ones stay may differ by head.
    pub shift: usize,
}

/// The block tables of a step: in each layer with attention, one for each of the batch's runs of rows of one sequence.
/// Layers whose tables are alike, as those of most models are, share them.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    blocks: Vec<u32>,
    /// Where the table of each run lies in `blocks`, its positions and its shift: a group after the other.
    spans: Vec<(Range<usize>, usize, usize)>,
    /// Where each group's runs lie in `spans`.
    groups: Vec<Range<usize>>,
    /// The group of each layer, by its number; of those that have one.
    layers: Vec<(usize, usize)>,
}

impl Tables {
    /// Adds those of a layer, in the order of the runs.
    pub fn push<'a>(&mut self, layer: usize, tables: impl IntoIterator<Item = Table<'a>>) {
        let first = self.spans.len();
        for table in tables {
            let from = self.blocks.len();
            self.blocks.extend_from_slice(table.blocks);
            self.spans.push((from..self.blocks.len(), table.tokens, table.shift));
        }
        let new = first..self.spans.len();
        if let Some(last) = self.groups.last()
            && self.group(last.clone()).eq(self.group(new.clone()))
        {
            self.blocks.truncate(self.spans.get(first).map_or(self.blocks.len(), |s| s.0.start));
            self.spans.truncate(first);
        } else {
            self.groups.push(new);
        }
        self.layers.push((layer, self.groups.len() - 1));
    }

    fn group(&self, spans: Range<usize>) -> impl ExactSizeIterator<Item = Table<'_>> {
        let table = |(at, tokens, shift): &(Range<usize>, usize, usize)| Table {
            blocks: &self.blocks[at.clone()],
            tokens: *tokens,
            shift: *shift,
        };
        self.spans[spans].iter().map(table)
    }

    /// The slot of every row of a batch, the same in all layers.
    pub fn slots(&self, batch: &Batch) -> Vec<usize> {
        let Some(first) = self.groups.first() else { return batch.positions().to_vec() };
        let runs = batch.runs().zip(self.group(first.clone()));
        runs.flat_map(|((_, rows), t)| rows.map(move |r| batch.positions()[r] - t.shift)).collect()
    }

    /// How many different groups of tables there are.
    pub fn groups(&self) -> usize {
        self.groups.len()
    }

    /// The group of `layer`. Panics where the step does not run it.
    #[track_caller]
    pub fn group_of(&self, layer: usize) -> usize {
        // Layers come in their order, and a step of a whole model has all that have attention.
        let found = self.layers.binary_search_by_key(&layer, |l| l.0);
        self.layers[found.expect("a layer of the step")].1
    }

    /// The tables of `layer`, one for each run.
    #[track_caller]
    pub fn of(&self, layer: usize) -> impl ExactSizeIterator<Item = Table<'_>> {
        self.group(self.groups[self.group_of(layer)].clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_with_the_same_tables_share_them() {
        let (a, b) = (Table { blocks: &[3, 1], tokens: 40, shift: 0 }, Table { blocks: &[2], tokens: 7, shift: 5 });
        let mut all = Tables::default();
        all.push(0, [a, b]);
        all.push(2, [a, b]);
        all.push(3, [a, Table { tokens: 8, ..b }]);
        all.push(5, []);
        all.push(6, []);
        assert_eq!((all.groups(), all.blocks.len(), all.spans.len()), (3, 6, 4));
        assert_eq!([0, 2, 3, 5, 6].map(|l| all.group_of(l)), [0, 0, 1, 2, 2]);
        let mut batch = Batch::one(4, 39..40);
        batch.push(9, 5..7);
        assert_eq!(all.slots(&batch), [39, 0, 1]);
        assert_eq!(Tables::default().slots(&batch), [39, 5, 6], "a model without attention");
        assert!(all.of(2).eq([a, b]) && all.of(3).eq([a, Table { tokens: 8, ..b }]) && all.of(6).len() == 0);
    }
}
