//! Thoughts, and what a request tells the chat template.

mod common;

use common::{PLAIN, Server, chat, engine};
use lacuna_checkpoint::{TokenKind, Tokenizer, Vocabulary};
use lacuna_serve::Options;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
/// The tokens that mark thoughts.
const OPEN: u32 = 66;
const CLOSE: u32 = 67;

/// The tests' tokenizer, with marks of thoughts in place of two signs.
fn marking() -> Tokenizer {
    let mut tokens: Vec<String> = ["<|begin|>", "<|im_start|>", "<|im_end|>", "Ċ", "Ġ"].map(String::from).to_vec();
    tokens.extend(('!'..='~').filter(|c| !"~|`".contains(*c)).map(String::from));
    assert_eq!((tokens[OPEN as usize].as_str(), tokens[CLOSE as usize].as_str()), ("^", "_"));
    tokens[OPEN as usize] = "<think>".into();
    tokens[CLOSE as usize] = "</think>".into();
    let kind = |id: u32| match id {
        0..3 => TokenKind::Control,
        OPEN | CLOSE => TokenKind::UserDefined,
        _ => TokenKind::Normal,
    };
    let v = Vocabulary {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        tokens,
        kinds: (0..96).map(kind).collect(),
        bos: Some(0),
        eos: Some(2),
        ..Vocabulary::default()
    };
    Tokenizer::from_vocabulary(v).unwrap()
}

fn server(template: &str) -> Server {
    Server::reading(marking(), engine("llama"), Some(template), Options::default())
}

fn message(s: &Server, more: &Value) -> Value {
    let a = s.post(CHAT, &chat(more.clone()));
    assert_eq!(a.status, 200, "{}", a.body);
    a.json()["choices"][0]["message"].clone()
}

/// The same prompt through a template that names the marks and through one that does not: the text is the same, and
/// told in two parts.
#[test]
fn thoughts_are_told_apart_whole_and_streamed() {
    let open = format!("{PLAIN}<think>");
    let hidden = format!("{PLAIN}{{{{ '<th' ~ 'ink>' }}}}");
    let (marked, plain) = (server(&open), server(&hidden));
    let (mut parted, mut cut) = (0, 0);
    for seed in 0..12 {
        let ask =
            json!({"logit_bias": {"67": 1, "66": -100, "2": -100}, "max_tokens": 40, "temperature": 1, "seed": seed});
        let text = message(&plain, &ask)["content"].as_str().unwrap().to_owned();
        let whole = marked.post(CHAT, &chat(ask.clone())).json();
        let told = &whole["choices"][0]["message"];
        let (thought, said) = match text.split_once("</think>") {
            Some((thought, said)) => {
                parted += 1;
                (thought.trim().to_owned(), said.trim_start().to_owned())
            }
            None => {
                cut += 1;
                (text.trim().to_owned(), String::new())
            }
        };
        let found = told.get("reasoning_content").map_or("", |v| v.as_str().unwrap());
        assert_eq!((found, told["content"].as_str().unwrap()), (thought.as_str(), said.as_str()), "{text}");
        let tokens = whole["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap();
        assert!(tokens as usize >= thought.chars().count() && tokens <= 40, "{tokens} {thought}");
        let chunks = marked.stream(CHAT, &chat(ask));
        for (key, expected) in [("reasoning_content", &thought), ("content", &said)] {
            let parts = chunks.iter().filter_map(|c| c["choices"][0]["delta"][key].as_str());
            assert_eq!(&parts.collect::<String>(), expected);
        }
        let first = |key: &str| {
            chunks.iter().position(|c| c["choices"][0]["delta"][key].as_str().is_some_and(|t| !t.is_empty()))
        };
        assert!(said.is_empty() || thought.is_empty() || first("reasoning_content") < first("content"));
    }
    assert!(parted > 3 && cut > 0, "{parted} {cut}");
}

#[test]
fn thoughts_may_begin_in_the_answer() {
    let s = server(&format!("{{# <think> #}}{PLAIN}"));
    let told = message(&s, &json!({"logit_bias": {"66": 100}, "max_tokens": 3}));
    assert_eq!((&told["content"], &told["reasoning_content"]), (&json!(""), &json!("<think><think>")));
    let told = message(&s, &json!({}));
    assert!(told.get("reasoning_content").is_none() && told["content"] != "");
    // A model without thoughts writes marks as text.
    let told = message(&server(PLAIN), &json!({"logit_bias": {"66": 100}, "max_tokens": 2}));
    assert_eq!((&told["content"], told.get("reasoning_content")), (&json!("<think><think>"), None));
}

#[test]
fn an_answer_held_to_json_holds_no_thoughts() {
    let s = server(&format!("{PLAIN}<think>\n"));
    let schema = json!({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
    let told = message(&s, &json!({"response_format": format, "max_tokens": 60}));
    let said: Value = serde_json::from_str(told["content"].as_str().unwrap()).unwrap();
    assert!(said["ok"].is_boolean() && told.get("reasoning_content").is_none());
}

/// How many tokens the prompt has tells what the template was told.
#[test]
fn arguments_reach_the_template() {
    let template = "{% for m in messages %}<|im_start|>{{ m.content }}{% if m.reasoning_content %}{{ \
                    m.reasoning_content }}{% endif %}{% endfor %}{% if enable_thinking is defined and not \
                    enable_thinking %}<think></think>{% endif %}{{ note }}<|im_start|>";
    let s = server(template);
    let tokens = |more: Value| {
        let a = s.post(CHAT, &chat(more.clone()));
        assert_eq!(a.status, 200, "{more} {}", a.body);
        a.json()["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    let plain = tokens(json!({}));
    for off in [
        json!({"chat_template_kwargs": {"enable_thinking": false}}),
        json!({"enable_thinking": false}),
        json!({"reasoning_effort": "none"}),
        json!({"enable_thinking": false, "chat_template_kwargs": {"enable_thinking": false}}),
    ] {
        assert_eq!(tokens(off), plain + 2);
    }
    for on in
        [json!({"enable_thinking": true}), json!({"reasoning_effort": "high"}), json!({"chat_template_kwargs": {}})]
    {
        assert_eq!(tokens(on), plain);
    }
    assert_eq!(tokens(json!({"chat_template_kwargs": {"note": "abc"}})), plain + 3);
    let said =
        json!([{"role": "assistant", "content": "ab", "reasoning_content": "cde"}, {"role": "user", "content": "x"}]);
    assert_eq!(tokens(json!({ "messages": said })), 1 + 5 + 1 + 1 + 1);
    for (more, param) in [
        (json!({"chat_template_kwargs": {"enable_thinkin": false}}), "chat_template_kwargs.enable_thinkin"),
        (json!({"chat_template_kwargs": {"messages": []}}), "chat_template_kwargs.messages"),
        (json!({"chat_template_kwargs": {"enable_thinking": true}, "enable_thinking": false}), "enable_thinking"),
        (json!({"reasoning_effort": "none", "enable_thinking": true}), "reasoning_effort"),
        (json!({"reasoning_effort": "huge"}), "reasoning_effort"),
    ] {
        assert_eq!(s.post(CHAT, &chat(more.clone())).error().1, param, "{more}");
    }
    // A model that never thinks does not think; one that always does cannot be told not to.
    let never = server(PLAIN);
    assert_eq!(never.post(CHAT, &chat(json!({"enable_thinking": false, "reasoning_effort": "none"}))).status, 200);
    assert_eq!(never.post(CHAT, &chat(json!({"enable_thinking": true}))).error().2, "unsupported_parameter");
    let always = server(&format!("{PLAIN}<think>"));
    for more in [json!({"enable_thinking": false}), json!({"reasoning_effort": "none"})] {
        assert_eq!(always.post(CHAT, &chat(more)).error().2, "unsupported_parameter");
    }
}
