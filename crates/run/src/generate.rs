//! Continuing a prompt: tokens out one by one, text out as soon as it is certain.

use std::ops::ControlFlow;
use std::time::Instant;

use lacuna_checkpoint::Tokenizer;
use serde::Serialize;

use crate::{Engine, RunError, Sampler, Sampling, Sequence};

/// What to generate.
#[derive(Clone, Debug, Default)]
pub struct Generation {
    /// The prompt, its special tokens included.
    pub prompt: Vec<u32>,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Go on past the model's end tokens (for measurements).
    pub ignore_end: bool,
}

/// Why a generation ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// The model ended its answer with this token.
    EndToken(u32),
    /// This stop text came.
    StopText(String),
    /// The asked number of tokens is there.
    MaxTokens,
    /// The context is full.
    Context,
    /// What the grammar describes is complete.
    Grammar,
    /// The caller had enough.
    Caller,
}

/// Counts and speeds of one generation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stats {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, tokens that the sequence had read before.
    pub reused_tokens: usize,
    /// Tokens generated, an end token not counted.
    pub tokens: usize,
    /// Prompt tokens read a second, without the reused ones.
    pub prefill_tok_s: f64,
    /// Steps of one token a second; none where the first token was the last.
    pub decode_tok_s: Option<f64>,
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

impl Engine {
    /// Refuses what cannot be generated, before anything of it is shown; the sampler for what can.
    pub fn check(&self, g: &Generation) -> Result<Sampler, RunError> {
        let context = self.context();
        if g.prompt.is_empty() {
            return Err(RunError::Empty);
        }
        if g.prompt.len() >= context {
            let hint = ", and the answer needs room, too: shorten the prompt";
            return Err(RunError::Context { tokens: g.prompt.len(), context, hint });
        }
        Sampler::new(&g.sampling)
    }

    /// Continues `g.prompt` in `seq`, whose tokens are reused as far as they agree with the prompt. `on_text` gets the
    /// text as it becomes certain: whole characters, and nothing that may yet turn out to be a stop text; it may end
    /// the generation.
    pub fn generate(
        &self,
        seq: &mut Sequence,
        tokenizer: &Tokenizer,
        g: &Generation,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generated, RunError> {
        let context = self.context();
        let mut sampler = self.check(g)?;
        let reused = self.reuse(seq, &g.prompt, g.prompt.len().saturating_add(g.max_tokens));

        let mut all = g.prompt.clone();
        let mut decoder = tokenizer.decoder().continuing();
        let mut filter = StopFilter::new(&g.stop);
        let mut text = String::new();
        let mut steps = 0usize;

        let start = Instant::now();
        let mut logits: &[f32] = if g.max_tokens == 0 { &[] } else { self.extend(seq, &g.prompt[reused..])? };
        let prefill_s = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let stop = loop {
            let made = all.len() - g.prompt.len();
            if made == g.max_tokens {
                break Stop::MaxTokens;
            }
            if all.len() == context {
                break Stop::Context;
            }
            if made > 0 {
                logits = self.extend(seq, &all[all.len() - 1..])?;
                steps += 1;
            }
            let token = sampler.pick(logits, &all, g.prompt.len(), None)?;
            if !g.ignore_end && tokenizer.eos_set().contains(&token) {
                break Stop::EndToken(token);
            }
            all.push(token);
            let Some(piece) = decoder.push(token) else { continue };
            let (certain, stopped) = filter.push(&piece);
            text.push_str(&certain);
            let go_on = if certain.is_empty() { ControlFlow::Continue(()) } else { on_text(&certain) };
            if let Some(stop) = stopped {
                break Stop::StopText(stop);
            }
            if go_on.is_break() {
                break Stop::Caller;
            }
        };
        let decode_s = start.elapsed().as_secs_f64();
        if !matches!(stop, Stop::StopText(_) | Stop::Caller) {
            let mut rest = filter.finish();
            rest.extend(decoder.finish());
            if !rest.is_empty() {
                text.push_str(&rest);
                // The generation is over anyway.
                let _ = on_text(&rest);
            }
        }
        let tokens = all.split_off(g.prompt.len());
        let read = if g.max_tokens == 0 { 0 } else { g.prompt.len() - reused };
        let stats = Stats {
            prompt_tokens: g.prompt.len(),
            reused_tokens: reused,
            tokens: tokens.len(),
            prefill_tok_s: read as f64 / prefill_s.max(1e-9),
            decode_tok_s: (steps > 0).then(|| steps as f64 / decode_s.max(1e-9)),
            stop,
            kv_bytes: seq.kv_bytes() as u64,
        };
        Ok(Generated { text, tokens, stats })
    }
}

/// Holds back text that may be the beginning of a stop text.
pub(crate) struct StopFilter {
    stops: Vec<String>,
    held: String,
}

impl StopFilter {
    pub(crate) fn new(stops: &[String]) -> StopFilter {
        StopFilter { stops: stops.iter().filter(|s| !s.is_empty()).cloned().collect(), held: String::new() }
    }

    /// Takes a piece; returns the text that is certain, and the stop text if one came.
    pub(crate) fn push(&mut self, piece: &str) -> (String, Option<String>) {
        self.held.push_str(piece);
        // The match that ends first counts, so that the answer does not depend on how the text was cut into pieces.
        let hit = |s: &String| self.held.find(s.as_str()).map(|at| (at + s.len(), at, s.clone()));
        if let Some((_, at, stop)) = self.stops.iter().filter_map(hit).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), Some(stop));
        }
        let open = |&at: &usize| self.stops.iter().any(|s| s.starts_with(&self.held[at..]));
        let at = self.held.char_indices().map(|(at, _)| at).find(open).unwrap_or(self.held.len());
        let rest = self.held.split_off(at);
        (std::mem::replace(&mut self.held, rest), None)
    }

    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Rng;

    /// What a reader sees, and the stop text, for a text cut at `cuts`.
    fn run(text: &str, stops: &[String], mut cut: impl FnMut(usize) -> bool) -> (String, Option<String>) {
        let mut filter = StopFilter::new(stops);
        let (mut seen, mut from) = (String::new(), 0);
        for (at, _) in text.char_indices().skip(1).chain([(text.len(), ' ')]) {
            if at < text.len() && !cut(at) {
                continue;
            }
            let (certain, stop) = filter.push(&text[from..at]);
            seen += &certain;
            from = at;
            if stop.is_some() {
                return (seen, stop);
            }
        }
        (seen + &filter.finish(), None)
    }

    #[test]
    fn stop_texts_do_not_depend_on_token_borders() {
        let mut rng = Rng::new(3);
        for round in 0..2000 {
            let word = |rng: &mut Rng, n: usize| {
                (0..1 + rng.below(n)).map(|_| ['a', 'b', 'é'][rng.below(3)]).collect::<String>()
            };
            let text = word(&mut rng, 30);
            let stops: Vec<String> = (0..rng.below(4)).map(|_| word(&mut rng, 4)).collect();
            let whole = run(&text, &stops, |_| false);
            let single = run(&text, &stops, |_| true);
            let random = run(&text, &stops, |_| rng.below(2) == 0);
            assert_eq!(whole, single, "{round}: {text} {stops:?}");
            assert_eq!(whole, random, "{round}: {text} {stops:?}");
            assert!(stops.iter().all(|s| whole.1.is_some() || !text.contains(s.as_str())));
        }
    }

    #[test]
    fn nothing_certain_is_held_back() {
        let stops = ["\n\n".to_owned(), "END".to_owned()];
        let mut filter = StopFilter::new(&stops);
        assert_eq!(filter.push("one\n"), ("one".to_owned(), None));
        assert_eq!(filter.push("two E"), ("\ntwo ".to_owned(), None));
        assert_eq!(filter.push("N"), (String::new(), None));
        assert_eq!(filter.push("D!"), (String::new(), Some("END".to_owned())));
    }
}
