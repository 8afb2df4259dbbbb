//! The web page: files inside the binary, nothing from outside.

use axum::body::Body;
use axum::http::{HeaderValue, Response, header};

/// Nothing but the server's own script and style; no frames, no forms, no other servers.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; \
 base-uri 'none'; \
                      form-action 'none'; frame-ancestors 'none'";

fn file(kind: &'static str, text: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

/// The page.
pub async fn html() -> Response<Body> {
    file("text/html; charset=utf-8", include_str!("page/index.html"))
}

/// Its script.
pub async fn script() -> Response<Body> {
    file("text/javascript; charset=utf-8", include_str!("page/app.js"))
}

/// Its style.
pub async fn style() -> Response<Body> {
    file("text/css; charset=utf-8", include_str!("page/app.css"))
}

/// Its icon.
pub async fn icon() -> Response<Body> {
    file("image/svg+xml", include_str!("page/icon.svg"))
}
