//! Answers in OpenAI's shapes: whole, or chunk by chunk.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use lacuna_checkpoint::Tokenizer;
use lacuna_run::{Event, Finished, Picked, Probability, Stop};
use serde_json::{Value, json};

use crate::api::types::name;
use crate::error::ApiError;
use crate::reasoning::{Marks, Thoughts};
use crate::tools::{Call, Splitter, Tools};

/// Which of the two shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Messages.
    Chat,
    /// Plain texts.
    Completion,
}

/// What all answers of a request have in common.
pub struct Reply {
    pub shape: Shape,
    id: String,
    created: u64,
    began: Instant,
    model: String,
    fingerprint: String,
    tokenizer: Tokenizer,
    logprobs: bool,
    /// Whether a stream ends with the usage, and every chunk says so.
    usage_chunk: bool,
    /// Whether the stop text that came is told.
    tells_stop: bool,
    prompt_tokens: usize,
    choices: Vec<Choice>,
}

/// A prompt that is told before what continues it.
pub struct Echo {
    text: String,
    tokens: Vec<u32>,
    /// For each token the characters of the text before it.
    offsets: Vec<usize>,
}

impl Echo {
    /// Of a text and its tokens. A token that does not stand in the text, as one that begins every text does not, takes
    /// none of it.
    pub fn new(text: String, tokens: Vec<u32>, tokenizer: &Tokenizer) -> Echo {
        let (mut at, mut chars) = (0, 0);
        let mut offsets = Vec::with_capacity(tokens.len());
        for &id in &tokens {
            // A token of which the front is in the character before begins behind that.
            offsets.push(chars);
            let (bytes, rest) = (tokenizer.token_bytes(id), &text.as_bytes()[at..]);
            let spared = bytes.strip_prefix(b" ").unwrap_or(&bytes);
            let n = match () {
                () if rest.starts_with(&bytes) => bytes.len(),
                // Some tokenizers begin every text with a space of their own.
                () if at == 0 && rest.starts_with(spared) => spared.len(),
                () if tokenizer.is_special(id) => 0,
                () => bytes.len().min(rest.len()),
            };
            chars += rest[..n].iter().filter(|b| (**b as i8) >= -0x40).count();
            at += n;
        }
        Echo { text, tokens, offsets }
    }
}

/// One answer.
struct Choice {
    echo: Option<Arc<Echo>>,
    /// The prompt's tokens behind its first, with their probabilities.
    read: Vec<Picked>,
    text: String,
    tokens: Vec<Picked>,
    /// Characters of tokens told so far, for the offsets of the older shape.
    offset: usize,
    thoughts: Option<Thoughts>,
    reasoning: String,
    /// Tokens of thoughts; none where the model does not think aloud.
    reasoning_tokens: Option<usize>,
    splitter: Option<Splitter>,
    calls: Vec<Call>,
    finish: Option<&'static str>,
    finished: Option<Finished>,
}

/// How a reply begins.
pub struct Setting {
    /// Its shape.
    pub shape: Shape,
    /// The served name of the model.
    pub model: String,
    /// What identifies the model's files and this program.
    pub fingerprint: String,
    /// Names tokens.
    pub tokenizer: Tokenizer,
    /// Whether tokens are told with their probabilities.
    pub logprobs: bool,
    /// Whether a stream ends with the usage.
    pub usage_chunk: bool,
    /// Whether finished choices say by which stop text they ended, in `stop_text`.
    pub tells_stop: bool,
    /// Tokens of all prompts.
    pub prompt_tokens: usize,
    /// For each answer the prompt, where that is told.
    pub choices: Vec<Option<Arc<Echo>>>,
    /// The tools that may be called.
    pub tools: Option<Tools>,
    /// How thoughts are marked, and whether the prompt ends within some.
    pub thoughts: Option<(Marks, bool)>,
}

/// What a chunk adds to an answer.
#[derive(Default)]
struct Piece<'a> {
    thought: &'a str,
    text: &'a str,
    /// The first of its tokens.
    first: usize,
    finish: Option<&'static str>,
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

impl Reply {
    /// A reply to which nothing has come yet.
    pub fn new(s: Setting) -> Reply {
        let choice = |echo: Option<Arc<Echo>>| Choice {
            read: Vec::new(),
            text: String::new(),
            tokens: Vec::new(),
            offset: echo.as_ref().map_or(0, |e| e.text.chars().count()),
            echo,
            thoughts: s.thoughts.map(|(marks, open)| Thoughts::new(marks, open, s.tools.is_some())),
            reasoning: String::new(),
            reasoning_tokens: s.thoughts.map(|_| 0),
            splitter: s.tools.clone().map(Splitter::new),
            calls: Vec::new(),
            finish: None,
            finished: None,
        };
        Reply {
            id: name(if s.shape == Shape::Chat { "chatcmpl-" } else { "cmpl-" }),
            choices: s.choices.into_iter().map(choice).collect(),
            shape: s.shape,
            created: now(),
            began: Instant::now(),
            model: s.model,
            fingerprint: s.fingerprint,
            tokenizer: s.tokenizer,
            logprobs: s.logprobs,
            usage_chunk: s.usage_chunk,
            tells_stop: s.tells_stop,
            prompt_tokens: s.prompt_tokens,
        }
    }

    /// Takes an event; returns the chunks that a stream sends for it.
    pub fn take(&mut self, choice: usize, event: Event) -> Result<Vec<Value>, ApiError> {
        let Some(c) = self.choices.get_mut(choice) else { return Ok(Vec::new()) };
        match event {
            Event::Failed(e) => Err(ApiError::of_run(&e, "messages")),
            Event::Read(tokens) => {
                c.read.extend(tokens);
                Ok(self.echoed(choice).into_iter().collect())
            }
            Event::Embedding { .. } | Event::Rows { .. } => {
                Err(ApiError::new(500, "a vector came where text was asked for"))
            }
            Event::Text { text, tokens } => {
                let (thought, text) = match &mut c.thoughts {
                    Some(t) => {
                        let (before, parts) = (t.are_open(), t.push(&text));
                        let thinks = before || t.are_open() || !parts.0.is_empty();
                        c.reasoning_tokens = c.reasoning_tokens.map(|n| n + if thinks { tokens.len() } else { 0 });
                        parts
                    }
                    None => (String::new(), text),
                };
                let text = match &mut c.splitter {
                    Some(s) => s.push(&text),
                    None => text,
                };
                c.reasoning += &thought;
                c.text += &text;
                let first = c.tokens.len();
                c.tokens.extend(tokens);
                if thought.is_empty() && text.is_empty() && (first == c.tokens.len() || !self.logprobs) {
                    return Ok(Vec::new());
                }
                Ok(vec![self.chunk(choice, &Piece { thought: &thought, text: &text, first, finish: None })])
            }
            Event::Finished(f) => {
                let mut chunks = Vec::new();
                let (thought, mut text) = c.thoughts.take().map(Thoughts::finish).unwrap_or_default();
                if let Some(mut s) = c.splitter.take() {
                    text = s.push(&text);
                    let (rest, calls) = s.finish();
                    text += &rest;
                    c.calls = calls;
                }
                c.reasoning += &thought;
                c.text += &text;
                if !(thought.is_empty() && text.is_empty()) {
                    let piece = Piece { thought: &thought, text: &text, first: c.tokens.len(), finish: None };
                    chunks.push(self.chunk(choice, &piece));
                }
                let c = &mut self.choices[choice];
                let first = c.tokens.len();
                if c.echo.is_some() {
                    // Whoever takes the answer off the end finds as many tokens as were asked for.
                    c.tokens.extend(f.end.clone());
                }
                let reason = match f.stop {
                    Stop::MaxTokens | Stop::Context => "length",
                    _ if !c.calls.is_empty() => "tool_calls",
                    _ => "stop",
                };
                tracing::info!(
                    id = self.id,
                    choice,
                    prompt_tokens = f.prompt_tokens,
                    cached_tokens = f.reused_tokens,
                    tokens = f.tokens,
                    finish = reason,
                    ms = self.began.elapsed().as_millis() as u64,
                    "answered"
                );
                c.finish = Some(reason);
                c.finished = Some(f);
                chunks.push(self.chunk(choice, &Piece { first, finish: Some(reason), ..Piece::default() }));
                Ok(chunks)
            }
        }
    }

    /// The chunks that begin a stream.
    pub fn opening(&self) -> Vec<Value> {
        if self.shape == Shape::Completion {
            return (0..self.choices.len()).filter_map(|i| self.echoed(i)).collect();
        }
        let delta = json!({ "role": "assistant", "content": "", "refusal": null });
        (0..self.choices.len()).map(|i| self.framed(i, "delta", delta.clone(), Value::Null, None)).collect()
    }

    /// The chunk that ends a stream, where it was asked for.
    pub fn closing(&self) -> Option<Value> {
        self.usage_chunk.then(|| {
            let mut chunk = self.envelope(true);
            chunk["choices"] = json!([]);
            chunk["usage"] = self.usage();
            chunk
        })
    }

    /// All answers at once.
    pub fn whole(&self) -> Value {
        let mut all = self.envelope(false);
        let choices = self.choices.iter().enumerate().map(|(i, c)| {
            let start = c.echo.as_ref().map_or(0, |e| e.text.chars().count());
            let logprobs = if self.logprobs { self.probabilities(c, true, &c.tokens, start) } else { Value::Null };
            let mut choice = json!({ "index": i, "logprobs": logprobs, "finish_reason": c.finish });
            self.tell_stop(c, &mut choice);
            match self.shape {
                Shape::Completion => {
                    choice["text"] = (c.echo.as_ref().map_or("", |e| &e.text).to_owned() + &c.text).into();
                }
                Shape::Chat => {
                    let mut message = json!({ "role": "assistant", "content": c.text, "refusal": null });
                    if !c.reasoning.is_empty() {
                        message["reasoning_content"] = c.reasoning.as_str().into();
                    }
                    if !c.calls.is_empty() {
                        message["tool_calls"] = c.calls.iter().map(Call::json).collect();
                        if c.text.is_empty() {
                            message["content"] = Value::Null;
                        }
                    }
                    choice["message"] = message;
                }
            }
            choice
        });
        all["choices"] = choices.collect();
        all["usage"] = self.usage();
        all
    }

    /// Tokens of all prompts.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// Whether every answer came to its end.
    pub fn is_whole(&self) -> bool {
        self.choices.iter().all(|c| c.finish.is_some())
    }

    fn usage(&self) -> Value {
        let finished = self.choices.iter().filter_map(|c| c.finished.as_ref());
        let written: usize = finished.clone().map(|f| f.tokens).sum();
        // Answers to the same prompt take over from each other; what was there before is what the first one found.
        let cached = finished.map(|f| f.reused_tokens).min().unwrap_or(0).min(self.prompt_tokens);
        let mut usage = json!({
            "prompt_tokens": self.prompt_tokens, "completion_tokens": written, "total_tokens": self.prompt_tokens + written,
            "prompt_tokens_details": { "cached_tokens": cached },
        });
        let thought: Vec<usize> = self.choices.iter().filter_map(|c| c.reasoning_tokens).collect();
        if !thought.is_empty() {
            usage["completion_tokens_details"] = json!({ "reasoning_tokens": thought.iter().sum::<usize>() });
        }
        usage
    }

    fn tell_stop(&self, c: &Choice, choice: &mut Value) {
        if let (true, Some(Finished { stop: Stop::StopText(text), .. })) = (self.tells_stop, &c.finished) {
            choice["stop_text"] = text.as_str().into();
        }
    }

    /// The chunk that tells a prompt, once all that is to be told of it is known.
    fn echoed(&self, choice: usize) -> Option<Value> {
        let c = &self.choices[choice];
        let echo = c.echo.as_ref().filter(|e| !self.logprobs || c.read.len() + 1 == e.tokens.len())?;
        let logprobs = if self.logprobs { self.probabilities(c, true, &[], 0) } else { Value::Null };
        Some(self.framed(choice, "text", echo.text.as_str().into(), logprobs, None))
    }

    fn envelope(&self, chunk: bool) -> Value {
        let object = match (self.shape, chunk) {
            (Shape::Chat, true) => "chat.completion.chunk",
            (Shape::Chat, false) => "chat.completion",
            (Shape::Completion, _) => "text_completion",
        };
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model, "system_fingerprint": self.fingerprint,
        })
    }

    fn framed(&self, index: usize, key: &str, inner: Value, logprobs: Value, finish: Option<&str>) -> Value {
        let mut chunk = self.envelope(true);
        chunk["choices"] = json!([{ "index": index, key: inner, "logprobs": logprobs, "finish_reason": finish }]);
        if finish.is_some() {
            self.tell_stop(&self.choices[index], &mut chunk["choices"][0]);
        }
        if self.usage_chunk {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    /// A chunk with a piece of an answer, or the last one, which has none.
    fn chunk(&mut self, choice: usize, piece: &Piece<'_>) -> Value {
        let &Piece { thought, text, first, finish } = piece;
        let (logprobs, offset) = {
            let c = &self.choices[choice];
            let some = self.logprobs && first < c.tokens.len();
            (
                if some { self.probabilities(c, false, &c.tokens[first..], c.offset) } else { Value::Null },
                self.end(c, first),
            )
        };
        self.choices[choice].offset = offset;
        if self.shape == Shape::Completion {
            return self.framed(choice, "text", text.into(), logprobs, finish);
        }
        let mut delta = json!({});
        if !thought.is_empty() {
            delta["reasoning_content"] = thought.into();
        }
        if !text.is_empty() {
            delta["content"] = text.into();
        }
        let calls = &self.choices[choice].calls;
        if finish.is_some() && !calls.is_empty() {
            let numbered = calls.iter().enumerate().map(|(i, call)| {
                let mut v = call.json();
                v["index"] = i.into();
                v
            });
            delta["tool_calls"] = numbered.collect();
        }
        self.framed(choice, "delta", delta, logprobs, finish)
    }

    fn token(&self, id: u32) -> (String, Vec<u8>) {
        let bytes = self.tokenizer.token_bytes(id);
        (String::from_utf8_lossy(&bytes).into_owned(), bytes)
    }

    /// The offset behind the tokens from `first` on.
    fn end(&self, c: &Choice, first: usize) -> usize {
        c.offset + c.tokens[first..].iter().map(|t| self.token(t.id).0.chars().count()).sum::<usize>()
    }

    /// Probabilities of tokens whose text begins at `offset`. `echo`: behind the prompt's, where that is told.
    fn probabilities(&self, c: &Choice, echo: bool, tokens: &[Picked], mut offset: usize) -> Value {
        // JSON has no infinity: a token that cannot come is one of the smallest f32s.
        let finite = |x: f32| x.max(-9999.0);
        if self.shape == Shape::Chat {
            let one = |id: u32, logprob: f32| {
                let (token, bytes) = self.token(id);
                json!({ "token": token, "logprob": finite(logprob), "bytes": bytes })
            };
            let content = tokens.iter().map(|t| {
                let p = t.probability.clone().unwrap_or_default();
                let mut v = one(t.id, p.logprob);
                v["top_logprobs"] = p.top.iter().map(|&(id, l)| one(id, l)).collect();
                v
            });
            return json!({ "content": content.collect::<Vec<_>>(), "refusal": null });
        }
        let mut v = json!({ "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [] });
        let mut push = |text: String, at: usize, p: Option<&Probability>| {
            let top = p.map(|p| {
                // Of tokens that look alike, parts of characters, the likeliest is told.
                let mut top = serde_json::Map::new();
                for &(id, l) in &p.top {
                    top.entry(self.token(id).0).or_insert(finite(l).into());
                }
                top
            });
            let told: [Value; 4] = [text.into(), p.map(|p| finite(p.logprob)).into(), top.into(), at.into()];
            for (key, x) in ["tokens", "token_logprobs", "top_logprobs", "text_offset"].into_iter().zip(told) {
                v[key].as_array_mut().into_iter().for_each(|a| a.push(x.clone()));
            }
        };
        if let Some(echo) = c.echo.as_ref().filter(|_| echo) {
            // Nothing says how probable the first one was.
            let known = std::iter::once(None).chain(c.read.iter().map(|t| t.probability.as_ref()));
            for ((&id, &at), p) in echo.tokens.iter().zip(&echo.offsets).zip(known) {
                push(self.token(id).0, at, p);
            }
        }
        for t in tokens {
            let text = self.token(t.id).0;
            let n = text.chars().count();
            push(text, offset, t.probability.as_ref());
            offset += n;
        }
        v
    }
}
