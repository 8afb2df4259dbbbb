//! Texts whose rows read some blocks of keys only: who is asked, in which layers, and what was read.
//!
//! Pooled keys lie in the pages, beside the keys that they are of: they are worked out once, shared, copied and given
//! back with them; where a keeper moves slots, those of the whole key blocks that come of it are worked out anew, and a
//! selector's blocks are blocks of slots. Layers whose queries see a window that is smaller than the context read that, and nobody is asked.

use std::sync::Arc;

use lacuna_contract::{KeepPlan, MethodError, Select, SelectPlan, SelectScope};
use lacuna_model::{Backend, Pages, Reads};
use lacuna_spec::Spec;

use super::keep::window;
use super::{BLOCK_TOKENS, BlockStore};

/// A selector, and whether it is asked in each layer with attention.
pub(super) struct Selecting {
    by: Arc<dyn Select>,
    asked: Vec<bool>,
    reads: Reads,
}

/// Says why a plan's selector cannot run; `kept`: the plan of the keeper beside it.
pub(crate) fn check(plan: SelectPlan, kept: Option<KeepPlan>) -> Result<(), MethodError> {
    let error = |what: String| Err(MethodError::new(format!("select: {what}")));
    if kept.is_some_and(|k| k.mass) {
        let what =
            "beside a keeper that goes by the attention to every key: some are not read; leave one of the two out";
        return error(what.into());
    }
    if plan.block == 0 || !plan.block.is_multiple_of(BLOCK_TOKENS) {
        let block = plan.block;
        return error(format!("blocks of {block} positions; give a multiple of the cache's {BLOCK_TOKENS}"));
    }
    match plan.scope {
        SelectScope::Row | SelectScope::Tile(1) => Ok(()),
        SelectScope::Tile(n) => error(format!(
            "tiles of {n} positions share an answer: the first of them would wait for tokens that are not written yet; \
             let every position ask for itself (a tile of 1)"
        )),
        SelectScope::Prompt => error(
            "one answer for the whole prompt: prompts are read in chunks, and share their beginnings with others; \
             choose a method that asks for each position"
                .into(),
        ),
    }
}

impl<B: Backend> BlockStore<B> {
    /// An empty store, of as many blocks as `bytes` hold, whose rows read what `by` says; `context`: tokens that a text
    /// may have. A block is larger by its pooled keys.
    #[must_use]
    pub fn selecting(mut self, by: Arc<dyn Select>, spec: &Spec, context: usize, bytes: usize) -> BlockStore<B> {
        let layers =
            spec.layers.iter().enumerate().filter(|(_, l)| l.attn.as_ref().is_some_and(|a| a.kv_from.is_none()));
        let asked: Vec<bool> = layers.map(|(layer, _)| window(spec, layer, context).is_none()).collect();
        for (pool, _) in self.pools.iter_mut().zip(&asked).filter(|(_, asked)| **asked) {
            pool.pool_keys(by.plan().pool);
        }
        self.unit = self.unit.max(self.block_bytes());
        self.total = (bytes / self.unit).min(u32::MAX as usize);
        self.selecting = Some(Selecting { by, asked, reads: Reads::default() });
        self
    }

    /// What rows read where the selector was asked, since the start.
    pub fn reads(&self) -> Reads {
        self.selecting.as_ref().map_or(Reads::default(), |s| s.reads)
    }

    /// As [`lacuna_model::KvStore::selector`].
    pub(super) fn selector_of(&self, place: usize) -> Option<Arc<dyn Select>> {
        self.selecting.as_ref().filter(|s| s.asked[place]).map(|s| Arc::clone(&s.by))
    }

    /// As [`lacuna_model::KvStore::count_reads`].
    pub(super) fn add_reads(&mut self, reads: Reads) {
        self.selecting.iter_mut().for_each(|s| s.reads.add(reads));
    }
}
