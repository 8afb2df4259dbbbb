//! Requests over HTTP with short time-outs, retries, and downloads that go on where they broke off.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use ureq::http::{HeaderMap, Response, header};
use ureq::{Agent, Body, Proxy, Timeout};

use crate::Progress;

/// Finding a host and connecting to it; an unreachable source costs no more than this twice.
const CONNECT: Duration = Duration::from_secs(3);
/// The wait for the first answer of a source.
const PROBE: Duration = Duration::from_secs(10);
/// The wait for a download's first bytes, and for each further piece.
const SILENCE: Duration = Duration::from_secs(30);
const RETRIES: u32 = 4;
/// A connection that broke after this much has shown that the source works: its retries are counted anew.
const HEADWAY_BYTES: u64 = 1 << 20;
const MAX_JSON_BYTES: u64 = 64 << 20;

/// Why a request failed, as far as what to do next depends on it.
#[derive(Debug)]
pub(crate) enum Fault {
    /// No connection: trying again at once only costs time.
    Unreachable(String),
    /// May pass; the server may have said when.
    Transient(String, Option<Duration>),
    /// The server refused.
    Status(u16),
    /// Will not pass.
    Final(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable(why) | Self::Transient(why, _) | Self::Final(why) => f.write_str(why),
            Self::Status(code) => write!(f, "the server answered with status {code}"),
        }
    }
}

pub(crate) struct Http {
    agent: Agent,
    /// The first wait before a retry; each further one is twice as long.
    pub(crate) backoff: Duration,
    /// How long a source may take to answer at all.
    pub(crate) probe: Duration,
}

/// What to download, and what is known about it beforehand.
pub(crate) struct Want<'a> {
    pub(crate) url: &'a str,
    pub(crate) token: Option<&'a str>,
    /// The name shown as progress.
    pub(crate) name: &'a str,
    pub(crate) bytes: Option<u64>,
}

impl Http {
    pub(crate) fn new(proxy: Option<Proxy>) -> Self {
        let config = Agent::config_builder()
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_per_read(Some(SILENCE))
            .http_status_as_error(false)
            .proxy(proxy)
            .user_agent(concat!("lacuna/", env!("CARGO_PKG_VERSION")))
            .build();
        Self { agent: config.into(), backoff: Duration::from_millis(500), probe: PROBE }
    }

    fn get(
        &self,
        url: &str,
        token: Option<&str>,
        patience: Duration,
        (from, etag): (u64, Option<&str>),
    ) -> Result<Response<Body>, Fault> {
        // Sizes and ranges are those of the stored bytes.
        let mut request = self.agent.get(url).header(header::ACCEPT_ENCODING, "identity");
        request = request.config().timeout_recv_response(Some(patience)).build();
        if let Some(token) = token {
            // Not sent on to another host by a redirect: that is the agent's default.
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
            if let Some(etag) = etag {
                request = request.header(header::IF_RANGE, etag);
            }
        }
        let response = request.call().map_err(fault)?;
        match response.status().as_u16() {
            200 | 206 => Ok(response),
            code @ (408 | 429 | 500..=599) => {
                let wait = text_of(response.headers(), "retry-after").and_then(|text| text.parse().ok());
                let wait = wait.map(|seconds: u64| Duration::from_secs(seconds.min(30)));
                Err(Fault::Transient(Fault::Status(code).to_string(), wait))
            }
            code => Err(Fault::Status(code)),
        }
    }

    fn pause(&self, failures: u32, asked: Option<Duration>) {
        std::thread::sleep(asked.unwrap_or(self.backoff * 2u32.pow(failures.saturating_sub(1).min(6))));
    }

    /// A small JSON document; the first request to a source, so an unreachable one is given up at once.
    pub(crate) fn json(&self, url: &str, token: Option<&str>) -> Result<serde_json::Value, Fault> {
        let mut failures = 0;
        loop {
            let answer = self.get(url, token, self.probe, (0, None)).and_then(|mut response| {
                let body = response.body_mut().with_config().limit(MAX_JSON_BYTES);
                body.read_json().map_err(fault)
            });
            match answer {
                Err(Fault::Transient(why, asked)) if failures < RETRIES => {
                    failures += 1;
                    tracing::debug!("{url}: {why}: trying again ({failures} of {RETRIES})");
                    self.pause(failures, asked);
                }
                answer => return answer,
            }
        }
    }

    /// Downloads into a file, going on after what it already holds where the server can.
    pub(crate) fn download(&self, want: &Want<'_>, to: &Path, progress: &dyn Progress) -> Result<(), Fault> {
        let opened = File::options().create(true).read(true).write(true).truncate(false).open(to);
        let mut file = opened.map_err(|error| local(to, error))?;
        let (mut failures, mut etag) = (0, None);
        loop {
            let before = file.seek(SeekFrom::End(0)).map_err(|error| local(to, error))?;
            let (why, asked) = match self.stream(want, &mut file, before, &mut etag, to, progress) {
                Err(Fault::Transient(why, asked)) => (why, asked),
                // Bytes have come before: the connection was lost, not missing.
                Err(Fault::Unreachable(why)) if etag.is_some() => (why, None),
                done => return done,
            };
            let after = file.seek(SeekFrom::End(0)).map_err(|error| local(to, error))?;
            if after >= before.saturating_add(HEADWAY_BYTES) {
                failures = 0;
            }
            failures += 1;
            if failures > RETRIES {
                return Err(Fault::Final(format!("{why} ({after} bytes had come; gave up after {RETRIES} retries)")));
            }
            tracing::debug!("{}: {why}: going on from byte {after} ({failures} of {RETRIES})", want.url);
            self.pause(failures, asked);
        }
    }

    fn stream(
        &self,
        want: &Want<'_>,
        file: &mut File,
        mut have: u64,
        etag: &mut Option<String>,
        path: &Path,
        progress: &dyn Progress,
    ) -> Result<(), Fault> {
        let restart =
            |file: &mut File| file.set_len(0).and_then(|()| file.rewind()).map_err(|error| local(path, error));
        if want.bytes.is_some_and(|bytes| have > bytes) {
            restart(file)?;
            have = 0;
        }
        if have > 0 && want.bytes == Some(have) {
            return Ok(());
        }
        let tag = etag.as_deref().filter(|etag| !etag.is_empty());
        let response = match self.get(want.url, want.token, SILENCE, (have, tag)) {
            Err(Fault::Status(416)) => {
                restart(file)?;
                return Err(Fault::Transient("the server cannot go on where the download broke off".into(), None));
            }
            response => response?,
        };
        let headers = response.headers();
        if response.status().as_u16() == 206 {
            let range = text_of(headers, "content-range").unwrap_or_default();
            if !range.starts_with(&format!("bytes {have}-")) {
                restart(file)?;
                return Err(Fault::Transient(format!("asked for bytes from {have} and got `{range}`"), None));
            }
        } else if have > 0 {
            restart(file)?;
            have = 0;
        }
        // Only a strong tag says that the bytes are the same; an empty one says that there was an answer.
        *etag = Some(text_of(headers, "etag").filter(|etag| etag.starts_with('"')).unwrap_or_default());
        let length = text_of(headers, "content-length").and_then(|text| text.parse::<u64>().ok());
        let total = want.bytes.or(length.map(|length| have.saturating_add(length)));
        progress.started(want.name, total);
        progress.advanced(have);
        let mut body = response.into_body().into_with_config().limit(u64::MAX).reader();
        let mut buffer = vec![0u8; 256 << 10];
        loop {
            let n = match body.read(&mut buffer) {
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Fault::Transient(format!("the connection broke: {error}"), None)),
            };
            have += n as u64;
            if total.is_some_and(|total| have > total) {
                return Err(Fault::Final(format!("more than the {} bytes announced came", total.unwrap_or(0))));
            }
            if n == 0 {
                break;
            }
            file.write_all(&buffer[..n]).map_err(|error| local(path, error))?;
            progress.advanced(n as u64);
        }
        match total {
            Some(total) if have < total => Err(Fault::Transient(format!("only {have} of {total} bytes came"), None)),
            _ => {
                progress.finished();
                Ok(())
            }
        }
    }
}

fn text_of(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_string)
}

fn local(path: &Path, error: io::Error) -> Fault {
    Fault::Final(format!("{}: {error}", path.display()))
}

fn fault(error: ureq::Error) -> Fault {
    use ureq::Error as E;
    match error {
        E::Timeout(Timeout::Resolve | Timeout::Connect) => {
            Fault::Unreachable(format!("no connection within {} s", CONNECT.as_secs()))
        }
        E::Timeout(_) => Fault::Unreachable("no answer in time".into()),
        E::HostNotFound | E::ConnectionFailed => Fault::Unreachable(error.to_string()),
        E::Io(error) if lost(error.kind()) => Fault::Transient(error.to_string(), None),
        E::Io(error) if error.kind() == io::ErrorKind::InvalidData => {
            Fault::Final(format!("{error} (only publicly known certificates are trusted here)"))
        }
        // Refused, no route, or no such name, for which systems have no kind of their own.
        E::Io(error) => Fault::Unreachable(error.to_string()),
        E::Protocol(_) | E::BodyStalled => Fault::Transient(error.to_string(), None),
        E::Json(error) => Fault::Final(format!("the answer is not the expected JSON: {error}")),
        _ => Fault::Final(error.to_string()),
    }
}

/// Whether a connection was there and broke.
fn lost(kind: io::ErrorKind) -> bool {
    use io::ErrorKind as K;
    matches!(
        kind,
        K::ConnectionReset | K::ConnectionAborted | K::BrokenPipe | K::UnexpectedEof | K::TimedOut | K::WouldBlock
    )
}
