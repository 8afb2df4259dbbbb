//! Answers in channels, as GPT-OSS writes them.

mod common;

use common::{PLAIN, Server, chat, engine};
use lacuna_checkpoint::{TokenKind, Tokenizer, Vocabulary};
use lacuna_serve::Options;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
/// The marks, in place of rare signs.
const MARKS: [(u32, &str); 6] = [
    (62, "<|channel|>"),
    (63, "<|message|>"),
    (64, "<|start|>"),
    (65, "<|return|>"),
    (66, "<|end|>"),
    (67, "<|call|>"),
];

fn marking() -> Tokenizer {
    let mut tokens: Vec<String> = ["<|begin|>", "<|im_start|>", "<|im_end|>", "Ċ", "Ġ"].map(String::from).to_vec();
    tokens.extend(('!'..='~').filter(|c| !"~|`".contains(*c)).map(String::from));
    for (id, mark) in MARKS {
        tokens[id as usize] = mark.into();
    }
    let special = |id: u32| id < 3 || MARKS.iter().any(|m| m.0 == id);
    let v = Vocabulary {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        tokens,
        kinds: (0..96).map(|id| if special(id) { TokenKind::Control } else { TokenKind::Normal }).collect(),
        bos: Some(0),
        eos: Some(2),
        ..Vocabulary::default()
    };
    Tokenizer::from_vocabulary(v).unwrap()
}

fn server(template: &str) -> Server {
    Server::reading(marking(), engine("llama"), Some(template), Options::default())
}

/// A part's end does not end the answer; a call and a return do.
#[test]
fn answers_end_where_they_return() {
    assert_eq!(marking().eos_set(), [2, 65, 67]);
}

/// One server knows the marks, the other shows them: the text is the same, and told in two parts, by every interface.
#[test]
fn channels_are_told_apart_whole_and_streamed() {
    let marked = server(&format!("{PLAIN}<|channel|>analysis<|message|>"));
    // It shows marks where it looks for calls.
    let hidden =
        "{% if tools and 0 %}<tool_call>{% endif %}".to_owned() + PLAIN + "{{ '<|chan' ~ 'nel|>analysis<|message|>' }}";
    let shown = server(&hidden);
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let (mut parted, mut cut) = (0, 0);
    for seed in 0..12 {
        let bias = json!({"66": 1.5, "62": -100, "63": -100, "64": -100, "65": -100, "67": -100, "2": -100});
        let ask = json!({"logit_bias": bias, "max_tokens": 40, "temperature": 1, "seed": seed});
        let mut with = ask.clone();
        with["tools"] = tools.clone();
        // The tools are not in the prompt of the template that shows them here.
        let text =
            shown.post(CHAT, &chat(with)).json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
        let (thought, said) = match text.split_once("<|end|>") {
            Some((thought, said)) => {
                parted += 1;
                (thought, said.replace("<|end|>", ""))
            }
            None => {
                cut += 1;
                (text.as_str(), String::new())
            }
        };
        let whole = marked.post(CHAT, &chat(ask.clone())).json();
        let told = &whole["choices"][0]["message"];
        let found = told.get("reasoning_content").map_or("", |v| v.as_str().unwrap());
        assert_eq!(found, thought, "{text}");
        let without = |t: &str| t.chars().filter(|c| !c.is_whitespace()).collect::<String>();
        assert_eq!(without(told["content"].as_str().unwrap()), without(&said), "{text}");
        assert!(whole["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap() > 0);
        let chunks = marked.stream(CHAT, &chat(ask.clone()));
        for key in ["reasoning_content", "content"] {
            let parts = chunks.iter().filter_map(|c| c["choices"][0]["delta"][key].as_str()).collect::<String>();
            assert_eq!(parts, told.get(key).map_or("", |v| v.as_str().unwrap()));
        }
    }
    assert!(parted > 3 && cut > 0, "{parted} {cut}");
    // The other interfaces tell the same.
    let said = json!([{"role": "user", "content": "hello"}]);
    let claude = marked
        .post("/v1/messages", &json!({"model": "tiny", "messages": said, "max_tokens": 5, "temperature": 0}))
        .json();
    assert_eq!(claude["content"][0]["type"], "thinking", "{claude}");
    let more = json!({"model": "tiny", "input": "hello", "max_output_tokens": 16, "temperature": 0});
    let response = marked.post("/v1/responses", &more).json();
    assert_eq!(response["output"][0]["type"], "reasoning", "{response}");
}

/// A call that must be made is a message to its function; an answer that must be JSON is in the last channel.
#[test]
fn calls_and_schemas_have_their_channels() {
    let template = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|start|>{{ m.content \
                    }}{{ m.thinking }}<|end|>{% endfor %}<|start|>{# <|channel|> #}";
    let s = server(template);
    let schema = json!({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
        "additionalProperties": false});
    let tool = |name: &str| json!({"type": "function", "function": {"name": name, "parameters": schema}});
    for choice in [json!({"type": "function", "function": {"name": "g"}}), json!("required")] {
        let more = json!({"tools": [tool("f"), tool("g")], "tool_choice": choice, "max_tokens": 90});
        let v = s.post(CHAT, &chat(more)).json();
        let call = &v["choices"][0]["message"]["tool_calls"][0]["function"];
        assert!(call["name"] == "g" || (choice == "required" && call["name"] == "f"), "{v}");
        let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
        assert!(arguments["ok"].is_boolean(), "{v}");
        assert_eq!(v["choices"][0]["finish_reason"], "tool_calls", "{v}");
    }
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
    let v = s.post(CHAT, &chat(json!({"response_format": format, "max_tokens": 60}))).json();
    let message = &v["choices"][0]["message"];
    let said: Value = serde_json::from_str(message["content"].as_str().unwrap()).unwrap();
    assert!(said["ok"].is_boolean() && message.get("reasoning_content").is_none(), "{v}");
    // Thoughts of earlier turns reach the template under its own name.
    let tokens = |messages: Value| {
        s.post(CHAT, &chat(json!({"messages": messages, "max_tokens": 1}))).json()["usage"]["prompt_tokens"].as_u64()
    };
    let user = json!({"role": "user", "content": "x"});
    let plain = tokens(json!([{"role": "assistant", "content": "ab"}, user])).unwrap();
    let thought = tokens(json!([{"role": "assistant", "content": "ab", "reasoning_content": "cde"}, user])).unwrap();
    assert_eq!(thought, plain + 3);
}
