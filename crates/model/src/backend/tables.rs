//! Block tables: which pages of a layer are a sequence's.

use std::cell::RefCell;
use std::ops::Range;
use std::thread::LocalKey;

use crate::lent::{Reuse, Reused};
use crate::{Batch, ModelError};

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
#[derive(Debug, Default)]
pub struct Tables(Reused<Lists>);

/// What tables are made of. Public for [`Reused`] alone.
#[derive(Debug, Default)]
pub struct Lists {
    blocks: Vec<u32>,
    /// Where the table of each run lies in `blocks`, its positions and its shift: a group after the other.
    spans: Vec<(Range<usize>, usize, usize)>,
    /// Where each group's runs lie in `spans`.
    groups: Vec<Range<usize>>,
    /// The group of each layer, by its number; of those that have one.
    layers: Vec<(usize, usize)>,
    /// The slot of each row.
    slots: Vec<usize>,
    /// The slots of states, one for each run of rows, of a group of layers after the other.
    states: Vec<u32>,
    /// Where those of each layer with a recurrent mixer lie, by its number.
    state_layers: Vec<(usize, Range<usize>)>,
}

impl Reuse for Lists {
    fn store() -> &'static LocalKey<RefCell<Vec<Lists>>> {
        thread_local!(static FREE: RefCell<Vec<Lists>> = const { RefCell::new(Vec::new()) });
        &FREE
    }
    fn clear(&mut self) {
        let Lists { blocks, spans, groups, layers, slots, states, state_layers } = self;
        blocks.clear();
        spans.clear();
        groups.clear();
        layers.clear();
        slots.clear();
        states.clear();
        state_layers.clear();
    }
}

impl Lists {
    fn group(&self, spans: Range<usize>) -> impl ExactSizeIterator<Item = Table<'_>> {
        let table = |(at, tokens, shift): &(Range<usize>, usize, usize)| Table {
            blocks: &self.blocks[at.clone()],
            tokens: *tokens,
            shift: *shift,
        };
        self.spans[spans].iter().map(table)
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
            all.spans.push((from..all.blocks.len(), table.tokens, table.shift));
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

    /// Adds the slots of the states of a layer with a recurrent mixer, in the order of the runs, and behind them those in
    /// which states go on apart ([`Batch::apart_runs`]). Layers come in their order.
    pub fn push_states(
        &mut self,
        layer: usize,
        slots: impl IntoIterator<Item = Result<u32, ModelError>>,
    ) -> Result<(), ModelError> {
        let all = &mut *self.0;
        let first = all.states.len();
        for slot in slots {
            all.states.push(slot?);
        }
        let mut mine = first..all.states.len();
        if let Some((_, last)) = all.state_layers.last()
            && all.states[last.clone()] == all.states[mine.clone()]
        {
            mine = last.clone();
            all.states.truncate(first);
        }
        all.state_layers.push((layer, mine));
        Ok(())
    }

    /// The slots of states of `layer`, one for each run, and one for each state that goes on apart. Panics where the step
    /// does not run it.
    #[track_caller]
    pub fn states_of(&self, layer: usize) -> &[u32] {
        let found = self.0.state_layers.binary_search_by_key(&layer, |l| l.0);
        &self.0.states[self.0.state_layers[found.expect("a layer of the step")].1.clone()]
    }

    /// Works out the slot of every row of the tables' batch, the same in all layers, once those are there.
    pub fn place(&mut self, batch: &Batch) {
        let all = &mut *self.0;
        all.slots.clear();
        all.slots.extend_from_slice(batch.positions());
        let Some(first) = all.groups.first() else { return };
        for ((_, rows), (_, _, shift)) in batch.runs().zip(&all.spans[first.clone()]) {
            all.slots[rows].iter_mut().for_each(|slot| *slot -= shift);
        }
    }

    /// The slot of every row.
    pub fn slots(&self) -> &[usize] {
        &self.0.slots
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
        let (a, b) = (Table { blocks: &[3, 1], tokens: 40, shift: 0 }, Table { blocks: &[2], tokens: 7, shift: 5 });
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
        let mut batch = Batch::one(4, 39..40);
        batch.push(9, 5..7);
        all.place(&batch);
        assert_eq!(all.slots(), [39, 0, 1]);
        let mut none = Tables::default();
        none.place(&batch);
        assert_eq!(none.slots(), [39, 5, 6], "a model without attention");
        let mut states = |layer, slots: &[u32]| all.push_states(layer, slots.iter().map(|&s| Ok(s))).expect("slots");
        states(1, &[4, 2]);
        states(2, &[4, 2]);
        states(4, &[4, 3]);
        assert_eq!([1, 2, 4].map(|l| all.states_of(l).to_vec()), [[4, 2], [4, 2], [4, 3]]);
        assert_eq!(all.0.states.len(), 4);
        assert!(all.of(2).eq([a, b]) && all.of(3).eq([a, Table { tokens: 8, ..b }]) && all.of(6).len() == 0);
    }
}
