//! When a keeper decides, and how far texts go until then.

use std::sync::Arc;

use lacuna_contract::KeepPlan;

use super::Scheduler;
use super::plan::take_over;
use crate::blocks::BLOCK_TOKENS;
use crate::blocks::keep::next_cut;
use crate::request::Event;
use crate::{BlockStore, Engine, Limits, RunError};

impl Scheduler {
    /// An empty store for an engine under its plan.
    pub(super) fn store(engine: &Engine, limits: &Limits) -> BlockStore {
        let spec = &engine.model().spec;
        let store = BlockStore::new(spec, engine.kv_format(), limits.kv_bytes);
        let store = match engine.plan().select() {
            Some(by) => store.selecting(by.clone(), spec, engine.context(), limits.kv_bytes),
            None => store,
        };
        match engine.keep_plan() {
            Some(plan) => store.keeping(plan, spec, engine.context()),
            None => store,
        }
    }

    /// Most tokens that a text may have: the context, or what the blocks hold. Where a keeper holds the number of slots
    /// down, blocks for those and another one to move them are enough for the whole context.
    pub fn most_tokens(&self) -> usize {
        let context = self.engine.context();
        let blocks = self.store.total().saturating_sub(self.store.state_blocks());
        let held = context.min(blocks.saturating_mul(BLOCK_TOKENS));
        match self.engine.keep_plan() {
            None => held,
            Some(_) if blocks > self.store.slots(context).div_ceil(BLOCK_TOKENS) => context,
            // Up to the first decision nothing needs to move.
            Some(plan) => held.min(next_cut(plan, 0)),
        }
    }

    /// How far a text of `tokens` may be read before its keeper decides again, or its state is to be kept.
    pub(super) fn until_cut(&self, read: usize, tokens: usize) -> usize {
        let keeper = self.engine.keep_plan().map_or(usize::MAX, |plan| next_cut(plan, read));
        keeper.min(if self.limits.reuse { self.store.until_snapshot(read, tokens) } else { usize::MAX })
    }

    /// Lets the keeper decide about the texts that have come to where it does. Where room is short, the text admitted
    /// last gives way.
    pub(super) fn decide(&mut self, on: &mut dyn FnMut(u64, Event)) {
        let engine = Arc::clone(&self.engine);
        let Some(keep) = engine.plan().keep() else { return };
        let mut index = 0;
        while index < self.running.len() {
            if !self.running[index].goes_on() {
                // What others have published since the last step may lead there.
                let read = take_over(&mut self.store, &self.running[index], self.limits.reuse);
                self.running[index].read = read;
            }
            let a = &self.running[index];
            let (slot, room, reading) = (a.slot(), (a.tokens.len() + 1).min(a.extent), !a.goes_on());
            if !self.store.is_due(slot) {
                index += 1;
                continue;
            }
            while !self.store.can_cut(slot) {
                self.preempt();
                if index == self.running.len() {
                    return;
                }
            }
            if let Err(e) = self.store.cut(slot, keep) {
                let gone = self.running.remove(index);
                self.close(&gone);
                on(gone.id, Event::Failed(RunError::Request(format!("the run plan's keeper: {e}"))));
                continue;
            }
            // A prompt is read on without asking for room.
            while reading && !self.store.reserve(slot, room) {
                self.preempt();
                if index == self.running.len() {
                    return;
                }
            }
            index += 1;
        }
    }
}

impl Engine {
    /// When a keeper decides, where the plan has one.
    pub(crate) fn keep_plan(&self) -> Option<KeepPlan> {
        self.plan().keep().map(|keep| keep.plan())
    }
}
