//! Errors as clients expect them: OpenAI's `{"error": {"message", "type", "param", "code"}}`, or another interface's.

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use axum::response::IntoResponse;
use lacuna_run::RunError;
use serde_json::{Value, json};

/// A request that is not answered, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// The status of the answer.
    pub status: u16,
    /// What happened and what to do.
    pub message: String,
    /// The field of the request that is at fault, as a path such as `messages.0.role`.
    pub param: Option<String>,
    /// A word for programs.
    pub code: Option<&'static str>,
    /// Seconds after which asking again makes sense.
    pub retry_after_s: Option<u64>,
}

/// The interface in whose form an error is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    OpenAi,
    Anthropic,
    Ollama,
}

impl ApiError {
    /// An error of a status.
    pub fn new(status: u16, message: impl Into<String>) -> ApiError {
        ApiError { status, message: message.into(), param: None, code: None, retry_after_s: None }
    }

    /// A field that is wrong.
    pub fn bad(param: impl Into<String>, message: impl Into<String>) -> ApiError {
        ApiError { param: Some(param.into()), code: Some("invalid_value"), ..ApiError::new(400, message) }
    }

    /// Nothing new is taken, and what is at work may not end.
    pub fn going_down() -> ApiError {
        ApiError::new(503, "the server is going down")
    }

    /// With a word for programs.
    #[must_use]
    pub fn code(mut self, code: &'static str) -> ApiError {
        self.code = Some(code);
        self
    }

    /// What a running model has to say, about a request that `param` describes.
    pub fn of_run(e: &RunError, param: &str) -> ApiError {
        match e {
            RunError::Context { .. } => ApiError::bad(param, e.to_string()).code("context_length_exceeded"),
            RunError::Setting { setting, .. } => ApiError::bad(*setting, e.to_string()),
            RunError::Empty | RunError::Template(_) | RunError::Tokenizer(_) => ApiError::bad(param, e.to_string()),
            RunError::Model(_) | RunError::Logits { .. } | RunError::Embedding { .. } | RunError::Request(_) => {
                ApiError::new(500, e.to_string())
            }
        }
    }

    /// The word for the kind of error that goes with the status.
    fn kind(&self) -> &'static str {
        match self.status {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The body.
    pub fn body(&self) -> Value {
        json!({ "error": { "message": self.message, "type": self.kind(), "param": self.param, "code": self.code } })
    }

    /// The body in the form of an interface.
    pub fn body_for(&self, form: Form) -> Value {
        match form {
            Form::OpenAi => self.body(),
            Form::Ollama => json!({ "error": self.message }),
            Form::Anthropic => {
                let kind = match self.status {
                    413 => "request_too_large",
                    503 => "overloaded_error",
                    504 => "timeout_error",
                    500.. => "api_error",
                    _ => self.kind(),
                };
                json!({ "type": "error", "error": { "type": kind, "message": self.message } })
            }
        }
    }

    /// The same about fields of another interface: each pair is a field here and its name there.
    #[must_use]
    pub fn renamed(mut self, names: &[(&str, &str)]) -> ApiError {
        for (here, there) in names {
            let behind =
                |text: &str| text.strip_prefix(here).filter(|r| r.is_empty() || r.starts_with('.')).map(str::to_owned);
            if let Some(rest) = self.param.as_deref().and_then(behind) {
                self.param = Some(format!("{there}{rest}"));
                self.message = self.message.replace(&format!("'{here}"), &format!("'{there}"));
                break;
            }
        }
        self
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response<Body> {
        let mut response = json_response(self.status, &self.body());
        let headers = response.headers_mut();
        if let Some(s) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(s));
        }
        if self.status == 401 {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // Whoever knows by which path it goes out puts it into that interface's form.
        response.extensions_mut().insert(self);
        response
    }
}

/// A response of a status with a JSON body.
pub fn json_response(status: u16, body: &Value) -> Response<Body> {
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
