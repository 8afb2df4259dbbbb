//! Requests as Open WebUI, Continue, LangChain and LiteLLM send them, by their sources and as their own code sent them:
//! fields, headers, streams, and what they add unasked.

mod common;

use common::{PLAIN, Server, TOOLS, request};
use lacuna_serve::{Keys, Options};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

fn server(template: &str) -> Server {
    let keys = Some(Keys::parse("none\n").unwrap());
    Server::start(Some(template), Options { keys, ollama: true, ..Options::default() })
}

/// What is answered to a request that must be taken.
fn taken(s: &Server, path: &str, headers: &str, body: &Value) -> String {
    let a = s.ask(path, &format!("{headers}accept: */*\r\naccept-encoding: gzip, deflate\r\n"), body);
    assert_eq!(a.status, 200, "{path} {body}\n{}", a.body);
    a.body
}

fn json_of(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// The chunks of a stream that ends as OpenAI's do.
fn chunks(text: &str) -> Vec<Value> {
    let mut events: Vec<&str> = text.split("\n\n").filter(|e| !e.is_empty()).collect();
    assert_eq!(events.pop(), Some("data: [DONE]"));
    events.iter().map(|e| json_of(e.strip_prefix("data: ").unwrap())).collect()
}

const OPENAI: &str = "authorization: Bearer none\r\nuser-agent: OpenAI/Python 2.8.1\r\nx-stainless-lang: \
                      python\r\nx-stainless-package-version: 2.8.1\r\nx-stainless-os: Linux\r\nx-stainless-arch: \
                      x64\r\nx-stainless-runtime: CPython\r\nx-stainless-async: false\r\nx-stainless-retry-count: \
                      0\r\nx-stainless-read-timeout: 600\r\n";

#[test]
fn open_webui() {
    let s = server(PLAIN);
    let webui = "authorization: Bearer none\r\nhttp-referer: https://openwebui.com/\r\nx-title: Open \
                 WebUI\r\nx-openwebui-user-name: A%20User\r\nx-openwebui-user-id: 1\r\nx-openwebui-user-email: \
                 a@example.org\r\nx-openwebui-user-role: admin\r\nx-openwebui-chat-id: c\r\n";
    let list = s.raw(&format!("GET /v1/models HTTP/1.1\r\nhost: localhost\r\n{webui}connection: close\r\n\r\n"));
    assert_eq!(list.json()["data"][0]["id"], "tiny");
    let turns = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "And now?"}]);
    let body = json!({"stream": true, "model": "tiny", "messages": turns, "stream_options": {"include_usage": true},
        "temperature": 0.7, "top_p": 0.9, "max_tokens": 8, "frequency_penalty": 0, "presence_penalty": 0, "seed": 1,
        "stop": ["\n\n", "User:"], "logit_bias": {"5": -1}, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1,
        "reasoning_effort": null, "metadata": {"task": "chat"}});
    let all = chunks(&taken(&s, CHAT, webui, &body));
    assert!(all[all.len() - 1]["usage"]["completion_tokens"].as_u64().unwrap() <= 8);
    // Titles, tags and questions to ask next.
    let task = json!({"model": "tiny", "messages": [{"role": "user", "content": "### Task: name it"}], "stream": false,
        "max_completion_tokens": 9, "metadata": {"task": "title_generation", "chat_id": "c"}});
    assert!(json_of(&taken(&s, CHAT, webui, &task))["choices"][0]["message"]["content"].is_string());
    // Its other half speaks to Ollama.
    for path in ["/api/tags", "/api/version", "/api/ps"] {
        let text = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n{webui}connection: close\r\n\r\n");
        assert_eq!(s.raw(&text).status, 200);
    }
    taken(&s, "/api/show", webui, &json!({"model": "tiny:latest"}));
    let body = json!({"model": "tiny:latest", "messages": turns, "options": {"temperature": 0.7, "num_ctx": 8192,
        "num_predict": 8, "top_k": 40, "top_p": 0.9, "repeat_last_n": 64, "stop": ["\n\n"], "seed": 1, "mirostat": 0, "mirostat_eta":
        0.1, "mirostat_tau": 5, "tfs_z": 1, "num_gpu": 99, "num_thread": 4, "use_mmap": true, "use_mlock": false},
        "stream": true, "keep_alive": "5m", "think": false});
    let lines = taken(&s, "/api/chat", webui, &body);
    assert_eq!(json_of(lines.lines().last().unwrap())["done"], true);
}

#[test]
fn continues_editor() {
    let s = server(PLAIN);
    let editor = "authorization: Bearer none\r\napi-key: none\r\nx-api-key: none\r\n";
    let turns = json!([{"role": "user", "content": "hello"}, {"role": "assistant", "content": " "}, {"role": "user", "content": "go on"}]);
    let chat = json!({"messages": turns, "model": "tiny", "max_tokens": 8, "temperature": 0.5, "stream": true});
    chunks(&taken(&s, CHAT, editor, &chat));
    // A line is completed by text alone; stop texts are more than OpenAI takes.
    let stop = [
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        "<file_sep>",
        "<|endoftext|>",
        "</fim_middle>",
        "</code>",
        "/src/",
        "#- coding: utf-8",
        "```",
    ];
    let text = json!({"model": "tiny", "prompt": "def f(", "max_tokens": 8, "temperature": 0.01, "top_p": 1,
        "frequency_penalty": 0, "presence_penalty": 0, "stream": true, "stop": stop});
    chunks(&taken(&s, "/v1/completions", editor, &text));
    taken(&s, "/api/show", editor, &json!({"name": "tiny"}));
    let options = json!({"temperature": 0.01, "num_predict": 8, "stop": stop, "num_ctx": 8096});
    let raw = json!({"model": "tiny", "prompt": "def f(", "raw": true, "options": options, "keep_alive": 1800, "stream": true});
    let lines = taken(&s, "/api/generate", editor, &raw);
    assert_eq!(json_of(lines.lines().last().unwrap())["done"], true);
    let chat = json!({"model": "tiny", "messages": turns, "options": options, "keep_alive": 1800, "stream": true});
    taken(&s, "/api/chat", editor, &chat);
}

/// What LangChain's clients of all four interfaces, LiteLLM and the clients of Anthropic and Ollama sent, byte for byte:
/// langchain-openai 1.7.4, langchain-anthropic 1.7.10, langchain-ollama 1.1.0, litellm 1.110.2, anthropic 2.14.0, ollama
/// 0.6.3, pointed at a program that writes down what comes.
#[test]
fn what_was_recorded() {
    let recorded = json_of(include_str!("recorded.json"));
    // Ollama's clients know no keys.
    let s = Server::start(Some(TOOLS), Options { ollama: true, ..Options::default() });
    let mut streams = 0;
    for one in recorded.as_array().unwrap() {
        let (path, body) = (one["path"].as_str().unwrap(), &one["body"]);
        let headers = one["headers"].as_object().unwrap().iter();
        let headers: String = headers.map(|(name, v)| format!("{name}: {}\r\n", v.as_str().unwrap())).collect();
        let ask = request(path, body).replacen("content-type: application/json\r\n", &headers, 1);
        let a = s.raw(&ask);
        assert_eq!(a.status, 200, "{ask}\n{}", a.body);
        let text = a.body;
        let ollamas = path == "/api/chat" || path == "/api/generate";
        if !(body["stream"] == true || ollamas && body["stream"].is_null()) {
            json_of(&text);
            continue;
        }
        streams += 1;
        match path {
            "/v1/messages" => assert!(text.contains("event: message_stop\n"), "{text}"),
            _ if ollamas => assert_eq!(json_of(text.lines().last().unwrap())["done"], true),
            _ => {
                let all = chunks(&text);
                let told = all.iter().any(|c| c["usage"]["completion_tokens"].is_u64());
                assert_eq!(told, body["stream_options"]["include_usage"] == true, "{body}");
            }
        }
    }
    assert!(streams > 10, "{streams}");
}

/// What would change an answer and is not known is refused still.
#[test]
fn what_is_not_known_is_refused() {
    let s = server(PLAIN);
    for more in [
        json!({"mirostat_mode": 2}),
        json!({"guided_json": {}}),
        json!({"best_of": 3}),
        json!({"store": true}),
        json!({"top_a": 0.1}),
    ] {
        let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let e = s.ask(CHAT, OPENAI, &body).error();
        assert_eq!((e.0, e.1.as_str()), (400, more.as_object().unwrap().keys().next().unwrap().as_str()));
    }
}
