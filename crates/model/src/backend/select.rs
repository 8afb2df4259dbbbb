//! What a selector is asked about a row, what rows read by its answer, and what tiles of a prompt read.

use std::collections::HashMap;
use std::sync::Arc;

use lacuna_base::{Mat, MatRef};
use lacuna_contract::{MethodError, Pool, Pooled, Select, SelectAsk, SelectPlan, SelectScope};
use lacuna_kernels::KEY_BLOCK;

use super::Table;
use crate::ModelError;

/// Bytes that were read where something says what is needed: of keys and values by each row for itself where a selector
/// was asked, of weights by the rows of a step together where a gate was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reads {
    /// What was read.
    pub read: u64,
    /// What would have been without it.
    pub all: u64,
}

impl Reads {
    /// Adds others.
    pub fn add(&mut self, other: Reads) {
        self.read += other.read;
        self.all += other.all;
    }

    /// Adds a row at `slot` that reads these key blocks of a head, whose every position takes `bytes`.
    pub(super) fn row(&mut self, slot: usize, blocks: Option<&[usize]>, bytes: u64) {
        let own = slot / KEY_BLOCK;
        let before = blocks.map_or(own, <[usize]>::len);
        self.read += (before * KEY_BLOCK + slot % KEY_BLOCK + 1) as u64 * bytes;
        self.all += (slot + 1) as u64 * bytes;
    }
}

/// The pooled keys of one head of one sequence, a row for each of a selector's blocks.
pub(super) struct PooledKeys {
    /// The means, or the least of each component.
    first: Mat,
    /// The greatest.
    high: Option<Mat>,
    /// Key blocks of a block.
    per: usize,
    /// Blocks before the first with a number that is not finite.
    finite: usize,
}

/// Key blocks that a row reads of a head, of those before its own; none: all.
pub(super) type Blocks = Option<Vec<usize>>;

/// What a selector answered about one head: of the key blocks before `behind` those that are read, a bit each (none:
/// all); behind those everything is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decided {
    read: Option<Box<[u64]>>,
    behind: usize,
}

impl Decided {
    /// Everything.
    const ALL: Decided = Decided { read: None, behind: 0 };

    fn new(blocks: impl Iterator<Item = usize>, behind: usize) -> Decided {
        let mut words = vec![0u64; behind.div_ceil(64)];
        blocks.for_each(|b| words[b / 64] |= 1 << (b % 64));
        Decided { read: Some(words.into()), behind }
    }

    /// What the row at `slot` reads by it.
    pub(super) fn at(&self, slot: usize) -> Blocks {
        let words = self.read.as_ref()?;
        let read = (0..self.behind).filter(|b| words[b / 64] >> (b % 64) & 1 == 1);
        Some(read.chain(self.behind..slot / KEY_BLOCK).collect())
    }
}

/// A selector, and what it answered where tiles of several positions begin.
pub struct Asks<'a> {
    /// The selector.
    pub select: &'a dyn Select,
    /// Its answers to the tiles' first rows.
    pub decisions: &'a mut Decisions,
}

/// A position within a page, and an answer for each head.
type InPage = (usize, Arc<[Decided]>);

/// What a selector answered, in one layer, where tiles begin: of every key head, kept by the page in which the key of
/// the tile's first row lies. It goes wherever that page goes: shared with it, copied with it, forgotten with it. The
/// same tokens give the same answer, so that a row finds its own whoever computed the page.
#[derive(Clone, Debug, Default)]
pub struct Decisions {
    /// By block number.
    pages: HashMap<u32, Vec<InPage>>,
}

/// Bytes of an entry beside its answers: a place in the list, and counters.
const ENTRY_BYTES: usize = 64;

impl Decisions {
    /// Most bytes that the answers of a page of `page_tokens` positions take, of texts of `context` positions.
    pub fn page_bytes(plan: SelectPlan, page_tokens: usize, heads: usize, context: usize) -> usize {
        let SelectScope::Tile(tile) = plan.scope else { return 0 };
        let one = size_of::<Decided>() + 8 * context.div_ceil(64 * KEY_BLOCK);
        page_tokens.div_ceil(tile.max(1)) * (ENTRY_BYTES + heads * one)
    }

    /// A page's answers go to another page.
    pub fn copy(&mut self, from: u32, to: u32) {
        match self.pages.get(&from).cloned() {
            Some(all) => self.pages.insert(to, all),
            None => self.pages.remove(&to),
        };
    }

    /// A page holds something else from here on, or nothing.
    pub fn forget(&mut self, block: u32) {
        self.pages.remove(&block);
    }

    /// Keeps the answers to the row at `slot`.
    pub(super) fn put(&mut self, table: Table<'_>, page_tokens: usize, slot: usize, answers: &Arc<[Decided]>) {
        let (page, within) = (table.blocks[slot / page_tokens], slot % page_tokens);
        let all = self.pages.entry(page).or_default();
        all.retain(|(at, _)| *at != within);
        all.push((within, Arc::clone(answers)));
    }

    /// What the row at `position` of a tile of `tile` goes by: the answers to the tile's first row.
    pub(super) fn of(
        &self,
        table: Table<'_>,
        page_tokens: usize,
        (position, tile): (usize, usize),
    ) -> Result<&Arc<[Decided]>, ModelError> {
        let first = position - position % tile;
        let found = first.checked_sub(table.shift).and_then(|slot| {
            let page = self.pages.get(table.blocks.get(slot / page_tokens)?)?;
            page.iter().find(|(at, _)| *at == slot % page_tokens)
        });
        found.map(|(_, answers)| answers).ok_or_else(|| ModelError::Store {
            what: format!("position {position} reads what was decided at position {first}, and nothing was"),
        })
    }
}

/// Whether a selector is asked at a row's position.
pub(super) fn asks_at(plan: SelectPlan, position: usize) -> bool {
    match plan.scope {
        SelectScope::Row => true,
        SelectScope::Tile(tile) => position.is_multiple_of(tile.max(1)),
    }
}

/// What the tiles of a prompt read in one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptRead {
    /// Positions of a tile.
    tile: usize,
    /// Of each key head, for each tile of queries, the tiles of keys before its own, rising; none: everything.
    heads: Option<Vec<Vec<Vec<usize>>>>,
}

impl PromptRead {
    /// Everything is read.
    pub(super) const ALL: PromptRead = PromptRead { tile: KEY_BLOCK, heads: None };

    /// From an answer for each key head of a prompt of `tokens` positions.
    pub(super) fn new(
        layer: usize,
        (tile, tokens): (usize, usize),
        heads: Vec<Vec<Vec<usize>>>,
    ) -> Result<PromptRead, ModelError> {
        let refuse = |what: String| Err(ModelError::Select { what });
        if tile == 0 || !tile.is_multiple_of(KEY_BLOCK) {
            return refuse(format!("tiles of {tile} positions; keys are read in blocks of {KEY_BLOCK}"));
        }
        for (head, tiles) in heads.iter().enumerate() {
            let (have, want) = (tiles.len(), tokens.div_ceil(tile));
            if have != want {
                return refuse(format!("layer {layer}, head {head}: an answer for {have} tiles of {want}"));
            }
            for (nth, read) in tiles.iter().enumerate() {
                if let Some(w) = read.windows(2).find(|w| w[0] >= w[1]) {
                    return refuse(format!("layer {layer}, head {head}, tile {nth}: tile {} after {}", w[1], w[0]));
                }
                if let Some(last) = read.last().filter(|t| **t >= nth) {
                    return refuse(format!("layer {layer}, head {head}, tile {nth}: tile {last} is not before it"));
                }
            }
        }
        Ok(PromptRead { tile, heads: Some(heads) })
    }

    /// What the row at `slot` reads of a head.
    pub(super) fn at(&self, head: usize, slot: usize) -> Blocks {
        let (nth, per) = (slot / self.tile, self.tile / KEY_BLOCK);
        let read = self.heads.as_ref()?.get(head)?.get(nth)?;
        (read.len() < nth)
            .then(|| read.iter().flat_map(|t| t * per..(t + 1) * per).chain(nth * per..slot / KEY_BLOCK).collect())
    }
}

impl PooledKeys {
    /// Those of the blocks that end before slot `last`; `of` gives a key block's means, or its least components and then
    /// the greatest.
    pub(super) fn new<'a>(
        plan: SelectPlan,
        dim: usize,
        last: usize,
        of: impl Fn(usize) -> Option<&'a [f32]>,
    ) -> Result<PooledKeys, ModelError> {
        let per = plan.block / KEY_BLOCK;
        if per == 0 || !plan.block.is_multiple_of(KEY_BLOCK) {
            let what = format!("blocks of {} positions; keys are read in blocks of {KEY_BLOCK}", plan.block);
            return Err(ModelError::Select { what });
        }
        let blocks = last / plan.block;
        let mut first = Mat::zeros(blocks, dim);
        let mut high = (plan.pool == Pool::Bounds).then(|| Mat::zeros(blocks, dim));
        let mut finite = blocks;
        for b in 0..blocks {
            for nth in 0..per {
                let keys = of(b * per + nth).filter(|k| k.len() == dim * (1 + usize::from(high.is_some())));
                let keys = keys.ok_or_else(|| ModelError::Store { what: format!("no pooled keys of block {b}") })?;
                if finite > b && keys.iter().any(|k| !k.is_finite()) {
                    finite = b;
                }
                let (low, rest) = keys.split_at(dim);
                let into = first.row_mut(b).iter_mut().zip(low);
                match &mut high {
                    None => into.for_each(|(sum, k)| *sum += k / per as f32),
                    Some(_) if nth == 0 => into.for_each(|(least, k)| *least = *k),
                    Some(_) => into.for_each(|(least, k)| *least = least.min(*k)),
                }
                for (most, k) in high.iter_mut().flat_map(|h| h.row_mut(b).iter_mut()).zip(rest) {
                    *most = if nth == 0 { *k } else { most.max(*k) };
                }
            }
        }
        Ok(PooledKeys { first, high, per, finite })
    }

    /// What the row at `slot` is to read of a head. Where a number is not finite nobody is asked: what is wrong shows
    /// then as it does without a selector.
    pub(super) fn decide(
        &self,
        select: &dyn Select,
        (layer, head): (usize, usize),
        queries: MatRef<'_>,
        slot: usize,
    ) -> Result<Decided, ModelError> {
        let whole = slot / (self.per * KEY_BLOCK);
        let broken = || (0..queries.rows()).any(|r| queries.row(r).iter().any(|q| !q.is_finite()));
        if whole == 0 || whole > self.finite || broken() {
            return Ok(Decided::ALL);
        }
        let first = self.first.view().rows_range(0, whole);
        let pooled = match &self.high {
            None => Pooled::Mean(first),
            Some(high) => Pooled::Bounds { low: first, high: high.view().rows_range(0, whole) },
        };
        let refused = |e: MethodError| ModelError::Select { what: e.to_string() };
        let blocks = select.select(&SelectAsk { layer, head, queries, pooled }).map_err(refused)?;
        if let Some(w) = blocks.windows(2).find(|w| w[0] >= w[1]) {
            let what = format!("layer {layer}, head {head}: block {} after block {}", w[1], w[0]);
            return Err(ModelError::Select { what });
        }
        if let Some(last) = blocks.last().filter(|b| **b >= whole) {
            return Err(ModelError::Select { what: format!("layer {layer}, head {head}: block {last} of {whole}") });
        }
        if blocks.len() == whole {
            return Ok(Decided::ALL);
        }
        Ok(Decided::new(blocks.iter().flat_map(|b| b * self.per..(b + 1) * self.per), whole * self.per))
    }
}
