//! The interfaces: OpenAI's, and others' as translations onto its requests and answers.

mod chat;
mod completions;
pub mod dialect;
mod door;
mod embeddings;
mod messages;
mod ollama;
mod reply;
mod responses;
mod stream;
mod tokens;
pub mod types;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, Request, Response, header};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use serde_json::{Value, json};

use crate::app::App;
use crate::error::{ApiError, json_response};
use crate::worker::Ticket;
use dialect::Dialect;
use reply::Reply;
use types::Input;

type Answer = Result<Response<Body>, ApiError>;

/// Every endpoint that models answer at. `ollama`: those of Ollama's interface as well.
pub fn routes(ollama: bool) -> Router<Arc<App>> {
    let routes = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*model}", get(model))
        .route("/v1/chat/completions", post(chat::serve))
        .route("/v1/completions", post(completions::serve))
        .route("/v1/embeddings", post(embeddings::serve))
        .route("/v1/responses", post(responses::serve))
        .route("/v1/messages", post(messages::serve))
        .route("/v1/messages/count_tokens", post(messages::count))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/tokenizer_info", get(tokens::info));
    if ollama { routes.merge(ollama::routes()) } else { routes }
}

/// `GET /v1/models`
async fn models(State(app): State<Arc<App>>) -> Response<Body> {
    json_response(200, &json!({ "object": "list", "data": [app.model_object()] }))
}

/// `GET /v1/models/{model}`
async fn model(State(app): State<Arc<App>>, axum::extract::Path(name): axum::extract::Path<String>) -> Answer {
    app.known_model(&name)?;
    Ok(json_response(200, &app.model_object()))
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

/// What the engine is asked, and how its answer is told.
struct Prepared {
    requests: Vec<lacuna_run::Request>,
    reply: Reply,
    stream: bool,
    dialect: Box<dyn Dialect>,
}

/// Takes in a request of the schema `name`, prepares it and answers it.
async fn serve(
    app: Arc<App>,
    name: &'static str,
    request: Request<Body>,
    prepare: impl FnOnce(&App, Value, &mut Ticket) -> Result<Prepared, ApiError> + Send + 'static,
) -> Response<Body> {
    answer(async move {
        let (prepared, ticket) = app.admit(name, request, prepare).await?;
        run(&app, prepared, ticket).await
    })
    .await
}

async fn run(app: &App, prepared: Prepared, ticket: Ticket) -> Answer {
    let Prepared { requests, mut reply, stream, mut dialect } = prepared;
    let mut answers = app.submit(requests, ticket)?;
    if stream {
        let kind = HeaderValue::from_static(dialect.kind());
        let body = Body::new(stream::Events::new(reply, dialect, answers, app.limits.answer));
        let mut response = Response::new(body);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, kind);
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        return Ok(response);
    }
    let all = async {
        while let Some((choice, event)) = answers.next().await {
            reply.take(choice, event)?;
            dialect.came();
        }
        Ok::<(), ApiError>(())
    };
    in_time(app.limits.answer, all).await??;
    if !reply.is_whole() {
        return Err(ApiError::going_down());
    }
    Ok(json_response(200, &dialect.whole(reply.whole())?))
}

impl App {
    pub fn known_model(&self, name: &str) -> Result<(), ApiError> {
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
