//! Requests as values. The schema has seen them before: what is read here is known to have the right form.

use std::collections::BTreeMap;

use lacuna_run::{Generation, Sampler, Sampling};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::ApiError;

/// Fields that chats and completions have in common.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Common {
    pub frequency_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub logit_bias: Option<BTreeMap<String, f32>>,
    pub n: Option<usize>,
    pub seed: Option<serde_json::Number>,
    pub stop: Option<Many>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<usize>,
    pub min_p: Option<f32>,
    pub max_tokens: Option<usize>,
    pub user: Option<String>,
}

/// `stream_options`
#[derive(Clone, Debug, Default, Deserialize)]
pub struct StreamOptions {
    pub include_usage: Option<bool>,
}

/// One text or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Many {
    One(String),
    All(Vec<String>),
}

impl Many {
    /// As a list.
    pub fn list(self) -> Vec<String> {
        match self {
            Many::One(text) => vec![text],
            Many::All(texts) => texts,
        }
    }
}

/// What can be continued or turned into a vector.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Input {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    ManyTokens(Vec<Vec<u32>>),
}

impl Input {
    /// How many texts these are.
    pub fn texts(&self) -> usize {
        match self {
            Input::Text(_) | Input::Tokens(_) => 1,
            Input::Texts(all) => all.len(),
            Input::ManyTokens(all) => all.len(),
        }
    }
}

/// `/v1/chat/completions`
#[derive(Clone, Debug, Deserialize)]
pub struct Chat {
    #[serde(flatten)]
    pub common: Common,
    pub messages: Vec<Value>,
    pub max_completion_tokens: Option<usize>,
    pub logprobs: Option<bool>,
    pub top_logprobs: Option<usize>,
    pub response_format: Option<Value>,
    pub tools: Option<Vec<Value>>,
    pub tool_choice: Option<Value>,
    pub parallel_tool_calls: Option<bool>,
    pub safety_identifier: Option<String>,
    pub chat_template_kwargs: Option<Map<String, Value>>,
    pub enable_thinking: Option<bool>,
    pub reasoning_effort: Option<String>,
    /// For counting tokens; an answer always has one.
    pub add_generation_prompt: Option<bool>,
}

/// `/v1/completions`
#[derive(Clone, Debug, Deserialize)]
pub struct Completion {
    #[serde(flatten)]
    pub common: Common,
    pub prompt: Input,
    pub logprobs: Option<usize>,
    pub best_of: Option<usize>,
    pub echo: Option<bool>,
}

/// `/v1/embeddings`
#[derive(Clone, Debug, Deserialize)]
pub struct Embedding {
    pub input: Input,
    pub encoding_format: Option<String>,
    pub pooling: Option<String>,
    pub user: Option<String>,
}

/// Fields that are handed on as they came.
const HANDED_ON: &[&str] = &["chat_template_kwargs", "messages", "response_format", "tool_choice", "tools"];

/// Reads a request that the schema let through. Whole numbers may be written as 5.0.
pub fn read<T: for<'de> Deserialize<'de>>(mut value: Value) -> Result<T, ApiError> {
    let fields = value.as_object_mut().into_iter().flatten();
    fields.filter(|(name, _)| !HANDED_ON.contains(&name.as_str())).for_each(|(_, v)| whole(v));
    serde_json::from_value(value).map_err(|e| ApiError::new(400, format!("the request cannot be read: {e}")))
}

fn whole(value: &mut Value) {
    match value {
        Value::Number(n) => {
            let x = n.as_f64().unwrap_or(0.5);
            if n.is_f64() && x.fract() == 0.0 && x.abs() < 9e15 {
                *value = Value::from(x as i64);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(whole),
        Value::Object(fields) => fields.values_mut().for_each(whole),
        _ => {}
    }
}

/// A number that nobody can foresee, for seeds and names.
pub fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}

/// A name such as `chatcmpl-0123456789abcdef01234567`.
pub fn name(prefix: &str) -> String {
    format!("{prefix}{:016x}{:08x}", random(), random() as u32)
}

impl Common {
    /// Whether the answer comes as a stream, and whether that ends with the usage.
    pub fn stream(&self) -> Result<(bool, bool), ApiError> {
        let stream = self.stream.unwrap_or(false);
        let usage = self.stream_options.as_ref().and_then(|o| o.include_usage).unwrap_or(false);
        if usage && !stream {
            return Err(ApiError::bad("stream_options", "'stream_options' is for streams; set stream as well"));
        }
        Ok((stream, usage))
    }

    /// How tokens are chosen and where the answer ends, for the first of `n` answers. `vocab`: rows of the model's
    /// head.
    pub fn generation(&self, max_tokens: usize, vocab: usize) -> Result<Generation, ApiError> {
        let mut logit_bias = Vec::new();
        for (id, &bias) in self.logit_bias.iter().flatten() {
            let known = id.parse::<u32>().ok().filter(|&id| (id as usize) < vocab);
            let param = || format!("logit_bias.{}", id.chars().take(20).collect::<String>());
            let id = known
                .ok_or_else(|| ApiError::bad(param(), format!("'{}' is no token of the model's {vocab}", param())))?;
            logit_bias.push((id, bias));
        }
        let seed = match &self.seed {
            Some(n) => {
                n.as_i64().map(|s| s as u64).or(n.as_u64()).unwrap_or_else(|| n.as_f64().unwrap_or(0.0) as i64 as u64)
            }
            None => random(),
        };
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(1.0),
            top_k: self.top_k.unwrap_or(0),
            top_p: self.top_p.unwrap_or(1.0),
            min_p: self.min_p.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            logit_bias,
            seed,
        };
        // Numbers too small for an f32 become zero, which some settings may not be.
        Sampler::new(&sampling).map_err(|e| ApiError::of_run(&e, "temperature"))?;
        let stop = self.stop.clone().map(Many::list).unwrap_or_default();
        Ok(Generation { prompt: Vec::new(), max_tokens, stop, sampling, ignore_end: false })
    }
}

/// The length of an answer: as asked, or as much as there is room for. Refuses what does not fit.
pub fn answer_tokens(
    asked: Option<(&'static str, usize)>,
    prompt: usize,
    context: usize,
    most: usize,
) -> Result<usize, ApiError> {
    let room = context.saturating_sub(prompt);
    if room == 0 && (prompt > context || asked.is_none_or(|(_, n)| n > 0)) {
        let text = format!("the prompt has {prompt} tokens; the context of {context} leaves no room for an answer");
        return Err(ApiError::bad("messages", text).code("context_length_exceeded"));
    }
    let Some((param, asked)) = asked else { return Ok(room.min(most)) };
    if asked > most {
        return Err(ApiError::bad(
            param,
            format!("'{param}' is {asked}; this server writes {most} tokens at the most"),
        ));
    }
    if asked > room {
        let text = format!("{prompt} tokens of prompt and {asked} of answer do not fit the context of {context}");
        return Err(ApiError::bad(param, text).code("context_length_exceeded"));
    }
    Ok(asked)
}
