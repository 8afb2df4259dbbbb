//! Answers in OpenAI's shapes: whole, or chunk by chunk.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use lacuna_checkpoint::Tokenizer;
use lacuna_run::{Event, Finished, Picked, Stop};
use serde_json::{Value, json};

use crate::api::types::name;
use crate::error::ApiError;
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
    prompt_tokens: usize,
    choices: Vec<Choice>,
}

/// One answer.
struct Choice {
    text: String,
    tokens: Vec<Picked>,
    /// Characters of tokens told so far, for the offsets of the older shape.
    offset: usize,
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
    /// Tokens of all prompts.
    pub prompt_tokens: usize,
    /// Answers.
    pub choices: usize,
    /// The tools that may be called.
    pub tools: Option<Tools>,
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

impl Reply {
    /// A reply to which nothing has come yet.
    pub fn new(s: Setting) -> Reply {
        let choice = || Choice {
            text: String::new(),
            tokens: Vec::new(),
            offset: 0,
            splitter: s.tools.clone().map(Splitter::new),
            calls: Vec::new(),
            finish: None,
            finished: None,
        };
        Reply {
            id: name(if s.shape == Shape::Chat { "chatcmpl-" } else { "cmpl-" }),
            choices: (0..s.choices).map(|_| choice()).collect(),
            shape: s.shape,
            created: now(),
            began: Instant::now(),
            model: s.model,
            fingerprint: s.fingerprint,
            tokenizer: s.tokenizer,
            logprobs: s.logprobs,
            usage_chunk: s.usage_chunk,
            prompt_tokens: s.prompt_tokens,
        }
    }

    /// Takes an event; returns the chunks that a stream sends for it.
    pub fn take(&mut self, choice: usize, event: Event) -> Result<Vec<Value>, ApiError> {
        let Some(c) = self.choices.get_mut(choice) else { return Ok(Vec::new()) };
        match event {
            Event::Failed(e) => Err(ApiError::of_run(&e, "messages")),
            Event::Read(_) => Ok(Vec::new()),
            Event::Embedding { .. } => Err(ApiError::new(500, "a vector came where text was asked for")),
            Event::Text { text, tokens } => {
                let text = match &mut c.splitter {
                    Some(s) => s.push(&text),
                    None => text,
                };
                c.text += &text;
                let first = c.tokens.len();
                c.tokens.extend(tokens);
                if text.is_empty() && (first == c.tokens.len() || !self.logprobs) {
                    return Ok(Vec::new());
                }
                Ok(vec![self.chunk(choice, Some(&text), first, None)])
            }
            Event::Finished(f) => {
                let mut chunks = Vec::new();
                if let Some(s) = c.splitter.take() {
                    let (rest, calls) = s.finish();
                    c.text += &rest;
                    c.calls = calls;
                    if !rest.is_empty() {
                        let from = c.tokens.len();
                        chunks.push(self.chunk(choice, Some(&rest), from, None));
                    }
                }
                let c = &mut self.choices[choice];
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
                let from = c.tokens.len();
                chunks.push(self.chunk(choice, None, from, Some(reason)));
                Ok(chunks)
            }
        }
    }

    /// The chunks that begin a stream.
    pub fn opening(&self) -> Vec<Value> {
        if self.shape == Shape::Completion {
            return Vec::new();
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
            let logprobs = if self.logprobs { self.probabilities(c, 0, 0) } else { Value::Null };
            let mut choice = json!({ "index": i, "logprobs": logprobs, "finish_reason": c.finish });
            match self.shape {
                Shape::Completion => choice["text"] = c.text.as_str().into(),
                Shape::Chat => {
                    let mut message = json!({ "role": "assistant", "content": c.text, "refusal": null });
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

    /// Whether every answer came to its end.
    pub fn is_whole(&self) -> bool {
        self.choices.iter().all(|c| c.finish.is_some())
    }

    fn usage(&self) -> Value {
        let finished = self.choices.iter().filter_map(|c| c.finished.as_ref());
        let written: usize = finished.clone().map(|f| f.tokens).sum();
        // Answers to the same prompt take over from each other; what was there before is what the first one found.
        let cached = finished.map(|f| f.reused_tokens).min().unwrap_or(0).min(self.prompt_tokens);
        json!({
            "prompt_tokens": self.prompt_tokens, "completion_tokens": written, "total_tokens": self.prompt_tokens + written,
            "prompt_tokens_details": { "cached_tokens": cached },
        })
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
        if self.usage_chunk {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    /// A chunk with a piece of text and the tokens from `first` on; or, without text, the last one of an answer.
    fn chunk(&mut self, choice: usize, text: Option<&str>, first: usize, finish: Option<&str>) -> Value {
        let (logprobs, offset) = {
            let c = &self.choices[choice];
            let some = self.logprobs && first < c.tokens.len();
            (if some { self.probabilities(c, first, c.offset) } else { Value::Null }, self.end(c, first))
        };
        self.choices[choice].offset = offset;
        if self.shape == Shape::Completion {
            return self.framed(choice, "text", text.unwrap_or_default().into(), logprobs, finish);
        }
        let mut delta = json!({});
        if let Some(text) = text.filter(|t| !t.is_empty()) {
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

    /// Probabilities of the tokens from `first` on, whose text begins at `offset`.
    fn probabilities(&self, c: &Choice, first: usize, mut offset: usize) -> Value {
        // JSON has no infinity: a token that cannot come is one of the smallest f32s.
        let finite = |x: f32| x.max(-9999.0);
        let tokens = &c.tokens[first..];
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
        let mut push = |key: &str, x: Value| v[key].as_array_mut().into_iter().for_each(|a| a.push(x.clone()));
        for t in tokens {
            let p = t.probability.clone().unwrap_or_default();
            let text = self.token(t.id).0;
            push("text_offset", offset.into());
            offset += text.chars().count();
            push("tokens", text.into());
            push("token_logprobs", finite(p.logprob).into());
            let top: serde_json::Map<String, Value> =
                p.top.iter().map(|&(id, l)| (self.token(id).0, finite(l).into())).collect();
            push("top_logprobs", top.into());
        }
        v
    }
}
