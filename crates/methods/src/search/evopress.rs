//! EvoPress: levels evolve; each generation a few of them switch places, and the fittest assignment goes on.
//!
//! **Paper.** Oliver Sieberling, Denis Kuznedelev, Eldar Kurtic, Dan Alistarh, "EvoPress: Towards Optimal Dynamic Model
//! Compression via Evolutionary Search", 2024, arXiv 2410.14649.
//!
//! **Idea.** A (1 + λ) evolution. A child is its parent with `min(x, y)` level switches, `x` and `y` drawn from 1, 2,
//! 3: a slot goes one level up, another slot of its group one down. All λ children are measured on few tokens, the best
//! of them on more, the last ones and the parent on most; the best of these is the next parent. Fitness is KL(source ||
//! trial). The first parent is the uniform assignment, or, where no level taken everywhere uses the budget up, the best
//! of some that random places were lowered in until the budget held.
//!
//! **Shapes and units.** Slots with their levels; a level's index for each slot. Tokens of a selection are shares of
//! those the step allows.
//!
//! **Cost.** A generation is λ trials on `shares[0]` of the tokens, `survivors[0]` trials on `shares[1]`, and so on;
//! memory a few assignments. The paper's defaults want 400 · 74 trials; the step's `trials` ends the search before.
//!
//! **Departs.** (1) Levels are ordered by bytes, and places of a group need not be of one size: places of the group,
//! then of any, go down until the budget holds again, none where it holds anyhow. (2) Every selection takes the first
//! tokens of the text and not a random part, so an outcome never changes: the parent is not measured again, and no
//! assignment twice. (3) The uniform assignment is measured too, and wins against anything that is not better on most
//! tokens. (4) The last generation has as many children as trials are left for.

use std::collections::HashSet;

use lacuna_base::Rng;
use lacuna_contract::{Assignment, Card, Lab, Made, Method, MethodError, Search, SearchAsk};
use serde::Deserialize;

use super::uniform::uniform;
use crate::make;

/// The paper's parameters.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct EvoPress {
    /// Generations at the most.
    generations: usize,
    /// λ, children of a generation; 1 or more.
    offspring: usize,
    /// How many are left after each selection, never rising; the last is 1.
    survivors: Vec<usize>,
    /// Tokens of each selection, as fractions of the step's `tokens`, above 0 to 1.
    shares: Vec<f64>,
    /// Random assignments to begin with, where no uniform one uses the budget up; 1 or more.
    initial: usize,
}

impl Default for EvoPress {
    fn default() -> EvoPress {
        let (survivors, shares) = (vec![8, 2, 1], vec![1.0 / 32.0, 0.25, 1.0]);
        EvoPress { generations: 400, offspring: 64, survivors, shares, initial: 64 }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "evopress",
            paper: "Sieberling, Kuznedelev, Kurtic, Alistarh: EvoPress: Towards Optimal Dynamic Model Compression via \
             Evolutionary Search, 2024",
            arxiv: "2410.14649",
            summary: "Levels evolve: a few switch places in each generation, and the assignment nearest to the source \
             goes on.",
            system: Some(184),
            verb: "search",
            needs: &[],
            abilities: &[],
        },
        keys: make::keys::<EvoPress>,
        make: |given| {
            let p: EvoPress = make::parameters("evopress", given)?;
            p.check()?;
            Ok(Made::Search(Box::new(p)))
        },
    }
}

impl EvoPress {
    fn check(&self) -> Result<(), MethodError> {
        let fail = |what: String| Err(MethodError::new(what));
        if self.offspring == 0 || self.initial == 0 {
            return fail("offspring and initial must be 1 or more".into());
        }
        let falling = self.survivors.windows(2).all(|p| p[0] >= p[1]);
        if self.survivors.last() != Some(&1) || !falling {
            return fail(format!("survivors = {:?}; write numbers that fall to 1, like [8, 2, 1]", self.survivors));
        }
        if self.shares.len() != self.survivors.len() || !self.shares.iter().all(|s| *s > 0.0 && *s <= 1.0) {
            return fail(format!(
                "shares = {:?}; write {} fractions above 0, up to 1",
                self.shares,
                self.survivors.len()
            ));
        }
        Ok(())
    }

    /// Trials of a generation of `children`.
    fn cost(&self, children: usize) -> usize {
        let later = self.survivors[..self.survivors.len() - 1].iter();
        children + later.map(|&s| s.min(children)).sum::<usize>()
    }
}

/// What can be assigned: for each slot its levels by rising bytes. A *rung* is a place in that order; points are made
/// of rungs.
struct Space {
    order: Vec<Vec<usize>>,
    bytes: Vec<Vec<u64>>,
    group: Vec<usize>,
    budget: u64,
}

impl Space {
    fn new(lab: &dyn Lab, budget: u64) -> Space {
        let slots = 0..lab.slots().len();
        let order: Vec<Vec<usize>> = slots
            .map(|s| {
                let levels = lab.levels(s);
                let mut order: Vec<usize> = (0..levels.len()).collect();
                // Of two that take the same bytes the better one is the higher.
                order.sort_by(|&a, &b| {
                    let (a, b) = (&levels[a], &levels[b]);
                    a.bytes.cmp(&b.bytes).then(b.error.total_cmp(&a.error))
                });
                order
            })
            .collect();
        let bytes = order.iter().enumerate().map(|(s, o)| o.iter().map(|&l| lab.levels(s)[l].bytes).collect());
        Space { bytes: bytes.collect(), group: lab.slots().iter().map(|s| s.group).collect(), order, budget }
    }

    fn assignment(&self, point: &[usize]) -> Assignment {
        point.iter().zip(&self.order).map(|(&rung, order)| order[rung]).collect()
    }

    fn point(&self, assignment: &[usize]) -> Option<Vec<usize>> {
        assignment.iter().zip(&self.order).map(|(l, order)| order.iter().position(|o| o == l)).collect()
    }

    fn size(&self, point: &[usize]) -> u64 {
        point.iter().zip(&self.bytes).map(|(&rung, bytes)| bytes[rung]).sum()
    }

    /// Lowers slots drawn by lot, those of `first` before the others and never `but`, until the budget holds; whether
    /// that could be done.
    fn lower(&self, point: &mut [usize], first: Option<usize>, but: Option<usize>, rng: &mut Rng) -> bool {
        while self.size(point) > self.budget {
            let free = |s: &usize| point[*s] > 0 && Some(*s) != but;
            let mut from: Vec<usize> =
                (0..point.len()).filter(|s| free(s) && first.is_some_and(|g| g == self.group[*s])).collect();
            if from.is_empty() {
                from = (0..point.len()).filter(free).collect();
            }
            if from.is_empty() {
                return false;
            }
            point[from[rng.below(from.len())]] -= 1;
        }
        true
    }

    /// A child by level switches; none where the draw came to nothing.
    fn child(&self, parent: &[usize], rng: &mut Rng) -> Option<Vec<usize>> {
        let mut child = parent.to_vec();
        for _ in 0..(1 + rng.below(3)).min(1 + rng.below(3)) {
            let up: Vec<usize> = (0..child.len()).filter(|&s| child[s] + 1 < self.order[s].len()).collect();
            if up.is_empty() {
                break;
            }
            let up = up[rng.below(up.len())];
            child[up] += 1;
            if !self.lower(&mut child, Some(self.group[up]), Some(up), rng) {
                return None;
            }
        }
        (child != parent).then_some(child)
    }

    /// A random point within the budget: from the least uniform assignment above it, or from the top, slots go down.
    fn random(&self, rng: &mut Rng) -> Option<Vec<usize>> {
        let top: Vec<usize> = self.order.iter().map(|o| o.len() - 1).collect();
        let common = top.iter().copied().min().unwrap_or(0);
        let level = |rung: usize| vec![rung; top.len()];
        let mut point = (0..=common).map(level).find(|p| self.size(p) > self.budget).unwrap_or(top.clone());
        self.lower(&mut point, None, None, rng).then_some(point)
    }
}

/// The lab with what is left of its trials.
struct Counted<'a> {
    lab: &'a mut dyn Lab,
    space: Space,
    tokens: usize,
    left: usize,
}

impl Counted<'_> {
    /// Divergences of points on a share of the tokens; what is no number is infinite.
    fn measure(&mut self, points: &[Vec<usize>], share: f64) -> Result<Vec<f64>, MethodError> {
        let batch: Vec<Assignment> = points.iter().map(|p| self.space.assignment(p)).collect();
        let tokens = ((share * self.tokens as f64).round() as usize).max(1);
        let outcomes = self.lab.measure(&batch, tokens)?;
        if outcomes.len() != points.len() {
            return Err(MethodError::new(format!("{} outcomes of {} trials", outcomes.len(), points.len())));
        }
        self.left = self.left.saturating_sub(points.len());
        Ok(outcomes.iter().map(|o| if o.kl.is_nan() { f64::INFINITY } else { o.kl }).collect())
    }

    /// The `count` points of least divergence on a share of the tokens, best first.
    fn select(
        &mut self,
        points: Vec<Vec<usize>>,
        share: f64,
        count: usize,
    ) -> Result<Vec<(Vec<usize>, f64)>, MethodError> {
        let kl = self.measure(&points, share)?;
        let mut all: Vec<(Vec<usize>, f64)> = points.into_iter().zip(kl).collect();
        all.sort_by(|a, b| a.1.total_cmp(&b.1));
        all.truncate(count);
        Ok(all)
    }
}

impl EvoPress {
    /// The first parent, and the uniform assignment where it is another one.
    fn begin(&self, lab: &mut Counted<'_>, rng: &mut Rng) -> Result<(Vec<usize>, Option<Vec<usize>>), MethodError> {
        let budget = lab.space.budget;
        let even = uniform(&*lab.lab, budget).and_then(|a| lab.space.point(&a));
        if let Some(even) = &even {
            let top = even.iter().zip(&lab.space.order).all(|(&rung, order)| rung + 1 == order.len());
            if top || lab.space.size(even) == budget {
                return Ok((even.clone(), None));
            }
        }
        let none = || MethodError::new(format!("no assignment stays within {budget} bytes"));
        let mut all: Vec<Vec<usize>> = Vec::new();
        // A quarter of the trials may go into the beginning.
        for _ in 0..self.initial.min(lab.left / 4).max(1) {
            let point = lab.space.random(rng).ok_or_else(none)?;
            if !all.contains(&point) {
                all.push(point);
            }
        }
        if all.len() > 1 {
            let best = lab.select(all, self.shares[0], 1)?;
            all = best.into_iter().map(|(p, _)| p).collect();
        }
        Ok((all.pop().ok_or_else(none)?, even))
    }
}

impl Search for EvoPress {
    fn search(&self, lab: &mut dyn Lab, ask: &SearchAsk) -> Result<Assignment, MethodError> {
        let slots = lab.slots().len();
        if slots == 0 {
            return Ok(Vec::new());
        }
        if let Some(s) = (0..slots).find(|&s| lab.levels(s).is_empty()) {
            return Err(MethodError::new(format!("{} has no levels", lab.slots()[s].name)));
        }
        let space = Space::new(lab, ask.budget_bytes);
        let mut rng = Rng::new(ask.seed);
        let mut lab = Counted { lab, space, tokens: ask.tokens, left: ask.trials };
        let most = self.shares[self.shares.len() - 1];
        let (mut parent, even) = self.begin(&mut lab, &mut rng)?;
        let mut seen: HashSet<Vec<usize>> = HashSet::from([parent.clone()]);
        let mut rivals = vec![parent.clone()];
        rivals.extend(even.filter(|even| seen.insert(even.clone())));
        if lab.left < rivals.len() {
            // Nothing can be compared: the uniform assignment, where there is one.
            return Ok(lab.space.assignment(&rivals[rivals.len() - 1]));
        }
        let kl = lab.measure(&rivals, most)?;
        let mut least = kl[0];
        if kl.len() > 1 && kl[1] <= kl[0] {
            (parent, least) = (rivals[1].clone(), kl[1]);
        }
        for _ in 0..self.generations {
            let Some(count) = (1..=self.offspring).rev().find(|&n| self.cost(n) <= lab.left) else { break };
            let mut children = Vec::new();
            // Where hardly any are new, not all will be found; where none is, the search is over.
            for _ in 0..32 * count {
                children.extend(lab.space.child(&parent, &mut rng).filter(|c| seen.insert(c.clone())));
                if children.len() == count {
                    break;
                }
            }
            if children.is_empty() {
                break;
            }
            let mut best = Vec::new();
            for (&share, &survivors) in self.shares.iter().zip(&self.survivors) {
                best = lab.select(children, share, survivors)?;
                children = best.iter().map(|(p, _)| p.clone()).collect();
            }
            if let Some((child, kl)) = best.pop()
                && kl < least
            {
                (parent, least) = (child, kl);
            }
        }
        Ok(lab.space.assignment(&parent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::testkit::Bench;
    use lacuna_contract::{Level, Outcome, Slot};

    fn small() -> EvoPress {
        EvoPress { offspring: 16, survivors: vec![4, 1], shares: vec![0.5, 1.0], initial: 8, ..EvoPress::default() }
    }

    fn ask(budget_bytes: u64, trials: usize) -> SearchAsk {
        SearchAsk { budget_bytes, trials, tokens: 64, seed: 7 }
    }

    /// The least loss of all assignments within the budget, one after another.
    fn brute(lab: &Bench, slots: usize, levels: usize, budget: u64) -> f64 {
        let all = (0..levels.pow(slots as u32))
            .map(|n| (0..slots).map(|s| n / levels.pow(s as u32) % levels).collect::<Vec<usize>>());
        all.filter(|a| lab.bytes(a) <= budget).map(|a| lab.loss(&a)).fold(f64::INFINITY, f64::min)
    }

    #[test]
    fn agrees_with_brute_force_on_small_labs() {
        for seed in 0..40 {
            let mut lab = Bench::new(4, 4, seed);
            for budget in [lab.bytes(&[1; 4]), lab.bytes(&[2; 4]), lab.bytes(&[2; 4]) + 250, lab.bytes(&[3; 4])] {
                let chosen = small().search(&mut lab, &ask(budget, 2000)).expect("found");
                assert!(lab.bytes(&chosen) <= budget);
                let (got, best) = (lab.loss(&chosen), brute(&lab, 4, 4, budget));
                assert!(got <= best + 1e-12, "seed {seed}, budget {budget}: {got} above {best}, {chosen:?}");
            }
        }
    }

    #[test]
    fn trials_and_bytes_stay_within_their_budgets_and_uniform_is_never_better() {
        for seed in 0..10 {
            for levels in [2, 5] {
                for trials in (0..70).chain([200]) {
                    let mut lab = Bench::new(6, levels, seed);
                    let least = lab.bytes(&[levels - 1; 6]);
                    for budget in [least, least + 450, lab.bytes(&[0; 6]), lab.bytes(&[1; 6])] {
                        lab.measured = 0;
                        let method = if trials % 2 == 0 { small() } else { EvoPress::default() };
                        let chosen = method.search(&mut lab, &ask(budget, trials)).expect("found");
                        assert!(lab.measured <= trials, "{} trials of {trials}", lab.measured);
                        assert!(lab.bytes(&chosen) <= budget);
                        let even = uniform(&lab, budget).expect("one fits");
                        assert!(lab.loss(&chosen) <= lab.loss(&even), "{trials} trials: {chosen:?} and {even:?}");
                        assert_eq!(method.search(&mut lab, &ask(budget, trials)), Ok(chosen), "the same seed");
                    }
                }
            }
        }
        let mut lab = Bench::new(3, 3, 1);
        assert!(small().search(&mut lab, &ask(1, 50)).expect_err("too few bytes").what.contains("1 bytes"));
        assert_eq!(small().search(&mut Bench::new(0, 3, 1), &ask(1, 50)), Ok(vec![]));
    }

    #[test]
    fn parts_that_are_there_or_not_are_exchanged() {
        // Two levels: nothing between all and half of the bytes is uniform.
        let mut better = 0;
        for seed in 0..20 {
            let mut lab = Bench::new(8, 2, seed);
            let budget = lab.bytes(&[0; 8]) * 3 / 4;
            let chosen = small().search(&mut lab, &ask(budget, 400)).expect("found");
            assert!(lab.bytes(&chosen) <= budget && lab.loss(&chosen) < lab.loss(&[1; 8]));
            better += usize::from(lab.loss(&chosen) <= brute(&lab, 8, 2, budget) + 1e-12);
        }
        assert!(better >= 18, "the best of all in {better} of 20 labs");
    }

    #[test]
    fn levels_switch_within_a_group() {
        let bytes = |levels: usize| (0..levels as u64).map(|l| 10 + l).collect::<Vec<u64>>();
        let space = Space {
            order: vec![(0..4).collect(); 6],
            bytes: vec![bytes(4); 6],
            group: vec![0, 0, 0, 1, 1, 1],
            budget: 6 * 11,
        };
        let mut rng = Rng::new(3);
        for _ in 0..500 {
            let Some(child) = space.child(&[1; 6], &mut rng) else { continue };
            assert_eq!(child[..3].iter().sum::<usize>(), 3, "{child:?}");
            assert_eq!(child[3..].iter().sum::<usize>(), 3, "{child:?}");
            let moved = child.iter().map(|&l| l.abs_diff(1)).sum::<usize>();
            assert!((2..=6).contains(&moved), "{child:?}");
        }
    }

    /// A bench whose outcomes are no numbers where slot 0 is at level 0.
    struct Wild(Bench, f64);

    impl Lab for Wild {
        fn slots(&self) -> &[Slot] {
            self.0.slots()
        }

        fn levels(&self, slot: usize) -> &[Level] {
            self.0.levels(slot)
        }

        fn measure(&mut self, batch: &[Assignment], tokens: usize) -> Result<Vec<Outcome>, MethodError> {
            let mut all = self.0.measure(batch, tokens)?;
            let bad = self.1;
            all.iter_mut().zip(batch).filter(|(_, a)| a[0] == 0).for_each(|(o, _)| o.kl = bad);
            Ok(all)
        }
    }

    #[test]
    fn what_is_no_number_never_wins() {
        for seed in 0..10 {
            for bad in [f64::NAN, -f64::NAN, f64::INFINITY] {
                let mut lab = Wild(Bench::new(4, 4, seed), bad);
                let budget = lab.0.bytes(&[1; 4]);
                let chosen = small().search(&mut lab, &ask(budget, 300)).expect("found");
                assert!(chosen[0] > 0 && lab.0.loss(&chosen) <= lab.0.loss(&[1; 4]), "{chosen:?}");
            }
        }
    }

    #[test]
    fn parameters_that_make_no_sense_are_refused() {
        for bad in [
            serde_json::json!({ "offspring": 0 }),
            serde_json::json!({ "survivors": [8, 2] }),
            serde_json::json!({ "survivors": [2, 8, 1] }),
            serde_json::json!({ "survivors": [] }),
            serde_json::json!({ "shares": [0.5, 1.0] }),
            serde_json::json!({ "shares": [0.0, 0.5, 1.0] }),
        ] {
            assert!((method().make)(bad.clone()).is_err(), "{bad}");
        }
    }
}
