//! `/v1/embeddings`: texts as vectors.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{Request, Response};
use base64::Engine as _;
use lacuna_run::{Event, Job, Pooling};
use serde_json::{Value, json};

use super::{answer, in_time, tell_user, types};
use crate::app::App;
use crate::error::{ApiError, json_response};
use crate::worker::Ticket;

/// `POST /v1/embeddings`
pub async fn serve(State(app): State<Arc<App>>, request: Request<Body>) -> Response<Body> {
    answer(async move {
        let ((texts, pooling, base64), ticket) = app.admit("EmbeddingRequest", request, prepare).await?;
        let tokens: usize = texts.iter().map(Vec::len).sum();
        let vectors = vectors(&app, texts, pooling, ticket).await?;
        let mut data = Vec::with_capacity(vectors.len());
        for (i, v) in vectors.into_iter().enumerate() {
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

/// The vectors of texts, in their order.
pub async fn vectors(
    app: &App,
    texts: Vec<Vec<u32>>,
    pooling: Pooling,
    ticket: Ticket,
) -> Result<Vec<Vec<f32>>, ApiError> {
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
    vectors.into_iter().map(|v| v.ok_or_else(ApiError::going_down)).collect()
}

fn prepare(app: &App, body: Value, ticket: &mut Ticket) -> Result<(Vec<Vec<u32>>, Pooling, bool), ApiError> {
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
