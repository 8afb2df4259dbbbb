//! SV-NUP: each layer's Shapley value, approximated in a window that slides over the layers, says how sparse it gets.
//!
//! **Paper.** Chuan Sun, Han Yu, Lizhen Cui, Xiaoxiao Li, "Efficient Shapley Value-based Non-Uniform Pruning of Large
//! Language Models", 2025, arXiv 2505.01731.
//!
//! **Idea.** Layers are the players of a game; pruning the layers of a coalition `S` at the asked sparsity costs
//! `v(S)`. A layer's Shapley value, `φ_i = Σ_{S ⊆ N∖i} |S|! (n - |S| - 1)! / n! · (v(S ∪ i) - v(S))`, is its fair share
//! of the loss. Layers work on those near them most, so the sum goes over the coalitions of a window of neighbours
//! (SWSV) and not over all. Layers of large value are pruned less: `s_i = s - λ (φ_i - mean φ) / max |φ - mean φ|`.
//!
//! **Shapes and units.** Slots with their levels; values in nats a token. A window of `w` slots in the order of the
//! model, the slot in its middle where the ends allow that.
//!
//! **Cost.** One trial for each distinct coalition: about `n 2^(w-1)` and not `2^n`; for 30 layers and `w = 3` 116
//! trials.
//!
//! **Departs.** (1) Of the paper's text only the idea was at hand: the layers outside the window are as the level of
//! most bytes has them, and sparsities are linear in the values, at most `lambda` from the asked one. (2) The cost is
//! the loss and not the perplexity, whose logarithm it is. (3) Sparsities go to the nearest levels of the step;
//! then levels move until the bytes are used up and not exceeded.

use std::collections::HashMap;

use lacuna_contract::{Assignment, Card, Lab, Made, Method, MethodError, Search, SearchAsk};
use serde::Deserialize;

use super::divide;
use crate::make;

/// The method's parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct SvNup {
    /// Slots of a window, 1 to 12; fewer where the step's trials are.
    window: usize,
    /// λ, the farthest that a slot's value may be from the target's; above 0, in units of the key.
    lambda: f64,
}

impl Default for SvNup {
    fn default() -> SvNup {
        SvNup { window: 3, lambda: 0.1 }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "sv-nup",
            paper: "Sun, Yu, Cui, Li: Efficient Shapley Value-based Non-Uniform Pruning of Large Language Models, 2025",
            arxiv: "2505.01731",
            summary: "Layers whose Shapley value, over a sliding window of coalitions, is large are pruned less.",
            system: Some(276),
            verb: "search",
            needs: &[],
            abilities: &[],
        },
        keys: make::keys::<SvNup>,
        make: |given| {
            let p: SvNup = make::parameters("sv-nup", given)?;
            if !(1..=12).contains(&p.window) {
                return Err(MethodError::new(format!("window is {}; it must be 1 to 12", p.window)));
            }
            if !(p.lambda > 0.0 && p.lambda.is_finite()) {
                return Err(MethodError::new(format!("lambda is {}; it must be above 0", p.lambda)));
            }
            Ok(Made::Search(Box::new(p)))
        },
    }
}

/// The first slot of the window of `i`, of `n` slots, and the window's length.
fn window(i: usize, n: usize, wanted: usize) -> (usize, usize) {
    let w = wanted.min(n);
    (i.saturating_sub(w / 2).min(n - w), w)
}

/// Shapley values of `n` players, each in the game of its window; `cost` answers for coalitions, players as bits from
/// the window's first.
fn values(n: usize, wanted: usize, cost: &dyn Fn(usize, u64) -> f64) -> Vec<f64> {
    (0..n)
        .map(|i| {
            let (first, w) = window(i, n, wanted);
            let me = 1u64 << (i - first);
            // |S|! (w - |S| - 1)! / w!, one over `w` times the number of ways to choose S.
            let mut share = vec![1.0 / w as f64; w];
            (1..w).for_each(|s| share[s] = share[s - 1] * s as f64 / (w - s) as f64);
            let without = (0..1u64 << w).filter(|s| s & me == 0);
            without.map(|s| share[s.count_ones() as usize] * (cost(first, s | me) - cost(first, s))).sum()
        })
        .collect()
}

impl Search for SvNup {
    fn search(&self, lab: &mut dyn Lab, ask: &SearchAsk) -> Result<Assignment, MethodError> {
        let n = lab.slots().len();
        if n == 0 {
            return Ok(Vec::new());
        }
        let pruned = divide::target(lab, ask.budget_bytes)?;
        let most = |s: usize| (0..lab.levels(s).len()).rev().max_by_key(|&l| lab.levels(s)[l].bytes).unwrap_or(0);
        let dense: Assignment = (0..n).map(most).collect();
        if dense == pruned {
            return Ok(pruned);
        }
        let coalition = |first: usize, members: u64| -> Assignment {
            let in_it = |s: usize| s >= first && s - first < 64 && members >> (s - first) & 1 == 1;
            (0..n).map(|s| if in_it(s) { pruned[s] } else { dense[s] }).collect()
        };
        // Distinct coalitions of windows: all of the first, and of each later one those that hold its last slot.
        let count = |w: usize| (1usize << w) + (n - w) * (1usize << (w - 1));
        let Some(wide) = (1..=self.window.min(n)).rev().find(|&w| count(w) <= ask.trials) else {
            return Err(MethodError::new(format!(
                "{} coalitions of {n} slots alone are more than trials = {}",
                count(1),
                ask.trials
            )));
        };
        let mut known: HashMap<Assignment, f64> = HashMap::new();
        let mut batch: Vec<Assignment> = Vec::new();
        for i in 0..n {
            let (first, w) = window(i, n, wide);
            for members in 0..1u64 << w {
                let a = coalition(first, members);
                if known.insert(a.clone(), f64::NAN).is_none() {
                    batch.push(a);
                }
            }
        }
        let outcomes = lab.measure(&batch, ask.tokens)?;
        known.extend(batch.into_iter().zip(outcomes.iter().map(|o| o.loss)));
        let cost = |first: usize, members: u64| known.get(&coalition(first, members)).copied().unwrap_or(f64::NAN);
        let phi = values(n, wide, &cost);
        if let Some(s) = phi.iter().position(|v| !v.is_finite()) {
            return Err(MethodError::new(format!("the Shapley value of {} is {}", lab.slots()[s].name, phi[s])));
        }
        let mean = phi.iter().sum::<f64>() / n as f64;
        let far = phi.iter().map(|v| (v - mean).abs()).fold(0.0, f64::max);
        let wished = |s: usize| {
            let off = if far > 0.0 { self.lambda * (phi[s] - mean) / far } else { 0.0 };
            lab.levels(s)[pruned[s]].value - off
        };
        let wished: Vec<f64> = (0..n).map(wished).collect();
        let by = |f: fn(std::cmp::Ordering) -> bool| {
            let better = |a: usize, b: usize| if f(phi[b].total_cmp(&phi[a])) { b } else { a };
            (0..n).reduce(better).unwrap_or(0)
        };
        let (low, high) = (by(std::cmp::Ordering::is_lt), by(std::cmp::Ordering::is_gt));
        let told = |s: usize| format!("{:.4} nats ({})", phi[s], lab.slots()[s].name);
        let note = format!(
            "Shapley values from {} to {}, of {} coalitions in windows of {wide}",
            told(low),
            told(high),
            known.len()
        );
        lab.note(note);
        divide::nearest(lab, &wished, ask.budget_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::testkit::{Bench, Known};
    use lacuna_base::testkit::random;

    /// The definition over orders: the mean of what a player adds when the players of its window come one by one, in
    /// every order.
    fn brute(n: usize, wanted: usize, cost: &dyn Fn(&[usize]) -> f64) -> Vec<f64> {
        fn orders(left: &[usize], so_far: &[usize], out: &mut Vec<Vec<usize>>) {
            if left.is_empty() {
                out.push(so_far.to_vec());
            }
            for &p in left {
                let rest: Vec<usize> = left.iter().copied().filter(|q| *q != p).collect();
                orders(&rest, &[so_far, &[p]].concat(), out);
            }
        }
        (0..n)
            .map(|i| {
                let (first, w) = window(i, n, wanted);
                let mut all = Vec::new();
                orders(&(first..first + w).collect::<Vec<_>>(), &[], &mut all);
                let adds = |order: &Vec<usize>| {
                    let at = order.iter().position(|p| *p == i).expect("in its window");
                    cost(&order[..=at]) - cost(&order[..at])
                };
                all.iter().map(adds).sum::<f64>() / all.len() as f64
            })
            .collect()
    }

    #[test]
    fn windows_hold_their_slot_and_stay_within_the_model() {
        for n in 1..9 {
            for wanted in 1..12 {
                for i in 0..n {
                    let (first, w) = window(i, n, wanted);
                    assert!(first <= i && i < first + w && first + w <= n && w == wanted.min(n), "{n} {wanted} {i}");
                }
            }
        }
        assert_eq!(window(5, 10, 3), (4, 3));
    }

    #[test]
    fn agrees_with_brute_force_within_the_window_and_over_all() {
        for seed in 0..10 {
            let n = 2 + seed as usize % 5;
            let m = &random(n, n, seed);
            // Costs with pairs that add up to less or more than their parts.
            let cost = |s: &[usize]| -> f64 {
                let pairs = s.iter().flat_map(|&a| s.iter().map(move |&b| f64::from(m[(a, b)])));
                pairs.sum::<f64>().tanh()
            };
            let bits = |first: usize, members: u64| {
                let s: Vec<usize> = (0..n).filter(|p| *p >= first && members >> (p - first) & 1 == 1).collect();
                cost(&s)
            };
            for wanted in [1, 2, 3, n] {
                let (got, want) = (values(n, wanted, &bits), brute(n, wanted, &cost));
                assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-12), "{n} {wanted}: {got:?} {want:?}");
            }
            let all: f64 = values(n, n, &bits).iter().sum();
            assert!((all - cost(&(0..n).collect::<Vec<_>>())).abs() < 1e-12, "the values share out the whole cost");
        }
    }

    #[test]
    fn an_additive_game_is_exact_in_any_window() {
        let own = [0.5, 0.0, 2.0, -0.25, 1.0, 1.0];
        let bits = |first: usize, members: u64| {
            (0..6).filter(|p| *p >= first && members >> (p - first) & 1 == 1).map(|p| own[p]).sum()
        };
        for wanted in 1..7 {
            assert!(values(6, wanted, &bits).iter().zip(own).all(|(a, b)| (a - b).abs() < 1e-12), "{wanted}");
        }
    }

    #[test]
    fn layers_that_cost_more_are_pruned_less_with_few_trials_and_a_lower_loss() {
        let sparsity = [0.0f64, 0.5, 0.6, 0.7, 0.8];
        let weight = [8.0, 1.0, 1.0, 0.5, 1.0, 0.5, 1.0, 4.0];
        let loss = move |a: &[usize]| -> f64 {
            let e: Vec<f64> = a.iter().zip(weight).map(|(&l, w)| w * sparsity[l].powi(4)).collect();
            e.iter().sum::<f64>() + e.windows(2).map(|p| 0.1 * p[0] * p[1]).sum::<f64>()
        };
        let mut lab = Known::new(8, &sparsity, loss);
        let ask = SearchAsk { budget_bytes: lab.bytes(&[3; 8]), trials: 50, tokens: 8, seed: 0 };
        let got = SvNup::default().search(&mut lab, &ask).expect("found");
        assert!(lab.bytes(&got) <= ask.budget_bytes);
        assert!(got[0] < got[3] && got[0] < 3, "{got:?}");
        assert!(loss(&got) < loss(&[3; 8]), "{got:?}");
        assert_eq!(lab.measured, 8 + 6 * 4 - 4, "2^w for the first window, 2^(w-1) for each new one");
        assert!(lab.notes[0].contains("Shapley"), "{:?}", lab.notes);
        // With fewer trials a narrower window; with fewer than the slots alone take nothing.
        lab.measured = 0;
        SvNup::default().search(&mut lab, &SearchAsk { trials: 20, ..ask }).expect("found");
        assert_eq!(lab.measured, 4 + 6 * 2, "windows of 2");
        assert!(SvNup::default().search(&mut lab, &SearchAsk { trials: 8, ..ask }).is_err());
        let mut bench = Bench::new(4, 3, 1);
        let ask = SearchAsk { budget_bytes: bench.bytes(&[1; 4]), trials: 99, tokens: 8, seed: 0 };
        assert_eq!(SvNup::default().search(&mut bench, &ask), SvNup::default().search(&mut bench, &ask));
        for bad in [serde_json::json!({ "window": 0 }), serde_json::json!({ "lambda": 0 })] {
            assert!((method().make)(bad).is_err());
        }
    }
}
