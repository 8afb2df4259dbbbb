//! Texts of which only some entries stay: what a keeper is asked, and what becomes of pages.
//!
//! A keeper decides at positions that follow from its plan alone, so that a text's answer does not depend on how it was
//! cut into steps. Every head of every layer keeps the same number of slots, the budget, so that a text has one block
//! table and one number of evicted positions; which positions stay differs by head. Layers whose queries see a window
//! keep the newest slots: a window that is not larger than the budget stays exact.
//!
//! Blocks before the first decision are exact and may be shared; behind it a text is its own. Where the keeper goes by
//! attention, nothing is shared: a block that was taken over would come without the attention of its rows.

use lacuna_contract::{Keep, KeepHead, KeepPlan, MethodError};
use lacuna_kernels::Mass;
use lacuna_model::{Backend, Pages};
use lacuna_spec::{LayerSpec, Spec};

use super::{BLOCK_TOKENS, BlockStore};

/// A keeper's plan, and the layers that it is asked about.
pub(super) struct Keeping {
    pub(super) plan: KeepPlan,
    /// Of each layer with attention: its number, its key heads, and whether the keeper says what stays.
    layers: Vec<(usize, usize, bool)>,
    /// Entries of all heads that have been evicted.
    evicted: u64,
}

/// What keepers left of a text.
#[derive(Default)]
pub(super) struct Left {
    /// Positions evicted so far, of each head.
    pub(super) shift: usize,
    /// Positions that the last decision left, of each head that the keeper was asked about, layer by layer.
    positions: Vec<Vec<usize>>,
    /// The attention to slots, of each layer with attention; empty where the keeper reads none.
    pub(super) mass: Vec<Mass>,
}

impl Left {
    /// The same of a fork, whose slots begin behind as many evicted positions.
    pub(super) fn after(self, shift: usize) -> Left {
        Left { shift, ..self }
    }
}

/// The first position after `read` at which a keeper decides.
pub(crate) fn next_cut(plan: KeepPlan, read: usize) -> usize {
    (read.max(plan.budget) / plan.every.max(1) + 1).saturating_mul(plan.every.max(1))
}

/// Slots that the row at position `at` meets in each head, its own among them.
pub(crate) fn slots_at(plan: KeepPlan, at: usize) -> usize {
    let cut = at / plan.every.max(1) * plan.every;
    if cut > plan.budget { at - cut + plan.budget + 1 } else { at + 1 }
}

/// Slots that a text of `tokens` positions holds at once, at most.
pub(crate) fn slots(plan: Option<KeepPlan>, tokens: usize) -> usize {
    plan.map_or(tokens, |p| tokens.min(p.budget.saturating_add(p.every)))
}

/// The window, or chunk, of a layer that is smaller than what a text may have.
pub(super) fn window(spec: &Spec, layer: usize, context: usize) -> Option<usize> {
    let attn = spec.layers.get(layer)?.attn.as_ref()?;
    [attn.window, attn.chunk].into_iter().flatten().min().filter(|w| *w < context)
}

/// Says why a model cannot run under a keeper's plan.
pub(crate) fn check(plan: KeepPlan, spec: &Spec, context: usize) -> Result<(), MethodError> {
    if plan.budget == 0 || plan.every == 0 {
        let (budget, every) = (plan.budget, plan.every);
        return Err(MethodError::new(format!("keep: a budget of {budget} slots every {every}: 1 or more of each")));
    }
    // Entries move together, and slots are no longer the positions that ALiBi counts.
    if let Some(layer) = spec.layers.iter().position(|l| l.attn.as_ref().is_some_and(|a| a.alibi.is_some())) {
        return Err(MethodError::new(format!(
            "keep: layer {layer} adds the distance of keys to its scores (ALiBi), and of what stays the distances are \
             lost; run without a keeper"
        )));
    }
    let chunked = |l: &LayerSpec| l.attn.as_ref().is_some_and(|a| a.chunk.is_some_and(|c| c < context));
    if let Some(layer) = spec.layers.iter().position(chunked) {
        return Err(MethodError::new(format!(
            "keep: layer {layer} sees chunks of positions, and of what stays the positions are lost; run without a \
             keeper"
        )));
    }
    if let Some(from) = spec.shared_keys().first() {
        return Err(MethodError::new(format!(
            "keep: later layers read the keys of layer {from}, and a keeper hears of one layer's attention; run without \
             a keeper"
        )));
    }
    let windows = (0..spec.layers.len()).filter_map(|layer| Some((layer, window(spec, layer, context)?)));
    match windows.filter(|_| context > plan.budget).find(|(_, window)| *window > plan.budget) {
        None => Ok(()),
        Some((layer, window)) => Err(MethodError::new(format!(
            "keep: layer {layer} sees a window of {window} positions, more than the budget of {} slots; give a budget \
             of at least {window}",
            plan.budget
        ))),
    }
}

impl<B: Backend> BlockStore<B> {
    /// An empty store whose texts keep what a keeper of this plan says; `context`: tokens that a text may have. The
    /// keeper's plan must fit the model.
    #[must_use]
    pub(crate) fn keeping(mut self, plan: KeepPlan, spec: &Spec, context: usize) -> BlockStore<B> {
        let layers = spec.layers.iter().enumerate().filter_map(|(layer, l)| {
            let attn = l.attn.as_ref().filter(|a| a.kv_from.is_none())?;
            Some((layer, attn.kv_heads, window(spec, layer, context).is_none()))
        });
        self.keeping = Some(Keeping { plan, layers: layers.collect(), evicted: 0 });
        self
    }

    /// Slots that a text of `tokens` positions holds at once, at most.
    pub(crate) fn slots(&self, tokens: usize) -> usize {
        slots(self.keeping.as_ref().map(|k| k.plan), tokens)
    }

    /// Entries of heads, a position each, that have been evicted so far.
    pub fn evicted(&self) -> u64 {
        self.keeping.as_ref().map_or(0, |k| k.evicted)
    }

    /// What a text has before its first position.
    pub(super) fn nothing_left(&self) -> Left {
        let counted = self.keeping.iter().filter(|k| k.plan.mass).flat_map(|k| &k.layers);
        let mass = counted.map(|&(_, heads, asked)| Mass::new(if asked { heads } else { 0 })).collect();
        Left { mass, ..Left::default() }
    }

    /// Whether others may take over what the text writes now.
    pub(super) fn shares(&self, slot: usize) -> bool {
        let counted = self.keeping.as_ref().is_some_and(|k| k.plan.mass);
        self.text(slot).left.shift == 0 && !counted && !self.sees_prompts()
    }

    /// Whether the keeper is to decide before the text goes on.
    #[track_caller]
    pub(crate) fn is_due(&self, slot: usize) -> bool {
        let t = self.text(slot);
        self.keeping
            .as_ref()
            .is_some_and(|k| t.tokens.is_multiple_of(k.plan.every) && t.tokens - t.left.shift > k.plan.budget)
    }

    /// Whether there is room for a decision: slots move within the text's own pages, but out of those that it shares.
    #[track_caller]
    pub(crate) fn can_cut(&self, slot: usize) -> bool {
        let Some(k) = &self.keeping else { return true };
        let shared = &self.text(slot).shared;
        let moved = &shared[..k.plan.budget.div_ceil(BLOCK_TOKENS).min(shared.len())];
        // What nobody else uses makes room as soon as it is copied.
        let stay = moved.iter().filter(|serial| self.published[serial].users > 1).count();
        moved.is_empty() || self.available() > stay
    }

    /// Lets the keeper decide which slots of a text stay, and evicts the others. There must be room for it.
    #[track_caller]
    pub(crate) fn cut(&mut self, slot: usize, keep: &dyn Keep) -> Result<(), MethodError> {
        let Some(Keeping { plan, layers, .. }) = &self.keeping else { return Ok(()) };
        let (budget, t) = (plan.budget, self.text(slot));
        let n = t.tokens - t.left.shift;
        let heads = || {
            let asked = layers.iter().enumerate().filter(|(_, l)| l.2);
            asked.flat_map(|(place, &(layer, heads, _))| (0..heads).map(move |head| (place, layer, head)))
        };
        // The positions left by the last decision, and all since.
        let positions: Vec<Vec<usize>> = (heads().enumerate())
            .map(|(i, _)| {
                let mut of = t.left.positions.get(i).cloned().unwrap_or_default();
                of.extend(t.tokens - (n - of.len())..t.tokens);
                of
            })
            .collect();
        let mass = |place: usize, head: usize| {
            t.left.mass.get(place).and_then(|m| m.heads[head].sum.get(..n)).unwrap_or_default()
        };
        let asks: Vec<KeepHead<'_>> = (heads().zip(&positions))
            .map(|((place, layer, head), positions)| KeepHead { layer, head, positions, mass: mass(place, head) })
            .collect();
        let kept = keep.keep(&asks, budget)?;
        if kept.len() != asks.len() {
            return Err(MethodError::new(format!("keep: an answer for {} heads of {}", kept.len(), asks.len())));
        }
        for (ask, kept) in asks.iter().zip(&kept) {
            let rising = kept.windows(2).all(|w| w[0] < w[1]) && kept.last().is_none_or(|last| *last < n);
            if kept.len() != budget || !rising {
                return Err(MethodError::new(format!(
                    "keep: {} slots of layer {}, head {} are to stay; it must be {budget} of {n}, rising",
                    kept.len(),
                    ask.layer,
                    ask.head
                )));
            }
        }
        let newest: Vec<usize> = (n - budget..n).collect();
        let mut rest = kept.as_slice();
        let mut by_place: Vec<Vec<&[usize]>> = Vec::with_capacity(layers.len());
        for &(_, heads, asked) in layers {
            by_place.push(if asked {
                let mine;
                (mine, rest) = rest.split_at(heads);
                mine.iter().map(Vec::as_slice).collect()
            } else {
                vec![&newest[..]; heads]
            });
        }
        self.compact(slot, budget, &by_place);
        let t = self.text_mut(slot);
        for (mass, kept) in t.left.mass.iter_mut().zip(&by_place) {
            for (head, kept) in mass.heads.iter_mut().zip(kept) {
                head.sum = kept.iter().map(|&slot| head.sum[slot]).collect();
            }
        }
        let stay = |(kept, positions): (&Vec<usize>, Vec<usize>)| kept.iter().map(|&slot| positions[slot]).collect();
        t.left.positions = kept.iter().zip(positions).map(stay).collect();
        t.left.shift += n - budget;
        if let Some(k) = &mut self.keeping {
            k.evicted += (n - budget) as u64 * k.layers.iter().map(|l| l.1 as u64).sum::<u64>();
        }
        Ok(())
    }

    /// Moves the slots that stay, by layer with attention and head, to a text's first `budget` slots; gives the other
    /// blocks back.
    fn compact(&mut self, slot: usize, budget: usize, kept: &[Vec<&[usize]>]) {
        let clock = self.tick();
        let shared = std::mem::take(&mut self.text_mut(slot).shared);
        let blocks = budget.div_ceil(BLOCK_TOKENS);
        for i in 0..blocks {
            // Slots never move to a later place: what has been copied from is free to be written to.
            let to = if i < shared.len() { self.fresh() } else { self.text(slot).blocks[i] };
            let slots = i * BLOCK_TOKENS..((i + 1) * BLOCK_TOKENS).min(budget);
            let table = &self.texts[slot].as_ref().expect("an open text").blocks;
            for (pool, kept) in self.pools.iter_mut().zip(kept) {
                let kept: Vec<&[usize]> = kept.iter().map(|kept| &kept[slots.clone()]).collect();
                pool.gather(table, to, &kept);
            }
            self.text_mut(slot).blocks[i] = to;
            shared.get(i).into_iter().for_each(|&serial| self.leave(serial, clock));
        }
        let t = self.text_mut(slot);
        let rest = t.blocks.split_off(blocks);
        t.tail.clear();
        let theirs = shared.len().saturating_sub(blocks);
        self.spare.extend(&rest[theirs..]);
        shared.iter().skip(blocks).for_each(|&serial| self.leave(serial, clock));
    }

    /// Rows of a text from position `certain` on may be taken back, those of a fork all: the attention that they give
    /// counts when [`BlockStore::count_mass`] says so.
    #[track_caller]
    pub(crate) fn certain(&mut self, slot: usize, certain: usize) {
        let left = &mut self.text_mut(slot).left;
        let certain = certain.saturating_sub(left.shift);
        for mass in &mut left.mass {
            mass.certain = certain;
            mass.heads.iter_mut().for_each(|h| h.apart.clear());
        }
    }

    /// Adds the attention of a row that stays: the `nth` of those kept apart in `from`, the text or a fork of it.
    #[track_caller]
    pub(crate) fn count_mass(&mut self, slot: usize, from: usize, nth: usize) {
        let mut mass = std::mem::take(&mut self.text_mut(slot).left.mass);
        for (place, mass) in mass.iter_mut().enumerate() {
            for (head, of) in mass.heads.iter_mut().enumerate() {
                let given = if from == slot {
                    of.apart.get_mut(nth).map(std::mem::take)
                } else {
                    self.text(from).left.mass[place].heads[head].apart.get(nth).cloned()
                };
                given.into_iter().for_each(|given| of.add(&given));
            }
        }
        self.text_mut(slot).left.mass = mass;
    }

    /// As [`lacuna_model::KvStore::lend_mass`].
    pub(super) fn lend(&mut self, place: usize) -> Vec<Mass> {
        let asked = self.keeping.as_ref().is_some_and(|k| k.plan.mass && k.layers[place].2);
        let mut all = Vec::new();
        for text in self.prepared.iter().filter(|_| asked) {
            let mass = self.texts.get_mut(*text).and_then(Option::as_mut).and_then(|t| t.left.mass.get_mut(place));
            all.extend(mass.map(std::mem::take));
        }
        all
    }

    /// As [`lacuna_model::KvStore::take_mass`].
    pub(super) fn take_back(&mut self, place: usize, mass: Vec<Mass>) {
        for (text, mass) in self.prepared.iter().zip(mass) {
            let mine = self.texts.get_mut(*text).and_then(Option::as_mut).and_then(|t| t.left.mass.get_mut(place));
            if let Some(mine) = mine {
                *mine = mass;
            }
        }
    }
}
