//! Drafts within a step: which tokens of a text are verified, what came of them, what that costs.

use std::time::Instant;

use lacuna_base::MatRef;
use lacuna_contract::{Acceptance, Company, Draft, Drafting, Ledger, MethodError, StepSeconds, TopK, Tree};
use lacuna_model::{Batch, ContiguousKv, NoTap};

use super::{Part, Scheduler};
use crate::{Engine, RunError};

/// Tokens that a draft may have.
const MOST_NODES: usize = 48;

/// Rows of the steps that are timed, and how often.
const TIMED_ROWS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
const TIMED: usize = 3;

/// A step that takes so many times the one of a row is more than any draft is worth.
const TOO_LONG: f64 = 8.0;

/// What drafts for one text.
pub(super) struct Drafter {
    state: Box<dyn Drafting>,
    /// Ids that it reads behind each row.
    top: usize,
    /// Tokens of the text that it knows.
    told: usize,
    /// This step's draft, and those of its nodes that came.
    tree: Tree,
    path: Vec<usize>,
    /// The likeliest ids behind each row of this step, `top` each.
    ids: Vec<u32>,
    ledger: Option<Ledger>,
    company: Company,
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
            tree: Tree::default(),
            path: Vec::new(),
            ids: Vec::new(),
            ledger: None,
            company: Company::default(),
        }
    }

    /// The drafted tokens of this step, in the order of their rows.
    pub fn tokens(&self) -> &[u32] {
        &self.tree.tokens
    }

    /// Goes on from `row` (0: the text's, `1 + i`: node `i`'s) by `token`, where that was drafted; the row that says what
    /// follows.
    pub fn take(&mut self, row: usize, token: u32) -> Option<usize> {
        let parent = row.checked_sub(1);
        let mut nodes = self.tree.parents.iter().zip(&self.tree.tokens);
        let node = nodes.position(|(p, t)| *p == parent && *t == token)?;
        self.path.push(node);
        Some(node + 1)
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
        let a = &mut running[index];
        let slot = a.slot();
        let Some(d) = a.drafter.as_deref_mut() else { return Ok(0) };
        d.tree = Tree::default();
        d.path.clear();
        d.tell(&a.tokens);
        // A node at depth n is worth verifying where n + 1 more tokens may come, of this class of keys.
        let len = a.tokens.len();
        let deep = (1..a.extent.saturating_sub(len)).take_while(|n| engine.class(len + n) == a.class);
        let deep = deep.take(MOST_NODES).count();
        if deep == 0 {
            return Ok(0);
        }
        let tree = d.state.propose(&a.tokens, MOST_NODES);
        tree.check(engine.model().spec.vocab, MOST_NODES).map_err(of_draft)?;
        if tree.is_empty() {
            return Ok(0);
        }
        if prices.is_none() {
            *prices = Some(Prices { seconds: step_seconds(engine)?, acceptance: Acceptance::default() });
        }
        let Some(Prices { seconds, acceptance }) = prices else { return Ok(0) };
        let mut tree = chain(&tree, &acceptance.chances(&tree));
        tree.truncate(deep);
        let chances = acceptance.chances(&tree);
        let read = a.prompt_tokens - a.reused.unwrap_or(0);
        let ledger = d.ledger.get_or_insert_with(|| Ledger::begin(seconds.of(read)));
        d.company = *others;
        tree.truncate(ledger.nodes(seconds, *others, &chances));
        if !tree.is_empty() && !store.reserve(slot, len + tree.len()) {
            tree.truncate(0);
        }
        others.rows += tree.len();
        others.tokens += chances[..tree.len()].iter().sum::<f64>();
        d.tree = tree;
        Ok(d.tree.len())
    }

    /// Takes over what came of the drafts of a step: keys and values of tokens that were committed stay, the rest is
    /// forgotten; whoever drafts learns from it.
    pub(super) fn settle(&mut self, parts: &[Part]) {
        for p in parts.iter().filter(|p| p.wants > 0) {
            let a = &mut self.running[p.index];
            let slot = a.slot();
            let Some(d) = a.drafter.as_deref_mut() else { continue };
            let followed = &a.tokens[p.to..];
            if p.drafted > 0 {
                let taken = d.path.len().min(followed.len());
                a.read = p.to + taken;
                self.store.truncate(slot, a.read);
                self.store.publish(slot, &a.tokens[..a.read]);
                self.drafted += p.drafted as u64;
                self.accepted += taken as u64;
            }
            if let (Some(prices), Some(ledger)) = (&mut self.prices, &mut d.ledger) {
                ledger.step(&prices.seconds, d.company, p.drafted, followed.len().max(1));
                if p.drafted > 0 && !followed.is_empty() {
                    prices.acceptance.observe(&d.tree, followed);
                }
            }
            // The text's last token and each node, and what was likely behind them.
            if d.top > 0 {
                let last = a.tokens[p.to - 1];
                let tokens: Vec<u32> = std::iter::once(last).chain(d.tree.tokens.iter().copied()).collect();
                let committed = &a.tokens[d.told..];
                d.state.observe(committed, Some(TopK { tokens: &tokens, ids: &d.ids, k: d.top }));
                d.told = a.tokens.len();
            }
            d.tree.truncate(0);
        }
    }
}

fn of_draft(e: MethodError) -> RunError {
    RunError::Request(format!("the run plan's draft: {e}"))
}

/// The path through a tree on which every node is the likeliest of its siblings.
fn chain(tree: &Tree, chances: &[f64]) -> Tree {
    let (mut tokens, mut at) = (Vec::new(), None);
    loop {
        let children = (0..tree.len()).filter(|&i| tree.parents[i] == at);
        let Some(next) = children.max_by(|&a, &b| chances[a].total_cmp(&chances[b]).then(b.cmp(&a))) else { break };
        tokens.push(tree.tokens[next]);
        at = Some(next);
    }
    Tree::chain(&tokens)
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
        if ids.len() - from == k && !(x > least) {
            continue;
        }
        let above = ids[from..].partition_point(|&i| !(x > logits[i as usize] || logits[i as usize].is_nan()));
        ids.insert(from + above, id as u32);
        ids.truncate(from + k);
        if ids.len() - from == k {
            least = logits[ids[from + k - 1] as usize];
            least = if least.is_nan() { f32::NEG_INFINITY } else { least };
        }
    }
}

/// Times steps of some rows of one text, logits of all of them included.
fn step_seconds(engine: &Engine) -> Result<StepSeconds, RunError> {
    let model = engine.model();
    let depth = (engine.context() / 2).clamp(1, 64);
    let rows = engine.context().saturating_sub(depth);
    let tokens: Vec<u32> = (0..depth + 64).map(|i| (i * 7919 % model.spec.vocab) as u32).collect();
    let mut kv = ContiguousKv::with_format(&model.spec, 1, engine.kv_format());
    model.forward(&tokens[..depth], &Batch::one(0, 0..depth), &mut kv, &mut NoTap)?;
    let mut measured: Vec<(usize, f64)> = Vec::new();
    for n in TIMED_ROWS.into_iter().filter(|n| *n == 1 || *n <= rows) {
        let mut best = f64::INFINITY;
        for _ in 0..TIMED {
            let start = Instant::now();
            let batch = Batch::one(0, depth..depth + n);
            let hidden = model.forward(&tokens[depth..depth + n], &batch, &mut kv, &mut NoTap)?;
            std::hint::black_box(model.logits(hidden.view()));
            best = best.min(start.elapsed().as_secs_f64());
            kv.truncate(0, depth);
        }
        measured.push((n, best.max(1e-9)));
        if best > TOO_LONG * measured[0].1 {
            break;
        }
    }
    StepSeconds::new(measured).map_err(of_draft)
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
    fn a_chain_takes_the_likeliest_child() {
        let mut tree = Tree::default();
        let (a, b) = (tree.push(1, None), tree.push(2, None));
        tree.push(3, Some(a));
        let c = tree.push(4, Some(b));
        tree.push(5, Some(c));
        assert_eq!(chain(&tree, &[0.2, 0.6, 0.1, 0.5, 0.4]).tokens, [2, 4, 5]);
        assert_eq!(chain(&tree, &[0.5; 5]).tokens, [1, 3], "the first of equals");
        assert_eq!(chain(&Tree::default(), &[]), Tree::default());
    }
}
