//! A whole prompt at once, layer by layer: for a selector that must see its end before its first row reads anything.
//!
//! In each layer the queries, keys and values of all rows come first, then the selector's answers, then everything else.
//! Rows go through a layer in parts, so that memory beyond the residual stream and the queries does not grow with the
//! prompt: a row's bits depend on no other row of its call.

use lacuna_contract::SelectPrompt;

use super::{Asked, normed};
use crate::backend::{Backend, Cpu, PromptRead};
use crate::carried::Side;
use crate::kv::prepared;
use crate::profile::span;
use crate::tap::Look;
use crate::{Batch, Block, Decoder, KvStore, ModelError, Tap};

/// A prompt on its way through the layers.
pub struct PromptPass<B: Backend = Cpu> {
    /// Rows that go through a layer together, with their residual stream.
    parts: Vec<(Batch, B::Rows)>,
    /// Layers that are done.
    layers: usize,
}

impl<B: Backend> PromptPass<B> {
    /// Layers that are done.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// The residual stream behind these layers, `[rows, hidden]` each, of parts that follow each other.
    pub fn parts(&self) -> impl Iterator<Item = &B::Rows> {
        self.parts.iter().map(|(_, x)| x)
    }
}

impl<B: Backend> Decoder<B> {
    /// Begins a prompt, the first tokens of `sequence`, which has `length` of them (see [`Batch::push_part`]); at most
    /// `rows` rows go through a layer together.
    pub fn begin_prompt(
        &self,
        tokens: &[u32],
        sequence: usize,
        length: usize,
        rows: usize,
    ) -> Result<PromptPass<B>, ModelError> {
        let mut parts = Vec::with_capacity(tokens.len().div_ceil(rows.max(1)));
        let mut from = 0;
        for some in tokens.chunks(rows.max(1)) {
            let mut batch = Batch::new();
            batch.push_part(sequence, from..from + some.len(), length);
            from += some.len();
            let x = self.embed.rows(some, batch.positions())?;
            parts.push((batch, x));
        }
        Ok(PromptPass { parts, layers: 0 })
    }

    /// Takes a prompt through at most `layers` more layers. It is through when [`PromptPass::layers`] are all of them.
    pub fn go_on(
        &self,
        pass: &mut PromptPass<B>,
        layers: usize,
        kv: &mut dyn KvStore<B>,
        tap: &mut dyn Tap<B>,
    ) -> Result<(), ModelError> {
        for block in self.blocks.iter().skip(pass.layers).take(layers) {
            block.prompt(&mut pass.parts, kv, tap)?;
            pass.layers += 1;
        }
        Ok(())
    }
}

impl<B: Backend> Block<B> {
    /// Runs the block on the parts of a prompt.
    fn prompt(
        &self,
        parts: &mut [(Batch, B::Rows)],
        kv: &mut dyn KvStore<B>,
        tap: &mut dyn Tap<B>,
    ) -> Result<(), ModelError> {
        let layer = self.layer();
        let select = kv.prompt_selector(layer).filter(|_| self.attention.is_some());
        let Some(by) = select else {
            return parts.iter_mut().try_for_each(|(batch, x)| self.run(x, batch, kv, tap));
        };
        let (mut asked, mut last) = (Vec::with_capacity(parts.len()), None);
        for (batch, x) in parts.iter() {
            let step = last.insert(self.backend.begin(batch, prepared([layer], None, batch, kv)?));
            asked.extend(self.ask(x, step, kv, tap)?);
        }
        let read = match &last {
            Some(step) => self.foresee(&asked, step, kv, by.as_ref())?,
            None => None,
        };
        let Some(read) = read else { return Ok(()) };
        drop(last);
        for ((batch, x), asked) in parts.iter_mut().zip(asked) {
            let tables = prepared([layer], self.has_mixer().then_some(layer), batch, kv)?;
            let step = self.backend.begin(batch, tables);
            self.step_asked(x, (&mut Side::of_step(None), &step), kv, tap, Some((asked, &read)))?;
        }
        Ok(())
    }

    /// What the rows of a prompt ask of its keys, which are written with their values; none without attention.
    fn ask(
        &self,
        x: &B::Rows,
        step: &B::Step,
        kv: &mut dyn KvStore<B>,
        tap: &mut dyn Tap<B>,
    ) -> Result<Option<Asked<B>>, ModelError> {
        let Some(a) = &self.attention else { return Ok(None) };
        let first = self.mixer.as_ref().map(|m| m.normed(&self.backend, x));
        let first = first.or_else(|| self.shared.as_ref().map(|n| normed(&self.backend, n, x)));
        let side = &mut Side::of_step(None);
        a.ask(self.layer, (x, first.as_ref()), (side, step), kv, &mut Look::new(&self.backend, tap)).map(Some)
    }

    /// What the tiles of a prompt read, by the queries of all its parts; `step`: that of the last.
    fn foresee(
        &self,
        asked: &[Asked<B>],
        step: &B::Step,
        kv: &mut dyn KvStore<B>,
        by: &dyn SelectPrompt,
    ) -> Result<Option<PromptRead>, ModelError> {
        let Some(a) = &self.attention else { return Ok(None) };
        let q: Vec<&B::Rows> = asked.iter().map(|a| &a.q).collect();
        let pages = kv.pages(self.layer)?;
        span("keys selected", || self.backend.foresee(&a.scores, pages, self.layer, step, &q, by)).map(Some)
    }
}
