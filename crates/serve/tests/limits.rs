//! Limits: queues, sizes, times, keys, names, and the end of a server.

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::{PLAIN, ROOM, Server, chat, engine, request};
use lacuna_checkpoint::Tokenizer;
use lacuna_serve::{Keys, Options};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// A request whose answer takes long.
fn long() -> Value {
    // The end token can never come.
    chat(json!({"max_tokens": 900, "logit_bias": {"2": -100}, "stream": true}))
}

/// A request that is at work until its client leaves, for a [`Server::roomy`].
fn endless() -> Value {
    let mut v = long();
    v["max_tokens"] = (ROOM - 100).into();
    v
}

fn live(s: &Server) -> Value {
    s.get("/api/live").json()
}

/// Waits until `is` holds of the live numbers.
fn until(s: &Server, what: &str, is: impl Fn(&Value) -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !is(&live(s)) {
        assert!(Instant::now() < end, "{what} does not come: {}", live(s));
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn who_leaves_frees_its_place() {
    let s = Server::roomy(Options { batch: 1, ..Options::default() });
    let mut first = s.connect();
    first.send(&request(CHAT, &endless()));
    assert_eq!(first.head().0, 200);
    until(&s, "the first at work", |l| l["running"] == 1);
    // One that streams, one that waits, one that waits for a whole answer: all leave.
    let mut second = s.connect();
    second.send(&request(CHAT, &endless()));
    assert_eq!(second.head().0, 200);
    let mut third = s.connect();
    let mut whole = endless();
    whole["stream"] = false.into();
    third.send(&request(CHAT, &whole));
    until(&s, "two waiting", |l| l["waiting"] == 2);
    drop(third);
    until(&s, "one waiting", |l| l["waiting"] == 1);
    drop(first);
    until(&s, "the second at work", |l| l["running"] == 1 && l["waiting"] == 0);
    drop(second);
    until(&s, "peace", |l| l["running"] == 0 && l["kv"]["used"] == 0);
    assert!(s.get("/metrics").body.contains("lacuna_cancelled_total 3"));
    assert_eq!(s.post(CHAT, &chat(json!({}))).status, 200);
}

#[test]
fn a_full_queue_says_when_to_come_back() {
    let s = Server::roomy(Options { batch: 1, queue: 1, ..Options::default() });
    let mut talks: Vec<_> = (0..2)
        .map(|_| {
            let mut t = s.connect();
            t.send(&request(CHAT, &endless()));
            assert_eq!(t.head().0, 200);
            t
        })
        .collect();
    let refused = s.post(CHAT, &chat(json!({})));
    assert_eq!(refused.error(), (429, String::new(), "queue_full".into()));
    assert!(refused.header("retry-after").unwrap().parse::<u64>().unwrap() > 0);
    assert_eq!(s.post(CHAT, &chat(json!({"n": 3}))).status, 429, "three never fit");
    assert_eq!(s.post("/v1/embeddings", &json!({"model": "tiny", "input": "a"})).status, 429);
    talks.clear();
    until(&s, "peace", |l| l["running"] == 0);
    assert_eq!(s.post(CHAT, &chat(json!({"n": 2}))).status, 200);
}

/// A place in the queue comes first: what would fail once it is looked at, rendered or made tokens of is not looked at
/// without one.
#[test]
fn who_finds_no_place_costs_nothing() {
    let template = "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('rendered') }}{% endif \
     %}<|im_start|>{{ m.content }}{% endfor %}";
    let s = Server::with(
        engine("llama").with_context(ROOM),
        Some(template),
        Options { batch: 1, queue: 1, ..Options::default() },
    );
    let bad = |more: Value| {
        let mut v = chat(json!({"messages": [{"role": "user", "content": "bad"}]}));
        v.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        v
    };
    let wrong = [bad(json!({})), bad(json!({"temperature": 9})), json!({"model": "other"}), json!([])];
    let mut talks: Vec<_> = (0..2)
        .map(|_| {
            let mut t = s.connect();
            t.send(&request(CHAT, &endless()));
            assert_eq!(t.head().0, 200);
            t
        })
        .collect();
    for body in &wrong {
        assert_eq!(s.post(CHAT, body).error(), (429, String::new(), "queue_full".into()), "{body}");
    }
    let broken = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: \
     close\r\ncontent-length: 1\r\n\r\n{";
    assert_eq!(s.raw(broken).error().0, 429);
    // The limits on a body stay before.
    assert_eq!(s.raw(&broken.replace("application/json", "text/plain")).error().0, 415);
    let huge = chat(json!({"messages": [{"role": "user", "content": "x".repeat(5 << 20)}]}));
    assert_eq!(s.post(CHAT, &huge).error().0, 413);
    // One place is free, and three are asked for.
    talks.pop();
    until(&s, "a free place", |l| l["waiting"] == 0);
    assert_eq!(s.post(CHAT, &bad(json!({"n": 3}))).error().0, 429);
    assert_eq!(s.post(TEXT, &json!({"model": "tiny", "prompt": [[96], [96], [96]]})).error().0, 429);
    assert_eq!(s.post("/v1/embeddings", &json!({"model": "tiny", "input": [[96], [96], [96]]})).error().0, 429);
    // With a place all of it is said, and the place is free again.
    for (body, status) in wrong.iter().zip([400, 400, 404, 400]) {
        for _ in 0..3 {
            assert_eq!(s.post(CHAT, body).error().0, status, "{body}");
        }
    }
    assert_eq!(s.raw(broken).error().0, 400);
    talks.clear();
    until(&s, "peace", |l| l["running"] == 0);
    assert_eq!(s.post(CHAT, &chat(json!({"n": 2}))).status, 200);
}

/// Far more than any buffer between the two holds: who sends all of it before listening still hears why.
#[test]
fn too_much_is_told_to_whoever_sends_first() {
    let s = Server::start(Some(PLAIN), Options { body_bytes: 2000, ..Options::default() });
    let huge = chat(json!({"messages": [{"role": "user", "content": "x".repeat(20 << 20)}]}));
    assert_eq!(s.post(CHAT, &huge).error().0, 413);
}

/// Encoding takes much more time and memory than the text has bytes: what cannot fit is refused before. The vocabulary
/// has every byte, so that a text's length bounds its tokens.
#[test]
fn a_text_that_cannot_fit_is_not_encoded() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tokenizers/bytelevel");
    let tokenizer = Tokenizer::from_dir(&dir).unwrap();
    let s = Server::reading(tokenizer, engine("llama"), Some(PLAIN), Options::default());
    let text = "a ".repeat(500_000);
    let asked = [
        (CHAT, chat(json!({"messages": [{"role": "user", "content": text}]}))),
        ("/v1/completions", json!({"model": "tiny", "prompt": text})),
    ];
    for (path, body) in asked {
        let answer = s.post(path, &body);
        assert_eq!(answer.status, 400);
        let body = answer.json();
        assert_eq!(body["error"]["code"], "context_length_exceeded");
        let said = body["error"]["message"].as_str().unwrap();
        assert!(said.contains("bytes does not fit the context of 1024 tokens"), "{said}");
    }
}

#[test]
fn sizes_and_times_have_limits() {
    let patience = Duration::from_millis(300);
    let s = Server::start(
        Some(PLAIN),
        Options {
            body_bytes: 2000,
            tokens: 50,
            head_timeout: patience,
            body_timeout: patience,
            answer_timeout: patience,
            ..Options::default()
        },
    );
    let large = chat(json!({"messages": [{"role": "user", "content": "x".repeat(3000)}]}));
    assert_eq!(s.post(CHAT, &large).error().0, 413);
    let mut talk = s.connect();
    talk.send(&format!(
        "POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: \
         chunked\r\n\r\nFA0\r\n{}",
        " ".repeat(4000)
    ));
    assert_eq!(talk.answer().error().0, 413, "chunks are counted, too");
    let e = s.post(CHAT, &chat(json!({"max_tokens": 51}))).error();
    assert_eq!((e.0, e.1.as_str()), (400, "max_tokens"));
    // A body that does not come.
    let mut talk = s.connect();
    talk.send(&format!(
        "POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{{"
    ));
    assert_eq!(talk.answer().error().0, 408);
    // A head that does not come; and a connection without one.
    let began = Instant::now();
    let mut talk = s.connect();
    talk.send("GET / HTTP/1.1\r\nhost: loc");
    assert!(talk.is_closed());
    assert!(s.connect().is_closed());
    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!(s.get("/health/live").status, 200);
}

#[test]
fn an_answer_that_takes_too_long_ends() {
    let s = Server::start(
        Some(PLAIN),
        Options { answer_timeout: Duration::from_millis(60), batch: 1, ..Options::default() },
    );
    let mut streamed = long();
    let whole = {
        let mut w = long();
        w["stream"] = false.into();
        w["n"] = 16.into();
        w
    };
    streamed["n"] = 16.into();
    assert_eq!(s.post(CHAT, &whole).error(), (504, String::new(), "timeout".into()));
    let text = s.post(CHAT, &streamed).body;
    assert!(text.contains("\"timeout\"") && !text.contains("[DONE]"), "{text}");
    until(&s, "peace", |l| l["running"] == 0 && l["waiting"] == 0);
}

#[test]
fn a_client_that_reads_nothing_is_let_go() {
    let s = Server::start(
        Some(PLAIN),
        Options { write_timeout: Duration::from_millis(300), batch: 2, ..Options::default() },
    );
    // Answers with many rivals fill the socket's buffers, which nobody empties.
    let mut body = long();
    body["logprobs"] = true.into();
    body["top_logprobs"] = 20.into();
    body["n"] = 16.into();
    let mut talk = s.connect();
    talk.send(&request(CHAT, &body));
    until(&s, "work", |l| l["running"] == 2);
    let connections = |s: &Server| {
        let text = s.get("/metrics").body;
        let line = text.lines().find(|l| l.starts_with("lacuna_connections ")).unwrap().to_owned();
        line.split(' ').nth(1).unwrap().parse::<u64>().unwrap()
    };
    let end = Instant::now() + Duration::from_secs(50);
    // The one that asks is one.
    while connections(&s) > 1 {
        assert!(Instant::now() < end, "the connection is still held");
        std::thread::sleep(Duration::from_millis(50));
    }
    until(&s, "peace", |l| l["running"] == 0 && l["waiting"] == 0);
}

#[test]
fn keys_and_names() {
    let keys = Some(Keys::parse("secret\n").unwrap());
    let s = Server::start(Some(PLAIN), Options { keys, ..Options::default() });
    let refused = s.get("/v1/models");
    assert_eq!((refused.error().0, refused.header("www-authenticate")), (401, Some("Bearer")));
    assert_eq!(s.post(CHAT, &chat(json!({}))).status, 401);
    for path in ["/metrics", "/api/live", "/api/card"] {
        assert_eq!(s.get(path).status, 401, "{path}");
    }
    for path in ["/", "/health", "/health/live", "/health/ready", "/openapi.json", "/assets/app.js"] {
        assert_eq!(s.get(path).status, 200, "{path}");
    }
    let with = |key: &str| {
        s.raw(&format!(
            "GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\nconnection: close\r\n\r\n"
        ))
        .status
    };
    assert_eq!((with("secret"), with("secreT"), with("")), (200, 401, 401));

    let hosts = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    let s = Server::start(Some(PLAIN), Options { hosts, ..Options::default() });
    let named =
        |host: &str| s.raw(&format!("GET /v1/models HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n")).status;
    for (host, status) in [
        ("localhost:8080", 200),
        ("LOCALHOST", 200),
        ("[::1]:80", 200),
        ("127.0.0.1", 200),
        ("evil.example", 403),
        ("localhost.evil.example:80", 403),
    ] {
        assert_eq!(named(host), status, "{host}");
    }
}

#[test]
fn too_many_connections_are_turned_away() {
    let s = Server::start(Some(PLAIN), Options { connections: 3, ..Options::default() });
    let held: Vec<_> = (0..3).map(|_| s.connect()).collect();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(s.connect().answer().error(), (503, String::new(), "too_many_connections".into()));
    // One that has sent its request already hears it, too.
    assert_eq!(s.get("/health/live").error().0, 503);
    drop(held);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(s.get("/health/live").status, 200);
    assert!(s.get("/metrics").body.contains("lacuna_connections_turned_away_total 2"));
}

#[test]
fn a_server_that_is_told_to_stop_finishes_what_it_began() {
    let s = Server::start(Some(PLAIN), Options::default());
    let mut talk = s.connect();
    talk.send(&request(CHAT, &long()));
    assert_eq!(talk.head().0, 200);
    until(&s, "work", |l| l["running"] == 1);
    s.stop.trigger();
    let end = Instant::now() + Duration::from_secs(10);
    while std::net::TcpStream::connect(s.at).is_ok() {
        assert!(Instant::now() < end, "nobody new is let in");
    }
    let mut text = String::new();
    loop {
        let line = talk.line();
        text += &line;
        if line.contains("[DONE]") {
            break;
        }
        assert!(!text.is_empty() && Instant::now() < end, "{text}");
    }
    assert_eq!(s.end(), 0);
}

#[test]
fn a_server_does_not_wait_for_ever() {
    let options = Options { drain_timeout: Duration::from_millis(50), batch: 1, ..Options::default() };
    let s = Server::start(Some(PLAIN), options);
    let mut body = long();
    body["n"] = 16.into();
    let mut talk = s.connect();
    talk.send(&request(CHAT, &body));
    assert_eq!(talk.head().0, 200);
    until(&s, "work", |l| l["running"] == 1);
    let began = Instant::now();
    assert_eq!(s.end(), 1);
    assert!(began.elapsed() < Duration::from_secs(5));
}
