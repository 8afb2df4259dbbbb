//! Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`.

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
            RunError::Model(_) | RunError::Logits { .. } | RunError::Request(_) => ApiError::new(500, e.to_string()),
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
