//! `/v1/chat/completions`: the next answer of a conversation. Other interfaces' conversations come here as this one's.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{Request, Response};
use lacuna_checkpoint::{ChatTemplate, Setting as Rendering, TemplateError};
use lacuna_run::{Generation, Job};
use serde_json::{Map, Value, json};

use super::dialect::{Dialect, OpenAi};
use super::reply::{Reply, Setting, Shape};
use super::types::answer_tokens;
use super::{Prepared, tell_user, types};
use crate::app::App;
use crate::channels::FINAL;
use crate::error::ApiError;
use crate::exact;
use crate::reasoning::Marks;
use crate::schema::Path;
use crate::tools::{CallFormat, Tools};
use crate::worker::Ticket;

/// `POST /v1/chat/completions`
pub async fn serve(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    super::serve(app, "ChatCompletionRequest", request, |app, body, ticket| {
        prepare(app, body, ticket, Box::new(OpenAi), Length::Asked)
    })
    .await
}

/// What a length is that does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// Refused.
    Asked,
    /// As much as fits: interfaces whose clients must name one, and name the largest that there is.
    Most,
}

/// A request of another interface, made one of OpenAI's. `names`: fields here and their names there.
pub fn translated(
    app: &App,
    body: Value,
    ticket: &mut Ticket,
    dialect: Box<dyn Dialect>,
    (length, names): (Length, &[(&str, &str)]),
) -> Result<Prepared, ApiError> {
    let checked = app.schema.check("ChatCompletionRequest", &body);
    checked.and_then(|()| prepare(app, body, ticket, dialect, length)).map_err(|e| e.renamed(names))
}

/// A conversation as the model reads it.
pub struct Conversation {
    /// Its tokens, up to where the answer begins.
    pub prompt: Vec<u32>,
    tools: Option<Tools>,
    /// How the model marks its thoughts, and whether the prompt ends within some.
    thoughts: Option<(Marks, bool)>,
}

/// Renders and encodes a conversation. `held`: the answer is held to a schema, so that nothing is thought before.
pub fn read(app: &App, c: &mut types::Chat, held: bool) -> Result<Conversation, ApiError> {
    let template = app.template.as_ref().ok_or_else(|| {
        let text = "this model has no chat template: it was not trained to chat. Use /v1/completions";
        ApiError::bad("messages", text).code("unsupported_parameter")
    })?;
    results_have_calls(&c.messages)?;
    let args = arguments(template, c)?;
    let form = CallFormat::of(template.source(), template.takes_tools());
    let tools = Tools::read(c.tools.take(), c.tool_choice.as_ref(), c.parallel_tool_calls, form)?;
    let marks = Marks::of(template.source());
    let mut messages: Vec<Value> = std::mem::take(&mut c.messages).into_iter().map(|m| plain(m, form)).collect();
    if marks.is_some_and(Marks::in_channels) {
        messages.iter_mut().for_each(think);
    }
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
    let with = Rendering {
        add_generation_prompt: c.add_generation_prompt.unwrap_or(true),
        bos: text(app.tokenizer.bos()),
        eos: text(app.tokenizer.eos()),
        tools: shown.as_ref(),
        now: std::time::SystemTime::now(),
        args: Some(&args),
    };
    let rendered = template.render_with(&Value::from(messages), &with);
    let mut rendered = rendered.map_err(|e| ApiError::bad("messages", e.to_string()))?;
    let forced = tools.as_ref().filter(|t| !t.forced.is_empty());
    let mut thoughts = marks.map(|m| (m, m.are_open(&rendered)));
    if held || forced.is_some() {
        // A grammar has no place for thoughts.
        let passed = thoughts.take().map_or(String::new(), |(m, open)| match forced {
            // A call is in a channel of its own.
            Some(_) => m.passing_over(open).trim_end_matches(FINAL).to_owned(),
            None => m.passing_over(open),
        });
        rendered += &passed;
    }
    if let Some(t) = forced {
        rendered += &t.opening();
    }
    app.check_length(&rendered, "messages")?;
    let prompt = app.tokenizer.encode(&rendered, false).map_err(|e| ApiError::bad("messages", e.to_string()))?;
    app.check_tokens(&prompt, "messages")?;
    Ok(Conversation { prompt, tools, thoughts })
}

/// Refuses results of calls that nobody made, as the interfaces do that this one is like. One that names no call, as
/// Ollama's clients write them, is whose it may.
fn results_have_calls(messages: &[Value]) -> Result<(), ApiError> {
    let mut made: Vec<&str> = Vec::new();
    for (i, m) in messages.iter().enumerate() {
        made.extend(m["tool_calls"].as_array().into_iter().flatten().filter_map(|call| call["id"].as_str()));
        let id = m["tool_call_id"].as_str().filter(|id| m["role"] == "tool" && !id.is_empty());
        if let Some(id) = id.filter(|id| !made.contains(id)) {
            let shown: String = id.chars().take(100).collect();
            let text =
                format!("message {i} is the result of the call '{shown}', and no message before it makes that call");
            return Err(ApiError::bad("messages", text));
        }
    }
    Ok(())
}

/// The template's arguments: `chat_template_kwargs`, and what other fields say that it may know.
fn arguments(template: &ChatTemplate, c: &mut types::Chat) -> Result<Map<String, Value>, ApiError> {
    const THINK: &str = "enable_thinking";
    const EFFORT: &str = "reasoning_effort";
    let mut args = c.chat_template_kwargs.take().unwrap_or_default();
    let mut say = |name: &str, value: Value, param: &str| match args.insert(name.to_owned(), value.clone()) {
        Some(other) if other != value => {
            Err(ApiError::bad(param, format!("'{param}' and 'chat_template_kwargs.{name}' say different things")))
        }
        _ => Ok(()),
    };
    if let Some(think) = c.enable_thinking {
        say(THINK, think.into(), THINK)?;
    }
    if let Some(effort) = c.reasoning_effort.take() {
        if template.takes(EFFORT) {
            say(EFFORT, effort.into(), EFFORT)?;
        } else if template.takes(THINK) {
            say(THINK, (effort != "none").into(), EFFORT)?;
        } else if effort != "none" || Marks::of(template.source()).is_some() {
            let text = "'reasoning_effort' is not supported: the model has no such setting";
            return Err(ApiError::bad(EFFORT, text).code("unsupported_parameter"));
        }
    }
    if args.get(THINK) == Some(&Value::Bool(false)) && !template.takes(THINK) && Marks::of(template.source()).is_none()
    {
        // What is done anyway.
        args.remove(THINK);
    }
    template.check_args(&args).map_err(|e| {
        let param = match &e {
            TemplateError::Argument { name, .. } => format!("chat_template_kwargs.{name}"),
            _ => "chat_template_kwargs".to_owned(),
        };
        ApiError::bad(param, e.to_string()).code("unsupported_parameter")
    })?;
    Ok(args)
}

/// Makes of a request what the engine needs.
pub fn prepare(
    app: &App,
    body: Value,
    ticket: &mut Ticket,
    dialect: Box<dyn Dialect>,
    length: Length,
) -> Result<Prepared, ApiError> {
    let mut c: types::Chat = types::read(body)?;
    tell_user(c.common.user.as_deref().or(c.safety_identifier.as_deref()));
    app.widen(ticket, c.common.n.unwrap_or(1))?;
    let (stream, usage_chunk) = c.common.stream()?;
    let logprobs = match (c.logprobs.unwrap_or(false), c.top_logprobs) {
        (true, top) => Some(top.unwrap_or(0)),
        (false, None | Some(0)) => None,
        (false, Some(_)) => return Err(ApiError::bad("top_logprobs", "'top_logprobs' needs logprobs")),
    };
    let format = c.response_format.take().unwrap_or_default();
    let asked_schema = match format["type"].as_str() {
        Some("json_object") => Some(json!({ "type": "object" })),
        Some("json_schema") => Some(format["json_schema"]["schema"].clone()),
        _ => None,
    };
    let Conversation { prompt, tools, thoughts } = read(app, &mut c, asked_schema.is_some())?;
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
    let room = app.context.saturating_sub(prompt.len()).min(app.limits.tokens);
    let asked = asked.map(|(name, n)| (name, if length == Length::Most { n.min(room) } else { n }));
    let max_tokens = answer_tokens(asked, prompt.len(), app.context, app.limits.tokens)?;
    if asked_schema.is_some() && tools.is_some() {
        let text = "'response_format' and tools that may be called exclude each other here";
        return Err(ApiError::bad("response_format", text));
    }
    let forced = tools.as_ref().filter(|t| !t.forced.is_empty());
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
    // Some models mark calls or thoughts with special tokens.
    let marked = |m: Marks| app.tokenizer.id_of(m.opening()).is_some_and(|id| app.tokenizer.is_special(id));
    let special = tools.is_some() || thoughts.is_some_and(|(m, _)| marked(m));
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
        let job = Job::Generate { generation, logprobs, grammar, special };
        requests.push(lacuna_run::Request::new(prompt.clone(), job));
    }
    let reply = Reply::new(Setting {
        shape: Shape::Chat,
        model: app.name.clone(),
        fingerprint: app.fingerprint.clone(),
        tokenizer: app.tokenizer.clone(),
        logprobs: logprobs.is_some(),
        usage_chunk,
        tells_stop: dialect.wants_stop(),
        prompt_tokens: prompt.len(),
        choices: requests.iter().map(|_| None).collect(),
        tools,
        thoughts,
    });
    Ok(Prepared { requests, reply, stream, dialect })
}

/// The same generation with seeds that count up.
pub fn copies(g: Generation, n: usize) -> impl Iterator<Item = Generation> {
    (0..n as u64).map(move |i| {
        let mut g = g.clone();
        g.sampling.seed = g.sampling.seed.wrapping_add(i);
        g
    })
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

/// A message with its thoughts as templates of channels know them; beside a call they have a place for one text.
fn think(m: &mut Value) {
    let Some(fields) = m.as_object_mut() else { return };
    let Some(Value::String(mut thought)) = fields.remove("reasoning_content") else { return };
    if let (true, Some(Value::String(said))) = (fields.contains_key("tool_calls"), fields.get_mut("content"))
        && !said.is_empty()
    {
        thought = format!("{thought}\n{}", std::mem::take(said));
    }
    fields.insert("thinking".into(), thought.into());
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
