//! Pooled blocks: a query reads the blocks of keys that may score highest, by what pooling tells of them.
//!
//! **Paper.** Jiaming Tang, Yilong Zhao, Kan Zhu, Guangxuan Xiao, Baris Kasikci, Song Han, "Quest: Query-Aware
//! Sparsity for Efficient Long-Context LLM Inference", 2024, arXiv 2406.10774.
//!
//! **Idea.** A block of keys is known by the least and the greatest of each component, `m` and `M`. No key in it can
//! score more than `Σ_c max(q_c m_c, q_c M_c)` with the query `q`: the blocks with the largest bounds are read, all
//! others are not. With `pool = "mean"` a block's score is that of its mean key, `Σ_c q_c μ_c`.
//!
//! **Shapes and units.** Queries `[queries, head_dim]` that share an answer, pooled keys `[blocks, head_dim]`; a block
//! counts by its largest score with any of the queries; blocks, rising.
//!
//! **Cost.** Two products a component, block and query, and a partial sort; pooled keys are `2 / block` of the keys.
//!
//! **Departs.** Query heads that share a key head share its blocks, where the paper's every head has its own. Blocks
//! hold 32 positions, as the cache's do, for the paper's 16. The newest, unfinished block is read beside the budget
//! and not within it. Prompts are read by the same rule, where the paper reads them whole. Where scores are alike the
//! earlier block is read. With `scope = "tile"` the positions of a tile read what the first of them chose.

use std::sync::Arc;

use lacuna_base::MatRef;
use lacuna_contract::{
    Card, MadeRunning, MethodError, Pool, Pooled, RunMethod, Select, SelectAsk, SelectPlan, SelectScope, Selector,
};
use serde::{Deserialize, Serialize};

use crate::family::keys::Whole;
use crate::make;

/// What is read.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
struct PooledBlocks {
    /// Positions that are read of the whole blocks before the query, 1 to 2^30; rounded up to blocks.
    budget: Whole<1, { 1 << 30 }>,
    /// Positions of a block, 1 to 1024.
    block: Whole<1, 1024>,
    /// How its keys are pooled: "bounds" or "mean".
    pool: Pool,
    /// Who is asked: every position ("row"), or the first of each tile for all of it ("tile").
    scope: Sharing,
    /// Positions of a tile where tiles share an answer, 1 to 1024; 32 where nothing is said.
    tile: Option<Whole<1, 1024>>,
    /// First layers, which read everything.
    dense_layers: usize,
}

/// See [`PooledBlocks::scope`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum Sharing {
    Row,
    Tile,
}

impl Default for PooledBlocks {
    fn default() -> PooledBlocks {
        let (budget, block) = (Whole(1024), Whole(32));
        PooledBlocks { budget, block, pool: Pool::Bounds, scope: Sharing::Row, tile: None, dense_layers: 2 }
    }
}

/// Positions of a tile where nothing else is said.
const TILE: usize = 32;

pub(crate) fn method() -> RunMethod {
    RunMethod {
        card: Card {
            name: "pooled-blocks",
            paper: "Tang, Zhao, Zhu, Xiao, Kasikci, Han: Quest: Query-Aware Sparsity for Efficient Long-Context LLM \
                    Inference, 2024",
            arxiv: "2406.10774",
            summary: "A query reads the blocks of keys whose pooled keys promise the highest scores.",
            system: None,
            verb: "select",
            needs: &[],
            abilities: &[],
        },
        keys: make::keys::<PooledBlocks>,
        defaults: make::defaults::<PooledBlocks>,
        make: |given, _| {
            let made = make::parameters::<PooledBlocks>("pooled-blocks", given)?;
            if let (Sharing::Row, Some(Whole(tile))) = (made.scope, made.tile) {
                return Err(MethodError::new(format!(
                    "tile = {tile}: with scope = \"row\" every position asks for itself; write scope = \"tile\" beside it"
                )));
            }
            Ok(MadeRunning::Select(Selector::Rows(Arc::new(made))))
        },
    }
}

/// Sums that run side by side, so that a processor adds them in vectors; the order hangs on the length alone.
const LANES: usize = 8;

/// `Σ f(c)` over the components.
fn sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    for from in (0..n / LANES * LANES).step_by(LANES) {
        lanes.iter_mut().enumerate().for_each(|(i, lane)| *lane += f(from + i));
    }
    (n / LANES * LANES..n).map(&f).chain(lanes).sum()
}

/// The largest score of any query with each block.
fn scores(ask: &SelectAsk<'_>) -> Vec<f32> {
    let n = ask.queries.cols();
    let blocks = rows(&ask.pooled).0;
    let of = |q: &[f32], b: usize| match ask.pooled {
        Pooled::Mean(mean) => {
            let mean = &mean.row(b)[..n];
            sum(n, |c| q[c] * mean[c])
        }
        Pooled::Bounds { low, high } => {
            let (low, high) = (&low.row(b)[..n], &high.row(b)[..n]);
            sum(n, |c| (q[c] * low[c]).max(q[c] * high[c]))
        }
    };
    let mut scores = vec![f32::NEG_INFINITY; blocks];
    for r in 0..ask.queries.rows() {
        let q = &ask.queries.row(r)[..n];
        scores.iter_mut().enumerate().for_each(|(b, s)| *s = s.max(of(q, b)));
    }
    scores
}

/// Blocks, and components of a pooled key.
fn rows(pooled: &Pooled<'_>) -> (usize, usize) {
    let (Pooled::Mean(of) | Pooled::Bounds { high: of, .. }) = pooled;
    (of.rows(), of.cols())
}

impl PooledBlocks {
    fn check(&self, ask: &SelectAsk<'_>) -> Result<(), MethodError> {
        let error = |what: String| Err(MethodError::new(format!("layer {}, head {}: {what}", ask.layer, ask.head)));
        let (blocks, cols) = rows(&ask.pooled);
        let mut pooled: Vec<MatRef<'_>> = Vec::new();
        match (ask.pooled, self.pool) {
            (Pooled::Mean(mean), Pool::Mean) => pooled.push(mean),
            (Pooled::Bounds { low, high }, Pool::Bounds) => {
                if (low.rows(), low.cols()) != (blocks, cols) {
                    let (r, c) = (low.rows(), low.cols());
                    return error(format!("lower bounds {r} x {c} beside upper ones {blocks} x {cols}"));
                }
                pooled.extend([low, high]);
            }
            _ => return error(format!("keys are not pooled as asked, by {:?}", self.pool)),
        }
        if ask.queries.cols() != cols {
            return error(format!("queries of {} components for keys of {cols}", ask.queries.cols()));
        }
        for m in pooled {
            if let Some(b) = (0..blocks).find(|&b| m.row(b)[..cols].iter().any(|v| !v.is_finite())) {
                return error(format!("block {b} has a pooled key that is no finite number"));
            }
        }
        let bad = |r: &usize| ask.queries.row(*r)[..cols].iter().any(|v| !v.is_finite());
        match (0..ask.queries.rows()).find(bad) {
            Some(r) => error(format!("query {r} has a component that is no finite number")),
            None => Ok(()),
        }
    }
}

impl Select for PooledBlocks {
    fn plan(&self) -> SelectPlan {
        let scope = match self.scope {
            Sharing::Row => SelectScope::Row,
            Sharing::Tile => SelectScope::Tile(self.tile.map_or(TILE, |tile| tile.0)),
        };
        SelectPlan { pool: self.pool, block: self.block.0, scope }
    }

    fn select(&self, ask: &SelectAsk<'_>) -> Result<Vec<usize>, MethodError> {
        let (blocks, most) = (rows(&ask.pooled).0, self.budget.0.div_ceil(self.block.0));
        if blocks <= most || ask.layer < self.dense_layers {
            return Ok((0..blocks).collect());
        }
        self.check(ask)?;
        let scores = scores(ask);
        let mut read: Vec<usize> = (0..blocks).collect();
        read.select_nth_unstable_by(most - 1, |&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        read.truncate(most);
        read.sort_unstable();
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;
    use lacuna_base::{Mat, Rng};

    fn pools(keys: &Mat, block: usize) -> (Mat, Mat, Mat) {
        let blocks = keys.rows() / block;
        let of = |f: &dyn Fn(&[f32]) -> f32| {
            Mat::from_fn(blocks, keys.cols(), |b, c| {
                let column: Vec<f32> = (b * block..(b + 1) * block).map(|r| keys[(r, c)]).collect();
                f(&column)
            })
        };
        let least = of(&|x| x.iter().copied().fold(f32::INFINITY, f32::min));
        let most = of(&|x| x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        (of(&|x| x.iter().sum::<f32>() / x.len() as f32), least, most)
    }

    /// Whole numbers, so that sums are exact in any order and there are ties.
    fn whole(rows: usize, cols: usize, seed: u64) -> Mat {
        let mut rng = Rng::new(seed);
        Mat::from_fn(rows, cols, |_, _| rng.below(7) as f32 - 3.0)
    }

    /// Straight from the definition: the bound is the largest score of any vector between the bounds, found corner by
    /// corner; a block is read if fewer than the budget stand before it.
    #[test]
    fn agrees_with_brute_force_over_the_corners() {
        for seed in 0..200 {
            let mut rng = Rng::new(seed);
            let (block, blocks, d) = (1 + rng.below(3), rng.below(9), 1 + rng.below(10));
            let (keys, queries) = (whole(block * blocks, d, seed + 1), whole(1 + rng.below(3), d, seed + 2));
            let (mean, low, high) = pools(&keys, block);
            let budget = 1 + rng.below(12);
            let pool = if rng.below(2) == 0 { Pool::Mean } else { Pool::Bounds };
            let pooled = match pool {
                Pool::Mean => Pooled::Mean(mean.view()),
                Pool::Bounds => Pooled::Bounds { low: low.view(), high: high.view() },
            };
            let by = PooledBlocks { budget: Whole(budget), block: Whole(block), pool, ..PooledBlocks::default() };
            let ask = SelectAsk { layer: 2, head: 0, queries: queries.view(), pooled };
            let have = by.select(&ask).expect("selects");
            let with = |b: usize, q: usize| -> f64 {
                let dot = |k: &dyn Fn(usize) -> f32| -> f64 {
                    (0..d).map(|c| f64::from(queries[(q, c)]) * f64::from(k(c))).sum()
                };
                match pool {
                    Pool::Mean => dot(&|c| mean[(b, c)]),
                    Pool::Bounds => (0..1usize << d)
                        .map(|corner| dot(&|c| if corner >> c & 1 == 0 { low[(b, c)] } else { high[(b, c)] }))
                        .fold(f64::NEG_INFINITY, f64::max),
                }
            };
            let score = |b: usize| (0..queries.rows()).map(|q| with(b, q)).fold(f64::NEG_INFINITY, f64::max);
            let all: Vec<f64> = (0..blocks).map(score).collect();
            // Means of three are no whole numbers: the last bits of two sums may differ.
            let margin = if pool == Pool::Mean { 1e-4 } else { 0.0 };
            let most = budget.div_ceil(block);
            assert_eq!(have.len(), blocks.min(most), "seed {seed}");
            assert!(have.windows(2).all(|w| w[0] < w[1]));
            for b in 0..blocks {
                let ahead = (0..blocks).filter(|&o| all[o] > all[b] + margin).count();
                let beside = (0..b).filter(|&o| all[o] == all[b]).count();
                if have.contains(&b) {
                    assert!(ahead < most, "seed {seed}: {all:?} {have:?}");
                } else if margin == 0.0 {
                    assert!(ahead + beside >= most, "seed {seed}: {all:?} {have:?}");
                }
            }
        }
    }

    /// No key scores above its block's bound; and where keys that stand together are alike, as a text's are, the block of
    /// the best key is among the few that are read.
    #[test]
    fn bounds_are_bounds_and_find_the_best_key() {
        let (mut by_bounds, mut by_chance) = (0, 0);
        for seed in 0..100 {
            let (own, shared) = (random(16 * 8, 16, seed), random(16, 16, seed + 500));
            let keys = Mat::from_fn(16 * 8, 16, |r, c| shared[(r / 8, c)] + 0.3 * own[(r, c)]);
            let queries = random(1, 16, seed + 1000);
            let (_, low, high) = pools(&keys, 8);
            let pooled = Pooled::Bounds { low: low.view(), high: high.view() };
            let ask = SelectAsk { layer: 2, head: 0, queries: queries.view(), pooled };
            let bounds = scores(&ask);
            let score = |r: usize| -> f32 { (0..16).map(|c| queries[(0, c)] * keys[(r, c)]).sum() };
            assert!((0..128).all(|r| score(r) <= bounds[r / 8] + 1e-4), "seed {seed}");
            let best = (0..128).max_by(|&a, &b| score(a).total_cmp(&score(b))).expect("keys") / 8;
            let by = PooledBlocks { budget: Whole(32), block: Whole(8), ..PooledBlocks::default() };
            by_bounds += usize::from(by.select(&ask).expect("selects").contains(&best));
            by_chance += usize::from(best < 4);
        }
        assert!(by_bounds > 90 && by_chance < 50, "{by_bounds} {by_chance}");
    }

    #[test]
    fn first_layers_read_all_and_wrong_shapes_are_refused() {
        let (m, q) = (random(9, 4, 1), random(1, 4, 2));
        let by = PooledBlocks { budget: Whole(3), block: Whole(1), ..PooledBlocks::default() };
        let pooled = Pooled::Bounds { low: m.view(), high: m.view() };
        let ask = SelectAsk { layer: 1, head: 7, queries: q.view(), pooled };
        assert_eq!(by.select(&ask), Ok((0..9).collect()));
        let ask = SelectAsk { layer: 2, ..ask };
        assert_eq!(by.select(&ask).map(|b| b.len()), Ok(3));
        let refused = |ask: SelectAsk<'_>| by.select(&ask).expect_err("refused").what;
        let (short, narrow, bad) = (random(8, 4, 3), random(1, 3, 4), Mat::from_fn(9, 4, |_, _| f32::NAN));
        assert!(refused(SelectAsk { queries: narrow.view(), ..ask }).contains("3 components for keys of 4"));
        let pooled = Pooled::Bounds { low: short.view(), high: m.view() };
        assert!(refused(SelectAsk { pooled, ..ask }).contains("8 x 4"));
        let pooled = Pooled::Bounds { low: bad.view(), high: m.view() };
        assert!(refused(SelectAsk { pooled, ..ask }).contains("layer 2, head 7: block 0"));
        assert!(refused(SelectAsk { pooled: Pooled::Mean(m.view()), ..ask }).contains("Bounds"));
    }
}
