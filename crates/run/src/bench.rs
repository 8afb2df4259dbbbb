//! How fast the engine reads and writes, timed as llama-bench times it.

use std::sync::Arc;
use std::time::Instant;

use lacuna_base::Rng;
use lacuna_kernels::KvLayout;
use lacuna_model::Reads;
use serde::Serialize;

use crate::blocks::keep::slots_at;
use crate::request::{Event, Job, Request};
use crate::session::{DEFAULT_CHUNK, one_text};
use crate::{BLOCK_TOKENS, Engine, RunError, Scheduler};

/// What to time.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Random tokens read in one go at depth 0, in chunks of [`DEFAULT_CHUNK`]. 0: not timed.
    pub prompt_tokens: usize,
    /// Single-token steps. 0: not timed.
    pub gen_tokens: usize,
    /// Tokens read before the steps, at least 1 is taken.
    pub depth: usize,
    /// Repetitions after one warm-up, at least 1.
    pub reps: usize,
    /// Seed of the random tokens.
    pub seed: u64,
    /// Run once more with every operation timed.
    pub profile: bool,
}

impl Default for BenchOptions {
    fn default() -> BenchOptions {
        BenchOptions { prompt_tokens: 512, gen_tokens: 128, depth: 0, reps: 5, seed: 0, profile: false }
    }
}

/// Speeds of a model on this machine.
#[derive(Clone, Debug, Serialize)]
pub struct Bench {
    /// Tokens read a second, the median.
    pub prefill_tok_s: Option<f64>,
    /// Tokens written a second, the median.
    pub decode_tok_s: Option<f64>,
    /// Every repetition's reading speed.
    pub prefill_all_tok_s: Vec<f64>,
    /// Every repetition's writing speed.
    pub decode_all_tok_s: Vec<f64>,
    /// Bytes of weights read for one token, the mean over the steps where a gate leaves channels out.
    pub weights_bytes: u64,
    /// Bytes of keys and values read for one token, the mean over the steps.
    pub kv_bytes: u64,
    /// Both: what a token must move through memory.
    pub token_bytes: u64,
    /// Where the time of one reading goes, if asked.
    pub prefill_profile: Vec<Spent>,
    /// Where the time of the steps goes, if asked.
    pub decode_profile: Vec<Spent>,
}

/// An operation's share of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Spent {
    /// The operation.
    pub name: &'static str,
    /// Its calls.
    pub calls: u64,
    /// Seconds of all of them.
    pub seconds: f64,
}

/// What `f` spends on each operation, and on all that is none of them.
fn profiled(f: impl FnOnce() -> Result<(), RunError>) -> Result<Vec<Spent>, RunError> {
    lacuna_model::start_profile();
    let start = Instant::now();
    let done = f();
    let whole = start.elapsed().as_secs_f64();
    let mut all: Vec<Spent> = lacuna_model::end_profile()
        .into_iter()
        .map(|(name, calls, time)| Spent { name, calls, seconds: time.as_secs_f64() })
        .collect();
    let named: f64 = all.iter().map(|s| s.seconds).sum();
    all.push(Spent { name: "everything else", calls: 1, seconds: (whole - named).max(0.0) });
    done.map(|()| all)
}

/// Times reading and writing, of random tokens in the scheduler's own steps; logits are computed for a prompt's last
/// token only, and for every token that is written. Steps across LongRoPE's original context read the text again, as in
/// any generation, and that is timed, too. `progress` is told the repetitions done and their number.
pub fn bench(
    engine: impl Into<Arc<Engine>>,
    o: &BenchOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Bench, RunError> {
    let engine = engine.into();
    let depth = o.depth.max(1);
    let longest = o.prompt_tokens.max(if o.gen_tokens > 0 { depth.saturating_add(o.gen_tokens) } else { 0 });
    if longest == 0 {
        return Err(RunError::Request("nothing to time: both the prompt and the steps are 0".into()));
    }
    if longest > engine.context() {
        let hint = ": time fewer tokens or a smaller depth";
        return Err(RunError::Context { tokens: longest, context: engine.context(), hint });
    }
    let mut rng = Rng::new(o.seed);
    let vocab = engine.model().spec.vocab;
    let text: Vec<u32> = (0..longest).map(|_| rng.below(vocab) as u32).collect();
    let reps = o.reps.max(1);
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    let (mut prefill_profile, mut decode_profile) = (Vec::new(), Vec::new());

    let mut timed = Timed::new(&engine, longest);
    if o.prompt_tokens > 0 {
        let prompt = &text[..o.prompt_tokens];
        for rep in 0..=reps {
            timed.forget();
            timed.submit(prompt, &[])?;
            let start = Instant::now();
            timed.read()?;
            let speed = o.prompt_tokens as f64 / start.elapsed().as_secs_f64().max(1e-9);
            // The first one warms caches and memory up.
            if rep > 0 {
                prefill.push(speed);
            }
            progress(rep, 2 * reps);
        }
        if o.profile {
            timed.forget();
            timed.submit(prompt, &[])?;
            prefill_profile = profiled(|| timed.read())?;
        }
    }
    let (mut kv_bytes, mut left_out, mut weights_left) = (0, 0, 0);
    if o.gen_tokens > 0 {
        timed.forget();
        for rep in 0..=reps {
            let steps = if rep == 0 { o.gen_tokens.min(8) } else { o.gen_tokens };
            // Up to `depth` tokens, of which from the second time on the last alone is read: weights that a cache holds
            // are there again before the clock starts, and, where the steps crossed LongRoPE's original context, the
            // short keys.
            timed.submit(&text[..depth], &text[depth..depth + steps])?;
            timed.read()?;
            let before = timed.scheduler.gauges();
            let start = Instant::now();
            timed.write()?;
            let after = timed.scheduler.gauges();
            left_out = less(before.reads, after.reads) / steps as u64;
            weights_left = less(before.gate_reads, after.gate_reads) / steps as u64;
            if rep > 0 {
                decode.push(steps as f64 / start.elapsed().as_secs_f64().max(1e-9));
            }
            progress(reps + rep, 2 * reps);
        }
        if o.profile {
            timed.submit(&text[..depth], &text[depth..depth + o.gen_tokens])?;
            timed.read()?;
            decode_profile = profiled(|| timed.write())?;
        }
        kv_bytes = (depth..depth + o.gen_tokens).map(|at| engine.kv_bytes_at(at)).sum::<u64>() / o.gen_tokens as u64;
        kv_bytes -= left_out.min(kv_bytes);
    }
    let weights_bytes = engine.model().weights_bytes().saturating_sub(weights_left);
    Ok(Bench {
        prefill_tok_s: median(&prefill),
        decode_tok_s: median(&decode),
        prefill_all_tok_s: prefill,
        decode_all_tok_s: decode,
        weights_bytes,
        kv_bytes,
        token_bytes: weights_bytes + kv_bytes,
        prefill_profile,
        decode_profile,
    })
}

/// Bytes that were left out between two counts.
fn less(before: Reads, after: Reads) -> u64 {
    (after.all - before.all).saturating_sub(after.read - before.read)
}

/// A scheduler that reads and writes given tokens.
struct Timed {
    scheduler: Scheduler,
    next: u64,
}

impl Timed {
    fn new(engine: &Arc<Engine>, longest: usize) -> Timed {
        let mut scheduler = Scheduler::without_text(Arc::clone(engine), one_text(DEFAULT_CHUNK));
        scheduler.set_room(longest);
        Timed { scheduler, next: 0 }
    }

    /// From here on every text is read from its first token.
    fn forget(&mut self) {
        self.scheduler.forget();
    }

    fn submit(&mut self, prompt: &[u32], rest: &[u32]) -> Result<(), RunError> {
        self.next += 1;
        self.scheduler.submit(self.next, Request::new(prompt.to_vec(), Job::Forced(rest.to_vec())))
    }

    /// Reads the prompt, up to the logits after it.
    fn read(&mut self) -> Result<(), RunError> {
        while !self.scheduler.is_idle() && self.step()? == 0 {}
        Ok(())
    }

    /// Writes the rest, to the end.
    fn write(&mut self) -> Result<(), RunError> {
        while !self.scheduler.is_idle() {
            self.step()?;
        }
        Ok(())
    }

    /// One step; rows whose logits it computed.
    fn step(&mut self) -> Result<usize, RunError> {
        let mut failed = None;
        let step = self.scheduler.step(&mut |_, event| {
            if let Event::Failed(e) = event {
                failed = Some(e);
            }
        });
        if failed.is_none() && step.decode_rows + step.prefill_rows == 0 && !self.scheduler.is_idle() {
            let blocks = self.scheduler.gauges().blocks.total;
            return Err(RunError::Request(format!("a text to time finds no room in {blocks} blocks")));
        }
        failed.map_or(Ok(step.logits_rows), Err)
    }
}

impl Engine {
    /// Bytes of keys, values and states that the token at position `at` reads.
    fn kv_bytes_at(&self, at: usize) -> u64 {
        let seen = self.keep_plan().map_or(at + 1, |plan| slots_at(plan, at));
        let attns = self.model().spec.layers.iter().filter_map(|l| l.attn.as_ref());
        attns
            .map(|a| {
                let layout = KvLayout { kv_heads: a.kv_heads, head_dim: a.head_dim, page_tokens: BLOCK_TOKENS };
                (layout.token_bytes(self.kv_format())
                    * seen.min(a.window.unwrap_or(usize::MAX)).min(a.chunk.map_or(usize::MAX, |c| at % c + 1)))
                    as u64
            })
            .sum::<u64>()
            + self.state_bytes()
    }

    /// Bytes of a text's state.
    fn state_bytes(&self) -> u64 {
        let spec = &self.model().spec;
        let values = spec.layers.iter().filter_map(|l| l.mixer.as_ref()).map(|m| m.state_values(spec.hidden));
        4 * values.sum::<usize>() as u64
    }
}

/// The middle value; of two middle values, their mean.
fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let n = sorted.len();
    (n > 0).then(|| (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn medians() {
        assert_eq!(
            (median(&[]), median(&[3.0]), median(&[4.0, 1.0]), median(&[9.0, 1.0, 2.0])),
            (None, Some(3.0), Some(2.5), Some(2.0))
        );
    }
}
