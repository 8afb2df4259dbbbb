//! Prompts that are read whole, layer by layer, for a selector that must see their ends.
//!
//! One prompt at a time, so that the memory of one is all that it takes, and some layers a step, about as much work as
//! other prompts' rows are: texts that are being continued go on beside it. Rows behind the prompt are read like all
//! others; a text that was driven out begins with its prompt again.

use lacuna_contract::Selector;
use lacuna_model::{ModelError, NoTap, PromptPass};

use super::{Scheduler, Scratch, Step};
use crate::RunError;
use crate::request::Event;

impl Scheduler {
    /// Whether a text's prompt is to be read whole, and is not yet.
    pub(super) fn is_read_whole(&self, index: usize) -> bool {
        let a = &self.running[index];
        matches!(self.engine.plan().select(), Some(Selector::Prompt(_))) && a.read == 0 && a.prompt_tokens > 1
    }

    /// Takes the first such prompt some layers further, if there is one.
    pub(super) fn read_whole(&mut self, scratch: &mut Scratch, step: &mut Step, on: &mut dyn FnMut(u64, Event)) {
        let waiting = |i: &usize| self.is_read_whole(*i);
        let begun = self.running.iter().position(|a| a.pass.is_some());
        let Some(index) = begun.or_else(|| (0..self.running.len()).find(waiting)) else { return };
        let layers = self.engine.model().blocks.len();
        let (n, slot) = (self.running[index].prompt_tokens, self.running[index].slot());
        // Rows that so many layers of all of them are worth.
        let rows = |done: usize| (n * done).checked_div(layers).unwrap_or(n);
        let before = self.running[index].pass.as_ref().map_or(0, |p| rows(p.layers()));
        let pass = match self.further(index) {
            Ok(pass) => pass,
            Err(e) => {
                self.store.truncate(slot, 0);
                on(self.running[index].id, Event::Failed(RunError::Request(e.to_string())));
                self.end(&mut vec![index]);
                return;
            }
        };
        step.prefill_rows += rows(pass.layers()) - before;
        if pass.layers() < layers {
            self.running[index].pass = Some(pass);
            return;
        }
        let (mut from, mut over, mut last) = (0, false, None);
        for x in pass.parts() {
            let part = self.part(index, from, from + x.rows());
            from = part.to;
            over = self.came(&part, x.view(), on);
            last = Some((part, x));
        }
        let Some((part, x)) = last else { return };
        scratch.over.clear();
        scratch.wanted.clear();
        scratch.over.extend(over.then_some(index));
        if part.wants > 0 {
            scratch.wanted.push((index, x.rows() - 1..x.rows()));
        }
        step.logits_rows += scratch.wanted.len();
        step.chosen += self.answer(scratch, x.view(), on);
        self.settle(&[part]);
        self.end(&mut scratch.over);
    }

    /// The prompt of a text some layers further.
    fn further(&mut self, index: usize) -> Result<PromptPass, ModelError> {
        let (model, a) = (self.engine.model(), &mut self.running[index]);
        let n = a.prompt_tokens;
        let mut pass = match a.pass.take() {
            Some(pass) => pass,
            None => model.begin_prompt(&a.tokens[..n], a.slot(), a.tokens.len(), self.limits.prefill_rows)?,
        };
        let layers = self.limits.prefill_rows.saturating_mul(model.blocks.len()).div_ceil(n).max(1);
        model.go_on(&mut pass, layers, &mut self.store, &mut NoTap)?;
        Ok(pass)
    }
}
