//! Tokenizers and chat templates against what `transformers` gives for the same text (tests/golden/tokenizers).

use std::path::{Path, PathBuf};

use lacuna_checkpoint::{ChatTemplate, HfFiles, Message, TokenKind, Tokenizer, TokenizerError, Vocabulary};
use serde_json::Value;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tokenizers").join(name)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(v: &Value) -> Vec<u32> {
    v.as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as u32).collect()
}

/// Streaming gives the same text as all at once, and never half a character.
fn streamed(t: &Tokenizer, ids: &[u32]) -> String {
    let mut d = t.decoder().with_special();
    let mut text: String = ids.iter().filter_map(|&id| d.push(id)).collect();
    text.extend(d.finish());
    text
}

fn agree(t: &Tokenizer, golden: &Value) {
    for case in golden["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let expected = ids(&case["ids"]);
        assert_eq!(t.encode(text, false).unwrap(), expected, "{text:?}");
        if !case["with_special_tokens"].is_null() {
            assert_eq!(t.encode(text, true).unwrap(), ids(&case["with_special_tokens"]), "{text:?}");
        }
        assert_eq!(t.decode_with_special(&expected), case["decoded"].as_str().unwrap());
        assert_eq!(streamed(t, &expected), case["decoded"].as_str().unwrap());
    }
}

#[test]
fn byte_level_from_tokenizer_json() {
    let g = json(&golden("bytelevel/golden.json"));
    let t = Tokenizer::from_dir(&golden("bytelevel")).unwrap();
    agree(&t, &g);
    for case in g["decode_only"].as_array().unwrap() {
        assert_eq!(t.decode_with_special(&ids(&case["ids"])), case["decoded"].as_str().unwrap());
        assert_eq!(streamed(&t, &ids(&case["ids"])), case["decoded"].as_str().unwrap());
        assert_eq!(t.decode(&ids(&case["ids"])), case["decoded_skip_special"].as_str().unwrap());
    }
    assert_eq!((t.bos(), t.eos(), t.eos_set()), (Some(0), Some(2), [0, 2].as_slice()));
    assert_eq!((t.id_of("<|im_start|>"), t.token_text(1)), (Some(1), Some("<|im_start|>")));
    assert!(t.is_special(1) && !t.is_special(5) && t.token_text(1 << 30).is_none());
}

#[test]
fn sentencepiece_from_tokenizer_json() {
    let g = json(&golden("metaspace/golden.json"));
    let t = Tokenizer::from_dir(&golden("metaspace")).unwrap();
    agree(&t, &g);
    for case in g["decode_only"].as_array().unwrap() {
        let i = ids(&case["ids"]);
        assert_eq!(streamed(&t, &i), t.decode_with_special(&i));
        // The library gives up a whole run of byte tokens when one is wrong; SentencePiece and we keep the good ones.
        if !case["decoded"].as_str().unwrap().contains('\u{FFFD}') {
            assert_eq!(t.decode_with_special(&i), case["decoded"].as_str().unwrap());
            assert_eq!(t.decode(&i), case["decoded_skip_special"].as_str().unwrap());
        }
    }
    assert_eq!(t.bos(), Some(2));
    // After a prompt the space is a real one; at the beginning the encoder put it there.
    let word = t.encode("the", false).unwrap();
    let mut after = t.decoder().continuing();
    let text: String = word.iter().filter_map(|&id| after.push(id)).collect();
    assert_eq!((text.as_str(), t.decode(&word).as_str()), (" the", "the"));
}

/// The lists that a GGUF file would hold for a tokenizer.json.
fn as_vocabulary(dir: &str, model: &str, pre: &str) -> Vocabulary {
    let t = json(&golden(dir).join("tokenizer.json"));
    let map = t["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); map.len()];
    for (text, id) in map {
        tokens[id.as_u64().unwrap() as usize] = text.clone();
    }
    let merges: Vec<String> = t["model"]["merges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap()))
        .collect();
    let mut kinds = vec![TokenKind::Normal; tokens.len()];
    for added in t["added_tokens"].as_array().unwrap() {
        let id = added["id"].as_u64().unwrap() as usize;
        kinds[id] = if tokens[id] == "<unk>" { TokenKind::Unknown } else { TokenKind::Control };
    }
    let mut v = Vocabulary { model: model.into(), pre: Some(pre.into()), tokens, kinds, ..Vocabulary::default() };
    let find = |text: &str| v.tokens.iter().position(|t| t == text).map(|id| id as u32);
    if model == "llama" {
        // The rank of the first merge that makes a piece is what SentencePiece's trainer writes as its score.
        v.scores = vec![-1e6; v.tokens.len()];
        for (rank, m) in merges.iter().enumerate().rev() {
            let id = find(&m.replace(' ', "")).unwrap() as usize;
            v.scores[id] = -(rank as f32);
        }
        for id in 0..v.tokens.len() {
            if v.tokens[id].len() == 6 && v.tokens[id].starts_with("<0x") {
                v.kinds[id] = TokenKind::Byte;
            }
        }
        (v.bos, v.eos, v.unknown) = (find("<bos>"), find("<eos>"), find("<unk>"));
    } else {
        v.merges = merges;
        (v.bos, v.eos, v.add_bos) = (Some(0), Some(2), Some(false));
    }
    v
}

#[test]
fn both_kinds_from_gguf_lists() {
    let t = Tokenizer::from_vocabulary(as_vocabulary("bytelevel", "gpt2", "llama-bpe")).unwrap();
    let g = json(&golden("bytelevel/golden.json"));
    agree(&t, &g);
    // What we would write as tokenizer.json is read back as the same tokenizer.
    let written = HfFiles { tokenizer: Some(t.to_json().unwrap().into_bytes()), ..HfFiles::default() };
    agree(&Tokenizer::from_hf(&written).unwrap(), &g);

    let t = Tokenizer::from_vocabulary(as_vocabulary("metaspace", "llama", "default")).unwrap();
    let g = json(&golden("metaspace/golden.json"));
    agree(&t, &g);
    let written = HfFiles { tokenizer: Some(t.to_json().unwrap().into_bytes()), ..HfFiles::default() };
    agree(&Tokenizer::from_hf(&written).unwrap(), &g);
}

#[test]
fn gpt2_pair_of_files() {
    let v = as_vocabulary("bytelevel", "gpt2", "gpt-2");
    let vocab: serde_json::Map<String, Value> =
        v.tokens.iter().enumerate().map(|(id, t)| (t.clone(), Value::from(id))).collect();
    let merges = format!("#version: 0.2\n{}\n", v.merges.join("\n"));
    let files = HfFiles {
        vocab_and_merges: Some((serde_json::to_vec(&vocab).unwrap(), merges.into_bytes())),
        special_tokens_map: Some(br#"{"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}}"#.to_vec()),
        ..HfFiles::default()
    };
    let t = Tokenizer::from_hf(&files).unwrap();
    let expected = Tokenizer::from_vocabulary(v).unwrap();
    for text in ["The river's 123 bridges ", "日本 é\n\n<|im_end|>x"] {
        assert_eq!(t.encode(text, true).unwrap(), expected.encode(text, true).unwrap());
    }
    assert_eq!((t.bos(), t.eos()), (Some(0), Some(2)));
}

#[test]
fn settings_beside_the_tokenizer() {
    let mut files = HfFiles::read(&golden("metaspace")).unwrap();
    files.generation_config = Some(br#"{"eos_token_id": [1, 7]}"#.to_vec());
    files.tokenizer_config = Some(
        br#"{"tokenizer_class": "LlamaTokenizer", "add_eos_token": true, "bos_token": "<bos>", "eos_token": {"content": "<eos>"},
            "added_tokens_decoder": {"9999": {"content": "<|im_end|>", "special": true}}}"#
            .to_vec(),
    );
    assert!(matches!(Tokenizer::from_hf(&files), Err(TokenizerError::Broken(t)) if t.contains("9999")));
    let size = Tokenizer::from_dir(&golden("metaspace")).unwrap().vocab_size();
    let text = String::from_utf8(files.tokenizer_config.take().unwrap()).unwrap().replace("9999", &size.to_string());
    files.tokenizer_config = Some(text.into_bytes());
    let t = Tokenizer::from_hf(&files).unwrap();
    assert_eq!(t.eos_set(), [1, 7, size as u32]);
    let around = t.encode("x<|im_end|>", true).unwrap();
    assert_eq!((around[0], *around.last().unwrap()), (2, 1));
    assert!(around.contains(&(size as u32)));
    assert!(matches!(Tokenizer::from_dir(Path::new("/nonexistent")), Err(TokenizerError::Missing(_))));
}

#[test]
fn hostile_lists_are_errors() {
    let good = || as_vocabulary("metaspace", "llama", "default");
    let broken = |change: &dyn Fn(&mut Vocabulary)| {
        let mut v = good();
        change(&mut v);
        Tokenizer::from_vocabulary(v).unwrap_err().to_string()
    };
    assert!(broken(&|v| v.scores[5] = f32::NAN).contains("token 5 is NaN"));
    assert!(broken(&|v| v.scores.truncate(3)).contains("3 scores"));
    assert!(broken(&|v| v.kinds.truncate(3)).contains("3 token types"));
    assert!(broken(&|v| v.bos = Some(u32::MAX)).contains("4294967295"));
    assert!(broken(&|v| v.unknown = Some(1_000_000)).contains("1000000"));
    assert!(broken(&|v| v.tokens.clear()).contains("0 tokens"));
    assert!(broken(&|v| v.tokens[300] = "x".repeat(5000)).contains("5000 bytes"));
    assert!(broken(&|v| v.model = "rwkv".into()).contains("rwkv"));
    let bytes = |change: &dyn Fn(&mut Vocabulary)| {
        let mut v = as_vocabulary("bytelevel", "gpt2", "qwen2");
        change(&mut v);
        Tokenizer::from_vocabulary(v).unwrap_err().to_string()
    };
    assert!(bytes(&|v| v.merges[7] = "nospace".into()).contains("merge 7"));
    assert!(bytes(&|v| v.merges[7] = "\u{1F600} zz".into()).contains("merges do not fit"));
    let short = |v: &mut Vocabulary| {
        v.tokens.truncate(300);
        v.kinds.truncate(300);
    };
    assert!(bytes(&short).contains("merges do not fit"));
    assert!(bytes(&|v| v.pre = Some("klingon".into())).contains("klingon"));
    // Doubled and empty texts happen in real files.
    let mut v = good();
    v.tokens.extend(["the".to_owned(), String::new(), String::new()]);
    v.kinds.extend([TokenKind::Normal, TokenKind::Unused, TokenKind::UserDefined]);
    v.scores.extend([0.0; 3]);
    let t = Tokenizer::from_vocabulary(v).unwrap();
    assert!(t.token_text(t.vocab_size() as u32 - 1).is_none());
    for json in ["", "{}", "[1]", r#"{"model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}"#] {
        let files = HfFiles { tokenizer: Some(json.as_bytes().to_vec()), ..HfFiles::default() };
        assert!(Tokenizer::from_hf(&files).is_err(), "{json}");
    }
}

#[test]
fn chat_templates_render_as_in_transformers() {
    let g = json(&golden("chat.json"));
    for case in g["cases"].as_array().unwrap() {
        let name = case["template"].as_str().unwrap();
        let template = ChatTemplate::new(g["templates"][name].as_str().unwrap()).unwrap();
        let conversation = &g["conversations"][case["conversation"].as_str().unwrap()];
        let messages: Vec<Message> = conversation
            .as_array()
            .unwrap()
            .iter()
            .map(|m| Message::new(m["role"].as_str().unwrap(), m["content"].as_str().unwrap()))
            .collect();
        let tools = (case["tools"] == true).then_some(&g["tools"]);
        let (bos, eos) = (g["bos_token"].as_str().unwrap(), g["eos_token"].as_str().unwrap());
        let text = template.render(&messages, case["add_generation_prompt"] == true, bos, eos, tools).unwrap();
        assert_eq!(text, case["rendered"].as_str().unwrap(), "{name} {}", case["conversation"]);
    }
}

#[test]
fn templates_from_directories() {
    assert!(ChatTemplate::from_dir(&golden("bytelevel")).is_ok());
    assert!(ChatTemplate::from_dir(&golden("metaspace")).is_ok());
    let missing = ChatTemplate::from_dir(Path::new("/nonexistent")).unwrap_err().to_string();
    assert!(missing.contains("chat_template.jinja"), "{missing}");
}

/// Lists that fit each other in no way at all: an answer or an error, never a panic, and what decodes at once decodes in a stream.
#[test]
fn random_lists_never_panic() {
    use proptest::prelude::*;
    let token = proptest::sample::select(vec![
        "a", "b", "ab", "▁", "▁a", "  ", "<0x61>", "<0xE6>", "<s>", "é", "", "Ġ", "aaa", "\n", "日",
    ]);
    let kind = (1i64..7).prop_map(|n| TokenKind::from_number(n).unwrap());
    let lists = (
        proptest::collection::vec((token, kind, -3.0f32..3.0), 0..24),
        proptest::collection::vec(proptest::sample::select(vec!["a b", "▁ a", "a aa", "x y", "", " ", "a  b"]), 0..3),
        proptest::sample::select(vec![
            ("llama", "default"),
            ("gpt2", "gpt-2"),
            ("gpt2", "qwen2"),
            ("gpt2", "llama-bpe"),
            ("gpt2", "default"),
        ]),
        (proptest::option::of(0u32..26), proptest::option::of(0u32..26), proptest::option::of(0u32..26)),
        (proptest::option::of(any::<bool>()), proptest::option::of(any::<bool>()), proptest::option::of(any::<bool>())),
        proptest::collection::vec(0u32..30, 0..12),
        ".{0,12}|[ab é▁<0x61>日\n]{0,12}",
    );
    proptest!(ProptestConfig::with_cases(512), |((tokens, merges, (model, pre), (bos, eos, unknown), (add_bos, add_eos, prefix), stream, text) in lists)| {
        let v = Vocabulary {
            model: model.into(),
            pre: Some(pre.into()),
            tokens: tokens.iter().map(|t| t.0.to_owned()).collect(),
            kinds: tokens.iter().map(|t| t.1).collect(),
            scores: tokens.iter().map(|t| t.2).collect(),
            merges: merges.iter().map(|&m| m.to_owned()).collect(),
            bos,
            eos,
            more_eos: Vec::new(),
            unknown,
            add_bos,
            add_eos,
            add_space_prefix: prefix,
        };
        if let Ok(t) = Tokenizer::from_vocabulary(v) {
            for special in [false, true] {
                let ids = t.encode(&text, special);
                prop_assert!(ids.is_ok_and(|ids| ids.iter().all(|&id| (id as usize) < t.vocab_size())));
            }
            prop_assert_eq!(streamed(&t, &stream), t.decode_with_special(&stream));
            prop_assert!(t.to_json().is_ok());
        }
    });
}
