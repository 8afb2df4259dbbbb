//! States of recurrent mixers: a slot for each text at work, and snapshots that published blocks keep.
//!
//! A state cannot go back, and cannot be put together from blocks: a text that begins like another one goes on from the
//! last snapshot at or before what both have in common, and reads the rest again. Snapshots stand at the ends of blocks,
//! at absolute multiples of [`SNAPSHOT_TOKENS`] and at the last such end within a prompt; the state of a text that is
//! closed becomes one of its tail, or of its last block. A slot counts against the same budget as blocks, as many as its
//! bytes would be, and goes with its block.
//!
//! The rows of a draft go on from a copy of the state, in a slot that a text has for one step: where all of them stay,
//! the copy becomes the text's state, else the text reads those that stay once more.

use lacuna_model::{Backend, Batch, ModelError, States};
use lacuna_spec::Spec;

use super::{BLOCK_TOKENS, BlockStore, Key, Published, Text};

/// Positions between two snapshots of a text: a multiple of a block's.
pub const SNAPSHOT_TOKENS: usize = 512;

/// A position at which no state stands.
const NOWHERE: usize = usize::MAX;

/// Slots of states, in every layer with a mixer under the same numbers.
pub(super) struct Kept<B: Backend> {
    /// The number of each layer with a mixer, and its states.
    layers: Vec<(usize, B::States)>,
    /// What a slot counts, in blocks.
    blocks: usize,
    /// Slots that exist, and those of them that hold nothing.
    made: usize,
    spare: Vec<u32>,
    /// Numbers whose memory was given back.
    gone: Vec<u32>,
    /// Snapshots of blocks that nobody uses.
    idle: usize,
}

/// The state of a text at work.
#[derive(Clone, Copy)]
pub(super) struct Own {
    pub(super) slot: Option<u32>,
    /// Positions behind which it stands.
    at: usize,
    /// Where it goes on for the rows of a draft.
    apart: Option<u32>,
}

impl Own {
    /// None.
    pub(super) const NONE: Own = Own { slot: None, at: NOWHERE, apart: None };
}

impl<B: Backend> Kept<B> {
    pub(super) fn new(backend: &B, spec: &Spec, block_bytes: usize) -> Kept<B> {
        let layers = spec.layers.iter().enumerate();
        let layers: Vec<(usize, B::States)> =
            layers.filter_map(|(l, layer)| Some((l, backend.states(layer.mixer.as_ref()?, spec.hidden)))).collect();
        let bytes: usize = layers.iter().map(|(_, s)| s.slot_bytes()).sum();
        let blocks = bytes.div_ceil(block_bytes.max(1));
        Kept { layers, blocks, made: 0, spare: Vec::new(), gone: Vec::new(), idle: 0 }
    }

    fn bytes(&self) -> usize {
        self.layers.iter().map(|(_, s)| s.slot_bytes()).sum()
    }

    fn copy(&mut self, from: u32, to: u32) {
        self.layers.iter_mut().for_each(|(_, s)| s.copy(from, to));
    }

    /// A snapshot's block is used by somebody, or by nobody any more.
    pub(super) fn count_idle(&mut self, state: Option<u32>, idle: bool) {
        match (state, idle) {
            (None, _) => {}
            (Some(_), true) => self.idle += 1,
            (Some(_), false) => self.idle -= 1,
        }
    }

    /// A slot holds nothing any more.
    pub(super) fn give_up(&mut self, state: Option<u32>) {
        self.spare.extend(state);
    }

    /// Gives a slot's memory back to the system, where one holds nothing.
    pub(super) fn shrink(&mut self) -> bool {
        let Some(slot) = self.spare.pop() else { return false };
        self.layers.iter_mut().for_each(|(_, s)| s.release(slot));
        self.gone.push(slot);
        self.made -= 1;
        true
    }

    /// Blocks that all slots count.
    pub(super) fn taken(&self) -> usize {
        self.made * self.blocks
    }

    /// Blocks that slots count which hold nothing, and which nobody uses.
    pub(super) fn free(&self) -> [usize; 2] {
        [self.spare.len() * self.blocks, self.idle * self.blocks]
    }

    /// Bytes of all slots.
    pub(super) fn held_bytes(&self) -> usize {
        self.made * self.bytes()
    }
}

impl<B: Backend> BlockStore<B> {
    /// Whether texts have a state.
    pub(crate) fn keeps_states(&self) -> bool {
        !self.states.layers.is_empty()
    }

    /// Bytes of a text's own state.
    pub(crate) fn state_bytes(&self) -> usize {
        self.states.bytes()
    }

    /// Blocks that a text's own state counts.
    pub fn state_blocks(&self) -> usize {
        self.states.blocks
    }

    /// Blocks that the state of a text of `tokens` counts, and its snapshots, beside what the text before it left at its
    /// ends.
    pub fn state_blocks_of(&self, tokens: usize) -> usize {
        (4 + tokens / SNAPSHOT_TOKENS).saturating_mul(self.states.blocks)
    }

    /// The next position after `read` at which a text of `tokens` tokens is to leave a snapshot; where there is none,
    /// far away.
    pub(crate) fn until_snapshot(&self, read: usize, tokens: usize) -> usize {
        if !self.keeps_states() {
            return usize::MAX;
        }
        let last = last_end(tokens);
        let next = (read / SNAPSHOT_TOKENS + 1) * SNAPSHOT_TOKENS;
        if last > read { next.min(last) } else { next }
    }

    /// Leaves a snapshot of a text that stands at `read` of `tokens` tokens, if one is due and there is room for it
    /// beside `spare` blocks.
    pub(crate) fn snapshot(&mut self, slot: usize, tokens: usize, spare: usize) {
        let t = self.text(slot);
        let (read, last) = (t.tokens, t.shared.last().copied());
        let due = read > 0 && (read.is_multiple_of(SNAPSHOT_TOKENS) || read == last_end(tokens));
        let here = due && t.own.at == read && t.shared.len() * BLOCK_TOKENS == read;
        let (Some(serial), Some(own), true) = (last, t.own.slot, here) else { return };
        let lacks = self.published.get(&serial).is_some_and(|p| p.state.is_none());
        if !lacks || self.available() < self.states.blocks.saturating_add(spare) {
            return;
        }
        let Some(to) = self.fresh_state() else { return };
        self.states.copy(own, to);
        if let Some(p) = self.published.get_mut(&serial) {
            p.state = Some(to);
        }
    }

    /// A state for a text that begins, if there is room for one.
    pub(super) fn own_state(&mut self) -> Own {
        let room = self.keeps_states() && self.available() >= self.states.blocks;
        Own { slot: if room { self.fresh_state() } else { None }, at: 0, apart: None }
    }

    /// Whether a text lacks a state, and how many blocks that takes.
    pub(super) fn lacks_state(&self, t: &Text) -> usize {
        if self.keeps_states() && t.own.slot.is_none() { self.states.blocks } else { 0 }
    }

    /// Gives a text a state, if it has none: the caller has seen that there is room.
    pub(super) fn give_state(&mut self, slot: usize) {
        if self.lacks_state(self.text(slot)) > 0 {
            let own = self.fresh_state();
            self.text_mut(slot).own.slot = own;
        }
    }

    /// How many blocks of a text's `tokens` are published up to the last snapshot among them; none where that is no
    /// more than the text has.
    pub(super) fn reach(&self, slot: usize, tokens: &[u32]) -> Option<usize> {
        let t = self.text(slot);
        t.own.slot?;
        let (mut parent, mut n, mut best) = (t.last(), t.shared.len(), None);
        while let Some(block) = tokens.get(n * BLOCK_TOKENS..(n + 1) * BLOCK_TOKENS) {
            let key: Key = (parent, block.into());
            let Some(&serial) = self.index.get(&key) else { break };
            (parent, n) = (serial, n + 1);
            best = if self.published[&serial].state.is_some() { Some(n) } else { best };
        }
        best
    }

    /// A text that has taken over blocks up to a snapshot goes on from it.
    pub(super) fn go_on(&mut self, slot: usize, serial: u64) {
        let (own, from) = (self.text(slot).own.slot, self.published.get(&serial).and_then(|p| p.state));
        let (Some(own), Some(from)) = (own, from) else { return };
        self.states.copy(from, own);
        let t = self.text_mut(slot);
        t.own.at = t.tokens;
    }

    /// The longest tail behind block `parent` whose tokens are all among the first of `tokens`, and how many those are:
    /// its state stands behind its last.
    pub(super) fn whole_tail(&self, parent: u64, tokens: &[u32]) -> Option<(usize, u64)> {
        let of = |n: usize| {
            let key: Key = (parent, tokens[..n].into());
            Some((n, *self.index.get(&key)?))
        };
        let with_state = |found: &(usize, u64)| self.published[&found.1].state.is_some();
        (1..=tokens.len().min(BLOCK_TOKENS - 1)).rev().filter_map(of).find(with_state)
    }

    /// The state of a text that is closed, where it stands behind the text's last position.
    pub(super) fn last_state(&mut self, t: &Text) -> Option<u32> {
        self.states.give_up(t.own.apart);
        let state = t.own.slot.filter(|_| t.own.at == t.tokens && t.tokens > 0);
        if state.is_none() {
            self.states.give_up(t.own.slot);
        }
        state
    }

    /// Gives a snapshot to a published block that lacks one.
    pub(super) fn leave_state(&mut self, serial: Option<u64>, state: Option<u32>) {
        match serial.and_then(|s| self.published.get_mut(&s)) {
            Some(p) if p.state.is_none() => {
                p.state = state;
                let idle = p.users == 0;
                self.states.count_idle(state.filter(|_| idle), true);
            }
            _ => self.states.give_up(state),
        }
    }

    /// A slot of one's own; none where there is no room whatever is thrown away.
    fn fresh_state(&mut self) -> Option<u32> {
        if let Some(slot) = self.states.spare.pop() {
            return Some(slot);
        }
        while self.made + self.states.taken() + self.states.blocks > self.total {
            let block = self.spare.pop().or_else(|| self.evict())?;
            self.give_back(block);
            if let Some(slot) = self.states.spare.pop() {
                return Some(slot);
            }
        }
        let slot = self.states.gone.pop().unwrap_or(self.states.made as u32);
        self.states.made += 1;
        self.states.layers.iter_mut().for_each(|(_, s)| s.reserve(slot));
        Some(slot)
    }

    /// As [`lacuna_model::KvStore::prepare_states`].
    pub(super) fn prepare_own(&mut self, layer: usize, batch: &Batch) -> Result<(), ModelError> {
        // All layers stand at the same position.
        if self.states.layers.first().is_none_or(|(first, _)| *first != layer) {
            return Ok(());
        }
        let store = |what: String| ModelError::Store { what };
        for (slot, rows) in batch.own_runs() {
            let positions = &batch.positions()[rows];
            let (Some(&first), Some(&last)) = (positions.first(), positions.last()) else { continue };
            let text = self.texts.get_mut(slot).and_then(Option::as_mut);
            let own = &mut text.ok_or_else(|| store(format!("text {slot} is not open")))?.own;
            if first != 0 && first != own.at {
                let at = own.at;
                return Err(store(format!("position {first} of text {slot}, whose state stands behind {at}")));
            }
            own.at = last + 1;
        }
        Ok(())
    }

    /// As [`lacuna_model::KvStore::state`].
    pub(super) fn slot_of(&self, slot: usize) -> Result<u32, ModelError> {
        let own = self.texts.get(slot).and_then(Option::as_ref).and_then(|t| t.own.slot);
        own.ok_or_else(|| ModelError::Store { what: format!("text {slot} has no state") })
    }

    /// As [`lacuna_model::KvStore::apart`].
    pub(super) fn apart_of(&self, slot: usize) -> Result<u32, ModelError> {
        let apart = self.texts.get(slot).and_then(Option::as_ref).and_then(|t| t.own.apart);
        apart.ok_or_else(|| ModelError::Store { what: format!("text {slot} has no state for a draft") })
    }

    /// Gives a text a slot in which its state goes on for the rows of a draft, until [`BlockStore::settle_state`];
    /// false where there is no room for it beside `spare` blocks, or nothing to go on from.
    pub(crate) fn part_state(&mut self, slot: usize, spare: usize) -> bool {
        let own = self.text(slot).own;
        if own.apart.is_none() && own.slot.is_some() && self.available() >= self.states.blocks.saturating_add(spare) {
            let apart = self.fresh_state();
            self.text_mut(slot).own.apart = apart;
        }
        self.text(slot).own.apart.is_some()
    }

    /// Ends what [`BlockStore::part_state`] began: the state that went on apart, behind the text's first `tokens`
    /// positions, becomes the text's, or is forgotten.
    pub(crate) fn settle_state(&mut self, slot: usize, tokens: Option<usize>) {
        let own = &mut self.text_mut(slot).own;
        let mut apart = own.apart.take();
        if let (Some(tokens), true) = (tokens, apart.is_some()) {
            std::mem::swap(&mut own.slot, &mut apart);
            own.at = tokens;
        }
        self.states.give_up(apart);
    }

    /// As [`lacuna_model::KvStore::states`].
    pub(super) fn states_of(&mut self, layer: usize) -> Result<&mut B::States, ModelError> {
        let found = self.states.layers.iter_mut().find(|(l, _)| *l == layer);
        let found = found.ok_or_else(|| ModelError::Store { what: format!("block {layer} keeps no state") });
        Ok(&mut found?.1)
    }
}

/// The last end of a block before the last of `tokens` tokens, which is always read again.
fn last_end(tokens: usize) -> usize {
    tokens.saturating_sub(1) / BLOCK_TOKENS * BLOCK_TOKENS
}

impl Own {
    /// What was written behind `tokens` is forgotten: a state that took it up is worth nothing.
    pub(super) fn forget(&mut self, tokens: usize) {
        if self.at > tokens {
            self.at = NOWHERE;
        }
    }
}

impl Published {
    /// One that nobody uses, or one text.
    pub(super) fn new(key: Key, block: u32, users: usize, used: u64, depth: usize, state: Option<u32>) -> Published {
        Published { key, block, users, used, depth, state }
    }
}
