//! The way in: a body within its limits, then a place in the queue, and only then a look at what the request says.
//! Whoever finds no place costs no more than the reading of its body, which is thrown away as it comes.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, header};
use http_body_util::BodyExt;
use serde_json::Value;

use crate::app::App;
use crate::error::ApiError;
use crate::worker::Ticket;
use crate::{exact, schema};

/// Bytes of a request that are taken in and dropped when it is too large: whoever sends first and listens then would
/// find the connection broken, and not the reason.
const DROPPED: usize = 64 << 20;

fn too_large(most: usize) -> ApiError {
    ApiError::new(413, format!("the request is larger than {most} bytes"))
}

/// A body of `most` bytes at the most that comes within `time`; nothing of it where it is not to be kept.
async fn within(mut body: Body, most: usize, keep: bool, time: Duration) -> Result<Vec<u8>, ApiError> {
    let end = tokio::time::Instant::now() + time;
    let (mut kept, mut seen) = (Vec::new(), 0);
    loop {
        let frame = match tokio::time::timeout_at(end, body.frame()).await {
            Ok(Some(frame)) => frame.map_err(|_| ApiError::new(400, "the request was broken off"))?,
            Ok(None) => break,
            Err(_) if seen > most => break,
            Err(_) => return Err(ApiError::new(408, "the request was not sent in time")),
        };
        let Ok(data) = frame.into_data() else { continue };
        seen += data.len();
        if seen <= most && keep {
            kept.extend_from_slice(&data);
        } else if seen <= DROPPED.max(most) {
            kept = Vec::new();
        } else {
            break;
        }
    }
    if seen > most { Err(too_large(most)) } else { Ok(kept) }
}

impl App {
    /// Takes in a request of the schema `name` and has `work` make of it what the engine needs, beside the thread that
    /// talks: templates, tokens and grammars take long and do not wait. The place in the queue is taken before, and
    /// held until the work is done, even if the client left.
    pub async fn admit<T: Send + 'static>(
        self: &Arc<App>,
        name: &'static str,
        request: Request<Body>,
        work: impl FnOnce(&App, Value, &mut Ticket) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<(T, Ticket), ApiError> {
        let body = self.body(name, request).await?;
        let mut ticket = self.worker.ticket().ok_or_else(|| self.full())?;
        let app = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || {
            let value = app.read(name, body)?;
            let made = work(&app, value, &mut ticket)?;
            Ok((made, ticket))
        });
        done.await.unwrap_or_else(|_| Err(ApiError::new(500, "the request could not be read")))
    }

    /// The body of a request that there is room for.
    async fn body(&self, name: &str, request: Request<Body>) -> Result<Vec<u8>, ApiError> {
        let kind = request.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim();
        // Some of Ollama's clients say nothing. A page from elsewhere could do that unasked, but says where it is from.
        // curl says a form unless told, and Ollama takes that.
        let any = name.starts_with("Ollama") && !request.headers().contains_key(header::ORIGIN);
        if !any && !kind.eq_ignore_ascii_case("application/json") {
            return Err(ApiError::new(415, "send JSON with the header Content-Type: application/json"));
        }
        let most = self.limits.body_bytes;
        let told = request.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
        let too_long = told.is_some_and(|n| n > most);
        // Nobody takes in so much to be polite.
        if told.is_some_and(|n| n > DROPPED.max(most)) {
            return Err(too_large(most));
        }
        let refused = self.closed().or_else(|| self.worker.is_full().then(|| self.full()));
        if request.headers().contains_key(header::EXPECT)
            && let Some(why) = too_long.then(|| too_large(most)).or_else(|| refused.clone())
        {
            return Err(why);
        }
        let body = match within(request.into_body(), most, refused.is_none(), self.limits.body).await {
            Err(e) if e.status == 408 && too_long => return Err(too_large(most)),
            body => body?,
        };
        refused.map_or(Ok(body), Err)
    }

    /// Reads a JSON request and holds it against the published document. What is null is gone afterwards.
    fn read(&self, name: &str, body: Vec<u8>) -> Result<Value, ApiError> {
        let no_json = |why: String| ApiError::new(400, format!("the request is no JSON: {why}"));
        let text = String::from_utf8(body).map_err(|e| no_json(e.to_string()))?;
        let mut value: Value = serde_json::from_str(&text).map_err(|e| no_json(e.to_string()))?;
        if let Some(model) = value["model"].as_str() {
            // Ollama's clients say which one of a model's kinds they mean; there is one.
            let model = model.strip_suffix(":latest").filter(|_| name.starts_with("Ollama")).unwrap_or(model);
            self.known_model(model)?;
        }
        self.schema.check(name, &value)?;
        exact::check_request(&text, &value)?;
        schema::drop_nulls(&mut value);
        Ok(value)
    }

    /// Why nothing new is taken, once the server is going down.
    pub fn closed(&self) -> Option<ApiError> {
        let closed = self.draining.load(Ordering::Acquire) || !self.worker.is_alive();
        closed.then(ApiError::going_down)
    }

    /// There is no place in the queue.
    fn full(&self) -> ApiError {
        let pending = self.worker.pending();
        // About as long as an answer of those that wait takes, as far as anybody knows.
        let retry_after_s = Some(1 + pending as u64 / 8);
        let text = format!("{pending} answers are at work or wait; try again later");
        ApiError { retry_after_s, ..ApiError::new(429, text) }.code("queue_full")
    }

    /// Makes the place of a request one for `n` answers.
    pub fn widen(&self, ticket: &mut Ticket, n: usize) -> Result<(), ApiError> {
        if ticket.widen(n) { Ok(()) } else { Err(self.full()) }
    }
}
