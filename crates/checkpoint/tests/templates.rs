//! Chat templates against what `transformers` renders (tests/golden/templates.json).

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lacuna_checkpoint::{ChatTemplate, Setting, TemplateError};
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
        let with =
            Setting { add_generation_prompt: true, bos: "<s>", eos: "</s>", tools: Some(&g["data"]), now: now(&g) };
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
