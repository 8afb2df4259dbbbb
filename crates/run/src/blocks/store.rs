//! The block store as the decoder sees it.

use std::sync::Arc;

use lacuna_contract::{Select, SelectPrompt};
use lacuna_kernels::Mass;
use lacuna_model::{Backend, Batch, Decisions, KvStore, ModelError, Reads, Table};

use super::BlockStore;

impl<B: Backend> KvStore<B> for BlockStore<B> {
    fn prepare(&mut self, layer: usize, batch: &Batch) -> Result<(), ModelError> {
        let store = |what: String| ModelError::Store { what };
        self.prepared.clear();
        self.prepared.extend(batch.runs().map(|(slot, _)| slot));
        for (slot, rows) in batch.runs() {
            let (_, place) = self.place(layer, slot)?;
            let t = self.text_mut(slot);
            for position in batch.written(slot, rows).map(|r| batch.positions()[r]) {
                let have = t.written[place];
                if position > have {
                    return Err(store(format!(
                        "position {position} of text {slot} in block {layer} after only {have}"
                    )));
                }
                let Some(block) = t.block_of(position) else {
                    return Err(store(format!("position {position} of text {slot} was evicted")));
                };
                if block >= t.blocks.len() {
                    return Err(store(format!("no room was made for position {position} of text {slot}")));
                }
                if block < t.shared.len().max(t.lent) {
                    return Err(store(format!("position {position} of text {slot} lies in a published block")));
                }
                t.written[place] = have.max(position + 1);
            }
        }
        Ok(())
    }

    fn table(&self, layer: usize, slot: usize) -> Result<Table<'_>, ModelError> {
        let (t, place) = self.place(layer, slot)?;
        Ok(Table { blocks: &t.blocks, tokens: t.written[place], shift: t.left.shift })
    }

    fn pages(&mut self, layer: usize) -> Result<&mut B::Pages, ModelError> {
        let place = self.places.get(layer).copied().flatten();
        let place = place.ok_or_else(|| ModelError::Store { what: format!("block {layer} has no attention") })?;
        Ok(&mut self.pools[place])
    }

    fn lend_mass(&mut self, layer: usize) -> Vec<Mass> {
        self.places.get(layer).copied().flatten().map_or_else(Vec::new, |place| self.lend(place))
    }

    fn selector(&self, layer: usize) -> Option<Arc<dyn Select>> {
        self.places.get(layer).copied().flatten().and_then(|place| self.selector_of(place))
    }

    fn lend_decisions(&mut self, layer: usize) -> Decisions {
        let place = self.places.get(layer).copied().flatten();
        place.and_then(|place| self.decisions_of(place)).map(std::mem::take).unwrap_or_default()
    }

    fn take_decisions(&mut self, layer: usize, decisions: Decisions) {
        let place = self.places.get(layer).copied().flatten();
        if let Some(mine) = place.and_then(|place| self.decisions_of(place)) {
            *mine = decisions;
        }
    }

    fn prompt_selector(&self, layer: usize) -> Option<Arc<dyn SelectPrompt>> {
        self.places.get(layer).copied().flatten().and_then(|place| self.prompt_selector_of(place))
    }

    fn count_reads(&mut self, reads: Reads) {
        self.add_reads(reads);
    }

    fn take_mass(&mut self, layer: usize, mass: Vec<Mass>) {
        if let Some(place) = self.places.get(layer).copied().flatten() {
            self.take_back(place, mass);
        }
    }

    fn prepare_states(&mut self, layer: usize, batch: &Batch) -> Result<(), ModelError> {
        self.prepare_own(layer, batch)
    }

    fn state(&self, _: usize, slot: usize) -> Result<u32, ModelError> {
        self.slot_of(slot)
    }

    fn apart(&self, _: usize, slot: usize) -> Result<u32, ModelError> {
        self.apart_of(slot)
    }

    fn states(&mut self, layer: usize) -> Result<&mut B::States, ModelError> {
        self.states_of(layer)
    }
}
