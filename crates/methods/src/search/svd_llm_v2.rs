//! SVD-LLM V2: each matrix is cut by as much as the loss that its cut leads to in theory allows.
//!
//! **Paper.** Xin Wang, Samiul Alam, Zhongwei Wan, Hui Shen, Mi Zhang, "SVD-LLM V2: Optimizing Singular Value
//! Truncation for Large Language Model Compression", NAACL 2025, arXiv 2503.12340.
//!
//! **Idea.** Matrices of one kind (all q, all k, ...) share a ratio `R` of what goes. With `L_i` the least loss
//! `‖W_i X - W_i' X‖` that cutting matrix `i` at `R` can have, its own ratio is `R_i = R · n · q_i / Σ q`, `q_i = 1 / ln L_i`,
//! over the `n` matrices of its kind: what loses more is cut less. The second half of the paper, truncation by two
//! singular value decompositions instead of a Cholesky factor, is `svd-llm` with `root = "svd"`, which the step that
//! varies then names.
//!
//! **Shapes and units.** Slots with their levels; `L_i²` is a level's `lost`, over all calibration tokens, and a ratio
//! the share that goes of a slot's bytes in f16; a level's index for each slot.
//!
//! **Cost.** No trial: sorting. But every matrix is compressed at every level before.
//!
//! **Departs.** (1) Levels are what the recipe lists, so a ratio becomes the level below it; what is then left of the
//! budget raises slots by one, those that lack most first. Where a ratio lies beyond the levels, the least one is taken
//! and slots that have most too much pay for it. (2) `L_i` is what the level that uses the budget up loses as stored,
//! on the source's inputs, estimated from some of its rows; the logarithm of the square is twice it and so changes no
//! ratio. (3) The paper's formula has no meaning where `L_i` is 1 or less: below `e` it counts as `e`.

use std::collections::BTreeMap;

use lacuna_contract::{Assignment, Card, Lab, Made, Method, MethodError, Search, SearchAsk};
use serde::Deserialize;

use super::uniform::uniform;
use crate::make;

/// No parameters; the levels are the family's.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct SvdLlmV2 {}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "svd-llm-v2",
            paper: "Wang, Alam, Wan, Shen, Zhang: SVD-LLM V2: Optimizing Singular Value Truncation for Large Language \
             Model Compression, 2025",
            arxiv: "2503.12340",
            summary: "Among matrices of a kind, what would lose more by its cut is cut less; nothing is measured.",
            system: Some(279),
            verb: "search",
            needs: &[],
            abilities: &[],
        },
        keys: make::keys::<SvdLlmV2>,
        make: |given| Ok(Made::Search(Box::new(make::parameters::<SvdLlmV2>("svd-llm-v2", given)?))),
    }
}

/// The bytes that the paper's ratios leave of each slot, when all are at level `even`.
fn wanted(lab: &dyn Lab, even: &[usize]) -> Vec<f64> {
    let whole = |s: usize| 2.0 * lab.slots()[s].parameters as f64;
    let mut groups: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (s, slot) in lab.slots().iter().enumerate() {
        groups.entry(slot.group).or_default().push(s);
    }
    let mut out = vec![0.0; even.len()];
    for slots in groups.into_values() {
        let at = |s: usize| lab.levels(s)[even[s]];
        // Of L and not its square; a loss that is no number says nothing and counts as the least.
        let q = |s: usize| 1.0 / (0.5 * at(s).lost.ln()).max(1.0);
        // Matrices of one kind need not be of one size: ratios are weighted by it, so that their sum stays.
        let gone: f64 = slots.iter().map(|&s| whole(s) - at(s).bytes as f64).sum();
        let all: f64 = slots.iter().map(|&s| whole(s) * q(s)).sum();
        for &s in &slots {
            out[s] = whole(s) * (1.0 - gone * q(s) / all.max(f64::MIN_POSITIVE));
        }
    }
    out
}

impl Search for SvdLlmV2 {
    fn search(&self, lab: &mut dyn Lab, ask: &SearchAsk) -> Result<Assignment, MethodError> {
        let lab = &*lab;
        if lab.slots().is_empty() {
            return Ok(Vec::new());
        }
        let even = uniform(lab, ask.budget_bytes).ok_or_else(|| {
            MethodError::new(format!("no level taken everywhere stays within {} bytes", ask.budget_bytes))
        })?;
        let wanted = wanted(lab, &even);
        // For each slot its levels by rising bytes; of two that take the same the better one stands last.
        let order: Vec<Vec<usize>> = (0..even.len())
            .map(|s| {
                let levels = lab.levels(s);
                let mut order: Vec<usize> = (0..levels.len()).collect();
                order.sort_by(|&a, &b| {
                    levels[a].bytes.cmp(&levels[b].bytes).then(levels[b].error.total_cmp(&levels[a].error))
                });
                order
            })
            .collect();
        let bytes = |s: usize, rung: usize| lab.levels(s)[order[s][rung]].bytes;
        let fits = |s: usize| (0..order[s].len()).rfind(|&rung| bytes(s, rung) as f64 <= wanted[s]).unwrap_or(0);
        let mut rungs: Vec<usize> = (0..even.len()).map(fits).collect();
        let mut sum: u64 = rungs.iter().enumerate().map(|(s, &rung)| bytes(s, rung)).sum();
        // How much of itself a slot has too much; ties go to the first.
        let over =
            |s: usize, rung: usize| (bytes(s, rung) as f64 - wanted[s]) / lab.slots()[s].parameters.max(1) as f64;
        while sum > ask.budget_bytes {
            let most = (0..rungs.len())
                .filter(|&s| rungs[s] > 0)
                .max_by(|&a, &b| over(a, rungs[a]).total_cmp(&over(b, rungs[b])).then(b.cmp(&a)));
            let Some(s) = most else {
                return Err(MethodError::new(format!("the least levels take more than {} bytes", ask.budget_bytes)));
            };
            sum -= bytes(s, rungs[s]) - bytes(s, rungs[s] - 1);
            rungs[s] -= 1;
        }
        let mut lacking: Vec<usize> = (0..rungs.len()).collect();
        lacking.sort_by(|&a, &b| over(a, rungs[a]).total_cmp(&over(b, rungs[b])).then(a.cmp(&b)));
        for s in lacking {
            let Some(more) = (rungs[s] + 1 < order[s].len()).then(|| bytes(s, rungs[s] + 1) - bytes(s, rungs[s]))
            else {
                continue;
            };
            if sum + more <= ask.budget_bytes {
                sum += more;
                rungs[s] += 1;
            }
        }
        Ok(rungs.iter().enumerate().map(|(s, &rung)| order[s][rung]).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::testkit::Bench;
    use lacuna_contract::Level;

    /// Slots of 1000 weights whose loss is `size · (1 - keep)²`, in `steps` levels of bytes from 0 to all, f16.
    fn bench(slots: &[(usize, f64)], steps: usize) -> Bench {
        let one = |size: f64| {
            (0..=steps)
                .map(|l| {
                    let keep = l as f64 / steps as f64;
                    Level {
                        value: keep,
                        bytes: (2000.0 * keep) as u64,
                        error: 1.0 - keep,
                        lost: size * (1.0 - keep).powi(2),
                    }
                })
                .collect()
        };
        Bench::of(slots.iter().map(|&(group, size)| (group, one(size))).collect(), 1000)
    }

    fn ask(budget_bytes: u64) -> SearchAsk {
        SearchAsk { budget_bytes, trials: 0, tokens: 2, seed: 0 }
    }

    /// The paper's formula, straight from its definition, group by group.
    #[test]
    fn agrees_with_brute_force_ratios_on_a_fine_ladder() {
        let slots = [(0, 1e4), (1, 5e5), (0, 3e6), (1, 2e7), (0, 9e8)];
        for keep in [0.5, 0.8, 0.9] {
            let mut lab = bench(&slots, 1000);
            let chosen = SvdLlmV2 {}.search(&mut lab, &ask((5.0 * 2000.0 * keep) as u64)).expect("found");
            for group in [0, 1] {
                let mine: Vec<usize> = (0..5).filter(|&s| slots[s].0 == group).collect();
                let one = |s: &usize| 1.0 / (slots[*s].1.sqrt() * (1.0 - keep)).ln();
                let all: f64 = mine.iter().map(one).sum();
                for s in &mine {
                    let ratio = (1.0 - keep) * mine.len() as f64 * one(s) / all;
                    let got = 1.0 - chosen[*s] as f64 / 1000.0;
                    assert!((got - ratio).abs() < 0.0025, "slot {s} at {keep}: {got} {ratio}");
                }
            }
            assert!(lab.bytes(&chosen) <= (5.0 * 2000.0 * keep) as u64);
            assert_eq!(lab.measured, 0);
        }
    }

    #[test]
    fn within_any_budget_and_no_worse_than_even_where_sizes_differ() {
        let slots = [(0, 1e3), (0, 1e4), (0, 1e6), (0, 1e8), (3, 1e2), (3, 1e7)];
        for steps in [4, 5, 20] {
            let mut lab = bench(&slots, steps);
            for at in 1..steps {
                let budget = lab.bytes(&[at; 6]);
                let chosen = SvdLlmV2 {}.search(&mut lab, &ask(budget)).expect("found");
                assert!(lab.bytes(&chosen) <= budget);
                let lost = |a: &[usize]| a.iter().enumerate().map(|(s, &l)| lab.levels(s)[l].lost).sum::<f64>();
                assert!(lost(&chosen) <= lost(&[at; 6]), "{steps} {at}: {chosen:?}");
            }
            // Everything, and nothing.
            assert_eq!(SvdLlmV2 {}.search(&mut lab, &ask(12_000)), Ok(vec![steps; 6]));
            assert_eq!(SvdLlmV2 {}.search(&mut lab, &ask(0)), Ok(vec![0; 6]));
        }
    }

    #[test]
    fn levels_in_any_order_equal_losses_and_none_at_all() {
        for seed in 0..20 {
            let mut lab = Bench::new(5, 4, seed);
            for level in 0..4 {
                let budget = lab.bytes(&[level; 5]);
                let chosen = SvdLlmV2 {}.search(&mut lab, &ask(budget)).expect("found");
                assert!(lab.bytes(&chosen) <= budget, "{chosen:?}");
                assert_eq!(SvdLlmV2 {}.search(&mut lab, &ask(budget)), Ok(chosen));
            }
        }
        // What loses alike is cut alike; so is what loses nothing or what is no number.
        for size in [1e6, 0.0, f64::NAN] {
            let mut lab = bench(&[(0, size); 4], 10);
            let budget = lab.bytes(&[7; 4]);
            assert_eq!(SvdLlmV2 {}.search(&mut lab, &ask(budget)), Ok(vec![7; 4]));
        }
        assert_eq!(SvdLlmV2 {}.search(&mut Bench::of(Vec::new(), 1), &ask(5)), Ok(Vec::new()));
        let mut lab = Bench::new(3, 2, 1);
        assert!(SvdLlmV2 {}.search(&mut lab, &ask(1)).expect_err("refused").what.contains("1 bytes"));
    }
}
