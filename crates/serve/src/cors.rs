//! Pages of other origins that may use this server (CORS). Without one, browsers show no page of another origin what is
//! answered here.

use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, header};

/// Seconds for which a browser may remember what it was told.
const REMEMBERED: &str = "600";

/// The origins, as a browser writes them: `https://example.org:8443`. One that is `*` stands for all.
#[derive(Clone, Debug, Default)]
pub struct Origins(Vec<String>);

impl Origins {
    /// Reads origins, or says what is wrong with one.
    pub fn parse(origins: &[String]) -> Result<Origins, String> {
        let one = |o: &String| {
            let o = o.trim_end_matches('/').to_ascii_lowercase();
            let host = o.split_once("://").map(|(_, host)| host);
            let written = host.is_some_and(|h| !h.is_empty() && !h.contains(['/', '?', '#', '@', ' ']));
            if o == "*" || o == "null" || (written && HeaderValue::from_str(&o).is_ok()) {
                Ok(o)
            } else {
                Err(format!("'{o}' is no origin: write it as https://HOST or http://HOST:PORT, or *"))
            }
        };
        origins.iter().map(one).collect::<Result<_, _>>().map(Origins)
    }

    /// The origin of a request, as its answer names it, if it may see that.
    pub fn admit(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        let origin = headers.get(header::ORIGIN)?;
        let text = origin.to_str().ok()?;
        let known = |o: &String| o == "*" || o.eq_ignore_ascii_case(text);
        self.0.iter().any(known).then(|| origin.clone())
    }

    /// The answer to a browser that asks whether it may ask; none where this is something else.
    pub fn preflight(&self, request: &Request<Body>) -> Option<Response<Body>> {
        let headers = request.headers();
        let asks = request.method() == Method::OPTIONS && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
        if !asks || self.admit(headers).is_none() {
            return None;
        }
        let mut response = Response::new(Body::empty());
        *response.status_mut() = axum::http::StatusCode::NO_CONTENT;
        let told = response.headers_mut();
        told.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, HEAD, POST, OPTIONS"));
        if let Some(wanted) = headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
            // Clients add headers of their own; none means anything here but a key and a type.
            told.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted.clone());
        }
        told.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(REMEMBERED));
        // A page from outside that asks a server of this machine.
        if headers.contains_key("access-control-request-private-network") {
            let name = HeaderName::from_static("access-control-allow-private-network");
            told.insert(name, HeaderValue::from_static("true"));
        }
        Some(response)
    }

    /// Lets the page of `origin` see an answer.
    pub fn show(&self, origin: Option<HeaderValue>, headers: &mut HeaderMap) {
        if self.0.is_empty() {
            return;
        }
        headers.append(header::VARY, HeaderValue::from_static("Origin"));
        if let Some(origin) = origin {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("Retry-After"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_compared_whole() {
        let read = |all: &[&str]| Origins::parse(&all.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>());
        let admits = |all: &[&str], origin: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ORIGIN, HeaderValue::from_static(origin));
            read(all).unwrap().admit(&headers).is_some()
        };
        assert!(admits(&["https://a.org/", "http://b.org:3000"], "http://b.org:3000"));
        assert!(admits(&["https://A.org"], "https://a.org") && admits(&["*"], "null"));
        for other in ["https://a.org.evil.org", "http://a.org", "https://a.org:8443", "null", ""] {
            assert!(!admits(&["https://a.org"], other), "{other}");
        }
        assert!(read(&[]).unwrap().admit(&HeaderMap::new()).is_none());
        for wrong in ["a.org", "https://", "https://a.org/page", "https://a b", "https://*@x"] {
            assert!(read(&[wrong]).is_err(), "{wrong}");
        }
    }
}
