//! A tokenizer from the files of the Hugging Face layout.

use std::path::Path;

use serde_json::Value;
use tokenizers::AddedToken;

use super::pair::{Beside, Pair, SAVE_JSON};
use super::stream::Pieces;
use super::vocabulary::wrap;
use super::{Marks, Tokenizer, TokenizerError, guarded};
use crate::json;

/// Files that hold a tokenizer in a form that is not read here.
const OTHER_FORMS: [&str; 5] = ["tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt"];

/// The bytes of the files that say something about a tokenizer. All but one are optional.
#[derive(Clone, Debug, Default)]
pub struct HfFiles {
    /// `tokenizer.json`.
    pub tokenizer: Option<Vec<u8>>,
    /// `vocab.json` and `merges.txt`: the older form, used where `tokenizer.json` is missing.
    pub vocab_and_merges: Option<(Vec<u8>, Vec<u8>)>,
    /// `added_tokens.json`: ids of tokens beside that vocabulary.
    pub added_tokens: Option<Vec<u8>>,
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
        let up_to = |name: &str, most| match json::read_up_to(&dir.join(name), most) {
            Ok(Ok(bytes)) => Ok(Some(bytes)),
            Ok(Err(length)) => {
                Err(TokenizerError::Broken(format!("{}: {}", dir.join(name).display(), json::too_long(length, most))))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(TokenizerError::Read { path: dir.join(name).display().to_string(), source }),
        };
        let list = |name: &str| up_to(name, json::MAX_LIST);
        let get = |name: &str| up_to(name, json::MAX_SETTINGS);
        Ok(HfFiles {
            tokenizer: list("tokenizer.json")?,
            vocab_and_merges: list("vocab.json")?.zip(list("merges.txt")?),
            added_tokens: get("added_tokens.json")?,
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
            if let Some(name) = OTHER_FORMS.iter().find(|name| dir.join(name).exists()) {
                return Err(TokenizerError::Unsupported(format!(
                    "{} alone is not read here; {SAVE_JSON}",
                    dir.join(name).display()
                )));
            }
            return Err(TokenizerError::Missing(format!(
                "{} has neither tokenizer.json nor vocab.json with merges.txt",
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
        let (mut bos_name, mut eos_name) = (named("bos_token"), named("eos_token"));
        let numbered = |key: &str| ids(&generation[key]).chain(ids(&model[key])).collect::<Vec<u32>>();

        for (file, v) in [("generation_config.json", &generation), ("config.json", &model)] {
            for key in ["bos_token_id", "eos_token_id"] {
                if let Some(x) = json::not_finite(&v[key]) {
                    return Err(TokenizerError::Broken(format!("{file}: {key} is {x}, not a token's number")));
                }
                let number = |x: &Value| x.as_u64().is_some_and(|n| u32::try_from(n).is_ok());
                let sound = match &v[key] {
                    Value::Null => true,
                    Value::Array(all) => all.iter().all(number),
                    one => number(one),
                };
                if !sound {
                    let what = format!("{file}: {key} is {}, neither a token's number nor a list of such", v[key]);
                    return Err(TokenizerError::Broken(what));
                }
            }
        }

        let mut encoder = match (&files.tokenizer, &files.vocab_and_merges) {
            (Some(bytes), _) => {
                let mut encoder = guarded(|| tokenizers::Tokenizer::from_bytes(json::without_mark(bytes)))
                    .map_err(|e| TokenizerError::Broken(format!("tokenizer.json: {}", json::explain(bytes, e))))?;
                super::bounds::check_growth(&encoder)?;
                // Some files carry the settings of somebody's training run, which would cut or fill our texts.
                encoder.with_padding(None);
                encoder.with_truncation(None).map_err(|e| TokenizerError::Broken(e.to_string()))?;
                add_configured(&mut encoder, &config)?;
                encoder
            }
            (None, Some((vocab, merges))) => {
                let added = object(&files.added_tokens, "added_tokens.json")?;
                let beside = Beside { config: &config, map: &map, added: &added, model: &model };
                let mut pair = Pair::read(vocab, merges, &beside)?;
                add_configured(&mut pair.encoder, &config)?;
                add(&mut pair.encoder, pair.added, "added_tokens.json")?;
                (bos_name, eos_name) = (pair.bos, pair.eos);
                pair.encoder
            }
            (None, None) => {
                return Err(TokenizerError::Missing("neither tokenizer.json nor vocab.json with merges.txt".into()));
            }
        };
        let id = |name: &Option<String>| name.as_ref().and_then(|n| encoder.token_to_id(n));
        let bos = id(&bos_name).or_else(|| numbered("bos_token_id").first().copied());
        let eos = id(&eos_name).or_else(|| numbered("eos_token_id").first().copied());
        let pieces = pieces_of(&encoder)?;
        let marks = Marks { bos, eos, more_eos: numbered("eos_token_id") };

        let tokenizer = Tokenizer::assemble(encoder.clone(), None, pieces, marks)?;
        // The Llama and Gemma classes put these tokens around a text by their own settings, whatever tokenizer.json
        // says; so does a class that has no such file.
        let class = config["tokenizer_class"].as_str().unwrap_or("").trim_end_matches("Fast");
        let llama = matches!(class, "LlamaTokenizer" | "GemmaTokenizer");
        if !llama && files.tokenizer.is_some() {
            return Ok(tokenizer);
        }
        let inner = &tokenizer.0;
        let asked = |key: &str, otherwise: bool| config[key].as_bool().unwrap_or(otherwise);
        let bos = inner.bos.filter(|_| asked("add_bos_token", llama));
        let eos = inner.eos.filter(|&id| asked("add_eos_token", false) && (id as usize) < inner.texts.len());
        wrap(&mut encoder, bos, eos, &inner.texts)?;
        let marks = Marks { bos: inner.bos, eos: inner.eos, more_eos: inner.eos_set.clone() };
        Tokenizer::assemble(encoder, Some(inner.texts.clone()), pieces, marks)
    }
}

/// A JSON object, or null where the file is missing.
fn object(bytes: &Option<Vec<u8>>, name: &str) -> Result<Value, TokenizerError> {
    let Some(bytes) = bytes else { return Ok(Value::Null) };
    json::few_objects(bytes)
        .and_then(|()| json::parse(bytes))
        .map_err(|e| TokenizerError::Broken(format!("{name}: {e}")))
}

/// A token given as a string or as an object with its settings.
pub(super) fn token_name(v: &Value) -> Option<String> {
    v.as_str().or_else(|| v["content"].as_str()).map(str::to_owned)
}

/// A token with the settings of `value`, as far as it says any.
pub(super) fn flagged(content: String, value: &Value, special: bool) -> AddedToken {
    let flag = |key: &str| value[key] == true;
    AddedToken::from(content, special)
        .single_word(flag("single_word"))
        .lstrip(flag("lstrip"))
        .rstrip(flag("rstrip"))
        .normalized(flag("normalized"))
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
    let mut missing: Vec<(Option<u32>, AddedToken)> = Vec::new();
    for (id, token) in listed {
        let broken = || TokenizerError::Broken(format!("tokenizer_config.json: added token {id} is not understood"));
        let id: u32 = id.parse().map_err(|_| broken())?;
        let content = token["content"].as_str().ok_or_else(broken)?;
        if !content.is_empty() && !present.contains_key(&id) {
            missing.push((Some(id), flagged(content.into(), token, token["special"] == true)));
        }
    }
    missing.sort_by_key(|(id, _)| *id);
    add(encoder, missing, "tokenizer_config.json")
}

/// Adds tokens; each must get the id that `file` gives it, where it gives one.
fn add(
    encoder: &mut tokenizers::Tokenizer,
    tokens: Vec<(Option<u32>, AddedToken)>,
    file: &str,
) -> Result<(), TokenizerError> {
    let plain: Vec<AddedToken> = tokens.iter().map(|(_, t)| t.clone()).collect();
    guarded(|| Ok(encoder.add_tokens(&plain))).map_err(TokenizerError::Broken)?;
    for (id, token) in tokens {
        let got = encoder.token_to_id(&token.content);
        if id.is_some() && got != id {
            return Err(TokenizerError::Broken(format!(
                "{file} gives {:?} the id {}, the vocabulary {}",
                token.content,
                id.unwrap_or_default(),
                got.map_or("none".into(), |id| id.to_string())
            )));
        }
    }
    Ok(())
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
