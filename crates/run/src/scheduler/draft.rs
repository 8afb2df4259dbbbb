//! Drafts within a step: which tokens of a text are verified, what came of them, what that costs.
//!
//! A model with recurrent mixers takes the likeliest chain of a tree, since a state would have to branch with it: the
//! chain's rows go on from a copy of the text's state. Where all of them stay, that becomes the text's; else those that
//! stay are read once more beside the text's next token, which the price of a draft takes into account.

use std::time::Instant;

use lacuna_base::MatRef;
use lacuna_contract::{Acceptance, Company, Draft, Drafting, Ledger, MethodError, StepSeconds, TopK, Tree};
use lacuna_model::{Batch, ContiguousKv, NoTap};

use super::{Part, Scheduler};
use crate::blocks::keep::next_cut;
use crate::{Engine, RunError};

/// Tokens that a draft may have.
const MOST_NODES: usize = 48;

/// Blocks that the drafts of one text are given beside what it may become: a branch takes one or two for the time of a
/// step.
pub(super) const BLOCKS: usize = 32;

/// Rows of the steps that are timed, and how often.
const TIMED_ROWS: [usize; 5] = [1, 2, 4, 8, 16];
const TIMED: usize = 2;

/// A step that takes so many times the one of a row is more than any draft is worth.
const TOO_LONG: f64 = 8.0;

/// What drafts for one text.
pub(super) struct Drafter {
    state: Box<dyn Drafting>,
    /// Ids that it reads behind each row.
    top: usize,
    /// Tokens of the text that it knows.
    told: usize,
    /// All that was drafted for this step.
    offered: Tree,
    /// What is verified of it, and those of its nodes that came.
    tree: Tree,
    path: Vec<usize>,
    branches: Branches,
    /// The likeliest ids behind each row of this step, `top` each.
    ids: Vec<u32>,
    ledger: Option<Ledger>,
    company: Company,
}

/// How a draft lies in a step: the nodes of the longest path of firsts behind the text's own rows, and of every further
/// branch, from where it leaves another one, in a fork of the text.
#[derive(Default)]
struct Branches {
    /// Nodes of the text's own path, and of each fork's, from the text on.
    nodes: Vec<Vec<usize>>,
    /// The row of each node, counted from the text's last.
    row: Vec<usize>,
    forks: Vec<usize>,
}

impl Branches {
    fn of(tree: &Tree) -> Branches {
        let mut nodes: Vec<Vec<usize>> = vec![Vec::new()];
        for (node, parent) in tree.parents.iter().enumerate() {
            // A branch goes on where its last node, or the text, has a first child.
            let goes_on = |branch: &Vec<usize>| branch.last().copied() == *parent;
            match nodes.iter_mut().find(|branch| goes_on(branch)) {
                Some(branch) => branch.push(node),
                None => nodes.push(vec![node]),
            }
        }
        let mut row = vec![0; tree.len()];
        nodes.iter().flatten().enumerate().for_each(|(i, &node)| row[node] = i + 1);
        Branches { nodes, row, forks: Vec::new() }
    }

    /// The fork that computed a node (none: the text itself), and its number among those computed there.
    fn place_of(&self, node: usize) -> (Option<usize>, usize) {
        let nth = self.nodes.iter().find_map(|nodes| nodes.iter().position(|n| *n == node));
        (self.fork_of(node), nth.unwrap_or(0))
    }

    /// The fork that computed a node; none: the text itself.
    fn fork_of(&self, node: usize) -> Option<usize> {
        let branch = self.nodes.iter().position(|nodes| nodes.contains(&node))?;
        self.forks.get(branch.checked_sub(1)?).copied()
    }
}

/// What all texts' drafts know: the price of rows, and how often drafted tokens come.
pub(super) struct Prices {
    seconds: StepSeconds,
    acceptance: Acceptance,
}

impl Drafter {
    pub fn new(draft: &dyn Draft, vocab: usize) -> Drafter {
        Drafter {
            state: draft.begin(vocab),
            top: draft.top().min(vocab),
            told: 0,
            offered: Tree::default(),
            tree: Tree::default(),
            path: Vec::new(),
            branches: Branches::default(),
            ids: Vec::new(),
            ledger: None,
            company: Company::default(),
        }
    }

    /// Adds the rows of this step's draft behind the text's own, of which the last is row `last` of the batch; `whole`:
    /// tokens of the text, in `slot`; `recurrent`: they go on from a copy of its state.
    pub fn rows(&self, batch: &mut Batch, tokens: &mut Vec<u32>, slot: usize, whole: usize, recurrent: bool) {
        let last = batch.rows() - 1;
        if recurrent {
            batch.part_state(last + 1);
        }
        let slots = std::iter::once(slot).chain(self.branches.forks.iter().copied());
        for (branch, (nodes, slot)) in self.branches.nodes.iter().zip(slots).enumerate() {
            let Some(&first) = nodes.first() else { continue };
            let above = self.tree.path(first);
            let from = whole + above.len() - 1;
            batch.push_part(slot, from..from + nodes.len(), from + nodes.len());
            tokens.extend(nodes.iter().map(|&n| self.tree.tokens[n]));
            if branch > 0 {
                // What the branch has in common with others is computed there.
                batch.also(last, slot);
                above[..above.len() - 1].iter().for_each(|&n| batch.also(last + self.branches.row[n], slot));
            }
        }
    }

    /// Goes on from `row` (0: the text's) by `token`, where that was drafted; the row that says what follows.
    pub fn take(&mut self, row: usize, token: u32) -> Option<usize> {
        let parent = self.branches.row.iter().position(|r| *r == row);
        let mut nodes = self.tree.parents.iter().zip(&self.tree.tokens);
        let node = nodes.position(|(p, t)| *p == parent && *t == token)?;
        self.path.push(node);
        Some(self.branches.row[node])
    }

    /// What the text cost so far by the prices of rows, over what plain decoding would have.
    pub fn cost(&self) -> Option<f64> {
        self.ledger.as_ref().map(Ledger::cost)
    }

    /// Looks at what was likely behind each row.
    pub fn look(&mut self, logits: MatRef<'_>) {
        self.ids.clear();
        for r in 0..logits.rows() {
            likeliest(logits.row(r), self.top, &mut self.ids);
        }
    }

    /// Tells it what was committed since the last time, where nothing is known of what else was likely.
    fn tell(&mut self, text: &[u32]) {
        if self.told < text.len() {
            self.state.observe(&text[self.told..], None);
            self.told = text.len();
        }
    }
}

impl Scheduler {
    /// What steps cost by their rows, where the caller knows; otherwise some are timed before the first draft.
    pub fn set_prices(&mut self, seconds: StepSeconds) {
        let seconds = if self.store.keeps_states() && !seconds.has_state() { seconds.with_state(0.0) } else { seconds };
        self.prices = Some(Prices { seconds, acceptance: Acceptance::default() });
    }

    /// Drafts for a text at work whose last token alone is unread, in the company of `others`, which it joins with its
    /// nodes. Makes room for them and gives their number; none where drafting does not pay.
    pub(super) fn draft(&mut self, index: usize, others: &mut Company) -> usize {
        self.try_draft(index, others).unwrap_or_else(|_| {
            // A text is written without a draft as well as with one.
            self.running[index].drafter = None;
            0
        })
    }

    fn try_draft(&mut self, index: usize, others: &mut Company) -> Result<usize, RunError> {
        let Scheduler { engine, running, prices, store, .. } = self;
        let texts = running.len();
        let a = &mut running[index];
        let slot = a.slot();
        let Some(d) = a.drafter.as_deref_mut() else { return Ok(0) };
        (d.offered, d.tree) = (Tree::default(), Tree::default());
        d.path.clear();
        d.tell(&a.tokens);
        // A node at depth n is worth verifying where n + 1 more tokens may come, of this class of keys, and before the
        // keeper decides.
        let len = a.tokens.len();
        let deep = (1..a.extent.saturating_sub(len)).take_while(|n| engine.class(len + n) == a.class);
        let until = engine.keep_plan().map_or(usize::MAX, |plan| next_cut(plan, len - 1));
        // A text stops at snapshots of its state.
        let until = until.min(store.until_snapshot(len, 0));
        let deep = deep.take(MOST_NODES.min(until - len)).count();
        if deep == 0 {
            return Ok(0);
        }
        let tree = d.state.propose(&a.tokens, MOST_NODES);
        tree.check(engine.model().spec.vocab, MOST_NODES).map_err(of_draft)?;
        if tree.is_empty() {
            return Ok(0);
        }
        if prices.is_none() {
            *prices =
                Some(Prices { seconds: step_seconds(engine, store.state_bytes())?, acceptance: Acceptance::default() });
        }
        let Some(Prices { seconds, acceptance }) = prices else { return Ok(0) };
        let mut tree = within(tree, deep);
        d.offered = tree.clone();
        if store.keeps_states() {
            tree = likeliest_path(&tree, &acceptance.chances(&tree));
        }
        let chances = acceptance.chances(&tree);
        let read = a.prompt_tokens - a.reused.unwrap_or(0);
        let ledger = d.ledger.get_or_insert_with(|| Ledger::begin(seconds.of(read)));
        d.company = *others;
        tree.truncate(ledger.nodes(seconds, *others, &chances));
        // A block for each text at work is left: a draft must not drive one out.
        if !tree.is_empty() && (store.available() <= texts || !store.reserve(slot, len + tree.len().min(deep))) {
            tree.truncate(0);
        }
        if !tree.is_empty() && store.keeps_states() && !store.part_state(slot, texts) {
            tree.truncate(0);
        }
        d.branches = Branches::of(&tree);
        for branch in d.branches.nodes.iter().skip(1) {
            let longest = branch.first().map_or(0, |&n| tree.path(n).len()) + branch.len();
            let fork = Some(()).filter(|()| store.available() > texts).and_then(|()| store.fork(slot, len + longest));
            let Some(fork) = fork else { break };
            d.branches.forks.push(fork);
        }
        if d.branches.forks.len() + 1 < d.branches.nodes.len() {
            // Only the text's own path finds room.
            d.branches.forks.drain(..).for_each(|fork| store.close_fork(fork));
            tree = first_path(&tree);
            d.branches = Branches::of(&tree);
        }
        others.rows += tree.len();
        others.tokens += acceptance.chances(&tree).iter().sum::<f64>();
        d.tree = tree;
        Ok(d.tree.len())
    }

    /// Forgets the drafts of a step that failed.
    pub(super) fn undo(&mut self, parts: &[Part]) {
        for p in parts.iter().filter(|p| p.drafted > 0) {
            self.store.settle_state(self.running[p.index].slot(), None);
            let Some(d) = self.running[p.index].drafter.as_deref_mut() else { continue };
            d.branches.forks.drain(..).for_each(|fork| self.store.close_fork(fork));
        }
    }

    /// Takes over what came of the drafts of a step: keys and values of tokens that were committed stay, the rest is
    /// forgotten; whoever drafts learns from it.
    pub(super) fn settle(&mut self, parts: &[Part]) {
        let texts = self.running.len();
        for p in parts.iter().filter(|p| p.wants > 0) {
            let a = &mut self.running[p.index];
            let slot = a.slot();
            let Some(d) = a.drafter.as_deref_mut() else { continue };
            let followed = &a.tokens[p.to..];
            if p.drafted > 0 {
                let taken = d.path.len().min(followed.len());
                // A state that took all of the draft up is worth nothing where some of it goes.
                let recurrent = self.store.keeps_states();
                let stays = if !recurrent || taken == p.drafted { taken } else { 0 };
                a.read = p.to + stays;
                a.again = taken - stays;
                if recurrent {
                    self.store.settle_state(slot, Some(a.read).filter(|_| stays > 0));
                }
                for &node in &d.path[..stays] {
                    let (from, nth) = d.branches.place_of(node);
                    self.store.count_mass(slot, from.unwrap_or(slot), nth);
                }
                let kept = taken.checked_sub(1).and_then(|last| d.branches.fork_of(d.path[last]));
                for fork in d.branches.forks.drain(..) {
                    if Some(fork) == kept {
                        self.store.join(slot, fork);
                    } else {
                        self.store.close_fork(fork);
                    }
                }
                self.store.truncate(slot, a.read);
                self.store.publish(slot, &a.tokens[..a.read]);
                if recurrent && self.limits.reuse {
                    self.store.snapshot(slot, a.tokens.len(), texts);
                }
                self.drafted += p.drafted as u64;
                self.accepted += taken as u64;
            }
            if let (Some(prices), Some(ledger)) = (&mut self.prices, &mut d.ledger) {
                let came = d.path.len().min(followed.len());
                ledger.step(&prices.seconds, d.company, p.drafted, came, followed.len().max(1));
                // What was not verified teaches as well.
                if !d.offered.is_empty() && !followed.is_empty() {
                    prices.acceptance.observe(&d.offered, followed);
                }
            }
            // The text's last token and each node, and what was likely behind them.
            if d.top > 0 {
                let last = a.tokens[p.to - 1];
                let nodes = d.branches.nodes.iter().flatten().filter(|_| p.drafted > 0);
                let tokens: Vec<u32> = std::iter::once(last).chain(nodes.map(|&n| d.tree.tokens[n])).collect();
                let committed = &a.tokens[d.told..];
                d.state.observe(committed, Some(TopK { tokens: &tokens, ids: &d.ids, k: d.top }));
                d.told = a.tokens.len();
            }
            (d.offered, d.tree) = (Tree::default(), Tree::default());
        }
    }
}

fn of_draft(e: MethodError) -> RunError {
    RunError::Request(format!("the run plan's draft: {e}"))
}

/// The nodes that are at most `deep` tokens behind the text.
fn within(tree: Tree, deep: usize) -> Tree {
    let depths = tree.depths();
    if depths.iter().all(|d| *d <= deep) {
        return tree;
    }
    let (mut out, mut at) = (Tree::default(), vec![None; tree.len()]);
    for (node, (&token, &parent)) in tree.tokens.iter().zip(&tree.parents).enumerate() {
        if depths[node] <= deep {
            at[node] = Some(out.push(token, parent.and_then(|p| at[p])));
        }
    }
    out
}

/// The path that goes on by the child with the best chance, of equals the first.
fn likeliest_path(tree: &Tree, chances: &[f64]) -> Tree {
    let (mut path, mut at) = (Vec::new(), None);
    for _ in 0..tree.len() {
        let children = (0..tree.len()).filter(|&n| tree.parents[n] == at).rev();
        let Some(best) = children.max_by(|a, b| chances[*a].total_cmp(&chances[*b])) else { break };
        path.push(tree.tokens[best]);
        at = Some(best);
    }
    Tree::chain(&path)
}

/// The path of first children.
fn first_path(tree: &Tree) -> Tree {
    let first = Branches::of(tree).nodes.swap_remove(0);
    Tree::chain(&first.iter().map(|&n| tree.tokens[n]).collect::<Vec<_>>())
}

/// The ids of the `k` greatest logits, the greatest first, of equals the lower id; NaNs come last.
fn likeliest(logits: &[f32], k: usize, ids: &mut Vec<u32>) {
    if k == 0 {
        return;
    }
    let from = ids.len();
    let mut least = f32::NEG_INFINITY;
    for (id, &x) in logits.iter().enumerate() {
        // Most tokens end here.
        let above = x > least;
        if ids.len() - from == k && !above {
            continue;
        }
        let place = ids[from..].partition_point(|&i| !(x > logits[i as usize] || logits[i as usize].is_nan()));
        ids.insert(from + place, id as u32);
        ids.truncate(from + k);
        if ids.len() - from == k {
            least = logits[ids[from + k - 1] as usize];
            least = if least.is_nan() { f32::NEG_INFINITY } else { least };
        }
    }
}

/// Times steps of some rows of one text, logits of all of them included, and a copy of the state that a text has.
fn step_seconds(engine: &Engine, state_bytes: usize) -> Result<StepSeconds, RunError> {
    let model = engine.model();
    let depth = (engine.context() / 2).clamp(1, 64);
    let rows = engine.context().saturating_sub(depth);
    let tokens: Vec<u32> =
        (0..depth + TIMED_ROWS[TIMED_ROWS.len() - 1]).map(|i| (i * 7919 % model.spec.vocab) as u32).collect();
    let mut kv = ContiguousKv::with_format(&model.spec, 1, engine.kv_format());
    model.forward(&tokens[..depth], &Batch::one(0, 0..depth), &mut kv, &mut NoTap)?;
    // A state does not go back.
    let begun = (state_bytes > 0).then(|| kv.clone());
    let mut measured: Vec<(usize, f64)> = Vec::new();
    for n in TIMED_ROWS.into_iter().filter(|n| *n == 1 || *n <= rows) {
        let mut best = f64::INFINITY;
        for _ in 0..TIMED {
            let start = Instant::now();
            let batch = Batch::one(0, depth..depth + n);
            let hidden = model.forward(&tokens[depth..depth + n], &batch, &mut kv, &mut NoTap)?;
            std::hint::black_box(model.logits(hidden.view()));
            best = best.min(start.elapsed().as_secs_f64());
            match &begun {
                Some(begun) => kv = begun.clone(),
                None => kv.truncate(0, depth),
            }
        }
        measured.push((n, best.max(1e-9)));
        if best > TOO_LONG * measured[0].1 {
            break;
        }
    }
    let seconds = StepSeconds::new(measured).map_err(of_draft)?;
    Ok(if state_bytes > 0 { seconds.with_state(copy_seconds(state_bytes)) } else { seconds })
}

/// Times a copy of so many bytes.
fn copy_seconds(bytes: usize) -> f64 {
    let (from, mut to) = (vec![1u8; bytes], vec![2u8; bytes]);
    let mut best = f64::INFINITY;
    for _ in 0..=TIMED {
        let start = Instant::now();
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&mut to);
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Rng;

    #[test]
    fn the_likeliest_are_those_that_sorting_finds() {
        let mut rng = Rng::new(3);
        for case in 0..300 {
            let n = 1 + rng.below(40);
            // Few values, so that many are alike.
            let mut logits: Vec<f32> = (0..n).map(|_| rng.below(7) as f32 - 3.0).collect();
            if case % 5 == 0 {
                logits[rng.below(n)] = f32::NAN;
            }
            let k = rng.below(n + 1);
            let mut all: Vec<u32> = (0..n as u32).collect();
            let key = |i: &u32| logits[*i as usize];
            all.sort_by(|a, b| match (key(a).is_nan(), key(b).is_nan()) {
                (false, false) => key(b).total_cmp(&key(a)).then(a.cmp(b)),
                (x, y) => x.cmp(&y).then(a.cmp(b)),
            });
            let mut found = vec![99];
            likeliest(&logits, k, &mut found);
            assert_eq!(found[1..], all[..k], "{logits:?}");
        }
    }

    #[test]
    fn branches_cover_a_tree() {
        let mut rng = Rng::new(8);
        for _ in 0..300 {
            let mut tree = Tree::default();
            for token in 0..rng.below(20) as u32 {
                let parent = rng.below(tree.len() + 1).checked_sub(1);
                tree.push(token, parent);
            }
            let branches = Branches::of(&tree);
            let mut rows: Vec<usize> = branches.row.clone();
            rows.sort_unstable();
            assert_eq!(rows, (1..=tree.len()).collect::<Vec<_>>(), "each node has a row of its own");
            for (i, branch) in branches.nodes.iter().enumerate() {
                assert!(i == 0 || !branch.is_empty());
                // Each goes on from the one before.
                assert!(branch.windows(2).all(|w| tree.parents[w[1]] == Some(w[0])));
            }
            assert!(branches.nodes[0].first().is_none_or(|&n| tree.parents[n].is_none()));
            for deep in 0..5 {
                let cut = within(tree.clone(), deep);
                let kept: Vec<u32> =
                    (0..tree.len()).filter(|&n| tree.path(n).len() <= deep).map(|n| tree.tokens[n]).collect();
                assert_eq!(cut.tokens, kept);
                assert!(cut.check(99, 99).is_ok() && cut.depths().iter().all(|d| *d <= deep));
            }
            let first = first_path(&tree);
            assert_eq!(first.len(), branches.nodes[0].len());
            // The best of all paths that go on by the best child: chances that fall along each path.
            let mut chances: Vec<f64> = Vec::new();
            for (node, parent) in tree.parents.iter().enumerate() {
                let above = parent.map_or(1.0, |p| chances[p]);
                chances.push(above * (1.0 + ((node * 7) % 5) as f64) / 6.0);
            }
            let (mut want, mut at) = (Vec::new(), None);
            loop {
                let mut best: Option<usize> = None;
                for n in (0..tree.len()).filter(|&n| tree.parents[n] == at) {
                    best = if best.is_none_or(|b| chances[n] > chances[b]) { Some(n) } else { best };
                }
                let Some(best) = best else { break };
                want.push(tree.tokens[best]);
                at = Some(best);
            }
            assert_eq!(likeliest_path(&tree, &chances), Tree::chain(&want));
        }
    }
}
