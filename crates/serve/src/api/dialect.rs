//! How an interface tells an answer: translations of OpenAI's chunks and whole answers.

use serde_json::Value;

use crate::error::ApiError;

/// One interface's way to tell an answer.
pub trait Dialect: Send {
    /// The type of a stream.
    fn kind(&self) -> &'static str {
        "text/event-stream; charset=utf-8"
    }

    /// Whether finished choices say by which stop text they ended, in `stop_text`.
    fn wants_stop(&self) -> bool {
        true
    }

    /// What a stream begins with. `prompt_tokens`: tokens of the prompt.
    fn begin(&mut self, prompt_tokens: usize) -> String;

    /// What a chunk becomes; the last one has the usage, where it was asked for.
    fn chunk(&mut self, chunk: &Value) -> String;

    /// What a stream ends with.
    fn end(&mut self) -> String;

    /// What a stream ends with that cannot go on.
    fn error(&mut self, e: &ApiError) -> String;

    /// A sign of life, where there can be one.
    fn alive(&self) -> Option<&'static str> {
        Some(": still at work\n\n")
    }

    /// The first of a whole answer has come.
    fn came(&mut self) {}

    /// A whole answer.
    fn whole(&mut self, answer: Value) -> Result<Value, ApiError>;
}

/// As it is.
pub struct OpenAi;

impl Dialect for OpenAi {
    fn wants_stop(&self) -> bool {
        false
    }

    fn begin(&mut self, _: usize) -> String {
        String::new()
    }

    fn chunk(&mut self, chunk: &Value) -> String {
        format!("data: {chunk}\n\n")
    }

    fn end(&mut self) -> String {
        "data: [DONE]\n\n".to_owned()
    }

    fn error(&mut self, e: &ApiError) -> String {
        format!("data: {}\n\n", e.body())
    }

    fn whole(&mut self, answer: Value) -> Result<Value, ApiError> {
        Ok(answer)
    }
}

/// The arguments of a call as a value, for interfaces that have no other form. An integer that no value holds is not
/// rounded.
pub fn arguments(call: &Value) -> Result<Value, ApiError> {
    let text = call["function"]["arguments"].as_str().unwrap_or("{}");
    if !crate::exact::survives(text) {
        let text = "the model called a function with an integer of more than 64 bits, which this interface cannot \
                    tell; /v1/chat/completions can";
        return Err(ApiError::new(500, text));
    }
    Ok(serde_json::from_str(text).unwrap_or_default())
}
