//! Other interfaces than OpenAI's first: translations onto it, so that they say what it says.

mod common;

use common::{PLAIN, Server, TOOLS, chat, engine, request, tokenizer};
use lacuna_serve::{Keys, Options, Origins};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const RESPONSES: &str = "/v1/responses";
const MESSAGES: &str = "/v1/messages";

fn ollama() -> Server {
    Server::start(Some(PLAIN), Options { ollama: true, ..Options::default() })
}

/// What the first interface says to "hello".
fn said(s: &Server, more: Value) -> String {
    s.post(CHAT, &chat(more)).json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

fn with(mut base: Value, more: Value) -> Value {
    base.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    base
}

fn adder() -> Value {
    json!({"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["a"],
        "additionalProperties": false})
}

#[test]
fn responses_whole_and_streamed() {
    let s = Server::plain();
    let base = json!({"model": "tiny", "input": "hello", "max_output_tokens": 12, "temperature": 0});
    let text = said(&s, json!({}));
    let v = s.post(RESPONSES, &with(base.clone(), json!({"metadata": {"a": "b"}, "store": false}))).json();
    assert_eq!(
        (&v["object"], &v["status"], &v["metadata"]["a"]),
        (&json!("response"), &json!("incomplete"), &json!("b"))
    );
    assert_eq!(v["incomplete_details"]["reason"], "max_output_tokens");
    let item = &v["output"][0];
    assert_eq!((&item["type"], &item["content"][0]["type"]), (&json!("message"), &json!("output_text")));
    assert_eq!(item["content"][0]["text"], text.as_str());
    assert_eq!((&v["usage"]["input_tokens"], &v["usage"]["output_tokens"]), (&json!(8), &json!(12)));
    // Whatever form a conversation has, it is the same one.
    let parts = json!([{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]}]);
    for input in [parts, json!([{"role": "user", "content": "hello"}])] {
        let other = s.post(RESPONSES, &with(base.clone(), json!({ "input": input }))).json();
        assert_eq!(other["output"][0]["content"], item["content"], "{other}");
    }
    let events = s.events(RESPONSES, &base);
    let names: Vec<&str> = events.iter().map(|(n, _)| n.as_str()).collect();
    assert_eq!(
        names[..4],
        ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    );
    assert_eq!(
        names[names.len() - 4..],
        ["response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete"]
    );
    let deltas = events.iter().filter(|(n, _)| n == "response.output_text.delta");
    assert_eq!(deltas.filter_map(|(_, v)| v["delta"].as_str()).collect::<String>(), text);
    for (i, (_, v)) in events.iter().enumerate() {
        assert_eq!(v["sequence_number"], i);
    }
    let last = &events[events.len() - 1].1["response"];
    assert_eq!(last["output"][0]["content"], item["content"]);
    assert_eq!(last["usage"]["output_tokens"], 12);
    let stopped = s
        .post(
            RESPONSES,
            &with(
                base,
                json!({"max_output_tokens": 400, "text": {"format": {"type": "json_schema",
        "name": "x", "schema": adder(), "strict": true}}}),
            ),
        )
        .json();
    assert_eq!((&stopped["status"], &stopped["incomplete_details"]), (&json!("completed"), &Value::Null));
    let held: Value = serde_json::from_str(stopped["output"][0]["content"][0]["text"].as_str().unwrap()).unwrap();
    assert!(held["a"].is_u64());
}

#[test]
fn responses_call_tools_and_refuse_in_their_own_words() {
    let s = Server::start(Some(TOOLS), Options::default());
    let tool = json!({"type": "function", "name": "add", "parameters": adder(), "strict": true});
    let base = json!({"model": "tiny", "input": "hello", "temperature": 0, "tools": [tool], "max_output_tokens": 200});
    let forced = with(base, json!({"tool_choice": {"type": "function", "name": "add"}}));
    let v = s.post(RESPONSES, &forced).json();
    let call = &v["output"][0];
    assert_eq!(
        (&call["type"], &call["name"], &v["status"]),
        (&json!("function_call"), &json!("add"), &json!("completed"))
    );
    let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
    assert!(arguments["a"].is_u64());
    let events = s.events(RESPONSES, &forced);
    let done = events.iter().find(|(n, _)| n == "response.function_call_arguments.done").unwrap();
    assert_eq!(done.1["arguments"], call["arguments"]);
    // What was answered goes back as it is, with the result.
    let input = json!([{"role": "user", "content": "hello"}, call,
        {"type": "function_call_output", "call_id": call["call_id"], "output": "7"}]);
    let a = s.post(RESPONSES, &json!({"model": "tiny", "input": input, "max_output_tokens": 4}));
    assert_eq!(a.status, 200, "{}", a.body);
    let plain = json!({"model": "tiny", "input": "hello"});
    for (more, param) in [
        (json!({"store": true}), "store"),
        (json!({"previous_response_id": "resp_1"}), "previous_response_id"),
        (
            json!({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}),
            "input.0.content.0.type",
        ),
        (json!({"input": [{"type": "item_reference", "id": "x"}]}), "input.0.type"),
        (json!({"input": "long ".repeat(300)}), "input"),
        (json!({"max_output_tokens": 5000}), "max_output_tokens"),
        (json!({"tools": [{"type": "web_search"}]}), "tools.0.name"),
        (json!({"reasoning": {"effort": "high"}}), "reasoning.effort"),
        (
            json!({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"const": 1_234_567_890_123_456_789_i64}}}}),
            "text.format.schema.const",
        ),
        (json!({"surprise": 1}), "surprise"),
    ] {
        let e = s.post(RESPONSES, &with(plain.clone(), more.clone()));
        assert_eq!((e.error().0, e.error().1.as_str()), (400, param), "{more} {}", e.body);
    }
    assert_eq!(s.post(RESPONSES, &with(plain, json!({"model": "gpt-5"}))).error().0, 404);
}

#[test]
fn messages_whole_and_streamed() {
    let s = Server::plain();
    let base = json!({"model": "tiny", "max_tokens": 12, "temperature": 0, "messages": [{"role": "user", "content": "hello"}]});
    let text = said(&s, json!({}));
    let v = s.post(MESSAGES, &base).json();
    assert_eq!(
        (&v["type"], &v["role"], &v["stop_reason"]),
        (&json!("message"), &json!("assistant"), &json!("max_tokens"))
    );
    assert_eq!(v["content"], json!([{"type": "text", "text": text}]));
    let usage = &v["usage"];
    let read = usage["input_tokens"].as_u64().unwrap() + usage["cache_read_input_tokens"].as_u64().unwrap();
    assert_eq!((read, &usage["output_tokens"]), (8, &json!(12)));
    let stop: String = text.chars().skip(4).take(2).collect();
    let cut = s.post(MESSAGES, &with(base.clone(), json!({"stop_sequences": [stop]}))).json();
    assert_eq!((&cut["stop_reason"], &cut["stop_sequence"]), (&json!("stop_sequence"), &json!(stop)));
    assert_eq!(cut["content"][0]["text"], text[..text.find(&stop).unwrap()]);
    let events = s.events(MESSAGES, &base);
    let names: Vec<&str> = events.iter().map(|(n, _)| n.as_str()).collect();
    assert_eq!(names[..2], ["message_start", "content_block_start"]);
    assert_eq!(names[names.len() - 3..], ["content_block_stop", "message_delta", "message_stop"]);
    let deltas = events.iter().filter(|(n, _)| n == "content_block_delta");
    assert_eq!(deltas.filter_map(|(_, v)| v["delta"]["text"].as_str()).collect::<String>(), text);
    let delta = &events[events.len() - 2].1;
    assert_eq!((&delta["delta"]["stop_reason"], &delta["usage"]["output_tokens"]), (&json!("max_tokens"), &json!(12)));
    // More than there is room for is as much as there is.
    let much = with(base.clone(), json!({"max_tokens": 100_000, "stop_sequences": [stop]}));
    assert_eq!(s.post(MESSAGES, &much).json()["content"], cut["content"]);
    let counted =
        s.post("/v1/messages/count_tokens", &json!({"model": "tiny", "messages": base["messages"], "system": "x"}));
    assert_eq!(counted.json(), json!({"input_tokens": 11}), "{}", counted.body);
}

#[test]
fn messages_call_tools_and_refuse_in_their_own_words() {
    let keys = Some(Keys::parse("secret\n").unwrap());
    let s = Server::start(Some(TOOLS), Options { keys, ..Options::default() });
    let base = json!({"model": "tiny", "max_tokens": 200, "messages": [{"role": "user", "content": "hello"}]});
    let ask = |more: Value| {
        s.ask(MESSAGES, "x-api-key: secret\r\nanthropic-version: 2023-06-01\r\n", &with(base.clone(), more))
    };
    let tools = json!([{"name": "add", "description": "Adds.", "input_schema": adder()}]);
    let v = ask(json!({"tools": tools, "tool_choice": {"type": "tool", "name": "add"}, "temperature": 0})).json();
    let call = &v["content"][0];
    assert_eq!(
        (&call["type"], &call["name"], &v["stop_reason"]),
        (&json!("tool_use"), &json!("add"), &json!("tool_use"))
    );
    assert!(call["input"]["a"].is_u64(), "{v}");
    let streamed = ask(json!({"tools": tools, "tool_choice": {"type": "any"}, "temperature": 0, "stream": true})).body;
    let parts =
        streamed.lines().filter_map(|l| l.strip_prefix("data: ")).map(|l| serde_json::from_str::<Value>(l).unwrap());
    let json: String = parts.filter_map(|v| v["delta"]["partial_json"].as_str().map(str::to_owned)).collect();
    assert_eq!(serde_json::from_str::<Value>(&json).unwrap(), call["input"]);
    let back = json!([{"role": "user", "content": "hello"}, {"role": "assistant", "content": [call]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "7"}]}]}]);
    let a = ask(json!({"messages": back, "max_tokens": 4}));
    assert_eq!(a.status, 200, "{}", a.body);
    let image = json!([{"role": "user", "content": [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}]}]);
    for (more, status, kind, word) in [
        (json!({ "messages": image }), 400, "invalid_request_error", "messages.0.content.0.type"),
        (json!({"model": "claude"}), 404, "not_found_error", "claude"),
        (json!({"messages": [{"role": "assistant", "content": "It"}]}), 400, "invalid_request_error", "not continued"),
        (json!({"max_tokens": 0}), 400, "invalid_request_error", "max_tokens"),
        (json!({"thinking": {"type": "enabled", "budget_tokens": 2000}}), 400, "invalid_request_error", "'thinking'"),
        (json!({"surprise": 1}), 400, "invalid_request_error", "surprise"),
    ] {
        let a = ask(more.clone());
        let v = a.json();
        assert_eq!((a.status, &v["type"], &v["error"]["type"]), (status, &json!("error"), &json!(kind)), "{more}");
        assert!(v["error"]["message"].as_str().unwrap().contains(word), "{v}");
    }
    let unknown = s.ask(MESSAGES, "x-api-key: other\r\n", &base);
    assert_eq!((unknown.status, unknown.json()["error"]["type"].clone()), (401, json!("authentication_error")));
    assert_eq!(s.ask(CHAT, "authorization: Bearer secret\r\n", &chat(json!({}))).status, 200);
    assert_eq!(s.ask(CHAT, "authorization: Bearer no\r\nx-api-key: secret\r\n", &chat(json!({}))).error().0, 401);
}

/// The lines of a stream.
fn lines(s: &Server, path: &str, body: &Value) -> Vec<Value> {
    let a = s.post(path, body);
    assert_eq!((a.status, a.header("content-type")), (200, Some("application/x-ndjson")), "{}", a.body);
    a.body.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[test]
fn ollamas_conversations_and_texts() {
    let s = ollama();
    let text = said(&s, json!({}));
    let options = json!({"num_predict": 12, "temperature": 0, "num_ctx": 4096, "num_gpu": 1, "repeat_last_n": 64});
    let base = json!({"model": "tiny:latest", "messages": [{"role": "user", "content": "hello"}], "options": options, "keep_alive": "5m"});
    let v = s.post("/api/chat", &with(base.clone(), json!({"stream": false}))).json();
    assert_eq!((&v["model"], &v["message"]["content"]), (&json!("tiny:latest"), &json!(text)), "{v}");
    assert_eq!((&v["done"], &v["done_reason"], &v["eval_count"]), (&json!(true), &json!("length"), &json!(12)));
    assert!(
        v["total_duration"].as_u64() >= v["eval_duration"].as_u64() && v["created_at"].as_str().unwrap().ends_with('Z')
    );
    let all = lines(&s, "/api/chat", &base);
    assert_eq!(all.iter().filter_map(|l| l["message"]["content"].as_str()).collect::<String>(), text);
    let last = &all[all.len() - 1];
    assert_eq!((&last["done"], &last["eval_count"], &last["prompt_eval_count"]), (&json!(true), &json!(12), &json!(8)));
    assert!(all[..all.len() - 1].iter().all(|l| l["done"] == false));
    // Through the template, and as it is.
    let generate = json!({"model": "tiny", "prompt": "hello", "options": options, "stream": false});
    assert_eq!(s.post("/api/generate", &generate).json()["response"], text.as_str());
    let raw = lines(&s, "/api/generate", &with(generate.clone(), json!({"raw": true, "stream": true})));
    let plain = s
        .post("/v1/completions", &json!({"model": "tiny", "prompt": "hello", "max_tokens": 12, "temperature": 0}))
        .json();
    let joined: String = raw.iter().filter_map(|l| l["response"].as_str()).collect();
    assert_eq!(plain["choices"][0]["text"], joined);
    assert_eq!(s.post("/api/generate", &json!({"model": "tiny"})).json()["done_reason"], "load");
    assert_eq!(s.post("/api/chat", &json!({"model": "tiny", "messages": []})).json()["done_reason"], "load");
    let held = s
        .post(
            "/api/chat",
            &with(base.clone(), json!({"stream": false, "format": adder(), "options": {"num_predict": 90}})),
        )
        .json();
    let held: Value = serde_json::from_str(held["message"]["content"].as_str().unwrap()).unwrap();
    assert!(held["a"].is_u64());
    for (path, more, word) in [
        ("/api/chat", json!({"messages": [{"role": "user", "content": "x", "images": ["aaaa"]}]}), "images"),
        ("/api/chat", json!({"options": {"mirostat": 1}}), "mirostat"),
        ("/api/chat", json!({"options": {"repeat_penalty": 1.1, "repeat_last_n": 64}}), "repeat_last_n"),
        ("/api/chat", json!({"model": "llama3"}), "llama3"),
        ("/api/chat", json!({"think": true}), "think"),
        ("/api/generate", json!({"messages": null, "prompt": "x", "raw": true, "system": "Be brief."}), "system"),
        ("/api/generate", json!({"messages": null, "prompt": "x", "suffix": "y"}), "suffix"),
        ("/api/generate", json!({"messages": null, "prompt": "x", "context": [1]}), "context"),
    ] {
        let a = s.post(path, &with(base.clone(), more.clone()));
        let told = a.json()["error"].as_str().unwrap_or_else(|| panic!("{}", a.body)).to_owned();
        assert!(a.status >= 400 && told.contains(word), "{more} {told}");
    }
}

#[test]
fn ollamas_vectors() {
    let s = ollama();
    let same = |texts: Value| {
        let v = s.post("/v1/embeddings", &json!({"model": "tiny", "input": texts})).json();
        (v["data"].as_array().unwrap().iter().map(|d| d["embedding"].clone()).collect::<Vec<_>>(), v["usage"].clone())
    };
    let (vectors, usage) = same(json!(["hello", "Once upon a time"]));
    let options = json!({"num_ctx": 2048, "num_thread": null});
    let ask = json!({"model": "tiny:latest", "input": ["hello", "Once upon a time"], "options": options,
        "keep_alive": "5m", "truncate": true});
    let v = s.post("/api/embed", &ask).json();
    assert_eq!((&v["model"], v["embeddings"].as_array().unwrap()), (&json!("tiny:latest"), &vectors));
    assert_eq!((&v["prompt_eval_count"], &v["load_duration"]), (&usage["prompt_tokens"], &json!(0)));
    assert!(v["total_duration"].as_u64().unwrap() > 0);
    let one = s.post("/api/embed", &json!({"model": "tiny", "input": "hello"})).json();
    assert_eq!(one["embeddings"], json!([vectors[0]]));
    let old = s.post("/api/embeddings", &json!({"model": "tiny", "prompt": "hello"})).json();
    assert_eq!(old, json!({"embedding": vectors[0]}));
    // Nothing: the model is there.
    for nothing in [json!({}), json!({"input": ""}), json!({"input": []})] {
        let v = s.post("/api/embed", &with(json!({"model": "tiny"}), nothing)).json();
        assert_eq!((&v["embeddings"], &v["prompt_eval_count"]), (&json!([]), &json!(0)));
    }
    assert_eq!(s.post("/api/embeddings", &json!({"model": "tiny"})).json(), json!({"embedding": []}));
    // A text beyond the context, 1024 tokens of a letter each, is cut or refused.
    let long: String = "abcdefghij".repeat(2000);
    let cut = s.post("/api/embed", &json!({"model": "tiny", "input": long})).json();
    assert_eq!(cut["prompt_eval_count"], 1024, "{cut}");
    assert_eq!(cut["embeddings"][0], same(json!(long[..1024])).0[0]);
    assert_eq!(
        s.post("/api/embeddings", &json!({"model": "tiny", "prompt": long})).json()["embedding"],
        cut["embeddings"][0]
    );
    for (path, more, word) in [
        ("/api/embed", json!({"input": long, "truncate": false}), "1024"),
        ("/api/embed", json!({"input": &long[..1025], "truncate": false}), "1025"),
        ("/api/embed", json!({"input": [1, 2]}), "input"),
        ("/api/embed", json!({"input": ["a", ""]}), "input"),
        ("/api/embed", json!({"input": "a", "dimensions": 3}), "dimensions"),
        ("/api/embed", json!({"input": "a", "model": "other"}), "other"),
        ("/api/embeddings", json!({"input": "a"}), "input"),
        ("/api/embeddings", json!({"prompt": ["a"]}), "prompt"),
    ] {
        let a = s.post(path, &with(json!({"model": "tiny"}), more.clone()));
        let told = a.json()["error"].as_str().unwrap_or_else(|| panic!("{}", a.body)).to_owned();
        assert!(a.status >= 400 && told.contains(word), "{more} {told}");
    }
    let other = Server::start(Some(PLAIN), Options::default());
    assert_eq!(other.post("/api/embed", &json!({"model": "tiny", "input": "a"})).status, 404);
}

#[test]
fn ollamas_lists_and_tools() {
    let s = Server::start(Some(TOOLS), Options { ollama: true, ..Options::default() });
    assert!(s.get("/api/version").json()["version"].is_string());
    let tags = s.get("/api/tags").json();
    assert_eq!(
        (&tags["models"][0]["name"], tags["models"][0]["digest"].as_str().unwrap().len()),
        (&json!("tiny:latest"), 64)
    );
    assert_eq!(s.get("/api/ps").json()["models"][0]["digest"], tags["models"][0]["digest"]);
    for body in [json!({"model": "tiny"}), json!({"name": "tiny:latest"})] {
        let shown = s.post("/api/show", &body).json();
        assert_eq!(
            (&shown["capabilities"], &shown["template"]),
            (&json!(["completion", "tools"]), &json!(TOOLS)),
            "{shown}"
        );
    }
    assert_eq!(s.post("/api/show", &json!({})).status, 400);
    let tool = json!({"type": "function", "function": {"name": "add", "parameters": adder()}});
    let called = json!([{"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "1", "tool_name": "add"}]);
    let a = s.post(
        "/api/chat",
        &json!({"model": "tiny", "messages": called, "tools": [tool], "stream": false,
        "options": {"num_predict": 4}}),
    );
    assert_eq!(a.status, 200, "{}", a.body);
    // Nothing of it is there unless it was asked for.
    let other = Server::plain();
    for path in ["/api/tags", "/api/version"] {
        assert_eq!(other.get(path).status, 404);
    }
    assert!(other.get("/openapi.json").json()["paths"].get("/api/tags").is_none());
    let document = s.get("/openapi.json").json();
    for path in document["paths"].as_object().unwrap().keys() {
        assert_ne!(s.get(&path.replace("{model}", "tiny")).status, 404, "{path} is described and not there");
    }
}

#[test]
fn texts_and_tokens() {
    let s = Server::plain();
    let ids = tokenizer().encode("hello", false).unwrap();
    for body in [
        json!({"content": "hello"}),
        json!({"prompt": "hello", "add_special_tokens": false, "model": "tiny"}),
        json!({"content": "hello", "add_special": false, "parse_special": true}),
    ] {
        let v = s.post("/tokenize", &body).json();
        assert_eq!((&v["tokens"], &v["count"]), (&json!(ids), &json!(5)), "{body}");
    }
    let special = s.post("/tokenize", &json!({"prompt": "hello"})).json();
    assert_eq!(special["tokens"], json!(tokenizer().encode("hello", true).unwrap()));
    let pieces = s.post("/tokenize", &json!({"content": "he", "with_pieces": true, "return_token_strs": true})).json();
    assert_eq!((&pieces["tokens"][1]["piece"], &pieces["token_strs"]), (&json!("e"), &json!(["h", "e"])));
    let talk = s.post("/tokenize", &json!({"messages": [{"role": "user", "content": "hello"}]})).json();
    assert_eq!((&talk["count"], &talk["max_model_len"]), (&json!(8), &json!(1024)));
    let bare = json!({"messages": [{"role": "user", "content": "hello"}], "add_generation_prompt": false});
    assert_eq!(s.post("/tokenize", &bare).json()["count"], 7);
    let text = s.post("/detokenize", &json!({"tokens": talk["tokens"]})).json();
    assert_eq!(
        (&text["content"], &text["prompt"]),
        (&json!("<|im_start|>hello<|im_end|><|im_start|>"), &text["content"])
    );
    assert_eq!(s.post("/tokenize", &json!({"content": ""})).json()["tokens"], json!([]));
    for (path, body, param) in [
        ("/tokenize", json!({}), ""),
        ("/tokenize", json!({"content": "a", "prompt": "b"}), ""),
        ("/tokenize", json!({"content": "a", "parse_special": false}), "parse_special"),
        ("/detokenize", json!({"tokens": [96]}), "tokens"),
        ("/detokenize", json!({"tokens": ["a"]}), "tokens.0"),
    ] {
        assert_eq!(s.post(path, &body).error().1, param, "{body}");
    }
    let info = s.get("/tokenizer_info").json();
    assert_eq!(
        (&info["bos_token"], &info["eos_token"], &info["chat_template"]),
        (&json!("<|begin|>"), &json!("<|im_end|>"), &json!(PLAIN))
    );
}

#[test]
fn pages_of_other_origins() {
    let preflight = "OPTIONS /v1/messages HTTP/1.1\r\nhost: localhost\r\norigin: https://a.org\r\naccess-control-request-method: \
                     POST\r\naccess-control-request-headers: authorization,content-type,x-stainless-os\r\nconnection: close\r\n\r\n";
    let closed = Server::plain();
    let a = closed.raw(preflight);
    assert_eq!((a.status, a.header("access-control-allow-origin"), a.header("vary")), (405, None, None));
    let origins = Origins::parse(&["https://a.org".to_owned()]).unwrap();
    let keys = Some(Keys::parse("secret\n").unwrap());
    let s = Server::start(Some(PLAIN), Options { origins, keys, ..Options::default() });
    let a = s.raw(preflight);
    assert_eq!((a.status, a.header("access-control-allow-origin")), (204, Some("https://a.org")));
    assert_eq!(a.header("access-control-allow-headers"), Some("authorization,content-type,x-stainless-os"));
    assert!(a.header("access-control-allow-methods").unwrap().contains("POST"));
    let other = s.raw(&preflight.replace("https://a.org", "https://b.org"));
    assert_eq!((other.status, other.header("access-control-allow-origin")), (401, None), "{}", other.body);
    // Answers and refusals may be seen, by whom they are for.
    for (key, status) in [("secret", 200), ("wrong", 401)] {
        let headers = format!("origin: https://a.org\r\nauthorization: Bearer {key}\r\n");
        let a = s.ask(CHAT, &headers, &chat(json!({})));
        assert_eq!((a.status, a.header("access-control-allow-origin")), (status, Some("https://a.org")));
        assert_eq!(a.header("vary"), Some("Origin"));
    }
    let a = s.ask(CHAT, "origin: https://b.org\r\nauthorization: Bearer secret\r\n", &chat(json!({})));
    assert_eq!((a.status, a.header("access-control-allow-origin"), a.header("vary")), (200, None, Some("Origin")));
}

#[test]
fn heads_and_slashes() {
    let s = ollama();
    for path in ["/", "/v1/models", "/health", "/api/tags", "/v1/models/"] {
        let mut talk = s.connect();
        talk.send(&format!("HEAD {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"));
        let (status, headers) = talk.head();
        assert_eq!(status, 200, "{path}");
        assert!(headers.iter().any(|(n, _)| n == "content-type"));
        let mut rest = String::new();
        std::io::Read::read_to_string(&mut talk.0, &mut rest).unwrap();
        assert_eq!(rest, "", "a head has no body");
    }
    assert_eq!(s.get("/v1/models/").json()["object"], "list");
    assert_eq!(s.get("/v1/models/tiny/").json()["id"], "tiny");
    assert_eq!(s.get("/v1/models//?a=b").json()["object"], "list");
    assert_eq!(s.post("/v1/chat/completions/", &chat(json!({}))).status, 200);
    assert_eq!(s.get("//").status, 404);
    assert!(s.get("/metrics").body.contains("endpoint=\"/v1/chat/completions\",status=\"200\"} 1"));
}

/// Some clients of Ollama say no type; a page of another origin, which could do so without asking first, is refused.
#[test]
fn bodies_without_a_type() {
    let s = ollama();
    let body = json!({"model": "tiny", "prompt": "hello", "stream": false, "options": {"num_predict": 2}});
    let ask = |path: &str, headers: &str, body: &Value| {
        s.raw(&request(path, body).replacen("content-type: application/json\r\n", headers, 1)).status
    };
    assert_eq!(ask("/api/generate", "", &body), 200);
    assert_eq!(ask("/api/generate", "origin: https://a.org\r\n", &body), 415);
    // curl says a form unless told, which Ollama takes, too.
    let form = "content-type: application/x-www-form-urlencoded\r\n";
    assert_eq!(ask("/api/generate", form, &body), 200);
    assert_eq!(ask("/api/generate", &format!("{form}origin: https://a.org\r\n"), &body), 415);
    assert_eq!(ask(CHAT, form, &chat(json!({}))), 415);
    assert_eq!(ask(CHAT, "", &chat(json!({}))), 415);
}

/// Thoughts have a place in each interface.
#[test]
fn thoughts_in_every_interface() {
    let template = format!("{PLAIN}<think>");
    let s = Server::with(engine("llama"), Some(&template), Options { ollama: true, ..Options::default() });
    let v = s.post(CHAT, &chat(json!({}))).json();
    let thought = v["choices"][0]["message"]["reasoning_content"].as_str().unwrap().to_owned();
    assert!(!thought.is_empty() && v["choices"][0]["message"]["content"] == "");
    let turn = json!([{"role": "user", "content": "hello"}]);
    let v = s
        .post(RESPONSES, &json!({"model": "tiny", "input": "hello", "temperature": 0, "max_output_tokens": 12}))
        .json();
    assert_eq!(
        (&v["output"][0]["type"], &v["output"][0]["content"][0]["text"]),
        (&json!("reasoning"), &json!(thought))
    );
    assert!(v["usage"]["output_tokens_details"]["reasoning_tokens"].as_u64().unwrap() > 0);
    let body = json!({"model": "tiny", "messages": turn, "temperature": 0, "max_tokens": 12});
    let v = s.post(MESSAGES, &body).json();
    assert_eq!((&v["content"][0]["type"], &v["content"][0]["thinking"]), (&json!("thinking"), &json!(thought)));
    let events = s.events(MESSAGES, &body);
    let told: String = events.iter().filter_map(|(_, v)| v["delta"]["thinking"].as_str()).collect();
    assert_eq!(told, thought);
    let v = s.post(
        "/api/chat",
        &json!({"model": "tiny", "messages": turn, "stream": false, "options": {"temperature": 0, "num_predict": 12}}),
    );
    assert_eq!(v.json()["message"]["thinking"], thought.as_str());
}
