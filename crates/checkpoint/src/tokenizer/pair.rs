//! `vocab.json` and `merges.txt`: the older pair of files. They list the pieces; how a text is cut into words before,
//! and what is normalized, only the tokenizer's class knows, and which tokens steer is written in up to three files
//! beside them.

use std::collections::{HashMap, HashSet};

use serde_json::Value;
use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;

use super::hf::{flagged, token_name};
use super::words::{QWEN2, isolated};
use super::{MAX_VOCAB, TokenizerError, guarded};

/// What to do where this pair cannot be read.
pub(super) const SAVE_JSON: &str = "write tokenizer.json once with transformers \
     (AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)) or take it from the model's own release";

/// The names of tokens that a class gives a task.
const TASKS: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A class that reads such a pair.
#[derive(Clone, Copy, PartialEq)]
enum Class {
    /// GPT-2's words; CodeGen's are the same.
    Gpt2,
    Qwen2,
}

impl Class {
    /// From `tokenizer_class`, else from the kind of model that it comes with.
    fn of(config: &Value, model: &Value) -> Result<Class, TokenizerError> {
        let named = config["tokenizer_class"].as_str().or_else(|| model["tokenizer_class"].as_str());
        let unknown = |what: String| {
            Err(TokenizerError::Unsupported(format!(
                "vocab.json and merges.txt without tokenizer.json: {what}; known are GPT2Tokenizer, CodeGenTokenizer \
                 and Qwen2Tokenizer; {SAVE_JSON}"
            )))
        };
        match named.map(|n| n.trim_end_matches("Fast")) {
            Some("GPT2Tokenizer" | "CodeGenTokenizer") => Ok(Class::Gpt2),
            Some("Qwen2Tokenizer") => Ok(Class::Qwen2),
            Some(other) => unknown(format!("how the class {other} cuts words is not known here")),
            None => match model["model_type"].as_str() {
                Some("gpt2" | "opt") => Ok(Class::Gpt2),
                Some("qwen2" | "qwen3" | "qwen3_moe") => Ok(Class::Qwen2),
                Some(kind) => unknown(format!(
                    "no tokenizer_class says how words are cut, and models of the type {kind} have no class of their \
                     own"
                )),
                None => unknown("neither tokenizer_config.json nor config.json says which class reads them".into()),
            },
        }
    }

    /// The token for a task that no file names.
    fn default(self, task: &str) -> Option<&'static str> {
        match (self, task) {
            (Class::Gpt2, "bos_token") | (Class::Qwen2, "pad_token") | (_, "eos_token" | "unk_token") => {
                Some("<|endoftext|>")
            }
            _ => None,
        }
    }
}

/// The files beside the pair, parsed; null where there is none.
pub(super) struct Beside<'a> {
    /// `tokenizer_config.json`.
    pub config: &'a Value,
    /// `special_tokens_map.json`.
    pub map: &'a Value,
    /// `added_tokens.json`.
    pub added: &'a Value,
    /// `config.json`.
    pub model: &'a Value,
}

/// What the pair of files and those beside it say.
pub(super) struct Pair {
    /// The encoder, without any added token.
    pub encoder: tokenizers::Tokenizer,
    /// Tokens to add, in order, with the id that each must get where a file says one.
    pub added: Vec<(Option<u32>, AddedToken)>,
    /// The token that begins a text.
    pub bos: Option<String>,
    /// The token that ends one.
    pub eos: Option<String>,
}

impl Pair {
    pub fn read(vocab: &[u8], merges: &[u8], beside: &Beside<'_>) -> Result<Pair, TokenizerError> {
        let class = Class::of(beside.config, beside.model)?;
        let vocab: HashMap<String, u32> =
            crate::json::parse(vocab).map_err(|e| TokenizerError::Broken(format!("vocab.json: {e}")))?;
        if let Some((token, id)) = vocab.iter().find(|t| *t.1 as usize >= MAX_VOCAB) {
            return Err(TokenizerError::Broken(format!(
                "vocab.json: {token:?} has the id {id}, past {MAX_VOCAB}, the most allowed"
            )));
        }
        one_token_an_id(&vocab)?;
        // What `added_tokens_decoder` lists it lists whole; only without it do the older files count.
        let listed = beside.config["added_tokens_decoder"].as_object();
        let sides = if listed.is_some() { vec![beside.config] } else { vec![beside.map, beside.config] };
        let task = |task: &str| match sides.iter().find_map(|side| side.get(task)) {
            Some(said) => Some(said.clone()),
            None => Some(class.default(task).filter(|t| vocab.contains_key(*t))?.into()),
        };
        let more = ["additional_special_tokens", "extra_special_tokens"];
        let more = sides.iter().flat_map(|side| more.iter().filter_map(|key| side[*key].as_array()).flatten().cloned());
        let mut named: Vec<AddedToken> = Vec::new();
        for value in TASKS.iter().filter_map(|t| task(t)).chain(more) {
            if let Some(content) =
                token_name(&value).filter(|c| !c.is_empty() && !named.iter().any(|t| t.content == *c))
            {
                named.push(flagged(content, &value, true));
            }
        }
        let mut added = if listed.is_some() { Vec::new() } else { numbered(beside.added, &named)? };
        let known: HashSet<&str> = match listed {
            Some(list) => list.values().filter_map(|t| t["content"].as_str()).collect(),
            None => added.iter().map(|(_, t)| t.content.as_str()).collect(),
        };
        let fresh: Vec<_> =
            named.into_iter().filter(|t| !known.contains(t.content.as_str())).map(|t| (None, t)).collect();
        added.extend(fresh);
        let name = |t: &str| task(t).as_ref().and_then(token_name);
        let (bos, eos) = (name("bos_token"), name("eos_token"));
        let prefix = beside.config["add_prefix_space"] == true;
        Ok(Pair { encoder: encoder(class, vocab.into_iter().collect(), lines(merges)?, prefix)?, added, bos, eos })
    }
}

/// Two tokens with one id would be one token with either text, by chance.
fn one_token_an_id(vocab: &HashMap<String, u32>) -> Result<(), TokenizerError> {
    let mut sorted: Vec<(u32, &String)> = vocab.iter().map(|(token, id)| (*id, token)).collect();
    sorted.sort_unstable();
    match sorted.windows(2).find(|w| w[0].0 == w[1].0) {
        Some(w) => {
            let ((id, a), (_, b)) = (w[0], w[1]);
            Err(TokenizerError::Broken(format!("vocab.json: {a:?} and {b:?} both have the id {id}")))
        }
        None => Ok(()),
    }
}

fn encoder(class: Class, vocab: Vocab, merges: Merges, prefix: bool) -> Result<tokenizers::Tokenizer, TokenizerError> {
    let model = guarded(|| BPE::builder().vocab_and_merges(vocab, merges).build())
        .map_err(|e| TokenizerError::Broken(format!("merges.txt does not fit vocab.json: {e}")))?;
    let mut encoder = tokenizers::Tokenizer::new(model);
    match class {
        Class::Gpt2 => {
            encoder.with_pre_tokenizer(Some(ByteLevel::new(prefix, true, true)));
        }
        Class::Qwen2 => {
            encoder.with_normalizer(Some(NFC));
            let bytes = ByteLevel::new(prefix, true, false);
            encoder.with_pre_tokenizer(Some(Sequence::new(vec![isolated(QWEN2)?, bytes.into()])));
        }
    }
    encoder.with_decoder(Some(ByteLevel::new(false, true, true)));
    Ok(encoder)
}

/// `left right` lines as pairs.
fn lines(merges: &[u8]) -> Result<Merges, TokenizerError> {
    let text = std::str::from_utf8(merges).map_err(|e| TokenizerError::Broken(format!("merges.txt: {e}")))?;
    let lines =
        text.lines().enumerate().filter(|(i, l)| !(l.trim().is_empty() || *i == 0 && l.starts_with("#version")));
    let pair = |(i, line): (usize, &str)| match line.trim_end().split_once(' ') {
        Some((l, r)) if !l.is_empty() && !r.is_empty() && !r.contains(' ') => Ok((l.to_owned(), r.to_owned())),
        _ => Err(TokenizerError::Broken(format!(
            "merges.txt: line {} is {line:?}, not two pieces with a space between",
            i + 1
        ))),
    };
    lines.map(pair).collect()
}

/// The tokens of `added_tokens.json`. What steers among them it does not say: those that another file names.
fn numbered(ids: &Value, named: &[AddedToken]) -> Result<Vec<(Option<u32>, AddedToken)>, TokenizerError> {
    let mut tokens = Vec::new();
    for (content, id) in ids.as_object().into_iter().flatten() {
        let id = id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| {
            TokenizerError::Broken(format!("added_tokens.json: the id of {content:?} is {id}, not a whole number"))
        })?;
        let special = named.iter().any(|t| t.content == *content);
        tokens.push((Some(id), AddedToken::from(content.as_str(), special).normalized(!special)));
    }
    tokens.sort_by_key(|t| t.0);
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_belongs_to_one_token() {
        let config = serde_json::json!({"tokenizer_class": "GPT2Tokenizer"});
        let none = Value::Null;
        let beside = Beside { config: &config, map: &none, added: &none, model: &none };
        let read = |vocab: &[u8]| Pair::read(vocab, b"", &beside).map(|_| ()).map_err(|e| e.to_string());
        assert_eq!(read(br#"{"a": 0, "b": 1, "c": 2}"#), Ok(()));
        let e = read(br#"{"a": 0, "b": 1, "c": 0}"#).unwrap_err();
        assert!(e.contains(r#""a" and "c" both have the id 0"#), "{e}");
    }
}
