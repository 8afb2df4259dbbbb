//! Texts whose rows read some blocks of keys only: who is asked, in which layers, and what was read.
//!
//! Pooled keys lie in the pages, beside the keys that they are of: they are worked out once, shared, copied and given
//! back with them; where a keeper moves slots, those of the whole key blocks that come of it are worked out anew, and a
//! selector's blocks are blocks of slots. What was decided where a tile of positions begins goes by the page in which its
//! first key lies, too. Layers whose queries see a window that is smaller than the context read that, and nobody is
//! asked. A selector that must see the whole prompt makes it the text's own: nothing of it is shared.

use std::sync::Arc;

use lacuna_contract::{KeepPlan, MethodError, Select, SelectPrompt, SelectScope, Selector};
use lacuna_model::{Backend, Decisions, Pages, Reads};
use lacuna_spec::{AttnSpec, Spec};

use super::keep::window;
use super::{BLOCK_TOKENS, BlockStore};

/// A selector, and whether it is asked in each layer with attention.
pub(super) struct Selecting {
    by: Selector,
    asked: Vec<bool>,
    /// What was decided where tiles begin, of each layer with attention.
    decisions: Vec<Decisions>,
    /// Bytes that this takes of each block, at most.
    decision_bytes: usize,
    reads: Reads,
}

/// Says why a plan's selector cannot run on a network; `kept`: the plan of the keeper beside it.
pub(crate) fn check(by: &Selector, spec: &Spec, kept: Option<KeepPlan>) -> Result<(), MethodError> {
    let error = |what: String| Err(MethodError::new(format!("select: {what}")));
    let by_row = matches!(by, Selector::Rows(by) if by.plan().scope == SelectScope::Row);
    let shares = spec.layers.iter().position(|l| l.attn.as_ref().is_some_and(|a| a.kv_from.is_some()));
    if let Some(l) = shares.filter(|_| !by_row) {
        return error(format!(
            "layer {l} reads another layer's keys, and what is decided for a tile or a prompt would go by both; give one \
             that decides row by row"
        ));
    }
    if matches!(by, Selector::Prompt(_)) && (spec.layer_inputs.is_some() || spec.altup.is_some()) {
        return error("it must see the whole prompt, and layers have inputs beside the residual stream".into());
    }
    if kept.is_some_and(|k| k.mass) {
        let what =
            "beside a keeper that goes by the attention to every key: some are not read; leave one of the two out";
        return error(what.into());
    }
    let block = match by {
        Selector::Rows(by) => by.plan().block,
        Selector::Prompt(by) => by.tile(),
    };
    if block == 0 || !block.is_multiple_of(BLOCK_TOKENS) {
        return error(format!("blocks of {block} positions; give a multiple of the cache's {BLOCK_TOKENS}"));
    }
    match (by, kept) {
        (Selector::Prompt(_), Some(_)) => error(
            "it must see the whole prompt, and the keeper beside it evicts while the prompt is read; leave one of the two \
             out"
                .into(),
        ),
        (Selector::Prompt(_), None) => Ok(()),
        (Selector::Rows(by), kept) => match (by.plan().scope, kept) {
            (SelectScope::Tile(0), _) => error("tiles of 0 positions; give 1 or more".into()),
            (SelectScope::Tile(n), Some(k)) if !k.every.is_multiple_of(n) => error(format!(
                "tiles of {n} positions beside a keeper that moves keys every {} positions, within a tile; give tiles \
                 whose length divides {}",
                k.every, k.every
            )),
            _ => Ok(()),
        },
    }
}

impl<B: Backend> BlockStore<B> {
    /// An empty store, of as many blocks as `bytes` hold, whose rows read what `by` says; `context`: tokens that a text
    /// may have. A block is larger by its pooled keys, and by what is decided in it.
    #[must_use]
    pub fn selecting(mut self, by: Selector, spec: &Spec, context: usize, bytes: usize) -> BlockStore<B> {
        // Layers that read another one's keys and values have no pages.
        let own = |(_, a): &(usize, &AttnSpec)| a.kv_from.is_none();
        let layers =
            spec.layers.iter().enumerate().filter_map(|(layer, l)| Some((layer, l.attn.as_ref()?))).filter(own);
        let asked: Vec<(bool, usize)> =
            layers.map(|(layer, a)| (window(spec, layer, context).is_none(), a.kv_heads)).collect();
        let mut decision_bytes = 0;
        if let Selector::Rows(by) = &by {
            for (pool, (_, heads)) in self.pools.iter_mut().zip(&asked).filter(|(_, asked)| asked.0) {
                pool.pool_keys(by.plan().pool);
                decision_bytes += Decisions::page_bytes(by.plan(), BLOCK_TOKENS, *heads, context);
            }
        }
        let decisions = asked.iter().map(|_| Decisions::default()).collect();
        let asked = asked.into_iter().map(|(asked, _)| asked).collect();
        self.selecting = Some(Selecting { by, asked, decisions, decision_bytes, reads: Reads::default() });
        self.unit = self.unit.max(self.block_bytes());
        self.total = (bytes / self.unit).min(u32::MAX as usize);
        self
    }

    /// What rows read where the selector was asked, since the start.
    pub fn reads(&self) -> Reads {
        self.selecting.as_ref().map_or(Reads::default(), |s| s.reads)
    }

    /// Bytes that decisions take of a block, at most.
    pub(super) fn decision_bytes(&self) -> usize {
        self.selecting.as_ref().map_or(0, |s| s.decision_bytes)
    }

    /// Whether prompts are seen whole before they read anything, so that their blocks are nobody else's.
    pub(super) fn sees_prompts(&self) -> bool {
        self.selecting.as_ref().is_some_and(|s| matches!(s.by, Selector::Prompt(_)))
    }

    /// Copies a block's pages, with what was decided in them.
    pub(super) fn copy_block(&mut self, from: u32, to: u32) {
        self.pools.iter_mut().for_each(|p| p.copy(from, to));
        self.selecting.iter_mut().flat_map(|s| &mut s.decisions).for_each(|d| d.copy(from, to));
    }

    /// A block of one's own, in which nothing is decided yet. The caller has seen that one is available.
    pub(super) fn fresh(&mut self) -> u32 {
        let block = self.any_block();
        self.forget_decisions(block);
        block
    }

    /// What was decided in a block holds no more.
    pub(super) fn forget_decisions(&mut self, block: u32) {
        self.selecting.iter_mut().flat_map(|s| &mut s.decisions).for_each(|d| d.forget(block));
    }

    fn asked_at(&self, place: usize) -> Option<&Selector> {
        self.selecting.as_ref().filter(|s| s.asked[place]).map(|s| &s.by)
    }

    /// As [`lacuna_model::KvStore::selector`].
    pub(super) fn selector_of(&self, place: usize) -> Option<Arc<dyn Select>> {
        if let Selector::Rows(by) = self.asked_at(place)? { Some(Arc::clone(by)) } else { None }
    }

    /// As [`lacuna_model::KvStore::prompt_selector`].
    pub(super) fn prompt_selector_of(&self, place: usize) -> Option<Arc<dyn SelectPrompt>> {
        if let Selector::Prompt(by) = self.asked_at(place)? { Some(Arc::clone(by)) } else { None }
    }

    /// The decisions of a layer with attention.
    pub(super) fn decisions_of(&mut self, place: usize) -> Option<&mut Decisions> {
        self.selecting.as_mut()?.decisions.get_mut(place)
    }

    /// As [`lacuna_model::KvStore::count_reads`].
    pub(super) fn add_reads(&mut self, reads: Reads) {
        self.selecting.iter_mut().for_each(|s| s.reads.add(reads));
    }
}
