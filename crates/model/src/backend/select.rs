//! What a selector is asked about a row, and what the row reads by its answer.

use lacuna_base::{Mat, MatRef};
use lacuna_contract::{MethodError, Pool, Pooled, Select, SelectAsk, SelectPlan};
use lacuna_kernels::KEY_BLOCK;

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

    /// The key blocks that the row at `slot` reads of a head, rising, of those before its own; none: all. Where a number
    /// is not finite nobody is asked: what is wrong shows then as it does without a selector.
    pub(super) fn read(
        &self,
        select: &dyn Select,
        (layer, head): (usize, usize),
        queries: MatRef<'_>,
        slot: usize,
    ) -> Result<Blocks, ModelError> {
        let whole = slot / (self.per * KEY_BLOCK);
        let broken = || (0..queries.rows()).any(|r| queries.row(r).iter().any(|q| !q.is_finite()));
        if whole == 0 || whole > self.finite || broken() {
            return Ok(None);
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
            return Ok(None);
        }
        let own = slot / KEY_BLOCK;
        Ok(Some(blocks.iter().flat_map(|b| b * self.per..(b + 1) * self.per).chain(whole * self.per..own).collect()))
    }
}
