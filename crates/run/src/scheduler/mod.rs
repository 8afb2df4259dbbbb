//! Texts, one or many: continuous batching with prompts read in chunks.
//!
//! A step is one pass over the weights for one row of every text that is being continued and at most
//! [`Limits::prefill_rows`] rows of prompts. Texts are admitted first come, first served; prompts take turns, so that a
//! long one does not hold up short ones. Where blocks run out, the text that was admitted last gives its own up and
//! waits, to be read again later: a row's result does not depend on its company, so that its answer is the same. A text
//! that outgrows its class ([`Engine::class`]) is read again in the same way.
//!
//! Where the run plan drafts, a text that is being continued brings rows for the tokens that may come next, as many as
//! pay; those that are what it chooses anyway are kept, and the rest is forgotten before anything of it is published.
//!
//! Where the run plan has a keeper, it decides before a text goes on from a position at which that is due; chunks and
//! drafts end there.
//!
//! Where the run plan has a selector, rows ask it for themselves, or tiles of them at fixed positions, those of prompts
//! and of drafts like all others; so the model does with a gate that it was loaded with. One that must see the whole prompt
//! has prompts read layer by layer, one at a time, some layers a step.

mod draft;
mod keep;
mod plan;
#[cfg(test)]
mod tests;
mod text;
mod whole;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use lacuna_base::{Mat, MatRef};
use lacuna_checkpoint::Tokenizer;
use lacuna_model::{Batch, NoTap, Reads};
use rayon::prelude::*;

use self::draft::{Drafter, Prices};
use self::text::{Active, Scoring, Work, Writing};
use crate::blocks::{BLOCK_TOKENS, BlockCounts, BlockStore};
use crate::request::{Event, Finished, Job, Pooling, Request};
use crate::{Engine, RunError, Stop};

/// Rows whose logits are computed in one call, at most: a row of a large vocabulary is a megabyte.
const HEAD_ROWS: usize = 32;

/// Tokens of an answer that a text has memory for from the start.
const TOKENS: usize = 1024;

/// Logits to look at that are worth waking other threads for.
const CHOICE_COST: usize = 1 << 20;

/// How much is done at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Texts worked on at once, at most; at least 1.
    pub batch: usize,
    /// Rows of prompts in a step, at most; at least 1.
    pub prefill_rows: usize,
    /// Bytes of keys and values, at most.
    pub kv_bytes: usize,
    /// Whether published blocks are reused.
    pub reuse: bool,
}

/// What one step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Rows of texts being continued.
    pub decode_rows: usize,
    /// Rows of prompts.
    pub prefill_rows: usize,
    /// Rows of drafted tokens.
    pub drafted_rows: usize,
    /// Of all these, rows that wanted logits: those of a text's last token, and of what was drafted behind it.
    pub logits_rows: usize,
    /// Tokens that were chosen, ends of texts among them.
    pub chosen: usize,
}

/// The state of a scheduler, in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Gauges {
    /// Texts that wait.
    pub waiting: usize,
    /// Texts at work.
    pub running: usize,
    /// Times that a text gave up its blocks, since the start.
    pub preempted: u64,
    /// Blocks of keys and values.
    pub blocks: BlockCounts,
    /// Bytes of keys and values that are held.
    pub kv_bytes: usize,
    /// Tokens drafted and verified, since the start.
    pub drafted: u64,
    /// Of these, tokens that came.
    pub accepted: u64,
    /// The largest modelled cost of a text that is over, in that of plain decoding; 0 before one was drafted for.
    pub draft_cost: f64,
    /// What rows read where a selector was asked, since the start.
    pub reads: Reads,
    /// Entries of heads, a position each, that a keeper has evicted since the start.
    pub evicted: u64,
    /// What steps read of the matrices that a gate stands at, since the model was loaded.
    pub gate_reads: Reads,
}

/// Continues texts over one engine, one or many.
pub struct Scheduler {
    engine: Arc<Engine>,
    tokenizer: Option<Tokenizer>,
    limits: Limits,
    store: BlockStore,
    waiting: VecDeque<Active>,
    running: Vec<Active>,
    /// Whose turn it is among prompts: the number of steps so far.
    turn: usize,
    preempted: u64,
    /// What drafts are weighed by, once something was drafted.
    prices: Option<Prices>,
    drafted: u64,
    accepted: u64,
    draft_cost: f64,
    /// As [`CHOICE_COST`].
    choice_cost: usize,
    scratch: Scratch,
}

/// Rows of one text in a step.
struct Part {
    /// Which of the texts at work.
    index: usize,
    /// Its tokens `from..to`.
    from: usize,
    to: usize,
    /// Drafted tokens behind them.
    drafted: usize,
    /// How many of all these rows, the last ones, want logits.
    wants: usize,
}

/// Memory of steps, used again and again.
#[derive(Default)]
struct Scratch {
    parts: Vec<Part>,
    batch: Batch,
    tokens: Vec<u32>,
    /// Texts whose rows want logits, and those rows of the step.
    wanted: Vec<(usize, Range<usize>)>,
    rows: Vec<f32>,
    logits: Vec<f32>,
    /// Texts that are over.
    over: Vec<usize>,
}

impl Scheduler {
    /// A scheduler over an engine of its own or a shared one.
    pub fn new(engine: impl Into<Arc<Engine>>, tokenizer: Tokenizer, limits: Limits) -> Scheduler {
        Scheduler { tokenizer: Some(tokenizer), ..Scheduler::without_text(engine, limits) }
    }

    /// A scheduler without a tokenizer: it takes [`Job::Forced`], [`Job::Embed`] and [`Job::Read`] only.
    pub fn without_text(engine: impl Into<Arc<Engine>>, limits: Limits) -> Scheduler {
        let engine = engine.into();
        let limits = Limits { batch: limits.batch.max(1), prefill_rows: limits.prefill_rows.max(1), ..limits };
        let store = Scheduler::store(&engine, &limits);
        Scheduler {
            engine,
            tokenizer: None,
            limits,
            store,
            waiting: VecDeque::new(),
            running: Vec::new(),
            turn: 0,
            preempted: 0,
            prices: None,
            drafted: 0,
            accepted: 0,
            draft_cost: 0.0,
            choice_cost: CHOICE_COST,
            scratch: Scratch::default(),
        }
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Allows keys and values of `tokens` tokens from now on, and of another block, beside which a text that goes on
    /// from a tail finds room. Cached ones beyond that are thrown away; nothing is allocated before it is needed.
    pub(crate) fn set_room(&mut self, tokens: usize) {
        let drafts = if self.engine.plan().draft().is_some() { draft::BLOCKS } else { 0 };
        let blocks = self.store.slots(tokens).div_ceil(BLOCK_TOKENS).saturating_add(1 + drafts);
        let states = if drafts > 0 { self.store.state_blocks() } else { 0 };
        let blocks = blocks.saturating_add(self.store.state_blocks_of(tokens)).saturating_add(states);
        self.limits.kv_bytes = blocks.saturating_mul(self.store.unit_bytes());
        self.store.set_total(blocks);
    }

    /// Throws away all cached keys and values: the next texts are read from their first token on.
    pub(crate) fn forget(&mut self) {
        self.store.forget();
    }

    /// Whether nothing waits and nothing is at work.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Its state in numbers.
    pub fn gauges(&self) -> Gauges {
        Gauges {
            waiting: self.waiting.len(),
            running: self.running.len(),
            preempted: self.preempted,
            blocks: self.store.counts(),
            kv_bytes: self.store.bytes(),
            drafted: self.drafted,
            accepted: self.accepted,
            draft_cost: self.draft_cost,
            reads: self.store.reads(),
            evicted: self.store.evicted(),
            gate_reads: self.engine.model().gate_reads(),
        }
    }

    /// Takes a request, known by `id` from here on, or says what is wrong with it.
    pub fn submit(&mut self, id: u64, request: Request) -> Result<(), RunError> {
        self.engine.check_plan()?;
        let Request { mut prompt, job, score } = request;
        let (n, most) = (prompt.len(), self.most_tokens());
        if n == 0 {
            return Err(RunError::Empty);
        }
        let vocab = self.engine.model().spec.vocab;
        let forced = if let Job::Forced(tokens) = &job { tokens.as_slice() } else { &[] };
        if let Some(token) = prompt.iter().chain(forced).find(|&&t| t as usize >= vocab) {
            return Err(RunError::Request(format!("token {token} is not among the model's {vocab}")));
        }
        let too_long = |tokens, hint| Err(RunError::Context { tokens, context: most, hint });
        let (work, extent) = match job {
            Job::Embed(pooling) => {
                if n > most {
                    return too_long(n, "");
                }
                (Work::Embed { pooling, sum: Vec::new() }, n)
            }
            Job::Read => {
                if n > most {
                    return too_long(n, "");
                }
                (Work::Read { told: 0 }, n)
            }
            Job::Forced(tokens) => {
                let all = n.saturating_add(tokens.len());
                if all > most {
                    return too_long(all, "");
                }
                (Work::Forced(tokens.into_iter()), all)
            }
            Job::Generate { generation, logprobs, grammar, special } => {
                if n >= most {
                    return too_long(n, NO_ROOM);
                }
                let Some(tokenizer) = &self.tokenizer else {
                    return Err(RunError::Request("there is no tokenizer to turn an answer into text".into()));
                };
                let extent = n.saturating_add(generation.max_tokens).min(most);
                (Work::Generate(Box::new(Writing::new(generation, logprobs, grammar, special, tokenizer)?)), extent)
            }
        };
        let drafter = match (&work, self.engine.plan().draft()) {
            (Work::Generate(_), Some(draft)) => Some(Box::new(Drafter::new(draft, vocab))),
            _ => None,
        };
        // No step should have to move the tokens; an answer that may become very long grows as others do.
        prompt.reserve((extent - n).min(TOKENS));
        self.waiting.push_back(Active {
            id,
            prompt_tokens: n,
            tokens: prompt,
            slot: None,
            read: 0,
            again: 0,
            extent,
            class: self.engine.class(n),
            reused: None,
            score: score.map(|top| Scoring { top, done: 1 }),
            drafter,
            work,
            pass: None,
            chosen: Vec::new(),
            failed: None,
        });
        Ok(())
    }

    /// Gives a request up, and says how far it came; none where it is not known (any more). Nothing more is told of it.
    pub fn cancel(&mut self, id: u64) -> Option<Finished> {
        let gone = if let Some(at) = self.waiting.iter().position(|a| a.id == id) {
            self.waiting.remove(at)?
        } else {
            let gone = self.running.remove(self.running.iter().position(|a| a.id == id)?);
            self.close(&gone);
            gone
        };
        Some(gone.finished(Stop::Caller))
    }

    /// Gives everything up, telling each request why, and begins anew with an empty store.
    pub fn fail_all(&mut self, why: &str, on: &mut dyn FnMut(u64, Event)) {
        let all = self.waiting.drain(..).chain(self.running.drain(..));
        all.for_each(|a| on(a.id, Event::Failed(RunError::Request(why.to_owned()))));
        self.store = Scheduler::store(&self.engine, &self.limits);
    }

    /// Does one step, telling what comes of it.
    pub fn step(&mut self, on: &mut dyn FnMut(u64, Event)) -> Step {
        self.outgrown();
        self.admit(on);
        self.decide(on);
        let mut scratch = std::mem::take(&mut self.scratch);
        let mut step = self.plan(&mut scratch.parts);
        if !scratch.parts.is_empty() {
            step.chosen = self.compute(&mut scratch, on);
        }
        self.read_whole(&mut scratch, &mut step, on);
        self.scratch = scratch;
        step
    }

    /// Computes the planned rows and lets their texts go on; how many tokens were chosen.
    fn compute(&mut self, scratch: &mut Scratch, on: &mut dyn FnMut(u64, Event)) -> usize {
        let Scratch { parts, batch, tokens, wanted, over, .. } = scratch;
        batch.clear();
        tokens.clear();
        wanted.clear();
        over.clear();
        for p in parts.iter() {
            let a = &self.running[p.index];
            self.store.certain(a.slot(), a.tokens.len());
            batch.push_part(a.slot(), p.from..p.to, a.tokens.len());
            tokens.extend_from_slice(&a.tokens[p.from..p.to]);
            if let Some(d) = a.drafter.as_deref().filter(|_| p.drafted > 0) {
                d.rows(batch, tokens, a.slot(), a.tokens.len(), self.store.keeps_states());
            }
        }
        let hidden = match self.engine.model().forward(tokens, batch, &mut self.store, &mut NoTap) {
            Ok(hidden) => hidden,
            Err(e) => {
                self.undo(parts);
                over.extend(parts.iter().map(|p| p.index));
                for &index in over.iter() {
                    let a = &self.running[index];
                    // What was written of the step is worth nothing.
                    self.store.truncate(a.slot(), a.read);
                    on(a.id, Event::Failed(RunError::Request(e.to_string())));
                }
                self.end(over);
                return 0;
            }
        };
        let mut row = 0;
        for p in scratch.parts.iter() {
            let rows = row..row + (p.to - p.from) + p.drafted;
            row = rows.end;
            if self.came(p, hidden.view().rows_range(rows.start, rows.end), on) {
                scratch.over.push(p.index);
            } else if p.wants > 0 {
                scratch.wanted.push((p.index, rows.end - p.wants..rows.end));
            }
        }
        let chosen = self.answer(scratch, hidden.view(), on);
        self.settle(&scratch.parts);
        self.end(&mut scratch.over);
        chosen
    }

    /// Tells what came of a part's rows, the residual stream behind the last block, and takes note of how far its text is
    /// read; true where the text is over.
    fn came(&mut self, p: &Part, rows: MatRef<'_>, on: &mut dyn FnMut(u64, Event)) -> bool {
        let (texts, model) = (self.running.len(), self.engine.model());
        let a = &mut self.running[p.index];
        let mut over = false;
        (a.read, a.again) = (p.to, 0);
        self.store.publish(a.slot(), &a.tokens[..p.to]);
        if self.limits.reuse {
            // A block is left for each text at work.
            self.store.snapshot(a.slot(), a.tokens.len(), texts);
        }
        if let Some(s) = a.score.as_mut().filter(|s| s.done < a.prompt_tokens) {
            // The row at a position says what comes behind it.
            let prompt = &a.tokens[..a.prompt_tokens];
            match s.score(&model.head, prompt, p.from, rows.rows_range(0, p.to - p.from)) {
                Ok(known) if known.is_empty() => {}
                Ok(known) => on(a.id, Event::Read(known)),
                Err(e) => {
                    on(a.id, Event::Failed(e));
                    return true;
                }
            }
        }
        if a.is_answered() && p.to == a.tokens.len() {
            on(a.id, Event::Finished(a.finished(Stop::MaxTokens)));
            over = true;
        }
        if let Work::Embed { pooling, sum } = &mut a.work {
            let from = if *pooling == Pooling::Last { rows.rows() - 1 } else { 0 };
            let x = model.head.input(rows.rows_range(from, rows.rows()));
            match pooling {
                Pooling::Last => *sum = x.row(x.rows() - 1).iter().map(|&v| f64::from(v)).collect(),
                Pooling::Mean => add_rows(sum, x.view()),
            }
            if p.to == a.tokens.len() {
                let tokens = a.tokens.len();
                on(
                    a.id,
                    match sum.iter().find(|x| !x.is_finite()) {
                        Some(&value) => Event::Failed(RunError::Embedding { value, tokens }),
                        None => Event::Embedding { vector: unit(sum), tokens },
                    },
                );
                over = true;
            }
        }
        if let Work::Read { told } = &mut a.work {
            let new = (*told).max(p.from);
            if new < p.to {
                let rows = rows.rows_range(new - p.from, p.to - p.from).to_mat();
                on(a.id, Event::Rows { from: new, rows });
                *told = p.to;
            }
            if p.to == a.tokens.len() {
                on(a.id, Event::Finished(a.finished(Stop::MaxTokens)));
                over = true;
            }
        }
        over
    }

    /// Lets every text of `wanted` choose by the logits of its rows of `hidden` and go on; how many tokens were chosen.
    /// Those that end join `over`.
    fn answer(&mut self, scratch: &mut Scratch, hidden: MatRef<'_>, on: &mut dyn FnMut(u64, Event)) -> usize {
        let Scratch { wanted, rows, logits, over, .. } = scratch;
        let (width, vocab, most) = (hidden.cols(), self.engine.model().spec.vocab, self.most_tokens());
        wanted.sort_unstable_by_key(|w| w.0);
        let mut rest = wanted.as_slice();
        let mut chosen = 0;
        while let Some(first) = rest.first() {
            // A text's rows stay together.
            let (mut texts, mut n) = (1, first.1.len());
            while let Some(more) = rest.get(texts).map(|w| w.1.len()).filter(|more| n + more <= HEAD_ROWS) {
                (texts, n) = (texts + 1, n + more);
            }
            let some;
            (some, rest) = rest.split_at(texts);
            rows.clear();
            some.iter().flat_map(|w| w.1.clone()).for_each(|r| rows.extend_from_slice(hidden.row(r)));
            let mut memory = std::mem::take(logits);
            memory.resize(n * vocab, 0.0);
            let mut values = Mat::from_vec(n, vocab, memory);
            self.engine.model().head.logits_into(MatRef::new(n, width, rows), &mut values);
            self.choose(some, values.view());
            *logits = values.into_vec();
            chosen += some.iter().map(|w| self.running[w.0].chosen.len()).sum::<usize>();
            over.extend(some.iter().map(|w| w.0).filter(|&index| self.running[index].advance(most, on)));
        }
        chosen
    }

    /// Lets texts, rising in their index, choose their next tokens; each by as many rows of `logits` as it has.
    fn choose(&mut self, texts: &[(usize, Range<usize>)], logits: MatRef<'_>) {
        let vocab = logits.cols();
        let mut row = 0;
        let mut rows = |n: usize| {
            row += n;
            logits.rows_range(row - n, row)
        };
        let cost = texts.iter().map(|t| self.running[t.0].choice_cost(vocab)).sum::<usize>();
        if texts.len() == 1 || cost < self.choice_cost {
            texts.iter().for_each(|t| self.running[t.0].choose(rows(t.1.len())));
            return;
        }
        let mut texts = texts.iter().peekable();
        let mut choosing: Vec<(&mut Active, MatRef<'_>)> = Vec::new();
        for (index, a) in self.running.iter_mut().enumerate() {
            if let Some(t) = texts.next_if(|t| t.0 == index) {
                choosing.push((a, rows(t.1.len())));
            }
        }
        choosing.into_par_iter().for_each(|(a, logits)| a.choose(logits));
    }

    /// Takes texts that are over from those at work.
    fn end(&mut self, over: &mut Vec<usize>) {
        over.sort_unstable();
        for index in over.drain(..).rev() {
            let gone = self.running.remove(index);
            self.close(&gone);
        }
    }

    fn close(&mut self, a: &Active) {
        self.draft_cost = a.drafter.as_ref().and_then(|d| d.cost()).map_or(self.draft_cost, |c| c.max(self.draft_cost));
        self.store.close(a.slot());
        if !self.limits.reuse {
            self.store.forget();
        }
    }
}

/// Why a prompt that fills the context is refused.
pub(crate) const NO_ROOM: &str = ", and the answer needs room, too: shorten the prompt";

/// Adds every row to `sum`, in order.
fn add_rows(sum: &mut Vec<f64>, x: MatRef<'_>) {
    sum.resize(x.cols(), 0.0);
    for r in 0..x.rows() {
        sum.iter_mut().zip(x.row(r)).for_each(|(s, &v)| *s += f64::from(v));
    }
}

/// The vector of length 1 in a direction; of no direction, zeros.
fn unit(v: &[f64]) -> Vec<f32> {
    let length = v.iter().map(|x| x * x).sum::<f64>().sqrt();
    let factor = if length > 0.0 { 1.0 / length } else { 0.0 };
    v.iter().map(|x| (x * factor) as f32).collect()
}
