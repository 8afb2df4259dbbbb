//! How fast the engine reads and writes, timed as llama-bench times it.

use std::time::Instant;

use lacuna_base::Rng;
use lacuna_kernels::KvLayout;
use lacuna_model::STEP_TOKENS;
use serde::Serialize;

use crate::{Engine, RunError, Sequence};

/// What to time.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Random tokens read in one go at depth 0, in the engine's chunks. 0: not timed.
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
    /// Bytes of weights read for one token.
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

impl Engine {
    /// Times reading and writing; logits are computed for the last token of a call only. Steps across LongRoPE's
    /// original context read the text again, as in any generation, and that is timed, too. `progress` is told the
    /// repetitions done and their number.
    pub fn bench(&self, o: &BenchOptions, progress: &mut dyn FnMut(usize, usize)) -> Result<Bench, RunError> {
        let depth = o.depth.max(1);
        let longest = o.prompt_tokens.max(if o.gen_tokens > 0 { depth.saturating_add(o.gen_tokens) } else { 0 });
        if longest == 0 {
            return Err(RunError::Request("nothing to time: both the prompt and the steps are 0".into()));
        }
        if longest > self.context() {
            let hint = ": time fewer tokens or a smaller depth";
            return Err(RunError::Context { tokens: longest, context: self.context(), hint });
        }
        let mut rng = Rng::new(o.seed);
        let vocab = self.model().spec.vocab;
        let text: Vec<u32> = (0..longest).map(|_| rng.below(vocab) as u32).collect();
        let reps = o.reps.max(1);
        let (mut prefill, mut decode) = (Vec::new(), Vec::new());

        let mut seq = self.sequence();
        let (mut prefill_profile, mut decode_profile) = (Vec::new(), Vec::new());
        if o.prompt_tokens > 0 {
            for rep in 0..=reps {
                self.reuse(&mut seq, &[], longest);
                let start = Instant::now();
                self.extend(&mut seq, &text[..o.prompt_tokens])?;
                let speed = o.prompt_tokens as f64 / start.elapsed().as_secs_f64().max(1e-9);
                // The first one warms caches and memory up.
                if rep > 0 {
                    prefill.push(speed);
                }
                progress(rep, 2 * reps);
            }
            if o.profile {
                self.reuse(&mut seq, &[], longest);
                prefill_profile = profiled(|| self.extend(&mut seq, &text[..o.prompt_tokens]).map(drop))?;
            }
        }
        let mut kv_bytes = 0;
        if o.gen_tokens > 0 {
            self.reuse(&mut seq, &[], longest);
            self.extend(&mut seq, &text[..depth])?;
            // Back to `depth` tokens, the last of which is read anew: weights that a cache holds are there again before
            // the clock starts, and, where the steps crossed LongRoPE's original context, the short keys.
            let back = |seq: &mut Sequence| {
                seq.truncate(depth - 1);
                self.extend(seq, &text[depth - 1..depth]).map(drop)
            };
            for rep in 0..=reps {
                back(&mut seq)?;
                let steps = if rep == 0 { o.gen_tokens.min(8) } else { o.gen_tokens };
                let start = Instant::now();
                for token in &text[depth..depth + steps] {
                    self.extend(&mut seq, std::slice::from_ref(token))?;
                }
                if rep > 0 {
                    decode.push(steps as f64 / start.elapsed().as_secs_f64().max(1e-9));
                }
                progress(reps + rep, 2 * reps);
            }
            if o.profile {
                back(&mut seq)?;
                let steps = &text[depth..depth + o.gen_tokens];
                decode_profile = profiled(|| {
                    steps.iter().try_for_each(|t| self.extend(&mut seq, std::slice::from_ref(t)).map(drop))
                })?;
            }
            kv_bytes = (depth..depth + o.gen_tokens).map(|at| self.kv_bytes_at(at)).sum::<u64>() / o.gen_tokens as u64;
        }
        let weights_bytes = self.model().weights_bytes();
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

    /// Bytes of keys and values that the token at position `at` reads.
    fn kv_bytes_at(&self, at: usize) -> u64 {
        let attns = self.model().spec.layers.iter().filter_map(|l| l.attn.as_ref());
        attns
            .map(|a| {
                let layout = KvLayout { kv_heads: a.kv_heads, head_dim: a.head_dim, page_tokens: STEP_TOKENS };
                (layout.token_bytes(self.kv_format()) * (at + 1).min(a.window.unwrap_or(usize::MAX))) as u64
            })
            .sum()
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
