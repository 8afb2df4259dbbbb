//! Prompts that are told, with the probabilities of their tokens: what measuring programs ask for.

mod common;

use common::{PLAIN, Server, engine, tokenizer};
use lacuna_serve::Options;
use serde_json::{Value, json};

const TEXT: &str = "/v1/completions";

fn ask(s: &Server, more: Value) -> Value {
    let mut body = json!({"model": "tiny", "prompt": "hello there", "max_tokens": 0, "temperature": 0, "echo": true});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let a = s.post(TEXT, &body);
    assert_eq!(a.status, 200, "{}", a.body);
    a.json()
}

fn logprobs(choice: &Value) -> Vec<Option<f64>> {
    choice["logprobs"]["token_logprobs"].as_array().unwrap().iter().map(Value::as_f64).collect()
}

#[test]
fn a_prompt_is_told_with_the_probabilities_that_the_engine_gives_it() {
    let s = Server::plain();
    let v = ask(&s, json!({"logprobs": 2}));
    let c = &v["choices"][0];
    assert_eq!((&c["text"], &c["finish_reason"]), (&json!("hello there"), &json!("length")));
    let ids = tokenizer().encode("hello there", true).unwrap();
    let told = logprobs(c);
    assert_eq!((told.len(), told[0]), (ids.len(), None));
    let known = lacuna_run::score(engine("llama"), std::slice::from_ref(&ids), &mut |_, _| {}).unwrap();
    for (told, loss) in told[1..].iter().zip(&known[0]) {
        assert!((told.unwrap() + loss).abs() < 1e-5, "{told:?} {loss}");
    }
    let l = &c["logprobs"];
    assert_eq!((&l["top_logprobs"][0], &l["text_offset"][0]), (&Value::Null, &json!(0)));
    assert_eq!(l["top_logprobs"][3].as_object().unwrap().len(), 2);
    for (token, at) in l["tokens"].as_array().unwrap().iter().zip(l["text_offset"].as_array().unwrap()) {
        assert!("hello there"[at.as_u64().unwrap() as usize..].starts_with(token.as_str().unwrap()), "{token} {at}");
    }
    let usage = &v["usage"];
    assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(ids.len()), &json!(0)));
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0, "a scored prompt takes nothing over");
    assert_eq!(ask(&s, json!({"logprobs": 2}))["choices"], v["choices"], "nor the second time");
    // Without probabilities only the text comes.
    let plain = ask(&s, json!({}));
    assert_eq!((&plain["choices"][0]["text"], &plain["choices"][0]["logprobs"]), (&json!("hello there"), &Value::Null));
}

#[test]
fn company_and_form_change_nothing() {
    let s = Server::start(Some(PLAIN), Options { batch: 4, prefill_rows: 5, ..Options::default() });
    let texts = ["hello there", "a", "hello there again", "what? Something long and winding, to be read in pieces"];
    let alone: Vec<Value> = texts
        .iter()
        .map(|t| ask(&s, json!({"prompt": t, "logprobs": 1, "max_tokens": 3}))["choices"][0].clone())
        .collect();
    let ids: Vec<Vec<u32>> = texts.iter().map(|t| tokenizer().encode(t, true).unwrap()).collect();
    for prompt in [json!(texts), json!(ids)] {
        let together = ask(&s, json!({"prompt": prompt, "logprobs": 1, "max_tokens": 3}));
        for (i, one) in alone.iter().enumerate() {
            let mut one = one.clone();
            one["index"] = i.into();
            assert_eq!(together["choices"][i], one);
        }
    }
    let twice = ask(&s, json!({"logprobs": 0, "n": 2, "max_tokens": 2}));
    assert_eq!(twice["choices"][0]["logprobs"], twice["choices"][1]["logprobs"]);
    // What continues is what would come without the prompt before it.
    let only = ask(&s, json!({"echo": false, "max_tokens": 3, "logprobs": 1}))["choices"][0].clone();
    assert_eq!(alone[0]["text"], format!("hello there{}", only["text"].as_str().unwrap()));
    let (both, end) = (logprobs(&alone[0]), logprobs(&only));
    assert_eq!(both[both.len() - 3..], end[..]);
    let offsets = &alone[0]["logprobs"]["text_offset"];
    assert_eq!(offsets[both.len() - 3], "hello there".len());
}

#[test]
fn a_stream_tells_the_same() {
    let s = Server::plain();
    for more in [
        json!({"logprobs": 1}),
        json!({"logprobs": 1, "prompt": "h"}),
        json!({}),
        json!({"max_tokens": 0, "logprobs": 0}),
    ] {
        let mut body =
            json!({"model": "tiny", "prompt": "hello there", "max_tokens": 4, "temperature": 0, "echo": true});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let whole = s.post(TEXT, &body).json();
        let chunks = s.stream(TEXT, &body);
        let text: String = chunks.iter().map(|c| c["choices"][0]["text"].as_str().unwrap()).collect();
        assert_eq!(whole["choices"][0]["text"], text);
        for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            let parts = chunks.iter().filter_map(|c| c["choices"][0]["logprobs"][key].as_array());
            let all: Vec<Value> = parts.flatten().cloned().collect();
            let expected = whole["choices"][0]["logprobs"][key].as_array().cloned().unwrap_or_default();
            assert_eq!(all, expected, "{key} of {body}");
        }
    }
}

/// Programs take the tokens that they asked for off the end of the list: an answer that ends at once has one, too.
#[test]
fn the_token_that_ends_an_answer_is_told() {
    let s = Server::plain();
    let v = ask(&s, json!({"logprobs": 1, "max_tokens": 1, "logit_bias": {"2": 100}}));
    let (c, n) = (&v["choices"][0], tokenizer().encode("hello there", true).unwrap().len());
    assert_eq!((&c["text"], &c["finish_reason"]), (&json!("hello there"), &json!("stop")));
    assert_eq!(c["logprobs"]["tokens"].as_array().unwrap().len(), n + 1);
    assert_eq!((&c["logprobs"]["tokens"][n], &v["usage"]["completion_tokens"]), (&json!("<|im_end|>"), &json!(0)));
    assert!(c["logprobs"]["token_logprobs"][n].as_f64().unwrap() < 0.0);
    let unbiased = ask(&s, json!({"logprobs": 1, "max_tokens": 0}));
    assert_eq!(logprobs(c)[..n], logprobs(&unbiased["choices"][0])[..]);
}

#[test]
fn tokens_that_stand_in_no_text_take_none() {
    let s = Server::plain();
    let v = ask(&s, json!({"prompt": [0, 5, 6, 2, 7], "logprobs": 0}));
    let c = &v["choices"][0];
    assert_eq!((&c["text"], &c["logprobs"]["text_offset"]), (&json!("!\"#"), &json!([0, 0, 1, 2, 2])));
    assert_eq!(c["logprobs"]["tokens"][3], "<|im_end|>");
}
