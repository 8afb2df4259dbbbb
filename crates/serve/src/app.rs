//! What all requests share, and what is asked of every one of them: a key, a name of this server, a line in the log.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Request, Response, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::IntoResponse;
use axum::routing::get;
use lacuna_checkpoint::{ChatTemplate, Tokenizer};
use lacuna_run::Pooling;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::cors::Origins;
use crate::error::{ApiError, Form, json_response};
use crate::grammar::Grammars;
use crate::metrics::Metrics;
use crate::schema::Schema;
use crate::worker::{Answers, Ticket, Worker};
use crate::{api, page};

/// Limits on requests.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// Tokens of an answer.
    pub tokens: usize,
    /// Time for a body to come.
    pub body: Duration,
    /// Time for an answer to be complete.
    pub answer: Duration,
}

/// The keys of which a request must show one, as digests.
pub struct Keys(Vec<[u8; 32]>);

impl Keys {
    /// Reads keys: one a line; empty lines and lines that begin with # are skipped.
    pub fn parse(text: &str) -> Result<Keys, String> {
        let lines = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
        let keys: Vec<[u8; 32]> = lines.map(|l| Sha256::digest(l.as_bytes()).into()).collect();
        if keys.is_empty() { Err("there is no key in it".to_owned()) } else { Ok(Keys(keys)) }
    }

    /// Whether the headers show a key, as OpenAI's clients do or as Anthropic's do. Takes the same time whichever key
    /// is wrong in whichever place.
    fn admit(&self, headers: &HeaderMap) -> bool {
        let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
        let shown = match text(header::AUTHORIZATION.as_str()) {
            Some(v) => v.get(..7).filter(|b| b.eq_ignore_ascii_case("bearer ")).map_or("", |_| v[7..].trim()),
            None => text("x-api-key").unwrap_or_default().trim(),
        };
        let shown: [u8; 32] = Sha256::digest(shown.as_bytes()).into();
        let same = self.0.iter().fold(subtle::Choice::from(0), |same, key| same | key.ct_eq(&shown));
        same.into()
    }
}

/// What all requests share.
pub struct App {
    /// The served name of the model.
    pub name: String,
    /// What identifies the model's files and this program.
    pub fingerprint: String,
    /// When the server started, in seconds since 1970.
    pub created: u64,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Conversations to text.
    pub template: Option<ChatTemplate>,
    /// Rows of the model's head.
    pub vocab: usize,
    /// Tokens of a text, at most.
    pub context: usize,
    /// How vectors are made unless a request says.
    pub pooling: Pooling,
    /// Grammars, or why there are none.
    pub grammars: Result<Grammars, String>,
    /// Limits on requests.
    pub limits: Bounds,
    /// The keys, if any.
    pub keys: Option<Keys>,
    /// Names by which a request may call this server; any where there are none.
    pub hosts: Vec<String>,
    /// Origins whose pages may use this server.
    pub origins: Origins,
    /// Whether Ollama's interface is there.
    pub ollama: bool,
    /// Numbers of a row of the model.
    pub width: usize,
    /// The published document.
    pub schema: Schema,
    /// What the model is.
    pub card: Value,
    /// The run plan; null where nothing is drafted and nothing left out.
    pub run: Value,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// The engine's thread.
    pub worker: Worker,
    /// The server is going down.
    pub draining: AtomicBool,
}

impl App {
    /// Hands requests to the engine, for which there is room.
    pub fn submit(&self, requests: Vec<lacuna_run::Request>, ticket: Ticket) -> Result<Answers, ApiError> {
        self.closed().map_or_else(|| Ok(self.worker.submit(requests, ticket)), Err)
    }

    fn host_is_known(&self, request: &Request<Body>) -> bool {
        if self.hosts.is_empty() {
            return true;
        }
        let named = request.headers().get(header::HOST).and_then(|v| v.to_str().ok());
        // A name without its port; IPv6 addresses are in brackets.
        let bare = |h: &str| match h.strip_prefix('[').and_then(|h| h.split_once(']')) {
            Some((inner, _)) => inner.to_ascii_lowercase(),
            None => h.rsplit_once(':').map_or(h, |(name, _)| name).to_ascii_lowercase(),
        };
        named.is_none_or(|h| self.hosts.iter().any(|known| *known == bare(h)))
    }
}

/// The name under which a path is counted; whatever nobody knows is one.
fn endpoint(path: &str) -> &'static str {
    const KNOWN: &[&str] = &[
        "/",
        "/v1/models",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
        "/api/version",
        "/api/tags",
        "/api/ps",
        "/api/show",
        "/api/chat",
        "/api/generate",
        "/api/embed",
        "/api/embeddings",
        "/health",
        "/health/live",
        "/health/ready",
        "/metrics",
        "/openapi.json",
        "/api/live",
        "/api/card",
    ];
    match KNOWN.iter().find(|k| **k == path) {
        Some(known) => known,
        None if path.starts_with("/v1/models/") => "/v1/models/{model}",
        None if path.starts_with("/assets/") => "/assets",
        None => "other",
    }
}

/// In whose form errors at a path are told.
fn form(path: &str) -> Form {
    match endpoint(path) {
        "/v1/messages" | "/v1/messages/count_tokens" => Form::Anthropic,
        "/api/version" | "/api/tags" | "/api/ps" | "/api/show" | "/api/chat" | "/api/generate" | "/api/embed"
        | "/api/embeddings" => Form::Ollama,
        "other" if path.starts_with("/api/") => Form::Ollama,
        _ => Form::OpenAi,
    }
}

async fn watch(State(app): State<Arc<App>>, request: Request<Body>, next: Next) -> Response<Body> {
    let began = Instant::now();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let open =
        matches!(endpoint(&path), "/" | "/assets" | "/health" | "/health/live" | "/health/ready" | "/openapi.json");
    let origin = app.origins.admit(request.headers());
    let preflight = app.origins.preflight(&request);
    let mut response = if !app.host_is_known(&request) {
        let text = "this server is not known by the name in the Host header; --allow-host makes a name known";
        ApiError::new(403, text).code("unknown_host").into_response()
    } else if let Some(preflight) = preflight {
        preflight
    } else if !open && app.keys.as_ref().is_some_and(|k| !k.admit(request.headers())) {
        ApiError::new(401, "send a valid key in the header Authorization: Bearer KEY")
            .code("invalid_api_key")
            .into_response()
    } else {
        next.run(request).await
    };
    if let Some(e) = response.extensions_mut().remove::<ApiError>()
        && form(&path) != Form::OpenAi
    {
        *response.body_mut() = Body::from(e.body_for(form(&path)).to_string());
        response.headers_mut().remove(header::CONTENT_LENGTH);
    }
    let headers = response.headers_mut();
    app.origins.show(origin, headers);
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    let status = response.status().as_u16();
    app.metrics.request(endpoint(&path), status);
    let ms = began.elapsed().as_millis() as u64;
    let shown: String = path.chars().take(100).collect();
    tracing::info!(method = method.as_str(), path = shown, status, ms, "request");
    response
}

/// Every page of the server.
pub fn router(app: Arc<App>) -> Router {
    api::routes(app.ollama)
        .route("/health", get(|| async { json_response(200, &json!({ "status": "ok" })) }))
        .route("/health/live", get(|| async { json_response(200, &json!({ "status": "live" })) }))
        .route("/health/ready", get(ready))
        .route("/metrics", get(metrics))
        .route(
            "/openapi.json",
            get(|State(app): State<Arc<App>>| async move { json_response(200, app.schema.document()) }),
        )
        .route("/api/live", get(|State(app): State<Arc<App>>| async move { json_response(200, &app.metrics.live()) }))
        .route("/api/card", get(|State(app): State<Arc<App>>| async move { json_response(200, &app.card) }))
        .route("/", get(page::html))
        .route("/assets/app.js", get(page::script))
        .route("/assets/app.css", get(page::style))
        .route("/assets/icon.svg", get(page::icon))
        .fallback(|request: Request<Body>| async move {
            let path: String = request.uri().path().chars().take(100).collect();
            ApiError::new(404, format!("there is nothing at {path}; /openapi.json lists what there is"))
        })
        .method_not_allowed_fallback(|request: Request<Body>| async move {
            ApiError::new(405, format!("{} is not possible here; /openapi.json lists what is", request.method()))
        })
        .layer(from_fn_with_state(Arc::clone(&app), watch))
        .with_state(app)
}

async fn ready(State(app): State<Arc<App>>) -> Response<Body> {
    if let Some(closed) = app.closed() {
        return closed.into_response();
    }
    json_response(200, &json!({ "status": "ready", "model": app.name }))
}

async fn metrics(State(app): State<Arc<App>>) -> Response<Body> {
    let mut response = Response::new(Body::from(app.metrics.text()));
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_compared_whole() {
        let keys = Keys::parse("# ours\nalpha\n\n  beta  \n").unwrap();
        let admit = |shown: &str| {
            let mut h = HeaderMap::new();
            h.insert(header::AUTHORIZATION, HeaderValue::from_str(shown).unwrap());
            keys.admit(&h)
        };
        assert!(admit("Bearer alpha") && admit("bearer beta"));
        for wrong in ["Bearer alph", "Bearer alphaa", "alpha", "Bearer", "Bearer ", "Basic alpha", "Bearer # ours", "é"]
        {
            assert!(!admit(wrong), "{wrong}");
        }
        assert!(!keys.admit(&HeaderMap::new()));
        assert!(Keys::parse("# none\n").is_err());
    }
}
