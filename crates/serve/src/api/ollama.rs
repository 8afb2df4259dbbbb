//! Ollama's interface, as a translation onto conversations and texts. One model is served; it does not come and go.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{Request, Response};
use axum::routing::{get, post};
use lacuna_checkpoint::TokenizerError;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::chat::{Length, translated};
use super::dialect::{Dialect, arguments};
use super::types::Input;
use super::{Prepared, answer, completions, embeddings};
use crate::app::App;
use crate::error::{ApiError, Form, json_response};
use crate::reasoning::Marks;
use crate::worker::Ticket;

/// The version of Ollama's interface that this follows: clients ask for one.
const VERSION: &str = "0.12.0";

/// Fields of conversations and their names here.
const NAMES: &[(&str, &str)] = &[
    ("max_tokens", "options.num_predict"),
    ("response_format", "format"),
    ("reasoning_effort", "think"),
    ("enable_thinking", "think"),
    ("stop", "options.stop"),
];

/// Its endpoints.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/api/version", get(|| async { json_response(200, &version()) }))
        .route("/api/tags", get(|State(app): State<Arc<App>>| async move { json_response(200, &list(&app)) }))
        .route("/api/ps", get(|State(app): State<Arc<App>>| async move { json_response(200, &running(&app)) }))
        .route("/api/show", post(show))
        .route("/api/chat", post(chat))
        .route("/api/generate", post(generate))
        .route("/api/embed", post(embed))
        .route("/api/embeddings", post(embedding))
}

fn version() -> Value {
    json!({ "version": VERSION, "lacuna": env!("CARGO_PKG_VERSION") })
}

fn details(app: &App) -> Value {
    let bits = app.card["bits_per_weight"].as_f64().map_or_else(|| "unknown".to_owned(), |b| format!("{b:.2} bits"));
    let family = &app.card["architecture"];
    let size = app.card["parameters"].as_f64().unwrap_or(0.0);
    let size = if size < 1e9 { format!("{:.2}M", size / 1e6) } else { format!("{:.1}B", size / 1e9) };
    json!({
        "parent_model": "", "format": "lacuna", "family": family, "families": [family], "parameter_size": size,
        "quantization_level": bits,
    })
}

fn entry(app: &App) -> Map<String, Value> {
    let name = format!("{}:latest", app.name);
    let digest = Sha256::digest(format!("{}\n{}\n{}", app.name, app.fingerprint, app.card));
    let digest: String = digest.iter().map(|b| format!("{b:02x}")).collect();
    let made = json!({
        "name": name, "model": name, "size": app.card["bytes"].as_u64().unwrap_or(0), "digest": digest,
        "details": details(app),
    });
    made.as_object().cloned().unwrap_or_default()
}

fn list(app: &App) -> Value {
    let mut model = entry(app);
    model.insert("modified_at".into(), moment(UNIX_EPOCH + Duration::from_secs(app.created)).into());
    json!({ "models": [model] })
}

fn running(app: &App) -> Value {
    let mut model = entry(app);
    // It stays as long as the server does.
    model.insert("expires_at".into(), "9999-12-31T23:59:59Z".into());
    model.insert("size_vram".into(), 0.into());
    model.insert("context_length".into(), app.context.into());
    json!({ "models": [model] })
}

/// `POST /api/show`
async fn show(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    answer(async move {
        let work = |app: &App, body: Value, _: &mut _| {
            if body.get("model").or(body.get("name")).is_none() {
                return Err(ApiError::bad("model", "'model' is missing").code("missing_required_parameter"));
            }
            Ok(shown(app))
        };
        let (told, _ticket) = app.admit("OllamaShowRequest", request, work).await?;
        Ok(json_response(200, &told))
    })
    .await
}

fn shown(app: &App) -> Value {
    let mut abilities = vec!["completion"];
    let source = app.template.as_ref().map_or("", |t| t.source());
    if app.template.as_ref().is_some_and(|t| t.takes_tools()) {
        abilities.push("tools");
    }
    if Marks::of(source).is_some() {
        abilities.push("thinking");
    }
    let family = app.card["architecture"].as_str().unwrap_or("unknown");
    let mut info = Map::new();
    info.insert("general.architecture".into(), family.into());
    info.insert("general.parameter_count".into(), app.card["parameters"].clone());
    info.insert(format!("{family}.context_length"), app.context.into());
    info.insert(format!("{family}.embedding_length"), app.width.into());
    info.insert(format!("{family}.block_count"), app.card["layers"].clone());
    json!({
        "modelfile": format!("FROM {}", app.name), "parameters": "", "template": source, "details": details(app),
        "model_info": info, "capabilities": abilities,
        "modified_at": moment(UNIX_EPOCH + Duration::from_secs(app.created)),
    })
}

/// `POST /api/chat`
async fn chat(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    serve(app, "OllamaChatRequest", request, |app, body, ticket| {
        let mut chat = common(app, &body)?;
        let messages = body["messages"].as_array().map_or(&[][..], Vec::as_slice);
        let told = Told::new(app, &body, false);
        if messages.is_empty() {
            return Ok(Err(told.loaded()));
        }
        chat.insert("messages".into(), conversation(messages));
        chat.extend(body.get("tools").map(|t| ("tools".to_owned(), t.clone())));
        converse(app, chat, ticket, told).map(Ok)
    })
    .await
}

/// `POST /api/generate`
async fn generate(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    serve(app, "OllamaGenerateRequest", request, |app, body, ticket| {
        let mut asked = common(app, &body)?;
        let told = Told::new(app, &body, true);
        if body["prompt"].as_str().is_none_or(str::is_empty) {
            return Ok(Err(told.loaded()));
        }
        if body["raw"] != true && app.template.is_some() {
            let mut messages = Vec::new();
            for (role, key) in [("system", "system"), ("user", "prompt")] {
                messages
                    .extend(body[key].as_str().filter(|t| !t.is_empty()).map(|t| json!({"role": role, "content": t})));
            }
            asked.insert("messages".into(), messages.into());
            return converse(app, asked, ticket, told).map(Ok);
        }
        // A text as it is. What only a conversation has is refused, not left out.
        for (field, has) in [
            ("system", body["system"].as_str().is_some_and(|t| !t.is_empty())),
            ("format", asked.remove("response_format").is_some()),
            ("think", asked.remove("reasoning_effort").is_some()),
        ] {
            if has {
                let text = format!("'{field}' needs a chat template, and here the prompt is taken as it is");
                return Err(ApiError::bad(field, text).code("unsupported_parameter"));
            }
        }
        asked.remove("enable_thinking");
        let prompt = body["prompt"].as_str().unwrap_or_default();
        asked.insert("prompt".into(), prompt.into());
        let room = app.context.saturating_sub(app.tokenizer.encode(prompt, true).map_or(0, |ids| ids.len()));
        let most = asked.get("max_tokens").and_then(Value::as_u64).map_or(room, |n| room.min(n as usize));
        asked.insert("max_tokens".into(), most.min(app.limits.tokens).into());
        let asked = Value::from(asked);
        let checked = app.schema.check("CompletionRequest", &asked);
        let prepared = checked.and_then(|()| completions::prepare(app, asked, ticket, Box::new(told)));
        prepared.map_err(|e| e.renamed(NAMES)).map(Ok)
    })
    .await
}

/// `POST /api/embed`
async fn embed(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    answer(async move {
        let began = Instant::now();
        let work = |app: &App, body: Value, ticket: &mut Ticket| {
            let model = body["model"].as_str().unwrap_or(&app.name).to_owned();
            let texts = match &body["input"] {
                Value::String(text) if !text.is_empty() => vec![text.clone()],
                Value::Array(all) => all.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
                // Whoever asks for nothing wants the model loaded. It is.
                _ => Vec::new(),
            };
            Ok((model, tokens(app, texts, body["truncate"] != false, "input", ticket)?))
        };
        let ((model, texts), ticket) = app.admit("OllamaEmbedRequest", request, work).await?;
        let count: usize = texts.iter().map(Vec::len).sum();
        let vectors = vectors(&app, texts, ticket).await?;
        let took = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let told = json!({
            "model": model, "embeddings": vectors, "total_duration": took, "load_duration": 0, "prompt_eval_count": count,
        });
        Ok(json_response(200, &told))
    })
    .await
}

/// `POST /api/embeddings`
async fn embedding(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    answer(async move {
        let work = |app: &App, body: Value, ticket: &mut Ticket| {
            let text = body["prompt"].as_str().filter(|t| !t.is_empty()).map(str::to_owned);
            tokens(app, text.into_iter().collect(), true, "prompt", ticket)
        };
        let (texts, ticket) = app.admit("OllamaEmbeddingRequest", request, work).await?;
        let vector = vectors(&app, texts, ticket).await?.pop().unwrap_or_default();
        Ok(json_response(200, &json!({ "embedding": vector })))
    })
    .await
}

async fn vectors(app: &App, texts: Vec<Vec<u32>>, ticket: Ticket) -> Result<Vec<Vec<f32>>, ApiError> {
    if texts.is_empty() { Ok(Vec::new()) } else { embeddings::vectors(app, texts, app.pooling, ticket).await }
}

/// The tokens of texts that are to become vectors; `cut`: of one that does not fit as many as do.
fn tokens(
    app: &App,
    texts: Vec<String>,
    cut: bool,
    param: &str,
    ticket: &mut Ticket,
) -> Result<Vec<Vec<u32>>, ApiError> {
    app.widen(ticket, texts.len().max(1))?;
    let one = |text: String| {
        if !cut {
            let ids = app.tokens(Input::Text(text), param)?.swap_remove(0);
            let n = ids.len();
            let short = n <= app.context;
            let long = || format!("a text of {n} tokens does not fit the context of {}", app.context);
            return short.then_some(ids).ok_or_else(|| ApiError::bad(param, long()).code("context_length_exceeded"));
        }
        let bad = |e: TokenizerError| ApiError::bad(param, e.to_string());
        // No more of a long text is encoded than it takes: a token has a few bytes.
        let mut bytes = app.context.saturating_mul(16);
        loop {
            let end = (0..=bytes.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
            let mut ids = app.tokenizer.encode(&text[..end], true).map_err(bad)?;
            // What ends every text ends one that was cut.
            let last = ids.last().copied().filter(|&id| app.tokenizer.is_special(id));
            if ids.len() <= app.context && end < text.len() {
                bytes = bytes.saturating_mul(2);
                continue;
            }
            if ids.len() > app.context {
                ids.truncate(app.context);
                if let (Some(end), Some(at)) = (last, ids.last_mut()) {
                    *at = end;
                }
            }
            if ids.is_empty() {
                return Err(ApiError::bad(param, format!("'{param}' has a text without tokens")));
            }
            app.check_tokens(&ids, param)?;
            return Ok(ids);
        }
    };
    texts.into_iter().map(one).collect()
}

/// Answers a request, or says at once what there is to say without the engine.
async fn serve(
    app: Arc<App>,
    name: &'static str,
    request: Request<Body>,
    prepare: impl FnOnce(&App, Value, &mut Ticket) -> Result<Result<Prepared, Value>, ApiError> + Send + 'static,
) -> Response<Body> {
    answer(async move {
        match app.admit(name, request, prepare).await? {
            (Ok(prepared), ticket) => super::run(&app, prepared, ticket).await,
            (Err(told), _) => Ok(json_response(200, &told)),
        }
    })
    .await
}

fn converse(app: &App, chat: Map<String, Value>, ticket: &mut Ticket, told: Told) -> Result<Prepared, ApiError> {
    translated(app, chat.into(), ticket, Box::new(told), (Length::Most, NAMES))
}

/// What both endpoints say alike.
fn common(app: &App, body: &Value) -> Result<Map<String, Value>, ApiError> {
    let mut out = Map::new();
    out.insert("model".into(), app.name.as_str().into());
    let options = &body["options"];
    // Ollama's own settings where a request has none.
    for (here, otherwise) in [("temperature", json!(0.8)), ("top_k", json!(40)), ("top_p", json!(0.9))] {
        out.insert(here.into(), options.get(here).cloned().unwrap_or(otherwise));
    }
    for (there, here) in [
        ("min_p", "min_p"),
        ("seed", "seed"),
        ("stop", "stop"),
        ("repeat_penalty", "repetition_penalty"),
        ("presence_penalty", "presence_penalty"),
        ("frequency_penalty", "frequency_penalty"),
    ] {
        out.extend(options.get(there).map(|v| (here.to_owned(), v.clone())));
    }
    let penalised = options["repeat_penalty"].as_f64().is_some_and(|p| p != 1.0);
    if penalised && options.get("repeat_last_n").is_some_and(|n| n.as_f64() != Some(-1.0)) {
        let text = "'options.repeat_last_n' is not supported: repeat_penalty looks at the whole text, which is -1";
        return Err(ApiError::bad("options.repeat_last_n", text).code("unsupported_parameter"));
    }
    // Below zero is without end.
    if let Some(n) = options["num_predict"].as_f64().filter(|n| *n > 0.0) {
        out.insert("max_tokens".into(), (n as u64).into());
    }
    if body["stream"] != false {
        out.insert("stream".into(), true.into());
        out.insert("stream_options".into(), json!({ "include_usage": true }));
    }
    match &body["format"] {
        Value::Object(schema) => {
            let format = json!({ "type": "json_schema", "json_schema": { "name": "answer", "schema": schema } });
            out.insert("response_format".into(), format);
        }
        Value::String(json) if json == "json" => {
            out.insert("response_format".into(), json!({ "type": "json_object" }));
        }
        _ => {}
    }
    match &body["think"] {
        Value::Bool(false) => drop(out.insert("enable_thinking".into(), false.into())),
        Value::Bool(true) => drop(out.insert("reasoning_effort".into(), "medium".into())),
        Value::String(effort) => drop(out.insert("reasoning_effort".into(), effort.as_str().into())),
        _ => {}
    }
    Ok(out)
}

/// Messages as OpenAI's clients would write them. Calls have no names here: results belong to them in their order.
fn conversation(messages: &[Value]) -> Value {
    let (mut called, mut answered) = (0, 0);
    let one = |m: &Value| {
        let mut out = json!({ "role": m["role"], "content": m["content"].as_str().unwrap_or_default() });
        if let Some(thought) = m["thinking"].as_str().filter(|t| !t.is_empty()) {
            out["reasoning_content"] = thought.into();
        }
        let calls = m["tool_calls"].as_array().map_or(&[][..], Vec::as_slice).iter().map(|call| {
            called += 1;
            let f = &call["function"];
            let function = json!({ "name": f["name"], "arguments": f["arguments"].to_string() });
            json!({ "id": format!("call_{}", called - 1), "type": "function", "function": function })
        });
        let calls: Vec<Value> = calls.collect();
        if !calls.is_empty() {
            out["tool_calls"] = calls.into();
        }
        if m["role"] == "tool" {
            // One too many belongs to no call.
            let id = if answered < called { format!("call_{answered}") } else { String::new() };
            out["tool_call_id"] = id.into();
            answered += 1;
            if let Some(name) = m.get("tool_name") {
                out["name"] = name.clone();
            }
        }
        out
    };
    messages.iter().map(one).collect()
}

/// How an answer is told: JSON, a line each.
struct Told {
    model: String,
    /// A text, not a message.
    plain: bool,
    began: Instant,
    first: Option<Instant>,
    calls: Vec<Value>,
    finish: Value,
    usage: Value,
    failed: Option<ApiError>,
}

impl Told {
    fn new(app: &App, body: &Value, plain: bool) -> Told {
        // The name comes back as it was said.
        let model = body["model"].as_str().unwrap_or(&app.name).to_owned();
        let (finish, usage) = (Value::Null, Value::Null);
        Told { model, plain, began: Instant::now(), first: None, calls: Vec::new(), finish, usage, failed: None }
    }

    fn part(&self, text: &str, thought: &str, calls: &[Value]) -> Value {
        let mut all = json!({ "model": self.model, "created_at": moment(SystemTime::now()) });
        if self.plain {
            all["response"] = text.into();
            if !thought.is_empty() {
                all["thinking"] = thought.into();
            }
        } else {
            let mut message = json!({ "role": "assistant", "content": text });
            if !thought.is_empty() {
                message["thinking"] = thought.into();
            }
            if !calls.is_empty() {
                message["tool_calls"] = calls.into();
            }
            all["message"] = message;
        }
        all["done"] = false.into();
        all
    }

    /// Makes a part the last one.
    fn close(&self, mut part: Value) -> Value {
        let now = Instant::now();
        let first = self.first.unwrap_or(now);
        let nanos = |d: Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
        let end = json!({
            "done": true, "done_reason": if self.finish == "length" { "length" } else { "stop" },
            "total_duration": nanos(now - self.began), "load_duration": 0,
            "prompt_eval_count": self.usage["prompt_tokens"], "prompt_eval_duration": nanos(first - self.began),
            "eval_count": self.usage["completion_tokens"], "eval_duration": nanos(now - first),
        });
        part.as_object_mut().into_iter().for_each(|p| p.extend(end.as_object().cloned().unwrap_or_default()));
        part
    }

    /// Whoever asks for nothing wants the model loaded. It is.
    fn loaded(&self) -> Value {
        let mut all = self.part("", "", &[]);
        all["done"] = true.into();
        all["done_reason"] = "load".into();
        all
    }

    fn take_calls(&mut self, calls: &Value) -> Result<(), ApiError> {
        for call in calls.as_array().into_iter().flatten() {
            let function = json!({ "name": call["function"]["name"], "arguments": arguments(call)? });
            self.calls.push(json!({ "id": call["id"], "function": function }));
        }
        Ok(())
    }
}

impl Dialect for Told {
    fn kind(&self) -> &'static str {
        "application/x-ndjson"
    }

    fn begin(&mut self, _: usize) -> String {
        String::new()
    }

    fn chunk(&mut self, chunk: &Value) -> String {
        if !chunk["usage"].is_null() {
            self.usage = chunk["usage"].clone();
        }
        let choice = &chunk["choices"][0];
        if !choice["finish_reason"].is_null() {
            self.finish = choice["finish_reason"].clone();
        }
        let delta = &choice["delta"];
        if let Err(e) = self.take_calls(&delta["tool_calls"]) {
            self.failed = Some(e);
        }
        let text = delta["content"].as_str().or(choice["text"].as_str()).unwrap_or_default();
        let thought = delta["reasoning_content"].as_str().unwrap_or_default();
        let calls = std::mem::take(&mut self.calls);
        if text.is_empty() && thought.is_empty() && calls.is_empty() {
            return String::new();
        }
        self.first.get_or_insert_with(Instant::now);
        format!("{}\n", self.part(text, thought, &calls))
    }

    fn end(&mut self) -> String {
        match self.failed.take() {
            Some(e) => self.error(&e),
            None => format!("{}\n", self.close(self.part("", "", &[]))),
        }
    }

    fn error(&mut self, e: &ApiError) -> String {
        format!("{}\n", e.body_for(Form::Ollama))
    }

    fn alive(&self) -> Option<&'static str> {
        None
    }

    fn came(&mut self) {
        self.first.get_or_insert_with(Instant::now);
    }

    fn whole(&mut self, answer: Value) -> Result<Value, ApiError> {
        let choice = &answer["choices"][0];
        let message = &choice["message"];
        self.take_calls(&message["tool_calls"])?;
        self.finish = choice["finish_reason"].clone();
        self.usage = answer["usage"].clone();
        let text = message["content"].as_str().or(choice["text"].as_str()).unwrap_or_default();
        let thought = message["reasoning_content"].as_str().unwrap_or_default();
        Ok(self.close(self.part(text, thought, &self.calls)))
    }
}

/// A moment as RFC 3339 writes it, in UTC.
fn moment(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Years that begin in March put the leap day last (Hinnant, "chrono-compatible low-level date algorithms").
    let z = days + 719_468;
    let (era, of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let from_march = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * from_march + 2) / 153;
    let (month, day) = ((month_from_march + 2) % 12 + 1, from_march - (153 * month_from_march + 2) / 5 + 1);
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second, micros) = (second / 3600, second / 60 % 60, second % 60, since.subsec_micros());
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_out() {
        let at = |s: u64| moment(UNIX_EPOCH + Duration::from_micros(s));
        assert_eq!(at(0), "1970-01-01T00:00:00.000000Z");
        assert_eq!(at(951_827_696_000_007), "2000-02-29T12:34:56.000007Z");
        assert_eq!(at(4_102_444_799_999_999), "2099-12-31T23:59:59.999999Z");
    }

    #[test]
    fn calls_and_results_find_each_other() {
        let call = |name: &str| json!({"function": {"name": name, "arguments": {"a": 1}}});
        let there = [
            json!({"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [call("f"), call("g")]}),
            json!({"role": "tool", "content": "1", "tool_name": "f"}),
            json!({"role": "tool", "content": "2"}),
        ];
        let made = conversation(&there);
        assert_eq!(made[0]["tool_calls"][1]["id"], made[2]["tool_call_id"]);
        assert_eq!(conversation(&there[1..2])[0]["tool_call_id"], "");
        assert_eq!(made[0]["tool_calls"][0]["function"]["arguments"], "{\"a\":1}");
        assert_eq!((&made[1]["name"], &made[0]["reasoning_content"]), (&json!("f"), &json!("Hm.")));
    }
}
