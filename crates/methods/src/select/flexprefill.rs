//! FlexPrefill: each head of a prompt reads as many tiles of keys as it takes to gather most of its attention.
//!
//! **Paper.** Xunhao Lai, Jianqiao Lu, Yao Luo, Yiyuan Ma, Xun Zhou, "FlexPrefill: A Context-Aware Sparse Attention
//! Mechanism for Efficient Long-Sequence Inference", 2025, arXiv 2502.20766.
//!
//! **Idea.** The last queries `Q̂` of a prompt tell what a head does. Their true attention, added up by tiles of keys, is
//! `â`; pooling guesses it as `ā = softmax(mean(Q̂) mean(K)ᵀ / √d)`. Where both are alike,
//! `√JSD(ā ‖ â) < τ`, pooling is trusted for all queries: of the map of pooled queries and pooled keys the fewest tiles are
//! read that gather `γ` of it. Elsewhere a head reads columns and diagonals: the fewest columns that gather `γ` of what
//! `Q̂` sees, and the fewest diagonals that do.
//!
//! **Shapes and units.** Queries `[n, g d]` of the `g` query heads that share a key head, keys `[n, d]`; `⌈n/B⌉` tiles of
//! `B` positions; for each tile of queries the tiles of keys before its own, rising. `γ` is a share of attention, `τ` a
//! distance in `√nats`.
//!
//! **Cost.** `2 B g n d` for the last queries, `2 g (n/B)² d` for the pooled map; `O(n g d + (n/B)²)` memory.
//!
//! **Departs.** Query heads that share a key head share its tiles: their maps are averaged, where the paper's every head
//! has its own. Columns and diagonals are those of tiles: the sums over a tile's are what `γ` cuts, as keys are read in
//! tiles anyway. The diagonal of tiles is always read. Where a tile of queries would read fewer than `min_budget` positions
//! before its own, those with the next best scores of its row are added. A softcap, a sink and ALiBi's distances are not
//! seen here. Where scores are alike the earlier tile is read.

use std::sync::Arc;

use lacuna_base::dense::matmul_nt;
use lacuna_base::{Mat, MatRef};
use lacuna_contract::{Card, MadeRunning, MethodError, PromptAsk, RunMethod, SelectPrompt, Selector};
use serde::{Deserialize, Serialize};

use crate::family::keys::{Fraction, Whole};
use crate::make;

/// What is read.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
struct FlexPrefill {
    /// Share of the attention that is gathered, 0 to 1; 1: all is read.
    gamma: Fraction,
    /// The largest distance, √nats, at which pooling is trusted, 0 to 1.
    tau: Fraction,
    /// Positions before its own tile that a tile of queries reads at least, 0 to 2^30.
    min_budget: Whole<0, { 1 << 30 }>,
    /// Positions of a tile, 1 to 1024; as many last queries are looked at.
    tile: Whole<1, 1024>,
}

impl Default for FlexPrefill {
    fn default() -> FlexPrefill {
        FlexPrefill { gamma: Fraction(0.9), tau: Fraction(0.1), min_budget: Whole(1024), tile: Whole(128) }
    }
}

pub(crate) fn method() -> RunMethod {
    RunMethod {
        card: Card {
            name: "flexprefill",
            paper: "Lai, Lu, Luo, Ma, Zhou: FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient \
                    Long-Sequence Inference, 2025",
            arxiv: "2502.20766",
            summary: "A prompt's heads read the tiles of keys that gather most of their attention, by its last queries.",
            system: None,
            verb: "select",
            needs: &[],
            abilities: &[],
        },
        keys: make::keys::<FlexPrefill>,
        defaults: make::defaults::<FlexPrefill>,
        make: |given, _| {
            let made = make::parameters::<FlexPrefill>("flexprefill", given)?;
            Ok(MadeRunning::Select(Selector::Prompt(Arc::new(made))))
        },
    }
}

/// Queries whose scores with all keys are held at once.
const SIDE: usize = 32;
/// Scores so far below the largest have no weight: f32 holds it as a subnormal, slowly, or not at all.
const FAR: f32 = -87.0;

/// Scores become weights that add up to 1.
fn softmax(scores: &mut [f32]) {
    let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores.iter_mut().for_each(|s| *s = if *s - top < FAR { 0.0 } else { (*s - top).exp() });
    let whole = scores.iter().map(|s| f64::from(*s)).sum::<f64>().recip() as f32;
    scores.iter_mut().for_each(|s| *s *= whole);
}

/// The means of tiles of `tile` rows.
fn means(x: MatRef<'_>, tile: usize) -> Mat {
    let mut out = Mat::zeros(x.rows().div_ceil(tile), x.cols());
    for r in 0..x.rows() {
        let n = tile.min(x.rows() - r / tile * tile) as f32;
        out.row_mut(r / tile).iter_mut().zip(x.row(r)).for_each(|(sum, v)| *sum += v / n);
    }
    out
}

/// `√JSD` of two lists of weights that each add up to 1.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    let part = |p: f64, q: f64| if p > 0.0 { p * (2.0 * p / (p + q)).ln() } else { 0.0 };
    let sum: f64 = a.iter().zip(b).map(|(&p, &q)| part(p, q) + part(q, p)).sum();
    (sum / 2.0).max(0.0).sqrt()
}

/// The fewest of some weights that gather `share` of their sum, of equal ones the first.
fn gather(weights: &[f64], share: f64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
    let (goal, mut sum) = (share * weights.iter().sum::<f64>(), 0.0);
    let enough = order.iter().position(|&i| {
        sum += weights[i];
        sum >= goal
    });
    order.truncate(enough.map_or(order.len(), |last| last + 1));
    order
}

/// What the last queries see: by tiles of keys, by diagonals of tiles (0: their own tile), and by pooling.
struct Seen {
    columns: Vec<f64>,
    diagonals: Vec<f64>,
    pooled: Vec<f64>,
}

impl FlexPrefill {
    fn check(&self, ask: &PromptAsk<'_>) -> Result<(), MethodError> {
        let (n, d, wide) = (ask.keys.rows(), ask.keys.cols(), ask.queries.cols());
        if ask.queries.rows() == n && d > 0 && wide > 0 && wide.is_multiple_of(d) {
            return Ok(());
        }
        Err(MethodError::new(format!(
            "layer {}, head {}: queries {} x {wide} for keys {n} x {d}",
            ask.layer,
            ask.head,
            ask.queries.rows()
        )))
    }

    /// What the last queries see of the keys, whose means are `means`.
    fn look(&self, ask: &PromptAsk<'_>, means: &Mat) -> Seen {
        let (n, d, tile) = (ask.keys.rows(), ask.keys.cols(), self.tile.0);
        let (first, tiles) = (n - tile.min(n), n.div_ceil(tile));
        let none = || vec![0.0; tiles];
        let mut seen = Seen { columns: none(), diagonals: none(), pooled: none() };
        let heads = ask.queries.cols() / d;
        let each = 1.0 / (heads * (n - first)) as f64;
        for h in 0..heads {
            let queries = ask.queries.columns(h * d, (h + 1) * d);
            for from in (first..n).step_by(SIDE) {
                let to = (from + SIDE).min(n);
                let mut scores = matmul_nt(queries.rows_range(from, to), ask.keys.rows_range(0, to));
                for t in from..to {
                    let row = &mut scores.row_mut(t - from)[..=t];
                    row.iter_mut().for_each(|s| *s *= ask.scale);
                    softmax(row);
                    for (b, of_tile) in row.chunks(tile).enumerate() {
                        let sum = each * of_tile.iter().map(|w| f64::from(*w)).sum::<f64>();
                        seen.columns[b] += sum;
                        seen.diagonals[t / tile - b] += sum;
                    }
                }
            }
            let mut mean = vec![0.0f32; d];
            for t in first..n {
                mean.iter_mut().zip(queries.row(t)).for_each(|(m, q)| *m += q / (n - first) as f32);
            }
            let mut guess: Vec<f32> = (0..tiles).map(|b| ask.scale * dot(&mean, means.row(b))).collect();
            softmax(&mut guess);
            seen.pooled.iter_mut().zip(guess).for_each(|(p, g)| *p += f64::from(g) / heads as f64);
        }
        seen
    }

    /// The map of pooled queries and pooled keys: for each tile of queries a weight for each tile up to its own.
    fn pooled(&self, ask: &PromptAsk<'_>, means_of_keys: &Mat) -> Vec<Vec<f64>> {
        let d = ask.keys.cols();
        let (queries, heads) = (means(ask.queries, self.tile.0), ask.queries.cols() / d);
        let mut map: Vec<Vec<f64>> = (0..queries.rows()).map(|i| vec![0.0; i + 1]).collect();
        for h in 0..heads {
            let mut scores = matmul_nt(queries.view().columns(h * d, (h + 1) * d), means_of_keys.view());
            for (i, row) in map.iter_mut().enumerate() {
                let scores = &mut scores.row_mut(i)[..=i];
                scores.iter_mut().for_each(|s| *s *= ask.scale);
                softmax(scores);
                row.iter_mut().zip(scores).for_each(|(w, s)| *w += f64::from(*s) / heads as f64);
            }
        }
        map
    }

    /// Adds the best of the rest of a row until it reads as many tiles as it must; rising.
    fn fill(&self, mut read: Vec<usize>, nth: usize, score: impl Fn(usize) -> f64) -> Vec<usize> {
        let least = self.min_budget.0.div_ceil(self.tile.0).min(nth);
        read.sort_unstable();
        read.dedup();
        if read.len() < least {
            let mut rest: Vec<usize> = (0..nth).filter(|b| read.binary_search(b).is_err()).collect();
            rest.sort_by(|&a, &b| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
            read.extend(&rest[..least - read.len()]);
            read.sort_unstable();
        }
        read
    }
}

/// `Σ a_c b_c`.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl SelectPrompt for FlexPrefill {
    fn tile(&self) -> usize {
        self.tile.0
    }

    fn select(&self, ask: &PromptAsk<'_>) -> Result<Vec<Vec<usize>>, MethodError> {
        self.check(ask)?;
        let tiles = ask.keys.rows().div_ceil(self.tile.0);
        if self.gamma.0 >= 1.0 || self.min_budget.0.div_ceil(self.tile.0) + 1 >= tiles {
            return Ok((0..tiles).map(|nth| (0..nth).collect()).collect());
        }
        let keys = means(ask.keys, self.tile.0);
        let seen = self.look(ask, &keys);
        if distance(&seen.pooled, &seen.columns) < self.tau.0 {
            let map = self.pooled(ask, &keys);
            let starts: Vec<usize> = (0..tiles).map(|i| i * (i + 1) / 2).collect();
            let mut read: Vec<Vec<usize>> = vec![Vec::new(); tiles];
            for at in gather(&map.concat(), self.gamma.0) {
                let i = starts.partition_point(|s| *s <= at) - 1;
                read[i].extend(Some(at - starts[i]).filter(|b| *b < i));
            }
            let fill = |(i, read)| self.fill(read, i, |b| map[i][b]);
            return Ok(read.into_iter().enumerate().map(fill).collect());
        }
        let (columns, diagonals) = (gather(&seen.columns, self.gamma.0), gather(&seen.diagonals, self.gamma.0));
        let row = |i: usize| {
            let of_columns = columns.iter().copied().filter(|b| *b < i);
            let of_diagonals = diagonals.iter().filter(|d| **d > 0).filter_map(|d| i.checked_sub(*d));
            self.fill(of_columns.chain(of_diagonals).collect(), i, |b| seen.columns[b] + seen.diagonals[i - b])
        };
        Ok((0..tiles).map(row).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Rng;
    use lacuna_base::testkit::random;

    /// All maps whole and in f64, and sets grown one by one.
    fn brute(by: &FlexPrefill, scale: f64, q: &Mat, k: &Mat) -> (bool, Vec<Vec<usize>>) {
        let (n, d, tile) = (k.rows(), k.cols(), by.tile.0);
        let (heads, tiles) = (q.cols() / d, n.div_ceil(tile));
        let soft = |scores: Vec<f64>| -> Vec<f64> {
            let sum: f64 = scores.iter().map(|s| s.exp()).sum();
            scores.iter().map(|s| s.exp() / sum).collect()
        };
        let at = |m: &Mat, r: usize, c: usize| f64::from(m[(r, c)]);
        let mean = |m: &Mat, rows: std::ops::Range<usize>, c: usize| {
            rows.clone().map(|r| at(m, r, c)).sum::<f64>() / rows.len() as f64
        };
        let of_tile = |b: usize| b * tile..((b + 1) * tile).min(n);
        let last = n - tile.min(n)..n;
        let mut seen = [vec![0.0; tiles], vec![0.0; tiles], vec![0.0; tiles]];
        for h in 0..heads {
            for t in last.clone() {
                let score = |j: usize| (0..d).map(|c| at(q, t, h * d + c) * at(k, j, c)).sum::<f64>() * scale;
                for (j, w) in soft((0..=t).map(score).collect()).into_iter().enumerate() {
                    let w = w / (heads * last.len()) as f64;
                    seen[0][j / tile] += w;
                    seen[1][t / tile - j / tile] += w;
                }
            }
            let score = |b: usize| {
                scale * (0..d).map(|c| mean(q, last.clone(), h * d + c) * mean(k, of_tile(b), c)).sum::<f64>()
            };
            let guess = soft((0..tiles).map(score).collect());
            seen[2].iter_mut().zip(guess).for_each(|(s, g)| *s += g / heads as f64);
        }
        let entropy = |p: &[f64]| -p.iter().filter(|p| **p > 0.0).map(|p| p * p.ln()).sum::<f64>();
        let middle: Vec<f64> = seen[0].iter().zip(&seen[2]).map(|(a, b)| (a + b) / 2.0).collect();
        let jsd = entropy(&middle) - (entropy(&seen[0]) + entropy(&seen[2])) / 2.0;
        let pooled = jsd.max(0.0).sqrt() < by.tau.0;
        // Grown by the largest that is left until the share is there.
        let grow = |weights: &dyn Fn(usize) -> f64, count: usize| -> Vec<usize> {
            let total: f64 = (0..count).map(weights).sum();
            let mut set: Vec<usize> = Vec::new();
            while set.iter().map(|i| weights(*i)).sum::<f64>() < by.gamma.0 * total && set.len() < count {
                let left = (0..count).filter(|i| !set.contains(i));
                set.extend(left.fold(None, |best: Option<usize>, i| match best {
                    Some(b) if weights(b) >= weights(i) => Some(b),
                    _ => Some(i),
                }));
            }
            set
        };
        let pairs: Vec<(usize, usize)> = (0..tiles).flat_map(|i| (0..=i).map(move |b| (i, b))).collect();
        let map = |(i, b): (usize, usize)| -> f64 {
            let score = |h: usize, b: usize| {
                scale * (0..d).map(|c| mean(q, of_tile(i), h * d + c) * mean(k, of_tile(b), c)).sum::<f64>()
            };
            (0..heads).map(|h| soft((0..=i).map(|b| score(h, b)).collect())[b]).sum::<f64>() / heads as f64
        };
        let maps: Vec<f64> = pairs.iter().map(|p| map(*p)).collect();
        let chosen: Vec<(usize, usize)> = match pooled {
            true => grow(&|p| maps[p], pairs.len()).into_iter().map(|p| pairs[p]).collect(),
            false => {
                let (v, s) = (grow(&|b| seen[0][b], tiles), grow(&|b| seen[1][b], tiles));
                pairs.iter().copied().filter(|(i, b)| v.contains(b) || s.contains(&(i - b))).collect()
            }
        };
        let score = |i: usize, b: usize| match pooled {
            true => maps[pairs.iter().position(|p| *p == (i, b)).expect("a pair")],
            false => seen[0][b] + seen[1][i - b],
        };
        let rows = (0..tiles).map(|i| {
            let mut row: Vec<usize> = (0..i).filter(|b| chosen.contains(&(i, *b))).collect();
            while row.len() < by.min_budget.0.div_ceil(tile).min(i) {
                let left = (0..i).filter(|b| !row.contains(b));
                row.extend(left.fold(None, |best: Option<usize>, b| match best {
                    Some(a) if score(i, a) >= score(i, b) => Some(a),
                    _ => Some(b),
                }));
            }
            row.sort_unstable();
            row
        });
        (pooled, rows.collect())
    }

    #[test]
    fn agrees_with_brute_force() {
        let (mut trusted, mut patterned, mut apart) = (0, 0, 0);
        for seed in 0..120 {
            let mut rng = Rng::new(seed);
            let (n, d, heads) = (5 + rng.below(60), 1 + rng.below(9), 1 + rng.below(3));
            let by = FlexPrefill {
                gamma: Fraction(0.3 + 0.15 * rng.below(5) as f64),
                tau: Fraction([0.0, 0.1, 0.4][rng.below(3)]),
                min_budget: Whole(rng.below(12)),
                tile: Whole(1 + rng.below(6)),
            };
            let (q, k) = (random(n, heads * d, seed + 1), random(n, d, seed + 2));
            let ask = PromptAsk { layer: 0, head: 0, scale: 0.7, queries: q.view(), keys: k.view() };
            let have = by.select(&ask).expect("selects");
            let tiles = n.div_ceil(by.tile.0);
            assert_eq!(have.len(), tiles);
            for (i, read) in have.iter().enumerate() {
                assert!(read.windows(2).all(|w| w[0] < w[1]) && read.last().is_none_or(|b| *b < i), "{seed}: {have:?}");
                assert!(read.len() >= by.min_budget.0.div_ceil(by.tile.0).min(i), "{seed}: {have:?}");
            }
            if by.min_budget.0.div_ceil(by.tile.0) + 1 >= tiles {
                assert!(have.iter().enumerate().all(|(i, read)| read.len() == i));
                continue;
            }
            let (pooled, want) = brute(&by, 0.7, &q, &k);
            (trusted, patterned) = (trusted + usize::from(pooled), patterned + usize::from(!pooled));
            // Sums in f32 may lie on the other side of a share or of another score.
            apart += usize::from(have != want);
        }
        assert!(trusted > 15 && patterned > 40 && apart <= 1, "{trusted} {patterned} {apart}");
    }

    #[test]
    fn a_share_of_all_reads_all_and_ties_read_the_first() {
        let (q, k) = (Mat::zeros(24, 6), Mat::zeros(24, 3));
        let ask = PromptAsk { layer: 0, head: 0, scale: 1.0, queries: q.view(), keys: k.view() };
        let by = |gamma: f64, tau: f64, least: usize| FlexPrefill {
            gamma: Fraction(gamma),
            tau: Fraction(tau),
            min_budget: Whole(least),
            tile: Whole(4),
        };
        let all: Vec<Vec<usize>> = (0..6).map(|i| (0..i).collect()).collect();
        assert_eq!(by(1.0, 0.1, 0).select(&ask), Ok(all.clone()));
        assert_eq!(by(0.1, 0.1, 999).select(&ask), Ok(all));
        // Columns alike, and diagonals alike but for the own tile's, which is not whole: the first of each gathers a tenth.
        let both = |i: usize| [0, i.saturating_sub(1)][..2.min(i)].to_vec();
        let first: Vec<Vec<usize>> = (0..6).map(|i| if i == 1 { vec![0] } else { both(i) }).collect();
        assert_eq!(by(0.1, 0.0, 0).select(&ask), Ok(first));
        assert_eq!(by(0.1, 0.0, 12).select(&ask).map(|r| r[5].clone()), Ok(vec![0, 1, 4]));
        let short = Mat::zeros(23, 6);
        let refused = by(0.9, 0.1, 0).select(&PromptAsk { layer: 3, head: 1, queries: short.view(), ..ask });
        assert!(refused.expect_err("refused").what.contains("layer 3, head 1: queries 23 x 6 for keys 24 x 3"));
    }

    /// A head that looks at one early tile and at the tile before its own: that is what is read.
    #[test]
    fn columns_and_diagonals_are_found() {
        let (n, tile, d) = (160, 8, 32);
        // Keys of tile 2 point where all queries look; each tile's keys point where the next tile's queries look.
        let unit = |at: usize, of: f32| (0..d).map(move |c| if c == at { of } else { 0.0 });
        let rows = |f: &dyn Fn(usize) -> Vec<f32>| {
            let all: Vec<f32> = (0..n).flat_map(f).collect();
            Mat::from_vec(n, d, all)
        };
        let keys = rows(&|t| match t / tile {
            2 => unit(0, 9.0).collect(),
            b => unit(1 + b, 9.0).collect(),
        });
        let queries = rows(&|t| {
            let mut q: Vec<f32> = unit(0, 1.0).collect();
            q[1 + (t / tile).saturating_sub(1)] = 1.0;
            q
        });
        let by = FlexPrefill { tau: Fraction(0.0), min_budget: Whole(0), tile: Whole(tile), ..FlexPrefill::default() };
        let ask = PromptAsk { layer: 0, head: 0, scale: 1.0, queries: queries.view(), keys: keys.view() };
        let read = by.select(&ask).expect("selects");
        for (i, read) in read.iter().enumerate().skip(4) {
            assert!(read.contains(&2) && read.contains(&(i - 1)), "{i}: {read:?}");
            assert!(read.len() <= 5, "{i}: {read:?}");
        }
    }
}
