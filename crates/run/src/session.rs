//! One text after another: the scheduler, for whoever has a single text to continue at a time.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use lacuna_checkpoint::Tokenizer;
use lacuna_contract::StepSeconds;
use serde::Serialize;

use crate::request::{Event, Finished, Request};
use crate::scheduler::NO_ROOM;
use crate::{Engine, Generation, Limits, RunError, Sampler, Scheduler, Stop};

/// Rows of a prompt computed in one step: enough to keep a processor busy, few enough to keep activations small.
pub const DEFAULT_CHUNK: usize = 512;

/// Counts and speeds of one generation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stats {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, tokens whose keys and values were there already.
    pub reused_tokens: usize,
    /// Tokens generated, an end token not counted.
    pub tokens: usize,
    /// Prompt tokens read a second, without the reused ones.
    pub prefill_tok_s: f64,
    /// Tokens a second behind the first; none where that was the last.
    pub decode_tok_s: Option<f64>,
    /// Tokens that were drafted and verified.
    pub drafted_tokens: u64,
    /// Of these, tokens that came.
    pub accepted_tokens: u64,
    /// Why it ended.
    pub stop: Stop,
    /// Bytes of keys and values held at the end.
    pub kv_bytes: u64,
}

/// A finished generation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Generated {
    /// The text, without special tokens and without the stop text.
    pub text: String,
    /// The tokens, without the end token. After a stop text they may hold a little more than `text`.
    pub tokens: Vec<u32>,
    /// Counts and speeds.
    pub stats: Stats,
}

/// Continues one text at a time, by a [`Scheduler`] that has room for one. Keys and values of the last text stay: the
/// next one reuses them as far as it begins alike, token by token. There is room for what the present text may become,
/// allocated as it grows.
pub struct Session {
    scheduler: Scheduler,
    tokenizer: Tokenizer,
    next: u64,
}

impl Session {
    /// A session over an engine of its own or a shared one.
    pub fn new(engine: impl Into<Arc<Engine>>, tokenizer: Tokenizer) -> Session {
        Session::with_chunk(engine, tokenizer, DEFAULT_CHUNK)
    }

    /// As [`Session::new`], with another number of prompt rows computed in one step, at least 1. It changes speed and
    /// memory, never a result.
    pub fn with_chunk(engine: impl Into<Arc<Engine>>, tokenizer: Tokenizer, rows: usize) -> Session {
        let scheduler = Scheduler::new(engine, tokenizer.clone(), one_text(rows));
        Session { scheduler, tokenizer, next: 0 }
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        self.scheduler.engine()
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// See [`Scheduler::set_prices`].
    pub fn set_prices(&mut self, seconds: StepSeconds) {
        self.scheduler.set_prices(seconds);
    }

    /// Bytes of keys and values that are held.
    pub fn kv_bytes(&self) -> usize {
        self.scheduler.gauges().kv_bytes
    }

    /// Refuses what cannot be generated, before anything of it is shown.
    pub fn check(&self, g: &Generation) -> Result<(), RunError> {
        let (tokens, context) = (g.prompt.len(), self.engine().context());
        if tokens == 0 {
            return Err(RunError::Empty);
        }
        if tokens >= context {
            return Err(RunError::Context { tokens, context, hint: NO_ROOM });
        }
        Sampler::new(&g.sampling).map(drop)
    }

    /// Continues `g.prompt`. `on_text` gets the text as it becomes certain: whole characters, and nothing that may yet
    /// turn out to be a stop text; it may end the generation.
    pub fn generate(
        &mut self,
        g: &Generation,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generated, RunError> {
        self.check(g)?;
        self.scheduler.set_room(g.prompt.len().saturating_add(g.max_tokens).min(self.engine().context()));
        let id = self.next;
        self.next += 1;
        self.scheduler.submit(id, Request::generate(g.clone()))?;

        let (mut text, mut end, mut enough) = (String::new(), None, false);
        let (mut prefill_s, mut behind) = (None, 0usize);
        let before = self.scheduler.gauges();
        let mut start = Instant::now();
        let finished = loop {
            let step = self.scheduler.step(&mut |_, event| match event {
                Event::Text { text: piece, .. } if !enough && !piece.is_empty() => {
                    text.push_str(&piece);
                    enough = on_text(&piece).is_break();
                }
                Event::Read(_) | Event::Text { .. } | Event::Embedding { .. } | Event::Rows { .. } => {}
                Event::Finished(f) => end = Some(Ok(f)),
                Event::Failed(e) => end = Some(Err(e)),
            });
            if step.logits_rows > 0 {
                // The prompt's last row: from here on tokens are written.
                match prefill_s {
                    None => {
                        prefill_s = Some(start.elapsed().as_secs_f64());
                        start = Instant::now();
                    }
                    Some(_) => behind += step.chosen,
                }
            }
            if let Some(end) = end.take() {
                break end?;
            }
            let stuck = step.decode_rows + step.prefill_rows == 0;
            if enough || stuck {
                let finished = self.scheduler.cancel(id);
                match finished {
                    Some(f) if !stuck => break f,
                    _ => return Err(self.stuck(g)),
                }
            }
        };
        let decode_s = start.elapsed().as_secs_f64();
        let after = self.scheduler.gauges();
        let Finished { stop, prompt_tokens, reused_tokens, tokens, ids, end: _ } = finished;
        let stats = Stats {
            prompt_tokens,
            reused_tokens,
            tokens,
            prefill_tok_s: prefill_s.map_or(0.0, |s| (prompt_tokens - reused_tokens) as f64 / s.max(1e-9)),
            decode_tok_s: (behind > 0).then(|| behind as f64 / decode_s.max(1e-9)),
            drafted_tokens: after.drafted - before.drafted,
            accepted_tokens: after.accepted - before.accepted,
            stop,
            kv_bytes: self.kv_bytes() as u64,
        };
        Ok(Generated { text, tokens: ids, stats })
    }

    /// A step that did nothing would be followed by others: a mistake of ours must not look like a slow machine.
    fn stuck(&self, g: &Generation) -> RunError {
        let (n, gauges) = (g.prompt.len(), self.scheduler.gauges());
        RunError::Request(format!("a text of {n} tokens finds no room in {} blocks", gauges.blocks.total))
    }
}

/// Limits for one text at a time, whose room is set when it is known.
pub(crate) fn one_text(prefill_rows: usize) -> Limits {
    Limits { batch: 1, prefill_rows, kv_bytes: 0, reuse: true }
}
