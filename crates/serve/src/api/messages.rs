//! `/v1/messages`: Anthropic's interface, as a translation onto conversations.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{Request, Response};
use serde_json::{Map, Value, json};

use super::chat::{self, Length, translated};
use super::dialect::{Dialect, arguments};
use super::{answer, types};
use crate::app::App;
use crate::error::{ApiError, Form, json_response};

/// Fields there that have other names here.
const NAMES: &[(&str, &str)] = &[("stop", "stop_sequences"), ("reasoning_effort", "thinking")];

/// `POST /v1/messages`
pub async fn serve(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    super::serve(app, "MessagesRequest", request, |app, body, ticket| {
        let chat = conversation(&body)?;
        let told = Told::new(&app.name);
        translated(app, chat, ticket, Box::new(told), (Length::Most, NAMES))
    })
    .await
}

/// `POST /v1/messages/count_tokens`
pub async fn count(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    answer(async move {
        let work = |app: &App, body: Value, _: &mut _| {
            let chat = conversation(&body)?;
            app.schema.check("ChatCompletionRequest", &chat)?;
            let mut c: types::Chat = types::read(chat)?;
            chat::read(app, &mut c, false).map(|read| read.prompt.len())
        };
        let (n, _ticket) = app.admit("CountTokensRequest", request, work).await?;
        Ok(json_response(200, &json!({ "input_tokens": n })))
    })
    .await
}

/// A request as OpenAI's clients would make it.
fn conversation(body: &Value) -> Result<Value, ApiError> {
    let mut messages = Vec::new();
    if let Some(system) = body.get("system") {
        messages.push(json!({ "role": "system", "content": texts(system) }));
    }
    let said = body["messages"].as_array().map_or(&[][..], Vec::as_slice);
    if said.last().is_some_and(|m| m["role"] == "assistant") {
        let text = "the last message is the assistant's, and an answer that was begun is not continued here";
        return Err(ApiError::bad("messages", text).code("unsupported_parameter"));
    }
    for message in said {
        match (&message["content"], message["role"] == "assistant") {
            (Value::Array(blocks), true) => messages.push(of_assistant(blocks)),
            (Value::Array(blocks), false) => of_user(blocks, &mut messages),
            (text, _) => messages.push(json!({ "role": message["role"], "content": text })),
        }
    }
    let mut chat = Map::new();
    chat.insert("model".into(), body["model"].clone());
    chat.insert("messages".into(), messages.into());
    for (there, here) in [
        ("max_tokens", "max_tokens"),
        ("stop_sequences", "stop"),
        ("stream", "stream"),
        ("temperature", "temperature"),
        ("top_p", "top_p"),
        ("top_k", "top_k"),
    ] {
        chat.extend(body.get(there).map(|v| (here.to_owned(), v.clone())));
    }
    if body["stream"] == true {
        chat.insert("stream_options".into(), json!({ "include_usage": true }));
    }
    chat.extend(body["metadata"].get("user_id").map(|id| ("user".to_owned(), id.clone())));
    if let Some(tools) = body["tools"].as_array() {
        let function = |t: &Value| {
            let mut function = json!({ "name": t["name"], "parameters": t["input_schema"] });
            if let Some(told) = t.get("description") {
                function["description"] = told.clone();
            }
            json!({ "type": "function", "function": function })
        };
        chat.insert("tools".into(), tools.iter().map(function).collect());
    }
    if let Some(choice) = body.get("tool_choice") {
        let named = || json!({ "type": "function", "function": { "name": choice["name"] } });
        let choice = match choice["type"].as_str() {
            Some("any") => "required".into(),
            Some("tool") => named(),
            Some(same) => same.into(),
            None => Value::Null,
        };
        chat.insert("tool_choice".into(), choice);
    }
    if body["tool_choice"]["disable_parallel_tool_use"] == true {
        chat.insert("parallel_tool_calls".into(), false.into());
    }
    match body["thinking"]["type"].as_str() {
        Some("disabled") => drop(chat.insert("enable_thinking".into(), false.into())),
        // How long is the model's own matter.
        Some("enabled") => drop(chat.insert("reasoning_effort".into(), "high".into())),
        _ => {}
    }
    Ok(chat.into())
}

/// A text, or text blocks as parts.
fn texts(content: &Value) -> Value {
    let part = |block: &Value| json!({ "type": "text", "text": block["text"] });
    content.as_array().map_or_else(|| content.clone(), |blocks| blocks.iter().map(part).collect())
}

/// What a user says and what tools answered, each in its own message.
fn of_user(blocks: &[Value], messages: &mut Vec<Value>) {
    let mut said = Vec::new();
    for block in blocks {
        if block["type"] != "tool_result" {
            said.push(json!({ "type": "text", "text": block["text"] }));
            continue;
        }
        if !said.is_empty() {
            messages.push(json!({ "role": "user", "content": std::mem::take(&mut said) }));
        }
        let mut content = block.get("content").map_or_else(|| "".into(), texts);
        if block["is_error"] == true {
            // Templates know no other place for it.
            match &mut content {
                Value::Array(parts) => parts.insert(0, json!({ "type": "text", "text": "Error: " })),
                text => *text = format!("Error: {}", text.as_str().unwrap_or_default()).into(),
            }
        }
        if content.as_array().is_some_and(Vec::is_empty) {
            content = "".into();
        }
        messages.push(json!({ "role": "tool", "tool_call_id": block["tool_use_id"], "content": content }));
    }
    if !said.is_empty() {
        messages.push(json!({ "role": "user", "content": said }));
    }
}

/// What the model said, thought and called.
fn of_assistant(blocks: &[Value]) -> Value {
    let of = |kind: &'static str| blocks.iter().filter(move |b| b["type"] == kind);
    let mut message = json!({ "role": "assistant" });
    let said: Vec<&str> = of("text").filter_map(|b| b["text"].as_str()).collect();
    message["content"] = said.concat().into();
    let thought: Vec<&str> = of("thinking").filter_map(|b| b["thinking"].as_str()).collect();
    if !thought.is_empty() {
        message["reasoning_content"] = thought.concat().into();
    }
    let call = |b: &Value| {
        let function = json!({ "name": b["name"], "arguments": b["input"].to_string() });
        json!({ "id": b["id"], "type": "function", "function": function })
    };
    let calls: Vec<Value> = of("tool_use").map(call).collect();
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    }
    message
}

/// A block of a stream that is not closed yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Open {
    Thinking,
    Text,
}

/// How an answer is told.
struct Told {
    id: String,
    model: String,
    block: Option<Open>,
    blocks: usize,
    finish: Value,
    usage: Value,
}

impl Told {
    fn new(model: &str) -> Told {
        let (id, model) = (types::name("msg_"), model.to_owned());
        Told { id, model, block: None, blocks: 0, finish: Value::Null, usage: Value::Null }
    }

    fn message(&self, content: Value, stop: (Value, Value), usage: Value) -> Value {
        json!({
            "id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content,
            "stop_reason": stop.0, "stop_sequence": stop.1, "usage": usage,
        })
    }

    fn close(&mut self, out: &mut String) {
        if self.block.take().is_some() {
            *out += &event("content_block_stop", json!({ "index": self.blocks - 1 }));
        }
    }

    fn begin(&mut self, block: Value, out: &mut String) -> usize {
        self.close(out);
        self.blocks += 1;
        let index = self.blocks - 1;
        *out += &event("content_block_start", json!({ "index": index, "content_block": block }));
        index
    }

    /// More of a text or of a thought.
    fn go_on(&mut self, kind: Open, text: &str, out: &mut String) {
        let (block, delta) = match kind {
            Open::Thinking => (
                json!({ "type": "thinking", "thinking": "", "signature": "" }),
                json!({ "type": "thinking_delta", "thinking": text }),
            ),
            Open::Text => (json!({ "type": "text", "text": "" }), json!({ "type": "text_delta", "text": text })),
        };
        if self.block != Some(kind) {
            self.begin(block, out);
            self.block = Some(kind);
        }
        *out += &event("content_block_delta", json!({ "index": self.blocks - 1, "delta": delta }));
    }
}

fn event(kind: &str, fields: Value) -> String {
    let mut all = json!({ "type": kind });
    all.as_object_mut().into_iter().for_each(|a| a.extend(fields.as_object().cloned().unwrap_or_default()));
    format!("event: {kind}\ndata: {all}\n\n")
}

/// Why an answer ended, and by which stop text.
fn stop(choice: &Value) -> (Value, Value) {
    let reason = match (choice["finish_reason"].as_str(), choice.get("stop_text")) {
        (Some("length"), _) => "max_tokens",
        (Some("tool_calls"), _) => "tool_use",
        (_, Some(text)) => return ("stop_sequence".into(), text.clone()),
        _ => "end_turn",
    };
    (reason.into(), Value::Null)
}

/// Tokens that were read, those that were taken over, and those that were written.
fn usage(of: &Value) -> Value {
    let cached = of["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
    let read = of["prompt_tokens"].as_u64().unwrap_or(0).saturating_sub(cached);
    json!({
        "input_tokens": read, "cache_creation_input_tokens": 0, "cache_read_input_tokens": cached,
        "output_tokens": of["completion_tokens"],
    })
}

impl Dialect for Told {
    fn begin(&mut self, prompt_tokens: usize) -> String {
        let usage = json!({ "input_tokens": prompt_tokens, "output_tokens": 0 });
        event("message_start", json!({ "message": self.message(json!([]), (Value::Null, Value::Null), usage) }))
    }

    fn chunk(&mut self, chunk: &Value) -> String {
        let mut out = String::new();
        if !chunk["usage"].is_null() {
            self.usage = chunk["usage"].clone();
        }
        let choice = &chunk["choices"][0];
        for (kind, key) in [(Open::Thinking, "reasoning_content"), (Open::Text, "content")] {
            if let Some(text) = choice["delta"][key].as_str().filter(|t| !t.is_empty()) {
                self.go_on(kind, text, &mut out);
            }
        }
        for call in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
            let f = &call["function"];
            let block = json!({ "type": "tool_use", "id": call["id"], "name": f["name"], "input": {} });
            let index = self.begin(block, &mut out);
            let delta = json!({ "type": "input_json_delta", "partial_json": f["arguments"] });
            out += &event("content_block_delta", json!({ "index": index, "delta": delta }));
            out += &event("content_block_stop", json!({ "index": index }));
        }
        if !choice["finish_reason"].is_null() {
            self.finish = choice.clone();
        }
        out
    }

    fn end(&mut self) -> String {
        let mut out = String::new();
        self.close(&mut out);
        let (reason, text) = stop(&self.finish);
        let delta = json!({ "stop_reason": reason, "stop_sequence": text });
        out += &event("message_delta", json!({ "delta": delta, "usage": usage(&self.usage) }));
        out + &event("message_stop", json!({}))
    }

    fn error(&mut self, e: &ApiError) -> String {
        format!("event: error\ndata: {}\n\n", e.body_for(Form::Anthropic))
    }

    fn alive(&self) -> Option<&'static str> {
        Some("event: ping\ndata: {\"type\": \"ping\"}\n\n")
    }

    fn whole(&mut self, answer: Value) -> Result<Value, ApiError> {
        let choice = &answer["choices"][0];
        let message = &choice["message"];
        let mut content = Vec::new();
        if let Some(thought) = message["reasoning_content"].as_str() {
            content.push(json!({ "type": "thinking", "thinking": thought, "signature": "" }));
        }
        if let Some(text) = message["content"].as_str().filter(|t| !t.is_empty()) {
            content.push(json!({ "type": "text", "text": text }));
        }
        for call in message["tool_calls"].as_array().into_iter().flatten() {
            let (name, input) = (&call["function"]["name"], arguments(call)?);
            content.push(json!({ "type": "tool_use", "id": call["id"], "name": name, "input": input }));
        }
        Ok(self.message(content.into(), stop(choice), usage(&answer["usage"])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_is_translated() {
        let there = json!({
            "model": "m", "max_tokens": 9, "system": [{"type": "text", "text": "Be brief."}], "stop_sequences": ["x"],
            "metadata": {"user_id": "u"}, "thinking": {"type": "disabled"}, "stream": true,
            "tools": [{"name": "add", "description": "Adds.", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": true},
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": "s"},
                    {"type": "text", "text": "Let me add."}, {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": [1, null]}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "is_error": true, "content": "7"},
                    {"type": "text", "text": "Well?"}]},
            ],
        });
        let here = json!({
            "model": "m",
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "Let me add.", "reasoning_content": "Hm.", "tool_calls": [
                    {"id": "t1", "type": "function", "function": {"name": "add", "arguments": "{\"a\":[1,null]}"}}]},
                {"role": "tool", "tool_call_id": "t1", "content": "Error: 7"},
                {"role": "user", "content": [{"type": "text", "text": "Well?"}]},
            ],
            "max_tokens": 9, "stop": ["x"], "stream": true, "stream_options": {"include_usage": true}, "user": "u",
            "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}, "description": "Adds."}}],
            "tool_choice": "required", "parallel_tool_calls": false, "enable_thinking": false,
        });
        assert_eq!(conversation(&there).unwrap(), here);
        let begun = json!({"model": "m", "max_tokens": 9, "messages": [{"role": "assistant", "content": "It"}]});
        assert_eq!(conversation(&begun).unwrap_err().param.as_deref(), Some("messages"));
    }
}
