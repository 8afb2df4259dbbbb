//! Tokenizers and chat templates against what `transformers` gives for the same text (tests/golden/tokenizers).

use std::path::{Path, PathBuf};

use lacuna_checkpoint::{ChatTemplate, Export, HfFiles, Message, TokenKind, Tokenizer, TokenizerError, Vocabulary};
use serde_json::{Value, json};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tokenizers").join(name)
}

fn page(path: &Path) -> Value {
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
    let g = page(&golden("bytelevel/golden.json"));
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
    let g = page(&golden("metaspace/golden.json"));
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
    let t = page(&golden(dir).join("tokenizer.json"));
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
    let g = page(&golden("bytelevel/golden.json"));
    agree(&t, &g);
    // What we would write as tokenizer.json is read back as the same tokenizer.
    let written = HfFiles { tokenizer: Some(t.to_json().unwrap().into_bytes()), ..HfFiles::default() };
    agree(&Tokenizer::from_hf(&written).unwrap(), &g);

    let t = Tokenizer::from_vocabulary(as_vocabulary("metaspace", "llama", "default")).unwrap();
    let g = page(&golden("metaspace/golden.json"));
    agree(&t, &g);
    // The same pieces with their merges, as Gemma 4 has them.
    let v = as_vocabulary("metaspace", "gemma4", "gemma4");
    let id = |text: &str| v.tokens.iter().position(|t| t == text).map(|id| id as u32);
    let (bos, eos, unknown) = (id("<bos>"), id("<eos>"), id("<unk>"));
    let listed = Vocabulary { bos, eos, unknown, add_bos: None, add_space_prefix: Some(true), ..v.clone() };
    agree(&Tokenizer::from_vocabulary(listed).unwrap(), &g);
    // Without lists of either kind nothing is joined, and nothing breaks.
    let bare = Vocabulary { merges: vec![], ..v };
    assert!(Tokenizer::from_vocabulary(bare).unwrap().encode("the", false).unwrap().len() >= 3);
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
        config: Some(br#"{"model_type": "gpt2"}"#.to_vec()),
        ..HfFiles::default()
    };
    let t = Tokenizer::from_hf(&files).unwrap();
    let expected = Tokenizer::from_vocabulary(v).unwrap();
    for text in ["The river's 123 bridges ", "日本 é\n\n<|im_end|>x"] {
        assert_eq!(t.encode(text, true).unwrap(), expected.encode(text, true).unwrap());
    }
    assert_eq!((t.bos(), t.eos()), (Some(0), Some(2)));
}

/// The pair of files of `golden/tokenizers/pair` with `files` beside it.
fn pair_with(files: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["vocab.json", "merges.txt"] {
        std::fs::copy(golden("pair").join(name), dir.path().join(name)).unwrap();
    }
    for (name, content) in files.as_object().unwrap() {
        std::fs::write(dir.path().join(name), content.to_string()).unwrap();
    }
    dir
}

/// Each class cuts words its own way and has its own added tokens; the ids are those of `transformers`.
#[test]
fn pairs_of_files_are_read_by_their_class() {
    let classes = page(&golden("pair/golden.json"));
    let names: Vec<&String> = classes.as_object().unwrap().keys().filter(|name| *name != "made_with").collect();
    assert_eq!(names.len(), 6);
    for name in names {
        let t = Tokenizer::from_dir(pair_with(&classes[name]["files"]).path()).unwrap();
        assert_eq!(apart(&t, &classes[name]["cases"]), [""; 0], "{name}");
    }
    let composed = |name: &str| {
        let t = Tokenizer::from_dir(pair_with(&classes[name]["files"]).path()).unwrap();
        t.encode("e\u{301}", false).unwrap() == t.encode("\u{e9}", false).unwrap()
    };
    assert!(composed("qwen2") && !composed("gpt2"));
    let qwen = Tokenizer::from_dir(pair_with(&classes["qwen2"]["files"]).path()).unwrap();
    let end = qwen.id_of("<|im_end|>");
    assert!(qwen.bos().is_none() && qwen.eos() == end && qwen.is_special(end.unwrap()));
    assert!(qwen.id_of("<tool_call>").is_some_and(|id| !qwen.is_special(id)));
}

#[test]
fn pairs_of_files_of_unknown_classes_are_refused() {
    let refused = |files: Value| match Tokenizer::from_dir(pair_with(&files).path()) {
        Err(e @ TokenizerError::Unsupported(_)) => e.to_string(),
        other => panic!("{other:?}"),
    };
    let class = |name: &str| json!({"tokenizer_config.json": {"tokenizer_class": name}});
    let e = refused(class("RobertaTokenizerFast"));
    assert!(e.contains("RobertaTokenizer") && e.contains("save_pretrained"), "{e}");
    let e = refused(json!({}));
    assert!(e.contains("which class") && e.contains("save_pretrained"), "{e}");
    let e = refused(json!({"config.json": {"model_type": "llama"}}));
    assert!(e.contains("llama") && e.contains("save_pretrained"), "{e}");
    // Older files name no class: the kind of model tells it.
    let classes = page(&golden("pair/golden.json"));
    for (kind, class) in [("opt", "gpt2"), ("qwen3", "qwen2 listed")] {
        let mut files = classes[class]["files"].clone();
        files["tokenizer_config.json"].as_object_mut().unwrap().remove("tokenizer_class");
        files["config.json"] = json!({"model_type": kind});
        let t = Tokenizer::from_dir(pair_with(&files).path()).unwrap();
        assert_eq!(apart(&t, &classes[class]["cases"]), [""; 0], "{kind}");
    }
    // What cannot be read names its file and says what to do.
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.model"), b"\x0a\x05").unwrap();
    match Tokenizer::from_dir(dir.path()) {
        Err(TokenizerError::Unsupported(e)) => {
            assert!(e.contains("tokenizer.model alone") && e.contains("save_pretrained"), "{e}")
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn broken_pairs_of_files_are_errors() {
    let broken = |vocab: &str, merges: &str, added: &str| {
        let files = HfFiles {
            vocab_and_merges: Some((vocab.as_bytes().to_vec(), merges.as_bytes().to_vec())),
            added_tokens: Some(added.as_bytes().to_vec()),
            config: Some(br#"{"model_type": "gpt2"}"#.to_vec()),
            ..HfFiles::default()
        };
        match Tokenizer::from_hf(&files) {
            Err(TokenizerError::Broken(e)) => e,
            other => panic!("{other:?}"),
        }
    };
    let vocab = r#"{"a": 0, "b": 1, "ab": 2}"#;
    assert!(broken(r#"{"a": 4294967295}"#, "", "{}").contains("4294967295"));
    assert!(broken(vocab, "#version: 0.2\na b c", "{}").contains("line 2"));
    assert!(broken(vocab, "a c", "{}").contains("merges.txt does not fit vocab.json"));
    assert!(broken(vocab, "a b", r#"{"<x>": 7}"#).contains("the id 7, the vocabulary 3"));
    assert!(broken(vocab, "a b", r#"{"<x>": "7"}"#).contains("not a whole number"));
    assert!(broken(vocab, "a b", "[").contains("added_tokens.json"));
}

/// The cases of a page that `t` reads otherwise.
fn apart(t: &Tokenizer, cases: &Value) -> Vec<String> {
    let cases = cases.as_array().unwrap();
    assert!(cases.len() > 20);
    let text = |case: &Value| case["text"].as_str().unwrap().to_owned();
    let differs = |case: &&Value| {
        let same = |key: &str, special| t.encode(&text(case), special).unwrap() == ids(&case[key]);
        !(same("ids", false) && same("with_special_tokens", true))
    };
    cases.iter().filter(differs).map(text).collect()
}

/// Golden directory `name` with `change` made to its tokenizer.json.
fn changed(name: &str, change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let mut t = page(&golden(name).join("tokenizer.json"));
    change(&mut t);
    std::fs::write(dir.path().join("tokenizer.json"), t.to_string()).unwrap();
    dir
}

fn exported(dir: &Path) -> (Export, Tokenizer) {
    let export = Export::of_dir(dir, 603).unwrap();
    let again = Tokenizer::from_vocabulary(export.vocabulary.clone()).unwrap();
    (export, again)
}

/// Special tokens that take the white space behind them away keep doing so in the lists of a GGUF file.
#[test]
fn white_space_behind_special_tokens() {
    let g = page(&golden("phi3/golden.json"));
    assert_eq!(apart(&Tokenizer::from_dir(&golden("phi3")).unwrap(), &g["cases"]), [""; 0]);
    let (export, again) = exported(&golden("phi3"));
    assert!(export.vocabulary.phi3 && export.notes.is_empty(), "{:?}", export.notes);
    assert_eq!(apart(&again, &g["cases"]), [""; 0]);
    let without = Vocabulary { phi3: false, ..export.vocabulary };
    let apart = apart(&Tokenizer::from_vocabulary(without).unwrap(), &g["cases"]);
    assert!(apart.contains(&"<|user|>\nhi".to_owned()) && apart.len() > 15, "{apart:?}");
}

/// What takes white space away otherwise than Phi-3 does has no form: named where it is rare, refused where chats hang
/// on it.
#[test]
fn other_settings_of_special_tokens_are_told() {
    let flag = |t: &mut Value, token: &str, flag: &str, on: bool| {
        let list = t["added_tokens"].as_array_mut().unwrap();
        list.iter_mut().find(|t| t["content"] == token).unwrap()[flag] = on.into();
    };
    let dir = changed("phi3", |t| flag(t, "<|system|>", "lstrip", true));
    let notes = exported(dir.path()).0.notes.join("\n");
    assert!(notes.contains("the white space around <|system|>") && notes.contains("hi <|system|>"), "{notes}");
    // Nor can the tokens of one file differ: without a `<|end|>` that does, either its line's end or that of the others
    // is lost.
    let dir = changed("phi3", |t| flag(t, "<|end|>", "rstrip", false));
    let e = Export::of_dir(dir.path(), 603).unwrap_err();
    assert!(matches!(&e, TokenizerError::Unsupported(e) if e.contains("a chat has other ids")), "{e}");
    assert!(e.to_string().contains("beside special tokens its own way, such as <|end|>"), "{e}");
    // Where no template says what chats are like, nothing hangs on it.
    std::fs::remove_file(dir.path().join("tokenizer_config.json")).unwrap();
    let (export, again) = exported(dir.path());
    let notes = export.notes.join("\n");
    assert!(export.vocabulary.phi3 && notes.contains("<|end|>"), "{notes}");
    assert!(apart(&again, &page(&golden("phi3/golden.json"))["cases"]).is_empty(), "the rule is for all of them");

    let classes = page(&golden("pair/golden.json"));
    let dir = pair_with(&classes["qwen2 listed"]["files"]);
    let (export, again) = exported(dir.path());
    let notes = export.notes.join("\n");
    assert_eq!(export.vocabulary.pre.as_deref(), Some("qwen2"));
    assert!(
        notes.contains("behind <|im_start|>;") && notes.contains("before <tool_call>;") && notes.contains("NFC"),
        "{notes}"
    );
    for text in apart(&again, &classes["qwen2 listed"]["cases"]) {
        assert!(text.contains("<|im_start|>") || text.contains("<tool_call>"), "{text:?}");
    }
    let template = "{% for m in messages %}<|im_start|>\n{{ m.content }}<|im_end|>\n{% endfor %}";
    std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    let e = Export::of_dir(dir.path(), 603).unwrap_err().to_string();
    assert!(e.contains("a chat has other ids"), "{e}");
    let dir = pair_with(&classes["qwen2"]["files"]);
    std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    let (export, again) = exported(dir.path());
    assert!(export.notes.len() == 1 && export.notes[0].contains("NFC"), "{:?}", export.notes);
    assert_eq!(apart(&again, &classes["qwen2"]["cases"]), [""; 0]);
}

/// When a space is put before a text: Metaspace has three schemes, each looking at what is there; GGUF knows only
/// always and never.
#[test]
fn the_space_before_a_text() {
    let schemes = page(&golden("schemes.json"));
    for (scheme, cases) in schemes.as_object().unwrap().iter().filter(|(name, _)| *name != "made_with") {
        let (name, split) = scheme.split_once(' ').unwrap();
        let dir = changed("metaspace", |t| {
            let step =
                json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": name, "split": split == "split"});
            t["normalizer"] = Value::Null;
            t["pre_tokenizer"] = step.clone();
            t["decoder"] = json!({"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, step]});
        });
        assert_eq!(apart(&Tokenizer::from_dir(dir.path()).unwrap(), cases), [""; 0], "{scheme}");
        let (export, again) = exported(dir.path());
        let (notes, prefix) = (export.notes.join("\n"), export.vocabulary.add_space_prefix);
        let differ = apart(&again, cases);
        match name {
            "never" => assert!(prefix == Some(false) && notes.is_empty() && differ.is_empty(), "{notes} {differ:?}"),
            "always" => {
                assert!(prefix == Some(true) && notes.contains("white space at the edge of a text"), "{notes}");
                assert!(notes.contains("<bos>") && !differ.is_empty(), "{notes}");
                let spaced = |t: &String| t.starts_with([' ', '▁']) || t.contains("> ");
                assert!(differ.iter().all(spaced), "{differ:?}");
            }
            // The template begins with <bos>: no text of a chat is the first, and a prompt can bring its own space.
            _ => {
                assert!(prefix == Some(false) && notes.contains("it has to be written"), "{notes}");
                let source = Tokenizer::from_dir(dir.path()).unwrap();
                assert!(!differ.is_empty());
                for text in differ {
                    assert!(!text.starts_with([' ', '<', '▁']), "{text:?}");
                    let ids = source.encode(&text, false).unwrap();
                    assert_eq!(again.encode(&format!(" {text}"), false).unwrap(), ids, "{text:?}");
                }
                // Without chats, plain text counts; what stands behind a token is told.
                std::fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
                let (export, again) = exported(dir.path());
                assert_eq!(export.vocabulary.add_space_prefix, Some(true));
                assert!(export.notes.iter().any(|n| n.contains("<bos>") && n.contains("hi")), "{:?}", export.notes);
                assert!(
                    apart(&again, cases).iter().all(|t| t.starts_with(' ') || t.starts_with('▁') || t.contains('<'))
                );
            }
        }
    }
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
    let g = page(&golden("chat.json"));
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

/// Lists that fit each other in no way at all: an answer or an error, never a panic, and what decodes at once decodes
/// in a stream.
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
            phi3: prefix == Some(true),
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
