//! OpenAI's endpoints.

mod door;
mod reply;
mod stream;
pub mod types;

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, Request, Response, header};
use axum::response::IntoResponse;
use base64::Engine as _;
use lacuna_run::{Event, Generation, Job, Pooling};
use serde_json::{Map, Value, json};

use crate::app::App;
use crate::error::{ApiError, json_response};
use crate::exact;
use crate::schema::Path;
use crate::tools::{CallFormat, Tools};
use crate::worker::Ticket;
use reply::{Reply, Setting, Shape};
use types::{Input, answer_tokens};

type Answer = Result<Response<Body>, ApiError>;

/// `GET /v1/models`
pub async fn models(State(app): State<Arc<App>>) -> Response<Body> {
    json_response(200, &json!({ "object": "list", "data": [app.model_object()] }))
}

/// `GET /v1/models/{model}`
pub async fn model(State(app): State<Arc<App>>, axum::extract::Path(name): axum::extract::Path<String>) -> Answer {
    app.known_model(&name)?;
    Ok(json_response(200, &app.model_object()))
}

/// `POST /v1/chat/completions`
pub async fn chat(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    answer(async move {
        let (prepared, ticket) = app.admit("ChatCompletionRequest", request, prepare_chat).await?;
        run(&app, prepared, ticket).await
    })
    .await
}

/// `POST /v1/completions`
pub async fn completions(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    answer(async move {
        let (prepared, ticket) = app.admit("CompletionRequest", request, prepare_completion).await?;
        run(&app, prepared, ticket).await
    })
    .await
}

/// `POST /v1/embeddings`
pub async fn embeddings(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    answer(async move {
        let ((texts, pooling, base64), ticket) = app.admit("EmbeddingRequest", request, prepare_embedding).await?;
        let tokens: usize = texts.iter().map(Vec::len).sum();
        let n = texts.len();
        let requests = texts.into_iter().map(|prompt| lacuna_run::Request::new(prompt, Job::Embed(pooling))).collect();
        let mut answers = app.submit(requests, ticket)?;
        let mut vectors: Vec<Option<Vec<f32>>> = vec![None; n];
        let all = async {
            while let Some((i, event)) = answers.next().await {
                match event {
                    Event::Embedding { vector, .. } => vectors[i] = Some(vector),
                    Event::Failed(e) => return Err(ApiError::of_run(&e, "input")),
                    _ => {}
                }
            }
            Ok(())
        };
        in_time(app.limits.answer, all).await??;
        let mut data = Vec::with_capacity(n);
        for (i, v) in vectors.into_iter().enumerate() {
            let v = v.ok_or_else(ApiError::going_down)?;
            let embedding = if base64 {
                let bytes: Vec<u8> = v.iter().flat_map(|x| x.to_le_bytes()).collect();
                Value::from(base64::engine::general_purpose::STANDARD.encode(bytes))
            } else {
                Value::from(v)
            };
            data.push(json!({ "object": "embedding", "index": i, "embedding": embedding }));
        }
        let usage = json!({ "prompt_tokens": tokens, "total_tokens": tokens });
        Ok(json_response(200, &json!({ "object": "list", "data": data, "model": app.name, "usage": usage })))
    })
    .await
}

async fn answer(work: impl Future<Output = Answer>) -> Response<Body> {
    work.await.unwrap_or_else(ApiError::into_response)
}

async fn in_time<T>(limit: Duration, work: impl Future<Output = T>) -> Result<T, ApiError> {
    tokio::time::timeout(limit, work).await.map_err(|_| ApiError::new(504, "the answer took too long").code("timeout"))
}

fn tell_user(user: Option<&str>) {
    if let Some(user) = user {
        tracing::info!(user, "asked");
    }
}

async fn run(app: &App, (requests, mut reply, stream): Prepared, ticket: Ticket) -> Answer {
    let mut answers = app.submit(requests, ticket)?;
    if stream {
        let body = Body::new(stream::Events::new(reply, answers, app.limits.answer));
        let mut response = Response::new(body);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        return Ok(response);
    }
    let all = async {
        while let Some((choice, event)) = answers.next().await {
            reply.take(choice, event)?;
        }
        Ok::<(), ApiError>(())
    };
    in_time(app.limits.answer, all).await??;
    if !reply.is_whole() {
        return Err(ApiError::going_down());
    }
    Ok(json_response(200, &reply.whole()))
}

type Prepared = (Vec<lacuna_run::Request>, Reply, bool);

fn prepare_embedding(app: &App, body: Value, ticket: &mut Ticket) -> Result<(Vec<Vec<u32>>, Pooling, bool), ApiError> {
    let e: types::Embedding = types::read(body)?;
    tell_user(e.user.as_deref());
    app.widen(ticket, e.input.texts())?;
    let pooling = match e.pooling.as_deref() {
        Some("mean") => Pooling::Mean,
        Some(_) => Pooling::Last,
        None => app.pooling,
    };
    let texts = app.tokens(e.input, "input")?;
    for t in &texts {
        if t.len() > app.context {
            let text = format!("a text of {} tokens does not fit the context of {}", t.len(), app.context);
            return Err(ApiError::bad("input", text).code("context_length_exceeded"));
        }
    }
    Ok((texts, pooling, e.encoding_format.as_deref() == Some("base64")))
}

fn prepare_completion(app: &App, body: Value, ticket: &mut Ticket) -> Result<Prepared, ApiError> {
    let c: types::Completion = types::read(body)?;
    tell_user(c.common.user.as_deref());
    let (stream, usage_chunk) = c.common.stream()?;
    let n = c.common.n.unwrap_or(1);
    if c.best_of.is_some_and(|best_of| best_of != n) {
        let text = "'best_of' is not supported: ask for n answers and choose";
        return Err(ApiError::bad("best_of", text).code("unsupported_parameter"));
    }
    app.widen(ticket, c.prompt.texts().saturating_mul(n))?;
    let prompts = app.tokens(c.prompt, "prompt")?;
    // The older interface writes 16 tokens unless told otherwise.
    let asked = c.common.max_tokens.unwrap_or(16);
    let mut requests = Vec::new();
    let prompt_tokens = prompts.iter().map(Vec::len).sum();
    for prompt in prompts {
        let room = app.context.saturating_sub(prompt.len()).min(app.limits.tokens);
        let asked = if c.common.max_tokens.is_some() { asked } else { asked.min(room) };
        let max_tokens = answer_tokens(Some(("max_tokens", asked)), prompt.len(), app.context, app.limits.tokens)?;
        let generation = c.common.generation(max_tokens, app.vocab)?;
        requests.extend(copies(generation, n).map(|generation| {
            let job = Job::Generate { generation, logprobs: c.logprobs, grammar: None, special: false };
            lacuna_run::Request::new(prompt.clone(), job)
        }));
    }
    let reply = Reply::new(Setting {
        shape: Shape::Completion,
        model: app.name.clone(),
        fingerprint: app.fingerprint.clone(),
        tokenizer: app.tokenizer.clone(),
        logprobs: c.logprobs.is_some(),
        usage_chunk,
        prompt_tokens,
        choices: requests.len(),
        tools: None,
    });
    Ok((requests, reply, stream))
}

/// The same generation with seeds that count up.
fn copies(g: Generation, n: usize) -> impl Iterator<Item = Generation> {
    (0..n as u64).map(move |i| {
        let mut g = g.clone();
        g.sampling.seed = g.sampling.seed.wrapping_add(i);
        g
    })
}

fn prepare_chat(app: &App, body: Value, ticket: &mut Ticket) -> Result<Prepared, ApiError> {
    let c: types::Chat = types::read(body)?;
    tell_user(c.common.user.as_deref().or(c.safety_identifier.as_deref()));
    app.widen(ticket, c.common.n.unwrap_or(1))?;
    let (stream, usage_chunk) = c.common.stream()?;
    let logprobs = match (c.logprobs.unwrap_or(false), c.top_logprobs) {
        (true, top) => Some(top.unwrap_or(0)),
        (false, None | Some(0)) => None,
        (false, Some(_)) => return Err(ApiError::bad("top_logprobs", "'top_logprobs' needs logprobs")),
    };
    let template = app.template.as_ref().ok_or_else(|| {
        let text = "this model has no chat template: it was not trained to chat. Use /v1/completions";
        ApiError::bad("messages", text).code("unsupported_parameter")
    })?;
    let form = CallFormat::of(template.source(), template.takes_tools());
    let tools = Tools::read(c.tools, c.tool_choice.as_ref(), c.parallel_tool_calls, form)?;
    let mut messages: Vec<Value> = c.messages.into_iter().map(|m| plain(m, form)).collect();
    if let Some(tools) = tools.as_ref().filter(|_| form == CallFormat::Constrained) {
        let at = messages.iter().rposition(|m| m["role"] == "user").unwrap_or(messages.len() - 1);
        let instruction = format!("\n\n{}", tools.instruction());
        match &mut messages[at]["content"] {
            Value::Array(parts) => parts.push(json!({ "type": "text", "text": instruction })),
            said => *said = (said.as_str().unwrap_or_default().to_owned() + &instruction).into(),
        }
    }
    let shown = tools.as_ref().filter(|_| form != CallFormat::Constrained).map(|t| Value::from(t.list.clone()));
    let text = |id: Option<u32>| id.and_then(|id| app.tokenizer.token_text(id)).unwrap_or("");
    let (bos, eos) = (text(app.tokenizer.bos()), text(app.tokenizer.eos()));
    let mut rendered = template
        .render_json(&Value::from(messages), true, bos, eos, shown.as_ref())
        .map_err(|e| ApiError::bad("messages", e.to_string()))?;
    let forced = tools.as_ref().filter(|t| !t.forced.is_empty());
    if let Some(t) = forced {
        rendered += t.form.opening();
    }
    app.check_length(&rendered, "messages")?;
    let prompt = app.tokenizer.encode(&rendered, false).map_err(|e| ApiError::bad("messages", e.to_string()))?;
    app.check_tokens(&prompt, "messages")?;
    let asked = match (c.max_completion_tokens, c.common.max_tokens) {
        (Some(new), Some(old)) if new != old => {
            return Err(ApiError::bad(
                "max_tokens",
                "'max_completion_tokens' and its older name 'max_tokens' say different things",
            ));
        }
        (Some(n), _) => Some(("max_completion_tokens", n)),
        (None, n) => n.map(|n| ("max_tokens", n)),
    };
    let max_tokens = answer_tokens(asked, prompt.len(), app.context, app.limits.tokens)?;
    let format = c.response_format.unwrap_or_default();
    let asked_schema = match format["type"].as_str() {
        Some("json_object") => Some(json!({ "type": "object" })),
        Some("json_schema") => Some(format["json_schema"]["schema"].clone()),
        _ => None,
    };
    if asked_schema.is_some() && tools.is_some() {
        let text = "'response_format' and tools that may be called exclude each other here";
        return Err(ApiError::bad("response_format", text));
    }
    let (schema, param) = match forced {
        Some(t) => (Some(t.schema()), "tools"),
        None => (asked_schema, "response_format"),
    };
    match forced {
        Some(tools) => tools.check_numbers()?,
        None => {
            let path = Path::Field(&Path::Root, "response_format");
            let path = Path::Field(&path, "json_schema");
            exact::check_schema(&format["json_schema"]["schema"], &Path::Field(&path, "schema"))?;
        }
    }
    let generation = c.common.generation(max_tokens, app.vocab)?;
    let mut requests = Vec::new();
    for generation in copies(generation, c.common.n.unwrap_or(1)) {
        let grammar = match &schema {
            None => None,
            Some(schema) => {
                let grammars = app.grammars.as_ref().map_err(|why| ApiError::bad(param, why.clone()))?;
                let made = grammars.json(schema);
                Some(made.map_err(|why| ApiError::bad(param, format!("the schema cannot be held to: {why}")))?)
            }
        };
        let job = Job::Generate { generation, logprobs, grammar, special: tools.is_some() };
        requests.push(lacuna_run::Request::new(prompt.clone(), job));
    }
    let reply = Reply::new(Setting {
        shape: Shape::Chat,
        model: app.name.clone(),
        fingerprint: app.fingerprint.clone(),
        tokenizer: app.tokenizer.clone(),
        logprobs: logprobs.is_some(),
        usage_chunk,
        prompt_tokens: prompt.len(),
        choices: requests.len(),
        tools,
    });
    Ok((requests, reply, stream))
}

/// A message as templates know it: developers called system, arguments of calls as objects. A template without a place
/// for tools gets calls and results as texts. Whether what is said comes as a text or in parts is the template's own
/// matter.
fn plain(mut m: Value, form: CallFormat) -> Value {
    if m["role"] == "developer" {
        m["role"] = "system".into();
    }
    let Some(fields) = m.as_object_mut() else { return m };
    exact::drop_unseen(fields);
    if fields.get("tool_calls").and_then(Value::as_array).is_some_and(Vec::is_empty) {
        fields.remove("tool_calls");
    }
    if let Some(calls) = fields.get_mut("tool_calls").and_then(Value::as_array_mut) {
        if form == CallFormat::Constrained {
            let text: Vec<String> = calls.iter().map(|call| written(&call["function"])).collect();
            fields.remove("tool_calls");
            fields.insert("content".into(), text.join("\n").into());
        } else {
            calls.iter_mut().filter_map(Value::as_object_mut).for_each(open);
        }
    }
    if form == CallFormat::Constrained && fields.get("role").is_some_and(|r| r == "tool") {
        let said = match fields.get("content") {
            Some(Value::Array(parts)) => parts.iter().filter_map(|p| p["text"].as_str()).collect(),
            said => said.and_then(Value::as_str).unwrap_or_default().to_owned(),
        };
        let text = format!("The function returned: {said}");
        return json!({ "role": "user", "content": text });
    }
    if fields.get("content").is_none_or(Value::is_null) {
        fields.insert("content".into(), "".into());
    }
    m
}

/// A call as its text, for a template without a place for it.
fn written(function: &Value) -> String {
    let arguments = function["arguments"].as_str().filter(|a| exact::fields(a).is_some());
    let arguments = arguments.map_or_else(|| function["arguments"].to_string(), str::to_owned);
    format!("{{\"name\": {}, \"arguments\": {arguments}}}", function["name"])
}

/// The arguments of a call as a value, which is what templates want; a text where a value would round its integers.
fn open(call: &mut Map<String, Value>) {
    exact::drop_unseen(call);
    let Some(function) = call.get_mut("function").and_then(Value::as_object_mut) else { return };
    exact::drop_unseen(function);
    let text = function.get("arguments").and_then(Value::as_str).filter(|a| exact::survives(a));
    if let Some(arguments @ Value::Object(_)) = text.and_then(|a| serde_json::from_str(a).ok()) {
        function.insert("arguments".into(), arguments);
    }
}

impl App {
    fn known_model(&self, name: &str) -> Result<(), ApiError> {
        if name == self.name {
            return Ok(());
        }
        let shown: String = name.chars().take(100).collect();
        let text = format!("the model '{shown}' is not served here; '{}' is", self.name);
        Err(ApiError { param: Some("model".into()), ..ApiError::new(404, text) }.code("model_not_found"))
    }

    fn model_object(&self) -> Value {
        let mut model = json!({ "id": self.name, "object": "model", "created": self.created, "owned_by": "lacuna" });
        if !self.run.is_null() {
            model["run"] = self.run.clone();
        }
        model
    }

    /// The tokens of a request's texts; special tokens as the model wants them around a text.
    fn tokens(&self, input: Input, param: &str) -> Result<Vec<Vec<u32>>, ApiError> {
        let encode = |text: &String| {
            self.check_length(text, param)?;
            let ids = self.tokenizer.encode(text, true).map_err(|e| ApiError::bad(param, e.to_string()))?;
            if ids.is_empty() {
                return Err(ApiError::bad(param, format!("'{param}' has a text without tokens")));
            }
            Ok(ids)
        };
        let all = match input {
            Input::Text(text) => vec![encode(&text)?],
            Input::Texts(texts) => texts.iter().map(encode).collect::<Result<_, _>>()?,
            Input::Tokens(ids) => vec![ids],
            Input::ManyTokens(all) => all,
        };
        all.iter().try_for_each(|ids| self.check_tokens(ids, param))?;
        Ok(all)
    }

    /// Refuses a text that cannot fit before it is encoded, which takes a hundred times its length in memory.
    fn check_length(&self, text: &str, param: &str) -> Result<(), ApiError> {
        if !self.tokenizer.exceeds(text, self.context) {
            return Ok(());
        }
        let text = format!("a text of {} bytes does not fit the context of {} tokens", text.len(), self.context);
        Err(ApiError::bad(param, text).code("context_length_exceeded"))
    }

    fn check_tokens(&self, ids: &[u32], param: &str) -> Result<(), ApiError> {
        match ids.iter().find(|&&id| id as usize >= self.vocab) {
            Some(id) => {
                Err(ApiError::bad(param, format!("'{param}' has the token {id}; the model knows {}", self.vocab)))
            }
            None => Ok(()),
        }
    }
}
