//! `/v1/completions`: texts go on. With `echo` they are told, too, and how probable their tokens were.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{Request, Response};
use lacuna_run::Job;
use serde_json::Value;

use super::chat::copies;
use super::dialect::{Dialect, OpenAi};
use super::reply::{Echo, Reply, Setting, Shape};
use super::types::{Input, answer_tokens};
use super::{Prepared, tell_user, types};
use crate::app::App;
use crate::error::ApiError;
use crate::worker::Ticket;

/// `POST /v1/completions`
pub async fn serve(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    super::serve(app, "CompletionRequest", request, |app, body, ticket| prepare(app, body, ticket, Box::new(OpenAi)))
        .await
}

/// Makes of a request what the engine needs.
pub fn prepare(app: &App, body: Value, ticket: &mut Ticket, dialect: Box<dyn Dialect>) -> Result<Prepared, ApiError> {
    let c: types::Completion = types::read(body)?;
    tell_user(c.common.user.as_deref());
    let (stream, usage_chunk) = c.common.stream()?;
    let n = c.common.n.unwrap_or(1);
    if c.best_of.is_some_and(|best_of| best_of != n) {
        let text = "'best_of' is not supported: ask for n answers and choose";
        return Err(ApiError::bad("best_of", text).code("unsupported_parameter"));
    }
    app.widen(ticket, c.prompt.texts().saturating_mul(n))?;
    let echoes = c.echo.unwrap_or(false);
    let mut texts = match &c.prompt {
        Input::Text(text) if echoes => vec![text.clone()],
        Input::Texts(texts) if echoes => texts.clone(),
        _ => Vec::new(),
    }
    .into_iter();
    let prompts = app.tokens(c.prompt, "prompt")?;
    // The older interface writes 16 tokens unless told otherwise.
    let asked = c.common.max_tokens.unwrap_or(16);
    let (mut requests, mut choices) = (Vec::new(), Vec::new());
    let prompt_tokens = prompts.iter().map(Vec::len).sum();
    for prompt in prompts {
        let room = app.context.saturating_sub(prompt.len()).min(app.limits.tokens);
        let asked = if c.common.max_tokens.is_some() { asked } else { asked.min(room) };
        let max_tokens = answer_tokens(Some(("max_tokens", asked)), prompt.len(), app.context, app.limits.tokens)
            .map_err(|e| e.renamed(&[("messages", "prompt")]))?;
        let generation = c.common.generation(max_tokens, app.vocab)?;
        let echo = echoes.then(|| {
            let text = texts.next().unwrap_or_else(|| app.tokenizer.decode(&prompt));
            Arc::new(Echo::new(text, prompt.clone(), &app.tokenizer))
        });
        for generation in copies(generation, n) {
            let job = Job::Generate { generation, logprobs: c.logprobs, grammar: None, special: false };
            let request = lacuna_run::Request::new(prompt.clone(), job);
            requests.push(match c.logprobs.filter(|_| echoes) {
                Some(top) => request.scored(top),
                None => request,
            });
            choices.push(echo.clone());
        }
    }
    let reply = Reply::new(Setting {
        shape: Shape::Completion,
        model: app.name.clone(),
        fingerprint: app.fingerprint.clone(),
        tokenizer: app.tokenizer.clone(),
        logprobs: c.logprobs.is_some(),
        usage_chunk,
        tells_stop: dialect.wants_stop(),
        prompt_tokens,
        choices,
        tools: None,
        thoughts: None,
    });
    Ok(Prepared { requests, reply, stream, dialect })
}
