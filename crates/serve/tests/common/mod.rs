//! A server over a tiny model, and a client that shows every byte.

// Each test program uses its own part.
#![allow(dead_code)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use lacuna_checkpoint::{ChatTemplate, TokenKind, Tokenizer, Vocabulary};
use lacuna_model::{Decoder, LoadOptions};
use lacuna_run::{Engine, RunPlan};
use lacuna_serve::{Options, Served, Stop, serve};
use serde_json::{Value, json};

/// ChatML, without a place for tools.
pub const PLAIN: &str = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}{% if \
 add_generation_prompt %}<|im_start|>{% endif %}";

/// The same with tools, as Qwen's and Hermes' templates have them.
pub const TOOLS: &str = "{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}{% for m in messages \
 %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>";

/// 96 tokens: three special ones, a line's end, a space, and the printable characters but three.
pub fn tokenizer() -> Tokenizer {
    let mut tokens: Vec<String> = ["<|begin|>", "<|im_start|>", "<|im_end|>", "Ċ", "Ġ"].map(String::from).to_vec();
    tokens.extend(('!'..='~').filter(|c| !"~|`".contains(*c)).map(String::from));
    let kinds = (0..96).map(|id| if id < 3 { TokenKind::Control } else { TokenKind::Normal }).collect();
    let v = Vocabulary {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        tokens,
        kinds,
        bos: Some(0),
        eos: Some(2),
        ..Vocabulary::default()
    };
    Tokenizer::from_vocabulary(v).unwrap()
}

/// Room for an answer that no processor ends while a test still looks at who waits.
pub const ROOM: usize = 1 << 16;

pub fn engine(name: &str) -> Engine {
    planned(name, RunPlan::none())
}

/// One under a run plan.
pub fn planned(name: &str, plan: RunPlan) -> Engine {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny").join(name);
    let checkpoint = lacuna_checkpoint::open(dir).unwrap();
    let options = LoadOptions { gate: plan.gate(), ..LoadOptions::default() };
    Engine::new(Decoder::load(&checkpoint, &options).unwrap()).with_context(1024).with_plan(plan)
}

/// A running server.
pub struct Server {
    pub at: SocketAddr,
    pub stop: Stop,
    thread: Option<JoinHandle<usize>>,
}

impl Server {
    pub fn start(template: Option<&str>, options: Options) -> Server {
        Server::with(engine("llama"), template, options)
    }

    /// One with [`ROOM`].
    pub fn roomy(options: Options) -> Server {
        Server::with(engine("llama").with_context(ROOM), Some(PLAIN), options)
    }

    pub fn with(engine: Engine, template: Option<&str>, options: Options) -> Server {
        Server::reading(tokenizer(), engine, template, options)
    }

    /// One with another tokenizer.
    pub fn reading(tokenizer: Tokenizer, engine: Engine, template: Option<&str>, options: Options) -> Server {
        let served = Served {
            name: "tiny".into(),
            fingerprint: "test".into(),
            engine,
            tokenizer,
            template: template.map(|t| ChatTemplate::new(t).unwrap()),
            card: json!({ "model": "tiny" }),
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (at, stop) = (listener.local_addr().unwrap(), Stop::default());
        let told = stop.clone();
        let thread = std::thread::spawn(move || serve(served, options, listener, &told).unwrap());
        Server { at, stop, thread: Some(thread) }
    }

    pub fn plain() -> Server {
        Server::start(Some(PLAIN), Options::default())
    }

    /// Stops it; how many connections were cut.
    pub fn end(mut self) -> usize {
        self.stop.trigger();
        self.thread.take().unwrap().join().unwrap()
    }

    pub fn connect(&self) -> Talk {
        let stream = TcpStream::connect(self.at).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Talk(BufReader::new(stream))
    }

    pub fn get(&self, path: &str) -> Answer {
        self.raw(&format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"))
    }

    pub fn raw(&self, text: &str) -> Answer {
        let mut talk = self.connect();
        talk.send(text);
        talk.answer()
    }

    /// A request with further headers, each ended by a line's end.
    pub fn ask(&self, path: &str, headers: &str, body: &Value) -> Answer {
        self.raw(&request(path, body).replacen("host: localhost\r\n", &format!("host: localhost\r\n{headers}"), 1))
    }

    /// The named events of a stream.
    pub fn events(&self, path: &str, body: &Value) -> Vec<(String, Value)> {
        let mut body = body.clone();
        body["stream"] = true.into();
        let answer = self.post(path, &body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        let event = |e: &str| {
            let (name, data) = e.split_once('\n').unwrap();
            let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
            let name = name.strip_prefix("event: ").unwrap().to_owned();
            assert_eq!(data["type"], name.as_str());
            (name, data)
        };
        answer.body.split("\n\n").filter(|e| !e.is_empty() && !e.starts_with(':')).map(event).collect()
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.raw(&request(path, body))
    }

    /// The JSON values of a stream, which must end as it should.
    pub fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = true.into();
        let answer = self.post(path, &body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert!(answer.header("content-type").unwrap().starts_with("text/event-stream"));
        let mut events: Vec<&str> =
            answer.body.split("\n\n").filter(|e| !e.is_empty() && !e.starts_with(':')).collect();
        assert_eq!(events.pop(), Some("data: [DONE]"), "{}", answer.body);
        events.iter().map(|e| serde_json::from_str(e.strip_prefix("data: ").unwrap()).unwrap()).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.trigger();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub fn request(path: &str, body: &Value) -> String {
    let body = body.to_string();
    format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: \
         close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

pub struct Talk(pub BufReader<TcpStream>);

pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The status, and `param` and `code` of the error, which must have OpenAI's shape.
    pub fn error(&self) -> (u16, String, String) {
        let e = self.json()["error"].clone();
        assert!(e["message"].as_str().is_some_and(|m| !m.is_empty()) && e["type"].is_string(), "{}", self.body);
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        (self.status, text(&e["param"]), text(&e["code"]))
    }
}

impl Talk {
    pub fn send(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).unwrap();
    }

    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub fn head(&mut self) -> (u16, Vec<(String, String)>) {
        let status = self.line();
        let status = status.split(' ').nth(1).unwrap_or_else(|| panic!("no answer: '{status}'")).parse().unwrap();
        let mut headers = Vec::new();
        loop {
            let line = self.line();
            let Some((name, value)) = line.split_once(": ") else { return (status, headers) };
            headers.push((name.to_ascii_lowercase(), value.to_owned()));
        }
    }

    pub fn answer(&mut self) -> Answer {
        let (status, headers) = self.head();
        let get = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone());
        let mut bytes = Vec::new();
        if get("transfer-encoding").as_deref() == Some("chunked") {
            loop {
                let size = usize::from_str_radix(&self.line(), 16).unwrap();
                let mut piece = vec![0; size];
                self.0.read_exact(&mut piece).unwrap();
                bytes.extend(piece);
                self.line();
                if size == 0 {
                    break;
                }
            }
        } else if let Some(n) = get("content-length") {
            bytes = vec![0; n.parse().unwrap()];
            self.0.read_exact(&mut bytes).unwrap();
        }
        Answer { status, headers, body: String::from_utf8(bytes).unwrap() }
    }

    /// Whether the other side closed.
    pub fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        self.0.read_to_end(&mut rest).is_ok() || !rest.is_empty()
    }
}

/// A chat request.
pub fn chat(more: Value) -> Value {
    let mut v = json!({ "model": "tiny", "messages": [{ "role": "user", "content": "hello" }], "max_tokens": 12, "temperature": 0 });
    v.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    v
}
