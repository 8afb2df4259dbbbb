//! Requests as Open WebUI, Continue, LangChain and LiteLLM send them, by their sources and as their own code sent them:
//! fields, headers, streams, and what they add unasked.

mod common;

use common::{PLAIN, Server, TOOLS};
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

#[test]
fn langchain() {
    let s = server(TOOLS);
    let base =
        json!({"model": "tiny", "messages": [{"content": "hello", "role": "user"}], "max_completion_tokens": 60});
    let with = |more: Value| {
        let mut body = base.clone();
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    json_of(&taken(&s, CHAT, OPENAI, &with(json!({}))));
    let all = chunks(&taken(
        &s,
        CHAT,
        OPENAI,
        &with(json!({"stream": true, "stream_options": {"include_usage": true}, "seed": 1,
        "stop": ["x"], "temperature": 0.5})),
    ));
    assert_eq!(all[all.len() - 1]["choices"], json!([]));
    let schema = json!({"properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"], "type": "object"});
    let tool = json!({"type": "function", "function": {"name": "add", "description": "Adds two numbers.", "parameters": schema}});
    taken(&s, CHAT, OPENAI, &with(json!({"tools": [tool]})));
    taken(&s, CHAT, OPENAI, &with(json!({"tools": [tool], "tool_choice": "required"})));
    let mut strict = tool.clone();
    strict["function"]["strict"] = true.into();
    strict["function"]["parameters"]["additionalProperties"] = false.into();
    let named = json!({"type": "function", "function": {"name": "add"}});
    taken(&s, CHAT, OPENAI, &with(json!({"tools": [strict], "tool_choice": named, "parallel_tool_calls": false})));
    let form = json!({"type": "json_schema", "json_schema": {"name": "X", "strict": true, "schema": {"properties": {"x": {"title": "X",
        "type": "integer"}}, "required": ["x"], "title": "X", "type": "object", "additionalProperties": false}}});
    taken(&s, CHAT, OPENAI, &with(json!({"response_format": form})));
    taken(&s, CHAT, OPENAI, &with(json!({"response_format": {"type": "json_object"}})));
    let history = json!([
        {"content": "Be brief.", "role": "system"}, {"content": "hello", "role": "user"},
        {"content": null, "role": "assistant", "tool_calls": [{"type": "function", "id": "c1", "function": {"name": "add", "arguments": "{\"a\": 1, \"b\": 2}"}}]},
        {"content": "3", "role": "tool", "tool_call_id": "c1"}, {"content": [{"type": "text", "text": "and?"}], "role": "user"},
    ]);
    taken(&s, CHAT, OPENAI, &with(json!({ "messages": history })));
    let text = json!({"model": "tiny", "prompt": ["hello"], "frequency_penalty": 0, "logit_bias": {}, "max_tokens": 8, "n": 1,
        "presence_penalty": 0, "temperature": 0.7, "top_p": 1});
    taken(&s, "/v1/completions", OPENAI, &text);
    let vectors = json!({"model": "tiny", "input": ["a", "b"], "encoding_format": "base64"});
    taken(&s, "/v1/embeddings", OPENAI, &vectors);
    let responses = json!({"model": "tiny", "max_output_tokens": 60, "stream": false, "tool_choice": "required",
        "input": [{"content": "hello", "role": "user", "type": "message"}],
        "tools": [{"type": "function", "name": "add", "description": "Adds two numbers.", "parameters": schema}]});
    taken(&s, "/v1/responses", OPENAI, &responses);
    // Its clients of the other two.
    let claude = "x-api-key: none\r\nanthropic-version: 2023-06-01\r\nuser-agent: langchain-anthropic/1.1.0\r\n";
    let messages = json!({"max_tokens": 8, "model": "tiny", "system": "Be brief.", "temperature": 0.5, "messages": [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": [{"type": "tool_use", "name": "add", "input": {"a": 1, "b": 2}, "id": "c1"}]},
        {"role": "user", "content": [{"type": "tool_result", "content": "3", "tool_use_id": "c1", "is_error": false}, {"type": "text", "text": "and?"}]},
    ], "tools": [{"name": "add", "input_schema": schema, "description": "Adds two numbers."}], "tool_choice": {"type": "auto"}});
    taken(&s, "/v1/messages", claude, &messages);
    let ollama = "authorization: Bearer none\r\nuser-agent: ollama-python/0.6.1\r\n";
    let body = json!({"model": "tiny", "stream": true, "options": {"num_ctx": 4096, "num_predict": 8}, "keep_alive": "5m",
        "messages": [{"role": "user", "content": "hello", "images": []}, {"role": "assistant", "content": "", "images": [],
            "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": 2}}, "type": "function", "id": "c1"}]},
            {"role": "tool", "content": "3", "images": [], "tool_call_id": "c1"}], "tools": [tool], "think": null, "format": ""});
    taken(&s, "/api/chat", ollama, &body);
}

#[test]
fn litellm() {
    let s = server(TOOLS);
    let body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "user": "u",
        "metadata": {"trace": "t"}, "extra_body": null, "stream": true, "stream_options": {"include_usage": true}, "temperature": 0.2,
        "parallel_tool_calls": true});
    chunks(&taken(&s, CHAT, OPENAI, &body));
    let tools =
        json!([{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]);
    let body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 60, "tools": tools,
        "tool_choice": "required", "parallel_tool_calls": true});
    taken(&s, CHAT, OPENAI, &body);
    let claude = "x-api-key: none\r\nanthropic-version: 2023-06-01\r\naccept: application/json\r\n";
    let body = json!({"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}], "max_tokens": 8});
    taken(&s, "/v1/messages", claude, &body);
    let body = json!({"model": "tiny", "input": "hello", "max_output_tokens": 20, "metadata": {}});
    taken(&s, "/v1/responses", OPENAI, &body);
    let ollama = "authorization: Bearer none\r\n";
    let body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "options": {"num_predict": 8}, "stream": false});
    taken(&s, "/api/chat", ollama, &body);
    let body = json!({"model": "tiny", "prompt": "### User:\nhello\n\n", "options": {"num_predict": 8}, "stream": false, "images": []});
    taken(&s, "/api/generate", ollama, &body);
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
