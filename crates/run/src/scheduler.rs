//! Many texts at once: continuous batching with prompts read in chunks.
//!
//! A step is one pass over the weights for one row of every text that is being continued and at most
//! [`Limits::prefill_rows`] rows of prompts. Texts are admitted first come, first served; prompts take turns, so that a
//! long one does not hold up short ones. Where blocks run out, the text that was admitted last gives its own up and
//! waits, to be read again later: a row's result does not depend on its company, so that its answer is the same. A text
//! that outgrows its class ([`Engine::class`]) is read again in the same way.

use std::collections::{HashSet, VecDeque};

use lacuna_base::{Mat, MatRef};
use lacuna_checkpoint::{Decoder as TextDecoder, Tokenizer};
use lacuna_model::{Batch, NoTap};

use crate::blocks::{BLOCK_TOKENS, BlockCounts, BlockStore};
use crate::generate::StopFilter;
use crate::request::{Event, Finished, Grammar, Job, Picked, Pooling, Request};
use crate::{Engine, Generation, Probability, RunError, Sampler, Stop};

/// Rows whose logits are computed in one call, at most: a row of a large vocabulary is a megabyte.
const HEAD_ROWS: usize = 32;

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
}

/// The state of a scheduler, in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
}

/// Continues many texts over one engine.
pub struct Scheduler {
    engine: Engine,
    tokenizer: Tokenizer,
    limits: Limits,
    store: BlockStore,
    waiting: VecDeque<Active>,
    running: Vec<Active>,
    /// Whose turn it is among prompts: the number of steps so far.
    turn: usize,
    preempted: u64,
    /// Memory of logits, used again and again.
    logits: Vec<f32>,
}

/// A text and where it stands.
struct Active {
    id: u64,
    /// The prompt and what was generated.
    tokens: Vec<u32>,
    prompt_tokens: usize,
    /// Where its keys and values are; none while it waits.
    slot: Option<usize>,
    /// Tokens whose keys and values are written.
    read: usize,
    /// Tokens that it may become.
    extent: usize,
    /// The class of its keys.
    class: u32,
    /// Tokens taken over at its first admission.
    reused: Option<usize>,
    work: Work,
}

enum Work {
    Generate(Box<Writing>),
    Embed { pooling: Pooling, sum: Vec<f64> },
}

/// An answer in the making.
struct Writing {
    generation: Generation,
    logprobs: Option<usize>,
    grammar: Option<Box<dyn Grammar>>,
    sampler: Sampler,
    decoder: TextDecoder,
    filter: StopFilter,
    /// Bytes of text decoded, and of those that are certain.
    decoded: usize,
    certain: usize,
    /// Tokens that were not told yet, with the byte at which their text begins.
    held: VecDeque<(usize, Picked)>,
}

/// Rows of one text in a step.
struct Chunk {
    index: usize,
    from: usize,
    to: usize,
}

impl Scheduler {
    /// A scheduler that owns its engine.
    pub fn new(engine: Engine, tokenizer: Tokenizer, limits: Limits) -> Scheduler {
        let limits = Limits { batch: limits.batch.max(1), prefill_rows: limits.prefill_rows.max(1), ..limits };
        let store = BlockStore::new(&engine.model().spec, engine.kv_format(), limits.kv_bytes);
        Scheduler {
            engine,
            tokenizer,
            limits,
            store,
            waiting: VecDeque::new(),
            running: Vec::new(),
            turn: 0,
            preempted: 0,
            logits: Vec::new(),
        }
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Most tokens that a text may have: the context, or what the blocks hold.
    pub fn most_tokens(&self) -> usize {
        self.engine.context().min(self.store.total().saturating_mul(BLOCK_TOKENS))
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
        }
    }

    /// Takes a request, known by `id` from here on, or says what is wrong with it.
    pub fn submit(&mut self, id: u64, request: Request) -> Result<(), RunError> {
        let Request { prompt, job } = request;
        let (n, most) = (prompt.len(), self.most_tokens());
        if n == 0 {
            return Err(RunError::Empty);
        }
        let vocab = self.engine.model().spec.vocab;
        if let Some(token) = prompt.iter().find(|&&t| t as usize >= vocab) {
            return Err(RunError::Request(format!("token {token} is not among the model's {vocab}")));
        }
        let too_long = |hint| Err(RunError::Context { tokens: n, context: most, hint });
        let (work, extent) = match job {
            Job::Embed(pooling) => {
                if n > most {
                    return too_long("");
                }
                (Work::Embed { pooling, sum: Vec::new() }, n)
            }
            Job::Generate { generation, logprobs, grammar, special } => {
                if n >= most {
                    return too_long(", and the answer needs room, too: shorten the prompt");
                }
                let extent = n.saturating_add(generation.max_tokens).min(most);
                let decoder = self.tokenizer.decoder().continuing();
                let writing = Writing {
                    sampler: Sampler::new(&generation.sampling)?,
                    decoder: if special { decoder.with_special() } else { decoder },
                    filter: StopFilter::new(&generation.stop),
                    logprobs,
                    grammar,
                    generation,
                    decoded: 0,
                    certain: 0,
                    held: VecDeque::new(),
                };
                (Work::Generate(Box::new(writing)), extent)
            }
        };
        self.waiting.push_back(Active {
            id,
            prompt_tokens: n,
            tokens: prompt,
            slot: None,
            read: 0,
            extent,
            class: self.engine.class(n),
            reused: None,
            work,
        });
        Ok(())
    }

    /// Gives a request up; false where it is not known (any more). Nothing more is told of it.
    pub fn cancel(&mut self, id: u64) -> bool {
        if let Some(at) = self.waiting.iter().position(|a| a.id == id) {
            self.waiting.remove(at);
            return true;
        }
        let Some(at) = self.running.iter().position(|a| a.id == id) else { return false };
        let gone = self.running.remove(at);
        self.close(&gone);
        true
    }

    /// Gives everything up, telling each request why, and begins anew with an empty store.
    pub fn fail_all(&mut self, why: &str, on: &mut dyn FnMut(u64, Event)) {
        let all = self.waiting.drain(..).chain(self.running.drain(..));
        all.for_each(|a| on(a.id, Event::Failed(RunError::Request(why.to_owned()))));
        self.store = BlockStore::new(&self.engine.model().spec, self.engine.kv_format(), self.limits.kv_bytes);
    }

    /// Does one step, telling what comes of it.
    pub fn step(&mut self, on: &mut dyn FnMut(u64, Event)) -> Step {
        self.outgrown();
        self.admit(on);
        let (parts, step) = self.plan();
        if parts.is_empty() {
            return step;
        }
        let mut batch = Batch::new();
        let mut tokens = Vec::new();
        for p in &parts {
            let a = &self.running[p.index];
            batch.push_part(slot(a), p.from..p.to, a.tokens.len());
            tokens.extend_from_slice(&a.tokens[p.from..p.to]);
        }
        let hidden = match self.engine.model().forward(&tokens, &batch, &mut self.store, &mut NoTap) {
            Ok(hidden) => hidden,
            Err(e) => {
                let mut failed: Vec<usize> = parts.iter().map(|p| p.index).collect();
                failed.sort_unstable();
                for index in failed.into_iter().rev() {
                    let gone = self.running.remove(index);
                    self.store.truncate(slot(&gone), gone.read);
                    self.close(&gone);
                    on(gone.id, Event::Failed(RunError::Request(e.to_string())));
                }
                return step;
            }
        };
        let mut wanted: Vec<(usize, usize)> = Vec::new();
        let (mut row, mut over) = (0, Vec::new());
        for p in &parts {
            let a = &mut self.running[p.index];
            let rows = row..row + (p.to - p.from);
            row = rows.end;
            a.read = p.to;
            self.store.publish(slot(a), &a.tokens[..p.to]);
            let whole = p.to == a.tokens.len();
            match &mut a.work {
                Work::Generate(_) if whole => wanted.push((p.index, rows.end - 1)),
                Work::Generate(_) => {}
                Work::Embed { pooling, sum } => {
                    let from = if *pooling == Pooling::Last { rows.end - 1 } else { rows.start };
                    let x = self.engine.model().head.input(hidden.view().rows_range(from, rows.end));
                    match pooling {
                        Pooling::Last => *sum = x.row(x.rows() - 1).iter().map(|&v| f64::from(v)).collect(),
                        Pooling::Mean => add_rows(sum, x.view()),
                    }
                    if whole {
                        on(a.id, Event::Embedding { vector: unit(sum), tokens: a.tokens.len() });
                        over.push(p.index);
                    }
                }
            }
        }
        for some in wanted.chunks(HEAD_ROWS) {
            self.answer(some, hidden.view(), &mut over, on);
        }
        over.sort_unstable();
        for index in over.into_iter().rev() {
            let gone = self.running.remove(index);
            self.close(&gone);
        }
        step
    }

    /// Texts that have become too long for the class of their keys are to be read again.
    fn outgrown(&mut self) {
        for index in (0..self.running.len()).rev() {
            let class = self.engine.class(self.running[index].tokens.len());
            if class != self.running[index].class {
                let a = self.running.remove(index);
                self.wait(Active { class, ..a });
            }
        }
    }

    /// Brings waiting texts to work while there is room.
    fn admit(&mut self, on: &mut dyn FnMut(u64, Event)) {
        while self.running.len() < self.limits.batch {
            let Some(mut a) = self.waiting.pop_front() else { return };
            if let Work::Generate(w) = &a.work
                && w.generation.max_tokens == 0
            {
                on(a.id, Event::Finished(finished(&a, Stop::MaxTokens)));
                continue;
            }
            let slot = self.store.open(a.class);
            a.slot = Some(slot);
            a.read = take_over(&mut self.store, &a, self.limits.reuse);
            // Room for what it is and its next token; and one block left for each text at work, or the next steps would
            // drive it out again.
            let spare = self.running.len();
            let fits = self.store.reserve(slot, (a.tokens.len() + 1).min(a.extent));
            if !fits || (spare > 0 && self.store.available() < spare) {
                self.store.close(slot);
                (a.slot, a.read) = (None, 0);
                self.waiting.push_front(a);
                return;
            }
            a.reused.get_or_insert(a.read);
            self.running.push(a);
        }
    }

    /// Which rows come next.
    fn plan(&mut self) -> (Vec<Chunk>, Step) {
        let (mut parts, mut step) = (Vec::new(), Step::default());
        let mut index = 0;
        while index < self.running.len() {
            let a = &self.running[index];
            if a.tokens.len() - a.read == 1 {
                let (slot, to) = (slot(a), a.tokens.len());
                // The last one admitted gives way, if need be this one.
                while !self.store.reserve(slot, to) {
                    self.preempt();
                    if index == self.running.len() {
                        return self.plan_prompts(parts, step);
                    }
                }
                parts.push(Chunk { index, from: to - 1, to });
                step.decode_rows += 1;
            }
            index += 1;
        }
        self.plan_prompts(parts, step)
    }

    /// Adds rows of prompts, each in its turn.
    fn plan_prompts(&mut self, mut parts: Vec<Chunk>, mut step: Step) -> (Vec<Chunk>, Step) {
        let rows = self.limits.prefill_rows;
        let reading: Vec<usize> =
            (0..self.running.len()).filter(|&i| self.running[i].tokens.len() - self.running[i].read > 1).collect();
        if reading.is_empty() {
            return (parts, step);
        }
        // A share for each, so that one long prompt leaves room for the others; what is left over goes to the first in
        // turn.
        let share = (rows / reading.len()).max(rows / 4).max(1);
        let first = self.turn % reading.len();
        self.turn += 1;
        let mut claimed = HashSet::new();
        let mut left = rows;
        let mut asked: Vec<Chunk> = Vec::new();
        for k in 0..reading.len() {
            let index = reading[(first + k) % reading.len()];
            if left == 0 {
                break;
            }
            // Others may have published the next blocks since the last step.
            let read = take_over(&mut self.store, &self.running[index], self.limits.reuse);
            self.running[index].read = read;
            let a = &self.running[index];
            let mean = matches!(a.work, Work::Embed { pooling: Pooling::Mean, .. });
            if self.limits.reuse && !mean {
                // Two texts that begin alike: one computes the block, the other takes it over in the next step.
                let key = self.store.next_key(slot(a), &a.tokens[..a.tokens.len() - 1]);
                if key.is_some_and(|key| !claimed.insert(key)) {
                    continue;
                }
            }
            let to = (a.read + share.min(left)).min(a.tokens.len());
            left -= to - a.read;
            asked.push(Chunk { index, from: a.read, to });
        }
        for p in asked.iter_mut() {
            let more = left.min(self.running[p.index].tokens.len() - p.to);
            (p.to, left) = (p.to + more, left - more);
        }
        // Room for whole prompts was made when they were admitted.
        step.prefill_rows = asked.iter().map(|p| p.to - p.from).sum();
        parts.extend(asked);
        (parts, step)
    }

    /// The text that was admitted last gives way.
    fn preempt(&mut self) {
        let Some(a) = self.running.pop() else { return };
        self.preempted += 1;
        self.wait(a);
    }

    /// Puts a text that was at work at the head of the queue; it gives its blocks up.
    fn wait(&mut self, mut a: Active) {
        self.close(&a);
        (a.slot, a.read) = (None, 0);
        if let Work::Embed { sum, .. } = &mut a.work {
            sum.clear();
        }
        self.waiting.push_front(a);
    }

    fn close(&mut self, a: &Active) {
        self.store.close(slot(a));
        if !self.limits.reuse {
            self.store.forget();
        }
    }

    /// Computes the logits of `wanted` (texts and their rows of `hidden`) and lets each go on by one token. Those that
    /// end join `over`.
    fn answer(
        &mut self,
        wanted: &[(usize, usize)],
        hidden: MatRef<'_>,
        over: &mut Vec<usize>,
        on: &mut dyn FnMut(u64, Event),
    ) {
        let (n, width) = (wanted.len(), hidden.cols());
        let rows: Vec<f32> = wanted.iter().flat_map(|&(_, r)| hidden.row(r).iter().copied()).collect();
        let vocab = self.engine.model().spec.vocab;
        let mut memory = std::mem::take(&mut self.logits);
        memory.resize(n * vocab, 0.0);
        let mut logits = Mat::from_vec(n, vocab, memory);
        self.engine.model().head.logits_into(MatRef::new(n, width, &rows), &mut logits);
        let context = self.most_tokens();
        for (i, &(index, _)) in wanted.iter().enumerate() {
            let a = &mut self.running[index];
            match next(a, logits.row(i), &self.tokenizer, context, on) {
                Ok(None) => {}
                Ok(Some(stop)) => {
                    on(a.id, Event::Finished(finished(a, stop)));
                    over.push(index);
                }
                Err(e) => {
                    on(a.id, Event::Failed(e));
                    over.push(index);
                }
            }
        }
        self.logits = logits.into_vec();
    }
}

/// Where a text at work keeps its keys and values.
#[track_caller]
fn slot(a: &Active) -> usize {
    a.slot.expect("a text at work has a slot")
}

/// Takes over what others have published of a text, short of its last token, whose row is needed. Returns the tokens
/// read.
fn take_over(store: &mut BlockStore, a: &Active, reuse: bool) -> usize {
    // A mean needs every row.
    let all = matches!(a.work, Work::Embed { pooling: Pooling::Mean, .. });
    if all || !reuse {
        return store.tokens(slot(a));
    }
    store.take_over(slot(a), &a.tokens[..a.tokens.len() - 1])
}

fn finished(a: &Active, stop: Stop) -> Finished {
    Finished {
        stop,
        prompt_tokens: a.prompt_tokens,
        reused_tokens: a.reused.unwrap_or(0),
        tokens: a.tokens.len() - a.prompt_tokens,
    }
}

/// Chooses a text's next token and tells the text that became certain; returns why the answer is over, if it is.
fn next(
    a: &mut Active,
    logits: &[f32],
    tokenizer: &Tokenizer,
    context: usize,
    on: &mut dyn FnMut(u64, Event),
) -> Result<Option<Stop>, RunError> {
    let Work::Generate(w) = &mut a.work else { return Ok(None) };
    let allowed = w.grammar.as_mut().map(|g| g.allowed()).transpose()?;
    let id = w.sampler.pick(logits, &a.tokens, a.prompt_tokens, allowed)?;
    let mut stop = None;
    if !w.generation.ignore_end && tokenizer.eos_set().contains(&id) {
        stop = Some(Stop::EndToken(id));
    } else {
        a.tokens.push(id);
        let probability = w.logprobs.map(|top| Probability::of(logits, id, top));
        w.held.push_back((w.decoded, Picked { id, probability }));
        let piece = w.decoder.push(id).unwrap_or_default();
        w.decoded += piece.len();
        let (certain, stopped) = w.filter.push(&piece);
        w.tell(a.id, certain, false, on);
        let complete = match &mut w.grammar {
            Some(g) => g.accept(id)?,
            None => false,
        };
        if let Some(text) = stopped {
            return Ok(Some(Stop::StopText(text)));
        } else if complete {
            stop = Some(Stop::Grammar);
        } else if a.tokens.len() - a.prompt_tokens == w.generation.max_tokens {
            stop = Some(Stop::MaxTokens);
        } else if a.tokens.len() == context {
            stop = Some(Stop::Context);
        }
    }
    if stop.is_some() {
        let mut rest = w.filter.finish();
        rest.extend(w.decoder.finish());
        w.tell(a.id, rest, true, on);
    }
    Ok(stop)
}

impl Writing {
    /// Tells text that is certain, with the tokens that begin in it; at the end, with all that are left.
    fn tell(&mut self, id: u64, text: String, end: bool, on: &mut dyn FnMut(u64, Event)) {
        self.certain += text.len();
        let mut tokens = Vec::new();
        while self.held.front().is_some_and(|(start, _)| end || *start < self.certain) {
            tokens.extend(self.held.pop_front().map(|(_, picked)| picked));
        }
        if !text.is_empty() || !tokens.is_empty() {
            on(id, Event::Text { text, tokens });
        }
    }
}

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
