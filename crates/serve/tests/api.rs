//! Every endpoint over real sockets: what is answered, and what is refused.

mod common;

use common::{PLAIN, Server, TOOLS, chat, engine, planned, request, tokenizer};
use lacuna_run::{Generation, Session};
use lacuna_serve::Options;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// What the engine itself says to a chat request of one message.
fn expected(text: &str, tokens: usize) -> String {
    let mut s = Session::new(engine("llama"), tokenizer());
    let prompt = tokenizer().encode(&format!("<|im_start|>{text}<|im_end|><|im_start|>"), false).unwrap();
    let g = Generation { prompt, max_tokens: tokens, ..Generation::default() };
    s.generate(&g, &mut |_| std::ops::ControlFlow::Continue(())).unwrap().text
}

#[test]
fn a_chat_whole_and_streamed() {
    let s = Server::plain();
    let whole = s.post(CHAT, &chat(json!({}))).json();
    let text = expected("hello", 12);
    assert_eq!(whole["choices"][0]["message"], json!({"role": "assistant", "content": text, "refusal": null}));
    assert_eq!((&whole["object"], &whole["model"]), (&json!("chat.completion"), &json!("tiny")));
    assert_eq!(whole["usage"]["prompt_tokens"], 8);
    assert_eq!(whole["usage"]["total_tokens"], 8 + whole["usage"]["completion_tokens"].as_u64().unwrap());
    assert!(whole["id"].as_str().unwrap().starts_with("chatcmpl-"));

    let chunks = s.stream(CHAT, &chat(json!({"stream_options": {"include_usage": true}})));
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let said: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(said, text);
    assert!(chunks.len() > 5, "it comes in pieces");
    let (usage, last) = (&chunks[chunks.len() - 1], &chunks[chunks.len() - 2]);
    assert_eq!((&usage["choices"], &usage["usage"]["prompt_tokens"]), (&json!([]), &json!(8)));
    assert_eq!(last["choices"][0]["finish_reason"], whole["choices"][0]["finish_reason"]);
    assert!(chunks.iter().all(|c| c["object"] == "chat.completion.chunk" && c["id"] == chunks[0]["id"]));
    assert!(chunks[..chunks.len() - 1].iter().all(|c| c["usage"].is_null()));
}

/// What is said comes as a text or in pieces, and goes to the template as the template takes it.
#[test]
fn contents_reach_templates_of_texts_and_of_parts() {
    const PARTS: &str = "{% for m in messages %}<|im_start|>{% for p in m.content %}{{ p.text }}{% endfor \
     %}<|im_end|>{% endfor \
        %}{% if add_generation_prompt %}<|im_start|>{% endif %}";
    let pieces = json!([{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]);
    for template in [PLAIN, PARTS] {
        let s = Server::start(Some(template), Options::default());
        for content in [json!("hello"), pieces.clone()] {
            let whole = s.post(CHAT, &chat(json!({"messages": [{"role": "user", "content": content}]}))).json();
            assert_eq!(whole["choices"][0]["message"]["content"], expected("hello", 12).as_str(), "{template} {whole}");
            assert_eq!(whole["usage"]["prompt_tokens"], 8);
        }
    }
    let s = Server::start(
        Some("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"),
        Options::default(),
    );
    let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]);
    let answer = s.post(CHAT, &chat(json!({ "messages": messages })));
    assert_eq!(answer.status, 400);
    let told = answer.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(told.contains("leaves out what 'system' says"), "{told}");
}

#[test]
fn company_changes_nothing_over_http() {
    let s = Server::start(Some(PLAIN), Options { batch: 6, prefill_rows: 13, ..Options::default() });
    let words = ["hello", "what is this", "hello again", "a", "hello", "tell me something long and old"];
    let answers: Vec<String> = std::thread::scope(|scope| {
        let all: Vec<_> = words
            .iter()
            .map(|w| {
                let body = chat(json!({"messages": [{"role": "user", "content": w}], "max_tokens": 30}));
                let s = &s;
                scope.spawn(move || {
                    s.post(CHAT, &body).json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
                })
            })
            .collect();
        all.into_iter().map(|t| t.join().unwrap()).collect()
    });
    for (w, a) in words.iter().zip(answers) {
        assert_eq!(a, expected(w, 30), "{w}");
    }
}

#[test]
fn seeds_n_and_stop() {
    let s = Server::plain();
    let drawn = |seed: i64, n: u64| {
        let v = s.post(CHAT, &chat(json!({"temperature": 1, "seed": seed, "n": n, "max_tokens": 20}))).json();
        let all = v["choices"].as_array().unwrap().iter().enumerate().map(|(i, c)| {
            assert_eq!(c["index"], i);
            c["message"]["content"].as_str().unwrap().to_owned()
        });
        (all.collect::<Vec<String>>(), v["usage"].clone())
    };
    let (three, usage) = drawn(7, 3);
    assert_eq!(three.len(), 3);
    assert!(three[0] != three[1] && three[1] != three[2]);
    assert_eq!(usage["prompt_tokens"], 8, "the prompt counts once");
    assert_eq!(drawn(8, 2).0, three[1..], "seeds count up");
    assert_eq!(drawn(-9_223_372_036_854_775_808, 1).0, drawn(-9_223_372_036_854_775_808, 1).0);
    let text = expected("hello", 12);
    let stop: String = text.chars().skip(4).take(2).collect();
    let cut = s.post(CHAT, &chat(json!({"stop": ["never in here", stop]}))).json();
    assert_eq!(cut["choices"][0]["message"]["content"], text[..text.find(&stop).unwrap()]);
    assert_eq!(cut["choices"][0]["finish_reason"], "stop");
    let biased = s.post(CHAT, &chat(json!({"logit_bias": {"40": 100}, "max_tokens": 5}))).json();
    assert_eq!(biased["choices"][0]["message"]["content"], tokenizer().decode(&[40; 5]));
    assert_eq!(biased["choices"][0]["finish_reason"], "length");
}

#[test]
fn probabilities_in_both_shapes() {
    let s = Server::plain();
    let v = s.post(CHAT, &chat(json!({"logprobs": true, "top_logprobs": 2}))).json();
    let content = v["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let joined: String = content.iter().map(|t| t["token"].as_str().unwrap()).collect();
    assert_eq!(v["choices"][0]["message"]["content"], joined);
    for t in content {
        assert_eq!(t["top_logprobs"].as_array().unwrap().len(), 2);
        assert_eq!(t["top_logprobs"][0]["token"], t["token"]);
        assert_eq!(t["bytes"].as_array().unwrap().len(), t["token"].as_str().unwrap().len());
    }
    let chunks = s.stream(CHAT, &chat(json!({"logprobs": true})));
    let streamed: usize =
        chunks.iter().filter_map(|c| c["choices"][0]["logprobs"]["content"].as_array()).map(Vec::len).sum();
    assert_eq!(streamed, content.len());

    let body = json!({"model": "tiny", "prompt": "hello", "max_tokens": 9, "temperature": 0, "logprobs": 3});
    let v = s.post(TEXT, &body).json();
    let (text, l) = (v["choices"][0]["text"].as_str().unwrap(), &v["choices"][0]["logprobs"]);
    assert_eq!(l["tokens"].as_array().unwrap().len(), 9);
    for (token, at) in l["tokens"].as_array().unwrap().iter().zip(l["text_offset"].as_array().unwrap()) {
        assert!(text[at.as_u64().unwrap() as usize..].starts_with(token.as_str().unwrap()));
    }
    assert_eq!(l["top_logprobs"][4].as_object().unwrap().len(), 3);
    let mut offsets = Vec::new();
    for c in s.stream(TEXT, &body) {
        offsets.extend(c["choices"][0]["logprobs"]["text_offset"].as_array().cloned().unwrap_or_default());
    }
    assert_eq!(Value::from(offsets), l["text_offset"]);
}

#[test]
fn completions_of_texts_and_tokens() {
    let s = Server::plain();
    let ask = |prompt: Value| {
        s.post(TEXT, &json!({"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0})).json()
    };
    let ids = tokenizer().encode("hello", true).unwrap();
    let one = ask(json!("hello"));
    assert_eq!(one["choices"][0]["text"], ask(json!(ids))["choices"][0]["text"]);
    let two = ask(json!(["hello", "other"]));
    assert_eq!(two["choices"].as_array().unwrap().len(), 2);
    assert_eq!(two["choices"][0]["text"], one["choices"][0]["text"]);
    assert_eq!(two["choices"][1]["text"], ask(json!("other"))["choices"][0]["text"]);
    let both = ask(json!([ids, [5, 6, 7]]));
    assert_eq!(both["choices"][0]["text"], one["choices"][0]["text"]);
    let said: String = s
        .stream(TEXT, &json!({"model": "tiny", "prompt": "hello", "max_tokens": 6, "temperature": 0}))
        .iter()
        .filter_map(|c| c["choices"][0]["text"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(one["choices"][0]["text"], said);
    assert_eq!(
        s.post(TEXT, &json!({"model": "tiny", "prompt": "x", "logit_bias": {"2": -100}})).json()["usage"]["completion_tokens"],
        16
    );
}

#[test]
fn vectors_as_numbers_and_as_bytes() {
    let s = Server::plain();
    let ask = |more: Value| {
        let mut v = json!({"model": "tiny", "input": ["hello", "other text"]});
        v.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let a = s.post("/v1/embeddings", &v);
        assert_eq!(a.status, 200, "{}", a.body);
        a.json()
    };
    let mean = ask(json!({}));
    let first: Vec<f32> = serde_json::from_value(mean["data"][0]["embedding"].clone()).unwrap();
    assert!((first.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-4);
    assert_eq!((mean["data"][1]["index"].as_u64(), mean["usage"]["prompt_tokens"].as_u64()), (Some(1), Some(15)));
    assert_eq!(ask(json!({"pooling": "mean"}))["data"], mean["data"]);
    let last = ask(json!({"pooling": "last"}));
    assert_ne!(last["data"][0]["embedding"], mean["data"][0]["embedding"]);
    // Four bytes a number, little end first.
    let coded = ask(json!({"encoding_format": "base64"}));
    let text = coded["data"][0]["embedding"].as_str().unwrap();
    let code = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bits, mut n, mut bytes) = (0u32, 0, Vec::new());
    for c in text.trim_end_matches('=').bytes() {
        (bits, n) = (bits << 6 | code.iter().position(|&x| x == c).unwrap() as u32, n + 6);
        if n >= 8 {
            n -= 8;
            bytes.push((bits >> n) as u8);
        }
    }
    let numbers: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(numbers, first);
}

#[test]
fn answers_are_held_to_json() {
    let s = Server::plain();
    let schema = json!({
        "type": "object", "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["ok", "n"], "additionalProperties": false,
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
    for seed in 0..5 {
        let v = s
            .post(CHAT, &chat(json!({"response_format": format, "max_tokens": 60, "temperature": 1, "seed": seed})))
            .json();
        let said: Value = serde_json::from_str(v["choices"][0]["message"]["content"].as_str().unwrap()).unwrap();
        assert!(said["ok"].is_boolean() && (1..=9).contains(&said["n"].as_i64().unwrap()), "{said}");
        assert_eq!(v["choices"][0]["finish_reason"], "stop");
    }
    let v = s.post(CHAT, &chat(json!({"response_format": {"type": "json_object"}, "logit_bias": {"95": 8}, "max_tokens": 900, "temperature": 1, "seed": 3}))).json();
    let c = &v["choices"][0];
    let said = c["message"]["content"].as_str().unwrap();
    assert!(said.starts_with('{'), "{said}");
    if c["finish_reason"] == "stop" {
        assert!(serde_json::from_str::<Value>(said).unwrap().is_object());
    }
    for bad in [json!({"type": "nonsense"}), json!({"$ref": "https://example.com/a.json"})] {
        let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": bad}});
        let e = s.post(CHAT, &chat(json!({"response_format": format}))).error();
        assert_eq!((e.0, e.1.as_str()), (400, "response_format"));
    }
}

#[test]
fn tools_are_called_where_they_must_be() {
    let tool = json!({"type": "function", "function": {"name": "add", "parameters": {
        "type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["a"], "additionalProperties": false}}});
    let other = json!({"type": "function", "function": {"name": "now"}});
    for template in [PLAIN, TOOLS] {
        let s = Server::start(Some(template), Options::default());
        let named = json!({"type": "function", "function": {"name": "add"}});
        let body = chat(json!({"tools": [tool, other], "tool_choice": named, "max_tokens": 200}));
        let v = s.post(CHAT, &body).json();
        let c = &v["choices"][0];
        assert_eq!((&c["finish_reason"], &c["message"]["content"]), (&json!("tool_calls"), &Value::Null), "{v}");
        let call = &c["message"]["tool_calls"][0];
        assert_eq!((&call["type"], &call["function"]["name"]), (&json!("function"), &json!("add")));
        let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
        assert!((0..=9).contains(&arguments["a"].as_i64().unwrap()));
        let chunks = s.stream(CHAT, &body);
        let last = &chunks[chunks.len() - 1]["choices"][0];
        assert_eq!(last["finish_reason"], "tool_calls");
        assert_eq!(last["delta"]["tool_calls"][0]["function"], call["function"]);
        assert_eq!(last["delta"]["tool_calls"][0]["index"], 0);
        // The result goes back.
        let more = json!({"messages": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": "7"},
        ]});
        assert_eq!(s.post(CHAT, &chat(more)).status, 200);
        // A result of a call that nobody made.
        for messages in [
            json!([{"role": "user", "content": "hello"}, {"role": "tool", "tool_call_id": "call_1", "content": "7"}]),
            json!([{"role": "user", "content": "hello"}, {"role": "assistant", "content": null, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": "7"}]),
        ] {
            let a = s.post(CHAT, &chat(json!({ "messages": messages })));
            assert_eq!((a.status, a.json()["error"]["param"].as_str()), (400, Some("messages")), "{}", a.body);
            assert!(a.body.contains("call_1"), "{}", a.body);
        }
        let auto = s.post(CHAT, &chat(json!({"tools": [tool]})));
        if template == PLAIN {
            assert_eq!(auto.error(), (400, "tools".into(), "unsupported_parameter".into()));
        } else {
            assert_eq!(auto.status, 200);
        }
    }
}

/// Null, and what is done anyway, count as absent: the answer is the same.
#[test]
fn what_is_done_anyway_may_be_asked_for() {
    let s = Server::plain();
    let with = |mut body: Value, more: &Value| {
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let same = |path: &str, base: &Value, all: &[Value], of: &dyn Fn(&Value) -> Value| {
        let expected = of(&s.post(path, base).json());
        assert!(!expected.is_null());
        for more in all {
            let a = s.post(path, &with(base.clone(), more));
            assert_eq!((a.status, of(&a.json())), (200, expected.clone()), "{more}: {}", a.body);
        }
    };
    let chats = [
        json!({"audio": null, "frequency_penalty": null, "function_call": null, "functions": null, "logit_bias": null,
            "logprobs": null, "max_completion_tokens": null, "metadata": null, "modalities": null, "moderation": null, "n": null,
            "parallel_tool_calls": null, "prediction": null, "presence_penalty": null, "prompt_cache_key": null,
            "prompt_cache_options": null, "prompt_cache_retention": null, "reasoning_effort": null, "response_format": null,
            "safety_identifier": null, "seed": null, "service_tier": null, "stop": null, "store": null, "stream": null,
            "stream_options": null, "tool_choice": null, "tools": null, "top_logprobs": null, "top_p": null, "user": null,
            "verbosity": null, "web_search_options": null}),
        json!({"frequency_penalty": 0, "presence_penalty": 0, "n": 1, "top_p": 1, "stream": false, "logprobs": false}),
        json!({"top_logprobs": 0, "logit_bias": {}, "stop": [], "response_format": {"type": "text"}, "max_completion_tokens": 12}),
        json!({"store": false, "metadata": {}, "modalities": ["text"], "service_tier": "auto", "verbosity": "medium"}),
        json!({"service_tier": "default", "function_call": "none", "functions": [], "tools": []}),
        json!({"tool_choice": "auto", "parallel_tool_calls": true}),
        json!({"tool_choice": "none", "parallel_tool_calls": false}),
        json!({"stream_options": {"include_usage": false, "include_obfuscation": false}, "prompt_cache_options": {"mode": "implicit"}}),
        json!({"prompt_cache_key": "k", "prompt_cache_retention": "in_memory", "safety_identifier": "s", "user": "u"}),
        json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "hello", "prompt_cache_breakpoint": null}], "name": null}]}),
    ];
    same(CHAT, &chat(json!({})), &chats, &|v| v["choices"][0]["message"].clone());
    let base = json!({"model": "tiny", "prompt": "hello", "max_tokens": 6, "temperature": 0, "n": 2});
    let texts = [
        json!({"best_of": null, "echo": null, "frequency_penalty": null, "logit_bias": null, "logprobs": null,
            "presence_penalty": null, "seed": null, "stop": null, "stream": null, "stream_options": null, "suffix": null,
            "top_p": null, "user": null}),
        json!({"best_of": 2, "echo": false, "suffix": "", "stream_options": {}}),
        json!({"n": 1, "best_of": 1}),
    ];
    same(TEXT, &base, &texts, &|v| v["choices"][0]["text"].clone());
    let base = json!({"model": "tiny", "input": "hello"});
    let width = s.post("/v1/embeddings", &base).json()["data"][0]["embedding"].as_array().unwrap().len();
    let vectors = [
        json!({"dimensions": null, "encoding_format": null, "pooling": null, "user": null}),
        json!({"dimensions": width, "encoding_format": "float"}),
    ];
    same("/v1/embeddings", &base, &vectors, &|v| v["data"].clone());
}

/// What the official client makes of an answer goes back as it is.
#[test]
fn answers_go_back_as_clients_keep_them() {
    let dumped = |content: &str| {
        json!({"content": content, "refusal": null, "role": "assistant", "annotations": null, "audio": null,
            "function_call": null, "tool_calls": null})
    };
    // A template that looks at what is there, not at what it is worth.
    let strict = "{% if tools %}{% endif %}{% for m in messages %}{% for k in m %}{{ k }},{% endfor %}{{ m.tool_calls \
     }}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>";
    for template in [PLAIN, strict, TOOLS] {
        let s = Server::start(Some(template), Options::default());
        let ask = |message: Value| {
            let user = json!({"role": "user", "content": "hello"});
            let a = s.post(CHAT, &chat(json!({"messages": [user, message, user]})));
            assert_eq!(a.status, 200, "{}", a.body);
            let v = a.json();
            (v["choices"][0]["message"]["content"].clone(), v["usage"]["prompt_tokens"].clone())
        };
        let plain = ask(json!({"content": "hi", "role": "assistant"}));
        let mut more = dumped("hi");
        assert_eq!(ask(more.clone()), plain);
        more["annotations"] = json!([]);
        more["tool_calls"] = json!([]);
        more["parsed"] = json!({"x": [null, 1]});
        assert_eq!(ask(more), plain);
        let call = |more: Value| {
            let mut function = json!({"name": "add", "arguments": "{\"a\": 1}"});
            function.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json!([{"id": "c", "function": function, "type": "function"}])
        };
        let mut calls = dumped("");
        calls["content"] = Value::Null;
        calls["tool_calls"] = call(json!({"parsed_arguments": {"a": 1}}));
        calls["tool_calls"][0]["index"] = 0.into();
        assert_eq!(ask(calls), ask(json!({"content": "", "role": "assistant", "tool_calls": call(json!({}))})));
    }
}

/// Numbers of any length come back as they are, or are refused by name.
#[test]
fn numbers_are_exact_or_refused() {
    let s = Server::start(Some(TOOLS), Options::default());
    let held = |n: &str| {
        let schema: Value = serde_json::from_str(&format!(
            "{{\"properties\": {{\"id\": {{\"const\": {n}}}}}, \
         \"required\": [\"id\"], \"type\": \"object\", \"additionalProperties\": false}}"
        ))
        .unwrap();
        chat(
            json!({"max_tokens": 80, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}),
        )
    };
    let said = s.post(CHAT, &held("1152921504606846976")).json();
    assert_eq!(said["choices"][0]["message"]["content"], "{\"id\": 1152921504606846976}");
    let e = s.post(CHAT, &held("1234567890123456789"));
    assert_eq!(e.error().1, "response_format.json_schema.schema.properties.id.const");
    assert!(e.body.contains("1234567890123456789"), "{}", e.body);
    let tool = |schema: Value| {
        let tools = json!([{"type": "function", "function": {"name": "now"}}, {"type": "function", "function": {"name": "add", "parameters": schema}}]);
        chat(json!({"tools": tools, "tool_choice": "required", "max_tokens": 200}))
    };
    let bounds =
        json!({"type": "object", "properties": {"a": {"type": "integer", "maximum": u64::MAX}}, "required": ["a"]});
    let forced = tool(bounds);
    assert_eq!(s.post(CHAT, &forced).error().1, "tools.1.function.parameters.properties.a.maximum");
    // Where nothing is held to it, the schema is text for the model.
    let mut free = forced.clone();
    free["tool_choice"] = "auto".into();
    assert_eq!(s.post(CHAT, &free).status, 200);
    // No value holds this one.
    let long = free.to_string().replace("18446744073709551615", "118446744073709551615");
    let raw = |body: &str| {
        s.raw(&format!(
            "POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: \
         close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        ))
    };
    assert_eq!(raw(&long).error().1, "tools.1.function.parameters.properties.a.maximum");
    // What a model wrote before goes into the prompt digit by digit.
    let show = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments }}{% endfor %}{% endfor %}{% \
     if tools %}{% endif %}";
    let s = Server::start(Some(show), Options::default());
    let tokens = |arguments: &str| {
        let call = json!({"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}});
        let v = s
            .post(CHAT, &chat(json!({"messages": [{"role": "assistant", "content": null, "tool_calls": [call]}]})))
            .json();
        v["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    assert_eq!(tokens("{\"a\":123456789012345678901234567890}"), tokens("{\"a\":12345678901234567890123456789}") + 1);
}

#[test]
fn whatever_is_wrong_is_said_in_openais_shape() {
    let s = Server::plain();
    for (more, status, param) in [
        (json!({"model": "gpt-4"}), 404, "model"),
        (json!({"temperature": 9}), 400, "temperature"),
        (json!({"store": true}), 400, "store"),
        (json!({"surprise": 1}), 400, "surprise"),
        (json!({"n": 17}), 400, "n"),
        (json!({"max_tokens": 0}), 400, "max_tokens"),
        (json!({"max_tokens": 5000}), 400, "max_tokens"),
        (json!({"max_completion_tokens": 5}), 400, "max_tokens"),
        (json!({"messages": null}), 400, "messages"),
        (json!({"reasoning_effort": "low"}), 400, "reasoning_effort"),
        (json!({"service_tier": "flex"}), 400, "service_tier"),
        (json!({"verbosity": "low"}), 400, "verbosity"),
        (json!({"web_search_options": {}}), 400, "web_search_options"),
        (json!({"functions": [{"name": "f"}]}), 400, "functions"),
        (json!({"prompt_cache_retention": "24h"}), 400, "prompt_cache_retention"),
        (json!({"tool_choice": {"type": "function", "function": {"name": "f"}}}), 400, "tool_choice"),
        (json!({"stream_options": {"include_usage": true}}), 400, "stream_options"),
        (json!({"top_logprobs": 2}), 400, "top_logprobs"),
        (json!({"logit_bias": {"96": 1}}), 400, "logit_bias.96"),
        (json!({"logit_bias": {"x": 1}}), 400, "logit_bias.x"),
        (json!({"tool_choice": "required"}), 400, "tool_choice"),
        (json!({"messages": [{"role": "user", "content": "long ".repeat(300)}]}), 400, "messages"),
        (json!({"top_p": 1e-60}), 400, "top_p"),
        (json!({"messages": "hello"}), 400, "messages"),
    ] {
        let e = s.post(CHAT, &chat(more.clone())).error();
        assert_eq!((e.0, e.1.as_str()), (status, param), "{more}");
    }
    for (body, param) in [
        (json!({"model": "tiny"}), "prompt"),
        (json!({"model": "tiny", "prompt": ""}), "prompt"),
        (json!({"model": "tiny", "prompt": []}), "prompt"),
        (json!({"model": "tiny", "prompt": [96]}), "prompt"),
        (json!({"model": "tiny", "prompt": ["a", 1]}), "prompt"),
        (json!({"model": "tiny", "prompt": "a", "echo": 1}), "echo"),
        (json!({"model": "tiny", "prompt": "a", "suffix": "b"}), "suffix"),
        (json!({"model": "tiny", "prompt": "a", "best_of": 2}), "best_of"),
        (json!({"model": "tiny", "prompt": "a", "best_of": 1, "n": 2}), "best_of"),
        (json!({"model": "tiny", "prompt": null}), "prompt"),
        (json!({"model": "tiny", "prompt": "a", "logprobs": 6}), "logprobs"),
        (json!({"prompt": "a"}), "model"),
    ] {
        let e = s.post(TEXT, &body).error();
        assert_eq!((e.0, e.1.split('.').next().unwrap()), (400, param), "{body}");
    }
    let e = s.post("/v1/embeddings", &json!({"model": "tiny", "input": "a", "dimensions": 3})).error();
    assert_eq!((e.0, e.1.as_str(), e.2.as_str()), (400, "dimensions", "unsupported_parameter"));
    assert_eq!(s.get("/v1/nothing").error().0, 404);
    let wrong = s.get(CHAT);
    assert_eq!((wrong.error().0, wrong.header("allow")), (405, Some("POST")));
    let post = |kind: &str, body: &str| {
        s.raw(&format!(
            "POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n{kind}connection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        ))
    };
    assert_eq!(post("", "{}").error().0, 415);
    assert_eq!(post("content-type: text/plain\r\n", "{}").error().0, 415);
    for broken in ["", "{", "nonsense", "{\"model\": \"tiny\", \"messages\": \u{1}}", &"[".repeat(100_000)] {
        assert_eq!(post("content-type: application/json\r\n", broken).error().0, 400);
    }
    assert_eq!(post("content-type: application/json; charset=utf-8\r\n", "[]").error().0, 400);
    let no_chat = Server::start(None, Options::default());
    assert_eq!(no_chat.post(CHAT, &chat(json!({}))).error().2, "unsupported_parameter");
    assert_eq!(no_chat.post(TEXT, &json!({"model": "tiny", "prompt": "a"})).status, 200);
}

/// What runs beside the model is told, and what is drafted changes no answer.
#[test]
fn a_run_plan_is_told_and_drafts_change_nothing() {
    let mut plan = lacuna_run::RunPlan::none();
    plan.flag("draft", "copyspec", &lacuna_methods::registry()).unwrap();
    let (plain, drafting) =
        (Server::plain(), Server::with(engine("llama").with_plan(plan), Some(PLAIN), Options::default()));
    for seed in 0..3 {
        let ask = chat(json!({"max_tokens": 60, "temperature": seed as f64 / 2.0, "seed": seed, "logprobs": true}));
        let [a, b] = [&plain, &drafting].map(|s| s.post(CHAT, &ask).json()["choices"].clone());
        assert_eq!(a, b);
    }
    assert!(plain.get("/v1/models/tiny").json().get("run").is_none());
    for model in [drafting.get("/v1/models/tiny").json(), drafting.get("/v1/models").json()["data"][0].clone()] {
        assert_eq!(
            (&model["run"]["lossless"], &model["run"]["methods"][0]["method"]),
            (&json!(true), &json!("copyspec"))
        );
    }
    let metrics = drafting.get("/metrics").body;
    assert!(
        metrics.contains("lacuna_run_plan_info{question=\"draft\",method=\"copyspec\",keys=\"\"} 1\n"),
        "{metrics}"
    );
    assert!(metrics.contains("lacuna_draft_tokens_total{kind=\"verified\"}"));
}

/// A gate is told as an approximation, and what it left unread is counted; all kept changes no answer.
#[test]
fn a_gate_is_told_and_counted() {
    let server = |by: &str| {
        let mut plan = lacuna_run::RunPlan::none();
        plan.flag("gate", by, &lacuna_methods::registry()).unwrap();
        Server::with(planned("llama", plan), Some(PLAIN), Options::default())
    };
    let (plain, all, half) = (Server::plain(), server("wina:keep=1.0"), server("wina:keep=0.3"));
    let ask = chat(json!({"max_tokens": 40, "temperature": 0, "logprobs": true}));
    let [a, b, c] = [&plain, &all, &half].map(|s| s.post(CHAT, &ask).json()["choices"].clone());
    assert!(a == b && a != c, "{a} {c}");
    // In company as alone.
    let together: Vec<_> = std::thread::scope(|scope| {
        let asked: Vec<_> = (0..4).map(|_| scope.spawn(|| half.post(CHAT, &ask).json()["choices"].clone())).collect();
        asked.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(together.iter().all(|t| *t == c));
    let run = half.get("/v1/models/tiny").json()["run"].clone();
    assert_eq!((&run["lossless"], &run["methods"][0]["question"]), (&json!(false), &json!("gate")));
    assert_eq!(run["methods"][0]["keys"]["keep"], json!(0.3));
    let metrics = half.get("/metrics").body;
    assert!(
        metrics.contains("lacuna_run_plan_info{question=\"gate\",method=\"wina\",keys=\"keep=0.3\"} 1\n"),
        "{metrics}"
    );
    let count = |kind: &str| -> u64 {
        let line =
            metrics.lines().find_map(|l| l.strip_prefix(&format!("lacuna_gate_bytes_total{{kind=\"{kind}\"}} ")));
        line.unwrap().parse().unwrap()
    };
    assert!(count("read") > 0 && count("read") < count("all"), "{metrics}");
}

#[test]
fn models_page_document_health_and_metrics() {
    let s = Server::plain();
    let list = s.get("/v1/models").json();
    assert_eq!((&list["data"][0]["id"], &list["data"][0]["object"]), (&json!("tiny"), &json!("model")));
    assert_eq!(s.get("/v1/models/tiny").json()["id"], "tiny");
    assert_eq!(s.get("/v1/models/other").error().2, "model_not_found");
    let document = s.get("/openapi.json").json();
    assert_eq!(document["components"]["schemas"]["ModelName"]["enum"], json!(["tiny"]));
    for path in document["paths"].as_object().unwrap().keys() {
        let path = path.replace("{model}", "tiny");
        assert_ne!(s.get(&path).status, 404, "{path} is described and not there");
    }
    assert_eq!(s.get("/health/live").status, 200);
    assert_eq!(s.get("/health").json(), json!({"status": "ok"}));
    assert_eq!(s.get("/health/ready").json()["status"], "ready");
    for path in ["/", "/assets/app.js", "/assets/app.css", "/assets/icon.svg"] {
        let page = s.get(path);
        assert_eq!(page.status, 200);
        assert!(page.header("content-security-policy").unwrap().contains("default-src 'none'"));
        assert_eq!(page.header("x-content-type-options"), Some("nosniff"));
        assert!(!page.body.contains("https://") && !page.body.contains("innerHTML"), "{path} asks nobody outside");
    }
    s.post(CHAT, &chat(json!({})));
    s.post(CHAT, &chat(json!({"n": 99})));
    let text = s.get("/metrics").body;
    for line in [
        "lacuna_requests_total{endpoint=\"/v1/chat/completions\",status=\"200\"} 1",
        "lacuna_requests_total{endpoint=\"/v1/chat/completions\",status=\"400\"} 1",
        "lacuna_time_to_first_token_seconds_count 1",
        "lacuna_tokens_total{kind=\"prompt\"} 8",
        "lacuna_queue_length 0",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    let live = s.get("/api/live").json();
    assert!(live["generated_tokens"].as_u64().unwrap() > 0 && live["kv"]["total"].as_u64().unwrap() > 0);
    assert_eq!(s.get("/api/card").json()["model"], "tiny");
    // One connection, several requests.
    let mut talk = s.connect();
    for _ in 0..2 {
        talk.send(&request(CHAT, &chat(json!({}))).replace("connection: close\r\n", ""));
        assert_eq!(talk.answer().status, 200);
    }
}

/// Networks with recurrent mixers: the same answers alone, in company, and from a snapshot of an earlier text.
#[test]
fn networks_with_a_state_are_served_like_others() {
    for name in ["lfm2", "qwen3_5", "mamba2"] {
        let of = |options: Options| Server::with(common::engine(name), Some(PLAIN), options);
        let ask = |i: usize| {
            let prompt = format!("{}{}", "so it goes on and on, ".repeat(4), "abcdefgh".split_at(i).0);
            json!({ "model": "tiny", "prompt": prompt, "max_tokens": 9, "temperature": 0, "seed": 1 })
        };
        let (alone, s) = (
            of(Options { batch: 1, ..Options::default() }),
            of(Options { batch: 8, prefill_rows: 11, ..Options::default() }),
        );
        let text = |v: &Value| v["choices"][0]["text"].as_str().unwrap().to_owned();
        let want: Vec<String> = (0..8).map(|i| text(&alone.post("/v1/completions", &ask(i)).json())).collect();
        for round in 0..2 {
            let said: Vec<Value> = std::thread::scope(|scope| {
                let asked: Vec<_> = (0..8)
                    .map(|i| {
                        scope.spawn({
                            let s = &s;
                            move || s.post("/v1/completions", &ask(i)).json()
                        })
                    })
                    .collect();
                asked.into_iter().map(|a| a.join().unwrap()).collect()
            });
            assert_eq!(said.iter().map(text).collect::<Vec<_>>(), want, "{name}");
            let cached = |v: &Value| v["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
            assert!(round == 0 || said.iter().all(|v| cached(v) >= 64), "{name}: {said:?}");
        }
        alone.end();
        s.end();
    }
}
