//! How many tokens of a draft to verify: what a step costs by its rows, how likely each token is, and what a text has
//! spent so far.

use crate::card::MethodError;
use crate::tree::Tree;

/// Modelled seconds that drafting may take in all, in those of plain decoding.
pub const MOST_COST: f64 = 1.03;

/// Seconds of a step of the decoder by its rows: straight lines between measured counts, never falling; before the
/// first count its seconds, behind the last one as steep as the last line.
#[derive(Clone, Debug, PartialEq)]
pub struct StepSeconds {
    measured: Vec<(usize, f64)>,
    /// Of a copy of a text's state, where it has one.
    state: Option<f64>,
}

impl StepSeconds {
    /// Of measured `(rows, seconds)`, rows rising.
    pub fn new(mut measured: Vec<(usize, f64)>) -> Result<StepSeconds, MethodError> {
        if measured.is_empty() {
            return Err(MethodError::new("no step was measured"));
        }
        if let Some(w) = measured.windows(2).find(|w| w[0].0 >= w[1].0) {
            return Err(MethodError::new(format!("a step of {} rows stands before one of {}", w[0].0, w[1].0)));
        }
        if let Some((rows, seconds)) = measured.iter().find(|(r, s)| *r == 0 || !(s.is_finite() && *s > 0.0)) {
            return Err(MethodError::new(format!("a step of {rows} rows in {seconds} seconds")));
        }
        // A step with more rows that was measured faster is noise, and would make rows look free.
        let mut most = 0.0;
        for (_, seconds) in &mut measured {
            most = seconds.max(most);
            *seconds = most;
        }
        Ok(StepSeconds { measured, state: None })
    }

    /// Of a model whose texts have a state, which takes `copy` seconds to copy. A draft then takes a copy, and where
    /// some of it comes and not all, a later step computes that much once more.
    #[must_use]
    pub fn with_state(self, copy: f64) -> StepSeconds {
        StepSeconds { state: Some(copy), ..self }
    }

    /// Whether they are those of such a model.
    pub fn has_state(&self) -> bool {
        self.state.is_some()
    }

    /// What `taken` of `nodes` that came add to a later step of as many rows as `company` and a text's own.
    fn again(&self, company: Company, nodes: usize, taken: usize) -> f64 {
        if self.state.is_none() || taken >= nodes {
            return 0.0;
        }
        self.of(company.rows + 1 + taken) - self.of(company.rows + 1)
    }

    /// Of a step of so many rows.
    pub fn of(&self, rows: usize) -> f64 {
        let points = &self.measured;
        let after = points.partition_point(|(r, _)| *r <= rows);
        if after == 0 {
            return points[0].1;
        }
        let (low, high) = if after < points.len() { (after - 1, after) } else { (after.saturating_sub(2), after - 1) };
        let ((r0, s0), (r1, s1)) = (points[low], points[high]);
        if r1 == r0 {
            // A single measurement: rows are taken to cost alike.
            return s0 * (rows as f64 / r0 as f64);
        }
        s0 + (s1 - s0) * (rows as f64 - r0 as f64) / (r1 as f64 - r0 as f64)
    }
}

/// The other texts of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Company {
    /// Their rows, drafts included.
    pub rows: usize,
    /// Tokens that they will commit, by expectation.
    pub tokens: f64,
}

/// Siblings that are told apart; all further ones count as the last.
const RANKS: usize = 8;

/// Depths that are told apart; all further ones count as the last.
const DEPTHS: usize = 8;

/// What a count keeps with each new trial: about the last 50 matter.
const MEMORY: f64 = 0.98;

/// Trials that a guess weighs.
const GUESS: f64 = 3.0;

/// Running averages of how often a draft's token was the one that came: by how deep it stood and the how manieth child
/// it was, among the times that all above it had come. It learns from drafts that nobody verified as well, from the
/// tokens that came instead.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Acceptance {
    /// Weighted trials and hits.
    seen: [[(f64, f64); RANKS]; DEPTHS],
}

impl Acceptance {
    /// A draft for a text, and the tokens that were committed behind that text: at least one.
    pub fn observe(&mut self, tree: &Tree, followed: &[u32]) {
        let mut at = None;
        for (depth, next) in followed.iter().enumerate() {
            let mut hit = None;
            let children = tree.parents.iter().zip(&tree.tokens).enumerate().filter(|(_, (p, _))| **p == at);
            for (rank, (node, (_, token))) in children.enumerate() {
                let (trials, hits) = &mut self.seen[depth.min(DEPTHS - 1)][rank.min(RANKS - 1)];
                *trials = *trials * MEMORY + 1.0;
                *hits = *hits * MEMORY + f64::from(token == next);
                if token == next {
                    hit = Some(node);
                }
            }
            if hit.is_none() {
                return;
            }
            at = hit;
        }
    }

    /// How likely each node of a draft is committed.
    pub fn chances(&self, tree: &Tree) -> Vec<f64> {
        // The how manieth child of the text, and of each node, comes next.
        let mut ranks = vec![0usize; tree.len() + 1];
        let mut found: Vec<(f64, usize)> = Vec::with_capacity(tree.len());
        for parent in &tree.parents {
            let (above, depth) = parent.and_then(|p| found.get(p)).map_or((1.0, 0), |(c, d)| (*c, d + 1));
            let rank = ranks.get_mut(parent.map_or(0, |p| p + 1)).map_or(0, |rank| {
                *rank += 1;
                *rank - 1
            });
            found.push((above * self.chance(depth, rank), depth));
        }
        found.into_iter().map(|(chance, _)| chance).collect()
    }

    /// How likely the `rank`th child at `depth` is the next token. Where little was seen, that rank at all depths
    /// counts, and where that is little, too, half of what the ranks before it left out.
    fn chance(&self, depth: usize, rank: usize) -> f64 {
        let (depth, rank) = (depth.min(DEPTHS - 1), rank.min(RANKS - 1));
        let toward = |(trials, hits): (f64, f64), guess: f64| (hits + GUESS * guess) / (trials + GUESS);
        let all = self.seen.iter().map(|ranks| ranks[rank]).fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
        toward(self.seen[depth][rank], toward(all, 1.0 / ((rank + 1) * (rank + 2)) as f64))
    }
}

/// The number of nodes, of those with these `chances`, with which a step gives most tokens a second, all texts
/// together; the least of several, 0 where a draft does not pay. Where texts have a state, the nodes are a chain.
pub fn best_nodes(seconds: &StepSeconds, company: Company, chances: &[f64]) -> usize {
    let (mut tokens, mut best) = (company.tokens + 1.0, 0);
    let mut most = tokens / seconds.of(company.rows + 1);
    for (i, chance) in chances.iter().enumerate() {
        tokens += chance;
        let rate = tokens / (seconds.of(company.rows + 1) + expected(seconds, company, &chances[..=i]));
        if rate > most {
            (most, best) = (rate, i + 1);
        }
    }
    best
}

/// What a text has spent on steps, and what plain decoding would have: drafts are let through only as long as the
/// former stays within [`MOST_COST`] times the latter, whatever comes of them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Ledger {
    spent: f64,
    plain: f64,
}

impl Ledger {
    /// A text whose prompt took so many modelled seconds, which is what first drafts may lean on.
    pub fn begin(prompt_seconds: f64) -> Ledger {
        Ledger { spent: prompt_seconds, plain: prompt_seconds }
    }

    /// How many nodes, of those with these `chances`, the next step should verify.
    pub fn nodes(&self, seconds: &StepSeconds, company: Company, chances: &[f64]) -> usize {
        let share = share(seconds, company);
        let within = |n: &usize| {
            let holds = |taken: usize| {
                let spent = self.spent + share + extra(seconds, company, *n, taken);
                spent <= MOST_COST * (self.plain + share * (taken + 1) as f64)
            };
            // What comes counts where some of it is computed once more; else the worst is that nothing comes.
            holds(0) && (!seconds.has_state() || (1..=*n).all(holds))
        };
        let most = (1..=chances.len()).take_while(within).last().unwrap_or(0);
        best_nodes(seconds, company, &chances[..most])
    }

    /// A step that verified `nodes`, of which `taken` came, and committed `tokens`, at least one.
    pub fn step(&mut self, seconds: &StepSeconds, company: Company, nodes: usize, taken: usize, tokens: usize) {
        let share = share(seconds, company);
        self.spent += share + extra(seconds, company, nodes, taken);
        self.plain += share * tokens as f64;
    }

    /// Seconds spent, over those of plain decoding; 1 before anything was.
    pub fn cost(&self) -> f64 {
        if self.plain > 0.0 { self.spent / self.plain } else { 1.0 }
    }
}

/// A plain text's part of a step.
fn share(seconds: &StepSeconds, company: Company) -> f64 {
    seconds.of(company.rows + 1) / (company.tokens + 1.0)
}

/// What a draft of which `taken` nodes come adds to a step, and to the one after.
fn extra(seconds: &StepSeconds, company: Company, nodes: usize, taken: usize) -> f64 {
    if nodes == 0 {
        return 0.0;
    }
    let rows = seconds.of(company.rows + 1 + nodes) - seconds.of(company.rows + 1);
    rows + seconds.state.unwrap_or(0.0) + seconds.again(company, nodes, taken)
}

/// The same by expectation.
fn expected(seconds: &StepSeconds, company: Company, chances: &[f64]) -> f64 {
    let nodes = chances.len();
    let all = extra(seconds, company, nodes, nodes);
    if seconds.state.is_none() {
        return all;
    }
    // So many come and the next one does not.
    let exactly = |taken: usize| (chances[taken - 1] - chances[taken]).max(0.0);
    all + (1..nodes).map(|taken| exactly(taken) * seconds.again(company, nodes, taken)).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Rng;

    fn unit(rng: &mut Rng) -> f64 {
        f64::from(rng.f32())
    }

    fn random_seconds(rng: &mut Rng) -> StepSeconds {
        let (mut rows, mut at) = (0, 0.2 + unit(rng));
        let measured = (0..1 + rng.below(5)).map(|_| {
            rows += 1 + rng.below(4);
            at += unit(rng) * 0.4;
            (rows, at)
        });
        StepSeconds::new(measured.collect()).expect("rising")
    }

    #[test]
    fn seconds_lie_on_the_lines() {
        let s = StepSeconds::new(vec![(1, 1.0), (4, 1.6), (8, 1.2), (16, 3.2)]).expect("measured");
        let want = [(0, 1.0), (1, 1.0), (2, 1.2), (4, 1.6), (6, 1.6), (8, 1.6), (12, 2.4), (16, 3.2), (20, 4.0)];
        for (rows, seconds) in want {
            assert!((s.of(rows) - seconds).abs() < 1e-12, "{rows}: {}", s.of(rows));
        }
        let one = StepSeconds::new(vec![(2, 1.0)]).expect("measured");
        assert_eq!([1, 2, 6].map(|r| one.of(r)), [1.0, 1.0, 3.0]);
        for bad in [vec![], vec![(0, 1.0)], vec![(1, 0.0)], vec![(1, f64::NAN)], vec![(2, 1.0), (2, 2.0)]] {
            assert!(StepSeconds::new(bad).is_err());
        }
        let mut rng = Rng::new(1);
        for _ in 0..200 {
            let s = random_seconds(&mut rng);
            assert!((0..40).all(|r| s.of(r) <= s.of(r + 1) && s.of(r) > 0.0), "{s:?}");
        }
    }

    #[test]
    fn the_best_number_is_the_best_by_brute_force() {
        let (mut none, mut some, mut all) = (0, 0, 0);
        for seed in 0..500 {
            let mut rng = Rng::new(seed);
            let s = random_seconds(&mut rng);
            let company = Company { rows: rng.below(5), tokens: unit(&mut rng) * 4.0 };
            let chances: Vec<f64> = (0..rng.below(12)).map(|_| unit(&mut rng)).collect();
            let rate =
                |n: usize| (company.tokens + 1.0 + chances[..n].iter().sum::<f64>()) / s.of(company.rows + 1 + n);
            let best = best_nodes(&s, company, &chances);
            assert!((0..=chances.len()).all(|n| rate(n) <= rate(best) * (1.0 + 1e-12)), "seed {seed}");
            assert!((0..best).all(|n| rate(n) < rate(best) * (1.0 + 1e-12)), "seed {seed}");
            match best {
                0 => none += 1,
                n if n == chances.len() => all += 1,
                _ => some += 1,
            }
        }
        assert!(none > 30 && some > 30 && all > 30, "{none} {some} {all}");
    }

    /// With a state, from the definition: over all that may come of a chain, what it costs now and in the next step.
    #[test]
    fn a_chain_with_a_state_is_weighed_with_what_is_computed_again() {
        let (mut none, mut some, mut fewer) = (0, 0, 0);
        for seed in 0..500 {
            let mut rng = Rng::new(seed);
            let plain = random_seconds(&mut rng);
            let copy = unit(&mut rng) * 0.2;
            let s = plain.clone().with_state(copy);
            let company = Company { rows: rng.below(5), tokens: unit(&mut rng) * 4.0 };
            let mut chance = 1.0;
            let chances: Vec<f64> = (0..rng.below(10))
                .map(|_| {
                    chance *= unit(&mut rng).sqrt();
                    chance
                })
                .collect();
            let rate = |n: usize| {
                let (mut tokens, mut spent) = (company.tokens + 1.0, s.of(company.rows + 1 + n));
                for taken in 0..=n {
                    let reached = if taken == 0 { 1.0 } else { chances[taken - 1] };
                    let beyond = if taken == n { 0.0 } else { chances[taken] };
                    tokens += (reached - beyond) * taken as f64;
                    let again = if taken < n { s.of(company.rows + 1 + taken) - s.of(company.rows + 1) } else { 0.0 };
                    spent += (reached - beyond) * again;
                }
                tokens / (spent + if n > 0 { copy } else { 0.0 })
            };
            let best = best_nodes(&s, company, &chances);
            assert!((0..=chances.len()).all(|n| rate(n) <= rate(best) * (1.0 + 1e-12)), "seed {seed}");
            let without = best_nodes(&plain, company, &chances);
            fewer += usize::from(best < without);
            if best == 0 { none += 1 } else { some += 1 }
        }
        assert!(none > 30 && some > 30 && fewer > 30, "{none} {some} {fewer}");
    }

    #[test]
    fn a_draft_that_never_comes_is_not_verified() {
        let dear = StepSeconds::new(vec![(1, 1.0), (9, 5.0)]).expect("measured");
        let mut acceptance = Acceptance::default();
        let tree = Tree::chain(&[1, 2, 3, 4]);
        let nodes = |a: &Acceptance| best_nodes(&dear, Company::default(), &a.chances(&tree));
        // What was not verified teaches, too: another token came.
        for _ in 0..40 {
            acceptance.observe(&tree, &[9]);
        }
        assert_eq!(nodes(&acceptance), 0);
        for _ in 0..60 {
            acceptance.observe(&tree, &[1, 2, 3, 4, 9]);
        }
        assert_eq!(nodes(&acceptance), 4);
        // Where only the first two come, no more are verified.
        for _ in 0..120 {
            acceptance.observe(&tree, &[1, 2, 9]);
        }
        assert_eq!(nodes(&acceptance), 2);
    }

    /// Against counts straight from the definition: among the times that all above had come, how often this one did.
    #[test]
    fn averages_come_near_the_true_chances() {
        let mut tree = Tree::default();
        let a = tree.push(1, None);
        let b = tree.push(2, None);
        let (c, d) = (tree.push(3, Some(a)), tree.push(4, Some(a)));
        tree.push(3, Some(b));
        let true_first = [0.6, 0.3];
        let true_second = [0.5, 0.2];
        let (mut acceptance, mut rng) = (Acceptance::default(), Rng::new(5));
        let pick = |p: [f64; 2], ids: [u32; 2], rng: &mut Rng| {
            let x = unit(rng);
            if x < p[0] {
                ids[0]
            } else if x < p[0] + p[1] {
                ids[1]
            } else {
                9
            }
        };
        let mut mean = vec![0.0; tree.len()];
        let (warm, n) = (500, 4000);
        for i in 0..warm + n {
            let first = pick(true_first, [1, 2], &mut rng);
            // Both nodes are followed by 3 half the time: a rank's average at a depth is over all parents.
            let second = pick(true_second, [3, 4], &mut rng);
            acceptance.observe(&tree, &[first, second]);
            if i >= warm {
                mean.iter_mut().zip(acceptance.chances(&tree)).for_each(|(m, c)| *m += c / n as f64);
            }
        }
        let want = [0.6, 0.3, 0.6 * 0.5, 0.6 * 0.2, 0.3 * 0.5];
        for (i, want) in want.iter().enumerate() {
            assert!((mean[i] - want).abs() < 0.06, "node {i}: {} for {want}", mean[i]);
        }
        let chances = acceptance.chances(&tree);
        assert!(chances[c] <= chances[a] && chances[d] <= chances[a]);
        // Before anything was seen: halves, sixths.
        let fresh = Acceptance::default().chances(&tree);
        assert!((fresh[a] - 0.5).abs() < 1e-12 && (fresh[b] - 1.0 / 6.0).abs() < 1e-12);
        assert!(Acceptance::default().chances(&Tree::default()).is_empty());
    }

    /// Whatever comes of drafts, also at the worst: the bound holds after every step.
    #[test]
    fn a_text_never_costs_more_than_the_bound() {
        let mut drafted = 0;
        for seed in 0..200 {
            let mut rng = Rng::new(seed);
            let s = random_seconds(&mut rng);
            let s = if seed % 4 == 3 { s.with_state(unit(&mut rng) * 0.1) } else { s };
            let mut ledger = Ledger::begin(if seed % 2 == 0 { 0.0 } else { 20.0 * unit(&mut rng) });
            assert_eq!(ledger.cost(), 1.0);
            for _ in 0..200 {
                let rows = rng.below(6);
                let company = Company { rows, tokens: rows as f64 };
                // Chances that promise too much.
                let chances = vec![0.95; rng.below(16)];
                let n = ledger.nodes(&s, company, &chances);
                assert!(n <= chances.len());
                drafted += n;
                let taken = if seed % 3 == 0 { 0 } else { rng.below(n + 1) };
                ledger.step(&s, company, n, taken, 1 + taken);
                assert!(ledger.cost() <= MOST_COST * (1.0 + 1e-9), "seed {seed}: {}", ledger.cost());
            }
        }
        assert!(drafted > 1000, "{drafted}");
        // Where all drafts come, they soon pay.
        let s = StepSeconds::new(vec![(1, 1.0), (9, 2.0)]).expect("measured");
        let mut ledger = Ledger::begin(10.0);
        for _ in 0..200 {
            let n = ledger.nodes(&s, Company::default(), &[0.9, 0.8, 0.7, 0.6]);
            ledger.step(&s, Company::default(), n, n, 1 + n);
        }
        assert!(ledger.cost() < 0.5, "{}", ledger.cost());
    }
}
