//! Block tables: which pages of a layer are a sequence's.

use std::cell::RefCell;
use std::ops::Range;
use std::thread::LocalKey;

use crate::ModelError;
use crate::lent::{Reuse, Reused};

/// The block table of one sequence in one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table<'a> {
    /// Numbers of its layer's pages, the one of position 0 first.
    pub blocks: &'a [u32],
    /// Positions written when the step is over.
    pub tokens: usize,
}

/// The block tables of a step: in each layer with attention, one for each of the batch's runs of rows of one sequence.
/// Layers whose tables are alike, as those of most models are, share them.
#[derive(Debug, Default)]
pub struct Tables(Reused<Lists>);

/// What tables are made of. Public for [`Reused`] alone.
#[derive(Debug, Default)]
pub struct Lists {
    blocks: Vec<u32>,
    /// Where the table of each run lies in `blocks`, and its positions: a group after the other.
    spans: Vec<(Range<usize>, usize)>,
    /// Where each group's runs lie in `spans`.
    groups: Vec<Range<usize>>,
    /// The group of each layer, by its number; of those that have one.
    layers: Vec<(usize, usize)>,
}

impl Reuse for Lists {
    fn store() -> &'static LocalKey<RefCell<Vec<Lists>>> {
        thread_local!(static FREE: RefCell<Vec<Lists>> = const { RefCell::new(Vec::new()) });
        &FREE
    }
    fn clear(&mut self) {
        let Lists { blocks, spans, groups, layers } = self;
        blocks.clear();
        spans.clear();
        groups.clear();
        layers.clear();
    }
}

impl Lists {
    fn group(&self, spans: Range<usize>) -> impl ExactSizeIterator<Item = Table<'_>> {
        self.spans[spans].iter().map(|(at, tokens)| Table { blocks: &self.blocks[at.clone()], tokens: *tokens })
    }
}

impl Tables {
    /// Adds those of a layer, in the order of the runs. Layers come in their order.
    pub fn push<'a>(
        &mut self,
        layer: usize,
        tables: impl IntoIterator<Item = Result<Table<'a>, ModelError>>,
    ) -> Result<(), ModelError> {
        let all = &mut *self.0;
        let first = all.spans.len();
        for table in tables {
            let (table, from) = (table?, all.blocks.len());
            all.blocks.extend_from_slice(table.blocks);
            all.spans.push((from..all.blocks.len(), table.tokens));
        }
        let new = first..all.spans.len();
        if let Some(last) = all.groups.last()
            && all.group(last.clone()).eq(all.group(new.clone()))
        {
            all.blocks.truncate(all.spans.get(first).map_or(all.blocks.len(), |s| s.0.start));
            all.spans.truncate(first);
        } else {
            all.groups.push(new);
        }
        all.layers.push((layer, all.groups.len() - 1));
        Ok(())
    }

    /// How many different groups of tables there are.
    pub fn groups(&self) -> usize {
        self.0.groups.len()
    }

    /// The group of `layer`. Panics where the step does not run it.
    #[track_caller]
    pub fn group_of(&self, layer: usize) -> usize {
        let found = self.0.layers.binary_search_by_key(&layer, |l| l.0);
        self.0.layers[found.expect("a layer of the step")].1
    }

    /// The tables of `layer`, one for each run.
    #[track_caller]
    pub fn of(&self, layer: usize) -> impl ExactSizeIterator<Item = Table<'_>> {
        self.0.group(self.0.groups[self.group_of(layer)].clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_with_the_same_tables_share_them() {
        let (a, b) = (Table { blocks: &[3, 1], tokens: 40 }, Table { blocks: &[2], tokens: 7 });
        let mut all = Tables::default();
        let mut push =
            |layer, tables: &[Table<'static>]| all.push(layer, tables.iter().map(|&t| Ok(t))).expect("tables");
        push(0, &[a, b]);
        push(2, &[a, b]);
        push(3, &[a, Table { tokens: 8, ..b }]);
        push(5, &[]);
        push(6, &[]);
        assert_eq!((all.groups(), all.0.blocks.len(), all.0.spans.len()), (3, 6, 4));
        assert_eq!([0, 2, 3, 5, 6].map(|l| all.group_of(l)), [0, 0, 1, 2, 2]);
        assert!(all.of(2).eq([a, b]) && all.of(3).eq([a, Table { tokens: 8, ..b }]) && all.of(6).len() == 0);
    }
}
