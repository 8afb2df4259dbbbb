//! Chat templates against what `transformers` renders (tests/golden/templates.json), and on their way from checkpoint
//! to checkpoint.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lacuna_arch as arch;
use lacuna_checkpoint::save::{GgufKind, save_gguf, save_hf};
use lacuna_checkpoint::{ChatTemplate, PackedWriter, Setting, TemplateError, open};
use lacuna_format::Weights;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

fn golden() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/templates.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn now(golden: &Value) -> SystemTime {
    UNIX_EPOCH + Duration::from_micros((golden["now"].as_f64().unwrap() * 1e6).round() as u64)
}

/// Every piece gives what Python gives, or fails where Python fails.
#[test]
fn pieces_render_as_in_transformers() {
    let g = golden();
    let mut wrong = Vec::new();
    for piece in g["pieces"].as_array().unwrap() {
        let (source, wanted) = (piece[0].as_str().unwrap(), piece[1].as_str());
        let with = Setting {
            add_generation_prompt: true,
            bos: "<s>",
            eos: "</s>",
            tools: Some(&g["data"]),
            now: now(&g),
            args: None,
        };
        let found = ChatTemplate::new(source).and_then(|t| t.render_with(&json!([]), &with));
        if found.as_deref().ok() != wanted {
            wrong.push(format!("{source}\n  wanted {wanted:?}\n  found  {found:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} pieces differ:\n{}", wrong.len(), wrong.join("\n"));
}

/// Templates in the styles of families, over texts, parts, calls and nulls.
#[test]
fn templates_of_families_render_as_in_transformers() {
    let g = golden();
    let mut wrong = Vec::new();
    let mut left_out = 0;
    for case in g["cases"].as_array().unwrap() {
        let (name, conversation) = (case["template"].as_str().unwrap(), case["conversation"].as_str().unwrap());
        let template = ChatTemplate::new(g["templates"][name].as_str().unwrap()).unwrap();
        let messages = &g["conversations"][conversation];
        let with = Setting {
            add_generation_prompt: case["add_generation_prompt"] == true,
            bos: "<s>",
            eos: "</s>",
            tools: (case["tools"] == true).then_some(&g["tools"]),
            now: now(&g),
            args: None,
        };
        let wanted = case["rendered"].as_str();
        let found = template.render_with(messages, &with);
        // Python leaves out in silence what a template has no place for.
        if let (Err(TemplateError::LeftOut(_)), Some(wanted)) = (&found, wanted) {
            let said = messages.as_array().unwrap().iter().filter_map(|m| m["content"].as_str());
            assert!(said.into_iter().any(|s| !wanted.contains(s.trim())), "{name}, {conversation}: {found:?}");
            left_out += 1;
            continue;
        }
        if found.as_deref().ok() != wanted {
            wrong.push(format!("{name}, {conversation}\n  wanted {wanted:?}\n  found  {found:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} cases differ:\n{}", wrong.len(), wrong.join("\n"));
    // Phi 3 knows no results of tools.
    assert_eq!(left_out, 2);
}

/// A one-layer model without values, with the golden byte-level tokenizer and a template of each kind.
fn model(dir: &Path) {
    std::fs::create_dir_all(dir.join("additional_chat_templates")).unwrap();
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tokenizers/bytelevel");
    for file in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
        std::fs::copy(tokenizer.join(file), dir.join(file)).unwrap();
    }
    for (file, text) in [
        ("chat_template.jinja", "plain"),
        ("additional_chat_templates/tool_use.jinja", "tools"),
        ("additional_chat_templates/with rag.jinja", "rag"),
    ] {
        std::fs::write(dir.join(file), text).unwrap();
    }
    let config = json!({
        "model_type": "llama", "vocab_size": 603, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 4, "max_position_embeddings": 64,
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let spec = arch::from_config(&config).unwrap();
    let tensors: Vec<_> = arch::hf_targets(&spec)
        .unwrap()
        .into_iter()
        .map(|t| (t.name, vec![0; 4 * t.shape.iter().product::<usize>()], t.shape))
        .collect();
    let views = tensors.iter().map(|(n, b, s)| (n, TensorView::new(Dtype::F32, s.clone(), b).unwrap()));
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}

/// Templates by name go along wherever a model is saved.
#[test]
fn named_templates_go_along() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    model(&at("hf"));
    let says = |name: &str| {
        let t = ChatTemplate::open(&open(at(name)).unwrap()).unwrap();
        let render = |tools: Option<&Value>| t.render(&[], false, "", "", tools).unwrap();
        [render(None), render(Some(&json!([])))]
    };
    let progress = &mut |_, _| {};
    let source = open(at("hf")).unwrap();
    save_hf(&source, &at("copy"), None, false, progress).unwrap();
    assert_eq!(std::fs::read_to_string(at("copy").join("additional_chat_templates/with rag.jinja")).unwrap(), "rag");
    save_gguf(&source, &at("m.gguf"), GgufKind::F32, false, progress).unwrap();
    let mut packed = PackedWriter::create(&at("packed"), false).unwrap();
    for place in source.spec().places() {
        packed.put(&place, &source.get(&place).unwrap().unwrap()).unwrap();
    }
    packed.finish(source.spec().clone(), json!({}), json!({}), Vec::new(), Some(&source)).unwrap();
    let gguf = open(at("m.gguf")).unwrap();
    let metadata = gguf.metadata().unwrap();
    assert_eq!(metadata.get_strs("tokenizer.chat_templates").unwrap().unwrap(), ["tool_use", "with_rag"]);
    assert_eq!(metadata.get_str("tokenizer.chat_template.with_rag").unwrap(), Some("rag"));
    save_hf(&gguf, &at("back"), None, false, progress).unwrap();
    for name in ["hf", "copy", "m.gguf", "packed", "back"] {
        assert_eq!(says(name), ["plain", "tools"], "{name}");
    }
}

/// Whatever a template says: a text or an error, never a panic.
#[test]
fn random_templates_never_panic() {
    use proptest::prelude::*;
    let piece = proptest::sample::select(vec![
        "{{",
        "}}",
        "{%",
        "%}",
        "{#",
        "#}",
        "-",
        "+",
        " ",
        "\n",
        "é",
        "'",
        "\"",
        "\\",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        ":",
        ",",
        ".",
        "|",
        "~",
        "*",
        "**",
        "//",
        "%",
        "==",
        "<",
        "0",
        "-1",
        "7.5e3",
        "9223372036854775808",
        "'aé'",
        "x",
        "messages",
        "tools",
        "loop",
        "none",
        "true",
        " is ",
        " in ",
        " not ",
        " if ",
        " else ",
        " for x in ",
        "if ",
        "endif",
        "for x in messages",
        "endfor",
        "set x = ",
        "macro m(x)",
        "endmacro",
        "m(",
        "raw",
        "endraw",
        "tojson",
        "join",
        "sort",
        "format",
        "split",
        "center",
        "slice",
        "range(",
        "namespace(",
        "'%5d' % ",
        "'{:>5}'",
        "[::-1]",
        "[1:]",
        "{{ x[",
        "{% for x in tools %}",
        "{% endfor %}",
        "{{ messages[0]['content']",
        "{% break %}",
    ]);
    proptest!(|(pieces in proptest::collection::vec(piece, 0..14))| {
        let source = pieces.concat();
        for source in [source.clone(), format!("{{{{ {source} }}}}")] {
            if let Ok(t) = ChatTemplate::new(&source) {
                let messages = json!([{"role": "user", "content": "hi é"}, {"role": "assistant", "content": null}]);
                let _ = t.render_json(&messages, true, "<s>", "</s>", Some(&json!([{"name": "f", "n": 1.5}])));
            }
        }
    });
}

/// Arguments are variables of the template: given once for all, or with a rendering, which goes before.
#[test]
fn arguments_are_variables() {
    let source = "{% if enable_thinking is defined %}{{ enable_thinking }}{% else %}-{% endif %} {{ note }}";
    let args = |v: Value| v.as_object().unwrap().clone();
    let render = |t: &ChatTemplate, own: Value| {
        let (own, now) = (args(own), std::time::SystemTime::UNIX_EPOCH);
        let with = Setting { add_generation_prompt: true, bos: "", eos: "", tools: None, now, args: Some(&own) };
        t.render_with(&json!([]), &with).unwrap()
    };
    let plain = ChatTemplate::new(source).unwrap();
    assert_eq!(render(&plain, json!({})), "- ");
    assert_eq!(render(&plain, json!({"enable_thinking": false, "note": "x"})), "False x");
    let given =
        ChatTemplate::new(source).unwrap().with_args(args(json!({"enable_thinking": true, "note": [1]}))).unwrap();
    assert_eq!(given.render(&[], true, "", "", None).unwrap(), "True [1]");
    assert_eq!(render(&given, json!({"note": "y"})), "True y");
    assert!(plain.takes("note") && !plain.takes("thinking") && !plain.takes("not") && !plain.takes(""));
    for (name, why) in [("messages", "says itself"), ("thinking", "nothing that this template"), ("", "nothing")] {
        let e = plain.check_args(&args(json!({ name: 1 }))).unwrap_err();
        assert!(matches!(e, TemplateError::Argument { .. }) && e.to_string().contains(why), "{e}");
    }
}
