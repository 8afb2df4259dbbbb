//! A tokenizer from the files of the Hugging Face layout.

use std::path::Path;

use serde_json::Value;
use tokenizers::AddedToken;

use super::stream::Pieces;
use super::vocabulary::wrap;
use super::{Marks, TokenKind, Tokenizer, TokenizerError, Vocabulary, guarded};
use crate::json;

/// The bytes of the files that say something about a tokenizer. All but one are optional.
#[derive(Clone, Debug, Default)]
pub struct HfFiles {
    /// `tokenizer.json`.
    pub tokenizer: Option<Vec<u8>>,
    /// `vocab.json` and `merges.txt`: GPT-2's older form, used where `tokenizer.json` is missing.
    pub vocab_and_merges: Option<(Vec<u8>, Vec<u8>)>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<Vec<u8>>,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Option<Vec<u8>>,
    /// `generation_config.json`.
    pub generation_config: Option<Vec<u8>>,
    /// `config.json`.
    pub config: Option<Vec<u8>>,
}

impl HfFiles {
    /// Reads those that exist in `dir`.
    pub fn read(dir: &Path) -> Result<HfFiles, TokenizerError> {
        let get = |name: &str| match std::fs::read(dir.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(TokenizerError::Read { path: dir.join(name).display().to_string(), source }),
        };
        Ok(HfFiles {
            tokenizer: get("tokenizer.json")?,
            vocab_and_merges: get("vocab.json")?.zip(get("merges.txt")?),
            tokenizer_config: get("tokenizer_config.json")?,
            special_tokens_map: get("special_tokens_map.json")?,
            generation_config: get("generation_config.json")?,
            config: get("config.json")?,
        })
    }
}

impl Tokenizer {
    /// A tokenizer from the directory of a checkpoint.
    pub fn from_dir(dir: &Path) -> Result<Tokenizer, TokenizerError> {
        let files = HfFiles::read(dir)?;
        if files.tokenizer.is_none() && files.vocab_and_merges.is_none() {
            let hint = if dir.join("tokenizer.model").exists() {
                "; tokenizer.model alone is not read here: save the model once with a fast tokenizer, or use its GGUF file"
            } else {
                ""
            };
            return Err(TokenizerError::Missing(format!(
                "{} has neither tokenizer.json nor vocab.json with merges.txt{hint}",
                dir.display()
            )));
        }
        Tokenizer::from_hf(&files)
    }

    /// A tokenizer from files in memory.
    pub fn from_hf(files: &HfFiles) -> Result<Tokenizer, TokenizerError> {
        let config = object(&files.tokenizer_config, "tokenizer_config.json")?;
        let map = object(&files.special_tokens_map, "special_tokens_map.json")?;
        let generation = object(&files.generation_config, "generation_config.json")?;
        let model = object(&files.config, "config.json")?;
        let named = |key: &str| token_name(&config[key]).or_else(|| token_name(&map[key]));
        let (bos_name, eos_name) = (named("bos_token"), named("eos_token"));
        let numbered = |key: &str| ids(&generation[key]).chain(ids(&model[key])).collect::<Vec<u32>>();

        for (file, v) in [("generation_config.json", &generation), ("config.json", &model)] {
            for key in ["bos_token_id", "eos_token_id"] {
                if let Some(x) = json::not_finite(&v[key]) {
                    return Err(TokenizerError::Broken(format!("{file}: {key} is {x}, not a token's number")));
                }
            }
        }

        let Some(bytes) = &files.tokenizer else {
            let Some((vocab, merges)) = &files.vocab_and_merges else {
                return Err(TokenizerError::Missing("neither tokenizer.json nor vocab.json with merges.txt".into()));
            };
            let mut special: Vec<String> =
                ["bos_token", "eos_token", "unk_token", "pad_token"].iter().filter_map(|k| named(k)).collect();
            special.push("<|endoftext|>".into());
            let mut v = from_pair(vocab, merges, &special)?;
            let find = |name: &Option<String>| {
                name.as_ref().and_then(|n| v.tokens.iter().position(|t| t == n)).map(|id| id as u32)
            };
            let (bos, eos) = (find(&bos_name), find(&eos_name));
            v.bos = bos.or_else(|| numbered("bos_token_id").first().copied());
            v.eos = eos.or_else(|| numbered("eos_token_id").first().copied());
            v.add_bos = Some(config["add_bos_token"] == true);
            return Tokenizer::from_vocabulary(v);
        };

        let mut encoder = guarded(|| tokenizers::Tokenizer::from_bytes(json::without_mark(bytes)))
            .map_err(|e| TokenizerError::Broken(format!("tokenizer.json: {}", json::explain(bytes, e))))?;
        // Some files carry the settings of somebody's training run, which would cut or fill our texts.
        encoder.with_padding(None);
        encoder.with_truncation(None).map_err(|e| TokenizerError::Broken(e.to_string()))?;
        add_configured(&mut encoder, &config)?;
        let id = |name: &Option<String>| name.as_ref().and_then(|n| encoder.token_to_id(n));
        let bos = id(&bos_name).or_else(|| numbered("bos_token_id").first().copied());
        let eos = id(&eos_name).or_else(|| numbered("eos_token_id").first().copied());
        let pieces = pieces_of(&encoder)?;
        let marks = Marks { bos, eos, more_eos: numbered("eos_token_id") };

        let tokenizer = Tokenizer::assemble(encoder.clone(), None, pieces, marks)?;
        // The Llama and Gemma classes put these tokens around a text by their own settings, whatever tokenizer.json says.
        let class = config["tokenizer_class"].as_str().unwrap_or("").trim_end_matches("Fast");
        if !matches!(class, "LlamaTokenizer" | "GemmaTokenizer") {
            return Ok(tokenizer);
        }
        let inner = &tokenizer.0;
        let asked = |key: &str, otherwise: bool| config[key].as_bool().unwrap_or(otherwise);
        let bos = inner.bos.filter(|_| asked("add_bos_token", true));
        let eos = inner.eos.filter(|&id| asked("add_eos_token", false) && (id as usize) < inner.texts.len());
        wrap(&mut encoder, bos, eos, &inner.texts)?;
        let marks = Marks { bos: inner.bos, eos: inner.eos, more_eos: inner.eos_set.clone() };
        Tokenizer::assemble(encoder, Some(inner.texts.clone()), pieces, marks)
    }
}

/// A JSON object, or null where the file is missing.
fn object(bytes: &Option<Vec<u8>>, name: &str) -> Result<Value, TokenizerError> {
    let Some(bytes) = bytes else { return Ok(Value::Null) };
    json::parse(bytes).map_err(|e| TokenizerError::Broken(format!("{name}: {e}")))
}

/// A token given as a string or as an object with its settings.
fn token_name(v: &Value) -> Option<String> {
    v.as_str().or_else(|| v["content"].as_str()).map(str::to_owned)
}

/// An id, or a list of ids.
fn ids(v: &Value) -> impl Iterator<Item = u32> + '_ {
    let list = v.as_array().map_or(std::slice::from_ref(v), Vec::as_slice);
    list.iter().filter_map(|v| u32::try_from(v.as_u64()?).ok())
}

/// Adds the tokens of `added_tokens_decoder` that tokenizer.json lacks; each must get the id written beside it.
fn add_configured(encoder: &mut tokenizers::Tokenizer, config: &Value) -> Result<(), TokenizerError> {
    let Some(listed) = config["added_tokens_decoder"].as_object() else { return Ok(()) };
    let present = encoder.get_added_tokens_decoder();
    let mut missing: Vec<(u32, AddedToken)> = Vec::new();
    for (id, token) in listed {
        let broken = || TokenizerError::Broken(format!("tokenizer_config.json: added token {id} is not understood"));
        let id: u32 = id.parse().map_err(|_| broken())?;
        let flag = |key: &str| token[key] == true;
        let added = AddedToken::from(token["content"].as_str().ok_or_else(broken)?, flag("special"))
            .single_word(flag("single_word"))
            .lstrip(flag("lstrip"))
            .rstrip(flag("rstrip"))
            .normalized(flag("normalized"));
        if !added.content.is_empty() && !present.contains_key(&id) {
            missing.push((id, added));
        }
    }
    missing.sort_by_key(|(id, _)| *id);
    let tokens: Vec<AddedToken> = missing.iter().map(|(_, t)| t.clone()).collect();
    guarded(|| Ok(encoder.add_tokens(&tokens))).map_err(TokenizerError::Broken)?;
    for (id, token) in missing {
        let got = encoder.token_to_id(&token.content);
        if got != Some(id) {
            return Err(TokenizerError::Broken(format!(
                "tokenizer_config.json gives {:?} the id {id}, tokenizer.json the id {got:?}",
                token.content
            )));
        }
    }
    Ok(())
}

/// GPT-2's pair of files as lists; `special`: the texts that are no text.
fn from_pair(vocab: &[u8], merges: &[u8], special: &[String]) -> Result<Vocabulary, TokenizerError> {
    let map: std::collections::HashMap<String, u32> =
        json::parse(vocab).map_err(|e| TokenizerError::Broken(format!("vocab.json: {e}")))?;
    let mut tokens = vec![String::new(); map.len()];
    for (text, id) in map {
        let n = tokens.len();
        *tokens
            .get_mut(id as usize)
            .ok_or_else(|| TokenizerError::Broken(format!("vocab.json: id {id} among {n} tokens")))? = text;
    }
    let merges = std::str::from_utf8(merges).map_err(|e| TokenizerError::Broken(format!("merges.txt: {e}")))?;
    let merges = merges.lines().filter(|l| !l.starts_with("#version") && !l.is_empty()).map(str::to_owned).collect();
    let kinds =
        tokens.iter().map(|t| if special.contains(t) { TokenKind::Control } else { TokenKind::Normal }).collect();
    Ok(Vocabulary { model: "gpt2".into(), pre: Some("gpt-2".into()), tokens, kinds, merges, ..Vocabulary::default() })
}

/// How tokens stand for bytes, read off the decoder that tokenizer.json names.
fn pieces_of(encoder: &tokenizers::Tokenizer) -> Result<Pieces, TokenizerError> {
    let decoder = serde_json::to_value(encoder.get_decoder()).unwrap_or(Value::Null);
    let steps = match decoder["decoders"].as_array() {
        Some(steps) => steps.as_slice(),
        None => std::slice::from_ref(&decoder),
    };
    let step = |kind: &str| steps.iter().find(|s| s["type"] == kind);
    if step("ByteLevel").is_some() {
        return Ok(Pieces::ByteLevel);
    }
    if let Some(meta) = step("Metaspace").filter(|m| m["replacement"] == "▁") {
        return Ok(Pieces::Spaced { strip: meta["prepend_scheme"] != "never" });
    }
    if step("Replace").is_some_and(|r| r["pattern"]["String"] == "▁" && r["content"] == " ") {
        let strip = step("Strip").is_some_and(|s| s["content"] == " " && s["start"].as_u64() > Some(0));
        return Ok(Pieces::Spaced { strip });
    }
    Err(TokenizerError::Unsupported(format!(
        "the decoder of tokenizer.json is {}; known are ByteLevel, Metaspace and SentencePiece's sequence",
        decoder["type"]
    )))
}
