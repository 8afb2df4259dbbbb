//! H2O: slots that got most attention so far stay, and the newest.
//!
//! **Paper.** Zhenyu Zhang, Ying Sheng, Tianyi Zhou, Tianlong Chen, Lianmin Zheng, Ruisi Cai, Zhao Song, Yuandong
//! Tian, Christopher Ré, Clark Barrett, Zhangyang Wang, Beidi Chen, "H₂O: Heavy-Hitter Oracle for Efficient Generative
//! Inference of Large Language Models", 2023, arXiv 2306.14048.
//!
//! **Idea.** `F(i) = Σ_q softmax(q Kᵀ / √d)_i`, over all queries since position `i` was written: a few positions, the
//! heavy hitters, get most of the attention, and they stay so. Of `budget` slots the newest ones (half by default)
//! stay because they had no time to gather, the others by the largest `F`.
//!
//! **Shapes and units.** Slots of each head with absolute positions and their accumulated mass (in queries); kept
//! slots, rising.
//!
//! **Cost.** One number a slot, added up by the attention kernel; a partial sort of the slots at each cut.
//!
//! **Departs.** The paper drops a slot with every token; here slots are dropped every `every` positions, at absolute
//! ones. Query heads that share a key head share its slots, so their masses are added. The budget is a number of
//! slots, where the paper's experiments take a share of the prompt. Where masses are alike the earlier position stays.

use lacuna_contract::{Card, Keep, KeepHead, KeepPlan, MadeRunning, MethodError, RunMethod};
use serde::{Deserialize, Serialize};

use crate::family::keys::{Fraction, Whole};
use crate::{keep, make};

/// What stays.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
struct H2o {
    /// Slots that a head keeps, 1 to 2^30.
    budget: Whole<1, { 1 << 30 }>,
    /// Fraction of the budget that goes to the newest, 0 to 1.
    recent: Fraction,
    /// Positions between two cuts, 1 to 65536.
    every: Whole<1, 65536>,
}

impl Default for H2o {
    fn default() -> H2o {
        H2o { budget: Whole(1024), recent: Fraction(0.5), every: Whole(32) }
    }
}

pub(crate) fn method() -> RunMethod {
    RunMethod {
        card: Card {
            name: "h2o",
            paper: "Zhang, Sheng, Zhou, Chen, Zheng, Cai, Song, Tian, Ré, Barrett, Wang, Chen: H2O: Heavy-Hitter \
                    Oracle for Efficient Generative Inference of Large Language Models, 2023",
            arxiv: "2306.14048",
            summary: "Keeps the keys and values that got most attention so far, and the newest.",
            system: None,
            verb: "keep",
            needs: &[],
            abilities: &[],
        },
        keys: make::keys::<H2o>,
        defaults: make::defaults::<H2o>,
        make: |given, _| Ok(MadeRunning::Keep(Box::new(make::parameters::<H2o>("h2o", given)?))),
    }
}

impl Keep for H2o {
    fn plan(&self) -> KeepPlan {
        KeepPlan { mass: true, every: self.every.0, budget: self.budget.0 }
    }

    fn keep(&self, heads: &[KeepHead<'_>], budget: usize) -> Result<Vec<Vec<usize>>, MethodError> {
        let one = |head: &KeepHead<'_>| {
            keep::check(head, true)?;
            let n = head.positions.len();
            if n <= budget {
                return Ok((0..n).collect());
            }
            // Fewer than n, since the budget is.
            let newest = ((budget as f64 * self.recent.0).round() as usize).min(budget);
            let heavy = budget - newest;
            let mut kept: Vec<usize> = (0..n - newest).collect();
            if heavy > 0 {
                kept.select_nth_unstable_by(heavy - 1, |&a, &b| head.mass[b].total_cmp(&head.mass[a]).then(a.cmp(&b)));
            }
            kept.truncate(heavy);
            kept.sort_unstable();
            kept.extend(n - newest..n);
            Ok(kept)
        };
        heads.iter().map(one).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Rng;

    /// Straight from the definition: the newest stay; another slot stays if fewer than the rest of the budget are
    /// heavier, or as heavy and earlier.
    #[test]
    fn agrees_with_brute_force_with_ties() {
        for seed in 0..500 {
            let mut rng = Rng::new(seed);
            let n = rng.below(24);
            let positions: Vec<usize> = (0..n).map(|i| 3 * i).collect();
            let mass: Vec<f32> = (0..n).map(|_| rng.below(4) as f32 * 0.5).collect();
            let (budget, recent) = (rng.below(20), [0.0, 0.3, 0.5, 1.0][rng.below(4)]);
            let by = H2o { recent: Fraction(recent), ..H2o::default() };
            let head = KeepHead { layer: 0, head: 0, positions: &positions, mass: &mass };
            let kept = by.keep(&[head], budget).expect("keeps").remove(0);
            let newest = ((budget as f64 * recent).round() as usize).min(n);
            let old = n - newest;
            let before = |i: usize| (0..old).filter(|&j| mass[j] > mass[i] || (mass[j] == mass[i] && j < i)).count();
            let want: Vec<usize> = (0..n).filter(|&i| n <= budget || i >= old || before(i) < budget - newest).collect();
            assert_eq!(kept, want, "seed {seed}: {mass:?}, {budget} by {recent}");
        }
    }

    /// The paper's claim: where few positions get most of the attention, they are still there at the end, and a window
    /// of the same size has lost them.
    #[test]
    fn heavy_hitters_outlive_the_window() {
        let heavy = [5, 17, 40];
        let by = H2o { budget: Whole(16), every: Whole(8), ..H2o::default() };
        let (mut positions, mut mass): (Vec<usize>, Vec<f32>) = (Vec::new(), Vec::new());
        let mut rng = Rng::new(1);
        for position in 0..400 {
            positions.push(position);
            mass.push(0.0);
            let weights: Vec<f32> =
                positions.iter().map(|p| if heavy.contains(p) { 2.0 } else { 0.2 * rng.f32() }).collect();
            let all: f32 = weights.iter().sum();
            mass.iter_mut().zip(&weights).for_each(|(m, w)| *m += w / all);
            if (position + 1) % 8 == 0 {
                let head = KeepHead { layer: 0, head: 0, positions: &positions, mass: &mass };
                let kept = by.keep(&[head], 16).expect("keeps").remove(0);
                (positions, mass) = kept.into_iter().map(|i| (positions[i], mass[i])).unzip();
            }
        }
        assert!(heavy.iter().all(|h| positions.contains(h)), "{positions:?}");
        assert!(positions.len() == 16 && (392..400).all(|p| positions.contains(&p)), "{positions:?}");
    }

    #[test]
    fn mass_that_is_none_is_refused() {
        for mass in [&[1.0][..], &[1.0, f32::NAN], &[-1.0, 0.0]] {
            let head = KeepHead { layer: 2, head: 5, positions: &[8, 9], mass };
            let said = H2o::default().keep(&[head], 1).expect_err("refused").what;
            assert!(said.contains("layer 2, head 5"), "{said}");
        }
    }
}
