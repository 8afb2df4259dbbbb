//! `/v1/responses`: OpenAI's newer interface, as a translation onto conversations. Nothing is kept: what was said comes
//! with each request.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{Request, Response};
use serde_json::{Map, Value, json};

use super::chat::{Length, translated};
use super::dialect::Dialect;
use super::reply::now;
use super::types;
use crate::app::App;
use crate::error::ApiError;

/// Fields of conversations and their names here.
const NAMES: &[(&str, &str)] = &[
    ("messages", "input"),
    ("max_completion_tokens", "max_output_tokens"),
    ("response_format.json_schema.schema", "text.format.schema"),
    ("response_format", "text.format"),
    ("reasoning_effort", "reasoning.effort"),
];

/// `POST /v1/responses`
pub async fn serve(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    super::serve(app, "ResponsesRequest", request, |app, body, ticket| {
        let chat = conversation(&body);
        let told = Told::new(&app.name, &body);
        translated(app, chat, ticket, Box::new(told), (Length::Asked, NAMES))
    })
    .await
}

/// A request as older clients would make it.
fn conversation(body: &Value) -> Value {
    let mut messages = Vec::new();
    if let Some(system) = body.get("instructions") {
        messages.push(json!({ "role": "system", "content": system }));
    }
    match &body["input"] {
        Value::Array(items) => items.iter().for_each(|item| take(item, &mut messages)),
        text => messages.push(json!({ "role": "user", "content": text })),
    }
    let mut chat = Map::new();
    chat.insert("model".into(), body["model"].clone());
    chat.insert("messages".into(), messages.into());
    for (there, here) in [
        ("max_output_tokens", "max_completion_tokens"),
        ("stream", "stream"),
        ("temperature", "temperature"),
        ("top_p", "top_p"),
        ("parallel_tool_calls", "parallel_tool_calls"),
        ("safety_identifier", "safety_identifier"),
        ("user", "user"),
    ] {
        chat.extend(body.get(there).map(|v| (here.to_owned(), v.clone())));
    }
    if body["stream"] == true {
        chat.insert("stream_options".into(), json!({ "include_usage": true }));
    }
    chat.extend(body["reasoning"].get("effort").map(|e| ("reasoning_effort".to_owned(), e.clone())));
    if let Some(tools) = body["tools"].as_array() {
        let function = |t: &Value| {
            let mut function = t.clone();
            function.as_object_mut().into_iter().for_each(|f| drop(f.remove("type")));
            json!({ "type": "function", "function": function })
        };
        chat.insert("tools".into(), tools.iter().map(function).collect());
    }
    if let Some(choice) = body.get("tool_choice") {
        let choice = match choice.get("name") {
            Some(name) => json!({ "type": "function", "function": { "name": name } }),
            None => choice.clone(),
        };
        chat.insert("tool_choice".into(), choice);
    }
    if let Some(format) = body["text"].get("format") {
        let mut format = format.clone();
        if format["type"] == "json_schema" {
            let mut inner = format;
            inner.as_object_mut().into_iter().for_each(|f| drop(f.remove("type")));
            format = json!({ "type": "json_schema", "json_schema": inner });
        }
        chat.insert("response_format".into(), format);
    }
    chat.into()
}

/// An item as a message, or as a part of the one before.
fn take(item: &Value, messages: &mut Vec<Value>) {
    let parts = |content: &Value| match content {
        Value::Array(parts) => parts.iter().map(|p| json!({ "type": "text", "text": p["text"] })).collect(),
        text => text.clone(),
    };
    // Thoughts, texts and calls of one turn are one message. Whatever follows a call is another.
    let turn = |messages: &mut Vec<Value>, new: &str| {
        let goes_on = messages.last().is_some_and(|m| {
            let open = new == "content" && m.get("tool_calls").is_none() && m.get(new).is_none();
            m["role"] == "assistant" && (new == "tool_calls" || open)
        });
        if !goes_on {
            messages.push(json!({ "role": "assistant" }));
        }
        messages.len() - 1
    };
    match item["type"].as_str() {
        Some("function_call") => {
            let at = turn(messages, "tool_calls");
            let function = json!({ "name": item["name"], "arguments": item["arguments"] });
            let call = json!({ "id": item["call_id"], "type": "function", "function": function });
            match &mut messages[at]["tool_calls"] {
                Value::Array(calls) => calls.push(call),
                none => *none = json!([call]),
            }
        }
        Some("function_call_output") => messages.push(json!({
            "role": "tool", "tool_call_id": item["call_id"], "content": parts(&item["output"]),
        })),
        Some("reasoning") => {
            let texts = ["content", "summary"].map(|key| item[key].as_array().filter(|parts| !parts.is_empty()));
            let text: String =
                texts.into_iter().flatten().take(1).flatten().filter_map(|p| p["text"].as_str()).collect();
            if !text.is_empty() {
                let at = turn(messages, "reasoning_content");
                messages[at]["reasoning_content"] = text.into();
            }
        }
        _ if item["role"] == "assistant" => {
            let at = turn(messages, "content");
            messages[at]["content"] = parts(&item["content"]);
        }
        _ => messages.push(json!({ "role": item["role"], "content": parts(&item["content"]) })),
    }
}

/// What a stream is telling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Thought,
    Said,
}

/// How an answer is told.
struct Told {
    response: Value,
    sequence: u64,
    /// The item that is being told, with its id and its text so far.
    open: Option<(Kind, String, String)>,
    output: Vec<Value>,
    cut: bool,
    usage: Value,
}

impl Told {
    fn new(model: &str, body: &Value) -> Told {
        let given = |key: &str, otherwise: Value| body.get(key).cloned().unwrap_or(otherwise);
        let response = json!({
            "id": types::name("resp_"), "object": "response", "created_at": now(), "status": "in_progress",
            "background": false, "error": null, "incomplete_details": null,
            "instructions": given("instructions", Value::Null),
            "max_output_tokens": given("max_output_tokens", Value::Null), "max_tool_calls": null, "model": model,
            "output": [], "parallel_tool_calls": given("parallel_tool_calls", true.into()),
            "previous_response_id": null,
            "reasoning": { "effort": body["reasoning"]["effort"], "summary": null }, "service_tier": "default",
            "store": false, "temperature": given("temperature", 1.0.into()),
            "text": { "format": body["text"].get("format").cloned().unwrap_or_else(|| json!({ "type": "text" })) },
            "tool_choice": given("tool_choice", "auto".into()), "tools": given("tools", json!([])), "top_logprobs": 0,
            "top_p": given("top_p", 1.0.into()), "truncation": "disabled", "usage": null,
            "user": given("user", Value::Null), "metadata": given("metadata", json!({})),
        });
        Told { response, sequence: 0, open: None, output: Vec::new(), cut: false, usage: Value::Null }
    }

    fn event(&mut self, kind: &str, fields: Value) -> String {
        let mut all = json!({ "type": kind, "sequence_number": self.sequence });
        self.sequence += 1;
        all.as_object_mut().into_iter().for_each(|a| a.extend(fields.as_object().cloned().unwrap_or_default()));
        format!("event: {kind}\ndata: {all}\n\n")
    }

    /// More of a text or of a thought.
    fn go_on(&mut self, kind: Kind, text: &str) -> String {
        let mut out = String::new();
        if self.open.as_ref().is_none_or(|o| o.0 != kind) {
            out += &self.close();
            let id = types::name(if kind == Kind::Said { "msg_" } else { "rs_" });
            let at = json!({ "output_index": self.output.len(), "item": item(kind, &id, None, "in_progress") });
            out += &self.event("response.output_item.added", at);
            out += &self.event("response.content_part.added", self.at(&id, json!({ "part": part(kind, "") })));
            self.open = Some((kind, id, String::new()));
        }
        let Some((_, id, so_far)) = &mut self.open else { return out };
        so_far.push_str(text);
        let id = id.clone();
        let mut more = json!({ "delta": text });
        if kind == Kind::Said {
            more["logprobs"] = json!([]);
        }
        let more = self.at(&id, more);
        out + &self.event(&format!("response.{}.delta", word(kind)), more)
    }

    /// Where an event belongs.
    fn at(&self, id: &str, mut fields: Value) -> Value {
        fields["item_id"] = id.into();
        fields["output_index"] = self.output.len().into();
        fields["content_index"] = 0.into();
        fields
    }

    /// Ends the item that is open.
    fn close(&mut self) -> String {
        let Some((kind, id, text)) = self.open.take() else { return String::new() };
        let mut done = json!({ "text": text });
        if kind == Kind::Said {
            done["logprobs"] = json!([]);
        }
        let (done, whole) = (self.at(&id, done), self.at(&id, json!({ "part": part(kind, &text) })));
        let mut out = self.event(&format!("response.{}.done", word(kind)), done);
        out += &self.event("response.content_part.done", whole);
        out + &self.add(item(kind, &id, Some(&text), if self.cut { "incomplete" } else { "completed" }))
    }

    fn add(&mut self, item: Value) -> String {
        let out = self.event("response.output_item.done", json!({ "output_index": self.output.len(), "item": item }));
        self.output.push(item);
        out
    }

    /// The whole response.
    fn response(&mut self) -> Value {
        let mut all = self.response.clone();
        all["status"] = if self.cut { "incomplete" } else { "completed" }.into();
        if self.cut {
            all["incomplete_details"] = json!({ "reason": "max_output_tokens" });
        }
        all["output"] = std::mem::take(&mut self.output).into();
        let (of, thought) = (&self.usage, &self.usage["completion_tokens_details"]["reasoning_tokens"]);
        all["usage"] = json!({
            "input_tokens": of["prompt_tokens"], "output_tokens": of["completion_tokens"], "total_tokens": of["total_tokens"],
            "input_tokens_details": { "cached_tokens": of["prompt_tokens_details"]["cached_tokens"] },
            "output_tokens_details": { "reasoning_tokens": thought.as_u64().unwrap_or(0) },
        });
        all
    }
}

fn word(kind: Kind) -> &'static str {
    if kind == Kind::Said { "output_text" } else { "reasoning_text" }
}

fn part(kind: Kind, text: &str) -> Value {
    let mut part = json!({ "type": word(kind), "text": text });
    if kind == Kind::Said {
        part["annotations"] = json!([]);
        part["logprobs"] = json!([]);
    }
    part
}

/// A message or a thought as an item; its text, once that is known.
fn item(kind: Kind, id: &str, text: Option<&str>, status: &str) -> Value {
    let content: Value = text.into_iter().map(|text| part(kind, text)).collect();
    match kind {
        Kind::Said => {
            json!({ "id": id, "type": "message", "role": "assistant", "status": status, "content": content })
        }
        Kind::Thought => json!({ "id": id, "type": "reasoning", "summary": [], "status": status, "content": content }),
    }
}

fn call(id: &str, call: &Value, arguments: &Value, status: &str) -> Value {
    json!({
        "id": id, "type": "function_call", "call_id": call["id"], "name": call["function"]["name"],
        "arguments": arguments, "status": status,
    })
}

impl Dialect for Told {
    fn begin(&mut self, _: usize) -> String {
        let response = self.response.clone();
        let out = self.event("response.created", json!({ "response": response }));
        out + &self.event("response.in_progress", json!({ "response": response }))
    }

    fn chunk(&mut self, chunk: &Value) -> String {
        let mut out = String::new();
        if !chunk["usage"].is_null() {
            self.usage = chunk["usage"].clone();
        }
        let choice = &chunk["choices"][0];
        self.cut |= choice["finish_reason"] == "length";
        for (kind, key) in [(Kind::Thought, "reasoning_content"), (Kind::Said, "content")] {
            if let Some(text) = choice["delta"][key].as_str().filter(|t| !t.is_empty()) {
                out += &self.go_on(kind, text);
            }
        }
        for made in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
            out += &self.close();
            let (id, arguments) = (types::name("fc_"), &made["function"]["arguments"]);
            let index = self.output.len();
            let begun = json!({ "output_index": index, "item": call(&id, made, &"".into(), "in_progress") });
            out += &self.event("response.output_item.added", begun);
            let more = json!({ "item_id": id, "output_index": index, "delta": arguments });
            out += &self.event("response.function_call_arguments.delta", more);
            let done = json!({
                "item_id": id, "output_index": index, "name": made["function"]["name"], "arguments": arguments,
            });
            out += &self.event("response.function_call_arguments.done", done);
            out += &self.add(call(&id, made, arguments, "completed"));
        }
        out
    }

    fn end(&mut self) -> String {
        let out = self.close();
        let kind = if self.cut { "response.incomplete" } else { "response.completed" };
        let response = self.response();
        out + &self.event(kind, json!({ "response": response }))
    }

    fn error(&mut self, e: &ApiError) -> String {
        let mut response = self.response.clone();
        response["status"] = "failed".into();
        response["error"] = json!({ "code": e.code.unwrap_or("server_error"), "message": e.message });
        self.event("response.failed", json!({ "response": response }))
    }

    fn whole(&mut self, answer: Value) -> Result<Value, ApiError> {
        let choice = &answer["choices"][0];
        let message = &choice["message"];
        self.usage = answer["usage"].clone();
        self.cut = choice["finish_reason"] == "length";
        let status = if self.cut { "incomplete" } else { "completed" };
        if let Some(text) = message["reasoning_content"].as_str() {
            self.output.push(item(Kind::Thought, &types::name("rs_"), Some(text), "completed"));
        }
        if let Some(text) = message["content"].as_str().filter(|t| !t.is_empty()) {
            self.output.push(item(Kind::Said, &types::name("msg_"), Some(text), status));
        }
        for made in message["tool_calls"].as_array().into_iter().flatten() {
            self.output.push(call(&types::name("fc_"), made, &made["function"]["arguments"], "completed"));
        }
        Ok(self.response())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_are_translated() {
        let there = json!({
            "model": "m", "instructions": "Be brief.", "max_output_tokens": 9, "stream": true, "reasoning": {"effort": "low"},
            "tools": [{"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": true}],
            "tool_choice": {"type": "function", "name": "add"},
            "text": {"format": {"type": "json_schema", "name": "x", "schema": {}, "strict": true}},
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me add."}]},
                {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"},
                {"type": "function_call", "call_id": "c2", "name": "add", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "7"},
                {"role": "assistant", "content": "Seven."},
                {"role": "assistant", "content": "Done."},
            ],
        });
        let call = |id: &str| json!({"id": id, "type": "function", "function": {"name": "add", "arguments": "{}"}});
        let here = json!({
            "model": "m",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "reasoning_content": "Hm.", "content": [{"type": "text", "text": "Let me add."}],
                    "tool_calls": [call("c1"), call("c2")]},
                {"role": "tool", "tool_call_id": "c1", "content": "7"},
                {"role": "assistant", "content": "Seven."},
                {"role": "assistant", "content": "Done."},
            ],
            "max_completion_tokens": 9, "stream": true, "stream_options": {"include_usage": true}, "reasoning_effort": "low",
            "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}, "strict": true}}],
            "tool_choice": {"type": "function", "function": {"name": "add"}},
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": true}},
        });
        assert_eq!(conversation(&there), here);
    }
}
