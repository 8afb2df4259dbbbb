//! Tokenizers on the way out: a `tokenizer.json` as the lists of a GGUF file, and the lists of a GGUF file as a
//! `tokenizer.json`.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::compare::Compared;
use super::stream::{Pieces, fallback_byte};
use super::vocabulary::{PHI3_NAMES, is_phi3, named_phi3};
use super::words::{Words, name_of};
use super::{HfFiles, TokenKind, Tokenizer, TokenizerError, Vocabulary};
use crate::template::{templates_in, templates_of};
use crate::{ChatTemplate, Checkpoint};

/// Everything that a GGUF file says about a tokenizer.
#[derive(Clone, Debug)]
pub struct Export {
    /// Its lists.
    pub vocabulary: Vocabulary,
    /// `padding_token_id`.
    pub padding: Option<u32>,
    /// The chat templates by their names; `default` is `tokenizer.chat_template`.
    pub templates: Vec<(String, String)>,
    /// What GGUF cannot say of it, a sentence each.
    pub notes: Vec<String>,
}

fn unsupported<T>(what: impl Into<String>) -> Result<T, TokenizerError> {
    Err(TokenizerError::Unsupported(format!("{}; GGUF has no form for it", what.into())))
}

impl Export {
    /// From the tokenizer files in `dir`, for a model whose embedding has `rows` rows. Refused where chats or plain
    /// text would have other ids.
    pub fn of_dir(dir: &Path, rows: usize) -> Result<Export, TokenizerError> {
        let tokenizer = Tokenizer::from_dir(dir)?;
        let files = HfFiles::read(dir)?;
        let templates = templates_in(dir).map_err(|e| TokenizerError::Broken(e.to_string()))?;
        let parse = |bytes: &Option<Vec<u8>>| match bytes {
            Some(b) => crate::json::parse(b).map_err(TokenizerError::Broken),
            None => Ok(Value::Null),
        };
        let json: Value =
            serde_json::from_str(&tokenizer.to_json()?).map_err(|e| TokenizerError::Broken(e.to_string()))?;
        let (config, map) = (parse(&files.tokenizer_config)?, parse(&files.special_tokens_map)?);
        let named = |key: &str| {
            let name = |v: &Value| v.as_str().or_else(|| v["content"].as_str()).map(str::to_owned);
            name(&config[key]).or_else(|| name(&map[key])).and_then(|n| tokenizer.id_of(&n))
        };
        let lists = vocabulary(&tokenizer, &json, rows, named("unk_token"))?;
        let (vocabulary, mut notes) = closest(&tokenizer, &json, lists, ChatTemplate::from_dir(dir).ok().as_ref())?;
        if vocabulary.pre.as_deref().and_then(|p| Words::named(p).ok()).is_some_and(|w| w.nfc) {
            notes.push(
                "the source composes accents before it looks for tokens (NFC); llama.cpp does not: letters written \
                 with separate accents have other ids there"
                    .into(),
            );
        }
        Ok(Export { vocabulary, padding: named("pad_token"), templates, notes })
    }
}

/// Lists that give the source's ids, or those that come closest, and what is still different. Two things GGUF says for
/// all texts or for none: that a space stands before each piece of text, and that special tokens take the white space
/// behind them away.
fn closest(
    tokenizer: &Tokenizer,
    json: &Value,
    lists: Vocabulary,
    template: Option<&ChatTemplate>,
) -> Result<(Vocabulary, Vec<String>), TokenizerError> {
    let added = json["added_tokens"].as_array().map_or(&[][..], Vec::as_slice);
    let takes_space = added.iter().any(|t| t["rstrip"] == true) && is_phi3(&lists.tokens);
    let mut steps = Vec::new();
    flatten(&json["pre_tokenizer"], "pretokenizers", &mut steps);
    let prefix = lists.add_space_prefix;
    // Metaspace asks what a text begins with, and its scheme `first` where the text stands; only the outcome tells what
    // is nearest to that.
    let either = steps.iter().any(|s| s["type"] == "Metaspace") && prefix == Some(true);
    let prefixes = if either { vec![prefix, Some(false)] } else { vec![prefix] };
    let named = if takes_space { vec![true, false] } else { vec![false] };
    let mut best: Option<(Vocabulary, Compared)> = None;
    for (add_space_prefix, phi3) in prefixes.iter().flat_map(|p| named.iter().map(move |n| (*p, *n))) {
        let v = Vocabulary { add_space_prefix, phi3, ..lists.clone() };
        let compared = tokenizer.compare(&Tokenizer::from_vocabulary(v.clone())?, template, &[])?;
        let exact = compared.texts == 0;
        let rank = |c: &Compared| (c.refused.is_some(), c.texts);
        if best.as_ref().is_none_or(|b| rank(&compared) < rank(&b.1)) {
            best = Some((v, compared));
        }
        if exact {
            break;
        }
    }
    match best {
        Some((_, Compared { refused: Some(why), notes, .. })) => unsupported([vec![why], notes].concat().join("; ")),
        Some((v, compared)) => Ok((v, compared.notes)),
        None => unsupported("the tokenizer"),
    }
}

/// `general.name` for a model called `name`, and what to say where it had to change: by this name alone llama.cpp
/// decides whether special tokens take the white space behind them away.
pub(crate) fn general_name(name: Option<String>, phi3: bool) -> (Option<String>, Option<String>) {
    match (phi3, name) {
        (true, name) if !name.as_deref().is_some_and(named_phi3) => {
            let new = name.map_or("phi-3".into(), |n| format!("phi-3 {n}"));
            let note = format!(
                "general.name is {new:?}: llama.cpp goes by this name in taking away the white space behind special \
                 tokens, which this model's tokenizer does; keep \"phi-3\" in it"
            );
            (Some(new), Some(note))
        }
        (false, Some(name)) if named_phi3(&name) => {
            let mut new = name.clone();
            for mark in PHI3_NAMES {
                while let Some(at) = new.to_ascii_lowercase().find(mark) {
                    new.replace_range(at + "phi".len()..at + mark.len(), "_3");
                }
            }
            let note = format!(
                "general.name is {new:?}, not {name:?}: in a file of that name llama.cpp would take away the white \
                 space behind special tokens, which this tokenizer does not do"
            );
            (Some(new), Some(note))
        }
        (_, name) => (name, None),
    }
}

fn vocabulary(
    tokenizer: &Tokenizer,
    json: &Value,
    rows: usize,
    unknown: Option<u32>,
) -> Result<Vocabulary, TokenizerError> {
    let inner = &tokenizer.0;
    let model = &json["model"];
    if model["type"] != "BPE" {
        return unsupported(format!("the tokenizer's model is {}, not BPE", model["type"]));
    }
    let spaced = matches!(inner.pieces, Pieces::Spaced { .. });
    let mut tokens = inner.texts.clone();
    if tokens.len() > rows {
        return Err(TokenizerError::Broken(format!("{} tokens for an embedding of {rows} rows", tokens.len())));
    }
    let unknown = unknown.or_else(|| tokenizer.id_of(model["unk_token"].as_str()?));
    let mut taken: HashSet<String> = tokens.iter().filter(|t| !t.is_empty()).cloned().collect();
    let mut kinds = Vec::with_capacity(rows);
    for id in 0..rows as u32 {
        let i = id as usize;
        if i == tokens.len() {
            tokens.push(String::new());
        }
        // Ids without a text, and rows beyond the last id: llama.cpp wants a text of its own for each.
        if tokens[i].is_empty() {
            tokens[i] = (0..).map(|n| format!("[PAD{}]", id + n)).find(|t| !taken.contains(t)).unwrap_or_default();
            taken.insert(tokens[i].clone());
            kinds.push(TokenKind::Unused);
            continue;
        }
        kinds.push(match () {
            _ if spaced && Some(id) == unknown => TokenKind::Unknown,
            _ if inner.special.contains(&id) => TokenKind::Control,
            _ if inner.added.contains(&id) => TokenKind::UserDefined,
            _ if spaced && fallback_byte(&tokens[i]).is_some() => TokenKind::Byte,
            _ => TokenKind::Normal,
        });
    }
    let merges = merges(model)?;
    let encode = |special: bool| tokenizer.encode("a", special);
    let (plain, wrapped) = (encode(false)?, encode(true)?);
    let begins = wrapped.first().filter(|id| plain.first() != Some(id));
    let ends = wrapped.last().filter(|id| plain.last() != Some(id));
    let mut v = Vocabulary {
        model: if spaced { "llama" } else { "gpt2" }.into(),
        kinds,
        bos: tokenizer.bos().or(begins.copied()),
        eos: tokenizer.eos().or(ends.copied()),
        unknown,
        add_bos: Some(begins.is_some()),
        add_eos: Some(ends.is_some()),
        ..Vocabulary::default()
    };
    if spaced {
        let Pieces::Spaced { strip } = inner.pieces else { return unsupported("its pieces") };
        (v.pre, v.add_space_prefix) = (Some("default".into()), Some(strip));
        v.scores = scores(&tokens, &merges);
    } else {
        v.pre = Some(pre(json)?.into());
        v.merges = merges.into_iter().map(|(l, r)| format!("{l} {r}")).collect();
        if let Some(m) = v.merges.iter().find(|m| m.matches(' ').count() != 1) {
            return unsupported(format!("the merge {m:?} has a space inside a piece"));
        }
    }
    v.tokens = tokens;
    Ok(v)
}

pub(super) fn merges(model: &Value) -> Result<Vec<(String, String)>, TokenizerError> {
    let pair = |m: &Value| match m {
        Value::String(s) => s.split_once(' ').map(|(l, r)| (l.to_owned(), r.to_owned())),
        _ => Some((m[0].as_str()?.to_owned(), m[1].as_str()?.to_owned())),
    };
    let list = model["merges"].as_array().map_or(&[][..], Vec::as_slice);
    let broken = || TokenizerError::Broken("a merge of tokenizer.json is no pair".into());
    list.iter().map(|m| pair(m).ok_or_else(broken)).collect()
}

/// SentencePiece's scores: the earlier a merge makes a piece, the higher. Pieces that none makes come last.
fn scores(tokens: &[String], merges: &[(String, String)]) -> Vec<f32> {
    let mut rank: HashMap<String, usize> = HashMap::new();
    for (i, (l, r)) in merges.iter().enumerate() {
        rank.entry(format!("{l}{r}")).or_insert(i);
    }
    let last = merges.len();
    let score = |t: &String| -(rank.get(t.as_str()).copied().unwrap_or(last) as f32) - 1.0;
    tokens.iter().map(score).collect()
}

/// How words are cut, by llama.cpp's name for it.
fn pre(json: &Value) -> Result<&'static str, TokenizerError> {
    let mut steps = Vec::new();
    flatten(&json["pre_tokenizer"], "pretokenizers", &mut steps);
    let mut normalizers = Vec::new();
    flatten(&json["normalizer"], "normalizers", &mut normalizers);
    let nfc = match normalizers.as_slice() {
        [] => false,
        [n] if n["type"] == "NFC" => true,
        _ => return unsupported(format!("the normalizer {}", json["normalizer"])),
    };
    let whole_words = json["model"]["ignore_merges"] == true;
    if let Some(name) = name_of(&steps, whole_words, nfc) {
        return Ok(name);
    }
    match name_of(&steps, whole_words, !nfc) {
        Some(_) => unsupported(format!("the normalizer {} before these words", json["normalizer"])),
        None => unsupported(format!("the pre-tokenizer {}", json["pre_tokenizer"])),
    }
}

fn flatten<'a>(step: &'a Value, inner: &str, out: &mut Vec<&'a Value>) {
    match step[inner].as_array() {
        Some(list) => list.iter().for_each(|s| flatten(s, inner, out)),
        None if step.is_null() => {}
        None => out.push(step),
    }
}

/// The tokenizer inside GGUF metadata as files of the Hugging Face layout: names and contents.
pub(crate) fn hf_files(checkpoint: &Checkpoint, context: usize) -> Result<Vec<(String, Vec<u8>)>, TokenizerError> {
    let Some(metadata) = checkpoint.metadata() else { return Ok(Vec::new()) };
    let tokenizer = Tokenizer::from_gguf(metadata)?;
    let v = Vocabulary::from_gguf(metadata)?;
    let bad = |e: crate::gguf::GgufError| TokenizerError::Broken(e.what);
    let padding = metadata.get_u32("tokenizer.ggml.padding_token_id").map_err(bad)?;
    let templates = templates_of(metadata).map_err(|e| TokenizerError::Broken(e.to_string()))?;
    let mut config = Map::new();
    let named = [("bos_token", v.bos), ("eos_token", v.eos), ("unk_token", v.unknown), ("pad_token", padding)];
    for (key, id) in named {
        if let Some(text) = id.and_then(|id| tokenizer.token_text(id)) {
            config.insert(key.into(), json!(text));
        }
    }
    config.insert("clean_up_tokenization_spaces".into(), json!(false));
    config.insert("model_max_length".into(), json!(context));
    config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    match templates.as_slice() {
        [] => {}
        [(name, only)] if name == "default" => {
            config.insert("chat_template".into(), json!(only));
        }
        several => {
            let list: Vec<Value> = several.iter().map(|(n, t)| json!({"name": n, "template": t})).collect();
            config.insert("chat_template".into(), list.into());
        }
    }
    let mut generation = Map::new();
    for (key, id) in [("bos_token_id", v.bos), ("eos_token_id", v.eos), ("pad_token_id", padding)] {
        if let Some(id) = id {
            generation.insert(key.into(), json!(id));
        }
    }
    let pretty = |m: Map<String, Value>| {
        serde_json::to_vec_pretty(&Value::Object(m)).map_err(|e| TokenizerError::Broken(e.to_string()))
    };
    Ok(vec![
        ("tokenizer.json".into(), tokenizer.to_json()?.into_bytes()),
        ("tokenizer_config.json".into(), pretty(config)?),
        ("generation_config.json".into(), pretty(generation)?),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tokenizers").join(name)
    }

    /// The lists give the ids that the file gave, on a page written to be hard.
    #[test]
    fn lists_of_a_tokenizer_give_its_ids() {
        for (name, pre, rows) in [("bytelevel", "smaug-bpe", 700), ("metaspace", "default", 590)] {
            let dir = golden(name);
            let export = Export::of_dir(&dir, rows).unwrap();
            let v = &export.vocabulary;
            assert_eq!((v.tokens.len(), v.kinds.len(), v.pre.as_deref()), (rows, rows, Some(pre)));
            assert_eq!(export.templates.len(), 1);
            let again = Tokenizer::from_vocabulary(v.clone()).unwrap();
            let page: Value = serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
            let cases = page["cases"].as_array().unwrap();
            assert!(cases.len() > 10);
            for case in cases {
                let want: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
                assert_eq!(
                    again.encode(case["text"].as_str().unwrap(), false).unwrap(),
                    want,
                    "{name}: {}",
                    case["text"]
                );
            }
        }
    }

    /// The name alone decides, so that it must fit the tokenizer.
    #[test]
    fn names_of_files_fit_their_tokenizers() {
        let named = |name: Option<&str>, phi3| {
            let (name, note) = general_name(name.map(str::to_owned), phi3);
            assert!(name.as_deref().is_some_and(named_phi3) == phi3, "{name:?}");
            (name.unwrap_or_default(), note.is_some())
        };
        let own = |name: &str, told| (name.to_owned(), told);
        assert_eq!(named(Some("Phi-3.5-mini"), true), own("Phi-3.5-mini", false));
        assert_eq!(named(Some("f10fb29b"), true), own("phi-3 f10fb29b", true));
        assert_eq!(named(None, true), own("phi-3", true));
        assert_eq!(named(Some("llama"), false), own("llama", false));
        assert_eq!(named(Some("My-Phi-3-PHI3"), false), own("My-Phi_3-PHI_3", true));
        assert_eq!(general_name(None, false), (None, None));
    }

    #[test]
    fn what_gguf_has_no_form_for_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut json: Value =
            serde_json::from_slice(&std::fs::read(golden("bytelevel").join("tokenizer.json")).unwrap()).unwrap();
        json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!(r"\w+");
        std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        let e = Export::of_dir(dir.path(), 700).unwrap_err().to_string();
        assert!(e.contains("pre-tokenizer") && e.contains("\\\\w+"), "{e}");
        std::fs::copy(golden("bytelevel").join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
        let e = Export::of_dir(dir.path(), 10).unwrap_err().to_string();
        assert!(e.contains("for an embedding of 10 rows"), "{e}");
    }
}
