//! Tokenizer files for a model that has lost tokens: those that stay get new ids, their places among them.

use std::collections::HashSet;

use serde_json::{Map, Value};

use super::{HfFiles, Tokenizer, TokenizerError};
use crate::gguf::{self, Metadata};
use crate::save::Pairs;
use crate::writer::SIDE_FILES;
use crate::{Checkpoint, Kind};

/// Vocabularies in forms that are not rewritten; what they hold is in the others.
const LEFT_OUT: [&str; 1] = ["tokenizer.model"];

/// Lists of ids in settings, beside those whose names end in `_token_id`.
const LISTS: [&str; 3] = ["suppress_tokens", "begin_suppress_tokens", "bad_words_ids"];

fn broken(e: impl ToString) -> TokenizerError {
    TokenizerError::Broken(e.to_string())
}

/// New ids for the tokens that stay.
struct Renumbered {
    /// Old ids, rising.
    kept: Vec<u32>,
}

impl Renumbered {
    fn new(kept: &[usize]) -> Result<Renumbered, TokenizerError> {
        let ids: Option<Vec<u32>> = kept.iter().map(|&id| u32::try_from(id).ok()).collect();
        match ids {
            Some(kept) if !kept.is_empty() && kept.windows(2).all(|w| w[0] < w[1]) => Ok(Renumbered { kept }),
            _ => Err(broken("the tokens that stay do not rise")),
        }
    }

    /// The new id of an old one, where it stays.
    fn of(&self, id: u64) -> Option<u32> {
        self.kept.binary_search(&u32::try_from(id).ok()?).ok().map(|at| at as u32)
    }

    /// What `list` has at the ids that stay.
    fn of_list<T: Clone>(&self, list: &[T]) -> Vec<T> {
        self.kept.iter().filter_map(|&id| list.get(id as usize).cloned()).collect()
    }

    /// An id, or lists of ids, in place: an id that goes leaves null, in a list nothing.
    fn ids(&self, v: &mut Value) {
        match v {
            Value::Number(n) => *v = n.as_u64().and_then(|id| self.of(id)).map_or(Value::Null, Value::from),
            Value::Array(list) => {
                list.iter_mut().for_each(|v| self.ids(v));
                list.retain(|v| !v.is_null());
            }
            _ => {}
        }
    }

    /// A map from texts to ids.
    fn vocab(&self, map: &mut Map<String, Value>) {
        map.values_mut().for_each(|v| self.ids(v));
        map.retain(|_, v| !v.is_null());
    }

    /// tokenizer.json.
    fn tokenizer(&self, json: &mut Value) -> Result<(), TokenizerError> {
        let model = &mut json["model"];
        match &mut model["vocab"] {
            Value::Object(map) => {
                self.vocab(map);
                let texts: HashSet<String> = map.keys().cloned().collect();
                if let Some(list) = model.get_mut("merges").and_then(Value::as_array_mut) {
                    list.retain(|m| merge(m).is_some_and(|(l, r)| stays(&texts, l, r)));
                }
            }
            Value::Array(list) => *list = self.of_list(list),
            _ => return Err(broken("tokenizer.json: the model has no vocab")),
        }
        if let Some(id) = model.get_mut("unk_id") {
            self.ids(id);
        }
        for token in json.get_mut("added_tokens").and_then(Value::as_array_mut).into_iter().flatten() {
            self.ids(&mut token["id"]);
        }
        if let Some(id) = json.get_mut("padding").and_then(|p| p.get_mut("pad_id")) {
            self.ids(id);
        }
        if let Some(processor) = json.get_mut("post_processor") {
            self.processor(processor);
        }
        Ok(())
    }

    fn processor(&self, processor: &mut Value) {
        for inner in processor.get_mut("processors").and_then(Value::as_array_mut).into_iter().flatten() {
            self.processor(inner);
        }
        let specials = processor.get_mut("special_tokens").and_then(Value::as_object_mut);
        for token in specials.into_iter().flat_map(|s| s.values_mut()) {
            if let Some(ids) = token.get_mut("ids") {
                self.ids(ids);
            }
        }
        for key in ["sep", "cls"] {
            // A token's text and its id.
            if let Some(id) = processor.get_mut(key).and_then(|pair| pair.get_mut(1)) {
                self.ids(id);
            }
        }
    }

    /// generation_config.json and config.json.
    fn settings(&self, json: &mut Value) {
        for (key, v) in json.as_object_mut().into_iter().flatten() {
            if key.ends_with("_token_id") || LISTS.contains(&key.as_str()) {
                self.ids(v);
            }
        }
    }

    /// A file beside the weights; `None` where it does not go along. `vocab`: the texts of vocab.json that stay.
    fn file(&self, name: &str, bytes: Vec<u8>, vocab: &HashSet<String>) -> Result<Option<Vec<u8>>, TokenizerError> {
        if LEFT_OUT.contains(&name) {
            return Ok(None);
        }
        if name == "merges.txt" {
            let text = String::from_utf8(bytes).map_err(|e| broken(format!("merges.txt: {e}")))?;
            let kept = |(i, line): &(usize, &str)| {
                let title = *i == 0 && line.starts_with("#version");
                title || line.trim_end().split_once(' ').is_some_and(|(l, r)| stays(vocab, l, r))
            };
            let lines = text.lines().enumerate().filter(kept).flat_map(|(_, line)| [line, "\n"]);
            return Ok(Some(lines.collect::<String>().into_bytes()));
        }
        let known = ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json"];
        if !known.contains(&name) && !["generation_config.json", "config.json"].contains(&name) {
            return Ok(Some(bytes));
        }
        let mut json: Value = crate::json::parse(&bytes).map_err(|e| broken(format!("{name}: {e}")))?;
        match (name, json.as_object_mut()) {
            ("tokenizer.json", Some(_)) => self.tokenizer(&mut json)?,
            ("added_tokens.json" | "vocab.json", Some(map)) => self.vocab(map),
            ("tokenizer_config.json", Some(map)) => {
                if let Some(listed) = map.get_mut("added_tokens_decoder").and_then(Value::as_object_mut) {
                    let renamed = std::mem::take(listed).into_iter();
                    let new = |id: &str| Some(self.of(id.parse().ok()?)?.to_string());
                    listed.extend(renamed.filter_map(|(id, token)| Some((new(&id)?, token))));
                }
            }
            (_, Some(_)) => self.settings(&mut json),
            _ => return Err(broken(format!("{name} is no object"))),
        }
        serde_json::to_vec(&json).map(Some).map_err(broken)
    }

    /// The texts of `vocab.json` that stay.
    fn pair(&self, vocab: Option<&[u8]>) -> Result<HashSet<String>, TokenizerError> {
        let Some(bytes) = vocab else { return Ok(HashSet::new()) };
        let mut map: Map<String, Value> =
            crate::json::parse(bytes).map_err(|e| broken(format!("vocab.json: {e}")))?;
        self.vocab(&mut map);
        Ok(map.into_iter().map(|(text, _)| text).collect())
    }

    /// A GGUF file of metadata alone, with lists of the tokens that stay.
    fn metadata(&self, file: &[u8], metadata: &Metadata) -> Result<Vec<u8>, TokenizerError> {
        const KEY: &str = "tokenizer.ggml.";
        let texts: HashSet<String> = match metadata.get("tokenizer.ggml.tokens") {
            Some(gguf::Value::Strs(all)) => self.of_list(all).into_iter().collect(),
            _ => return Err(broken("the GGUF file has no list of tokens")),
        };
        let bad = |e: gguf::GgufError| broken(e.what);
        let mut pairs = Pairs::default();
        for (key, raw) in metadata.raw(file) {
            match (key.strip_prefix(KEY), metadata.get(key)) {
                (Some("tokens"), Some(gguf::Value::Strs(all))) => pairs.strs(key, &self.of_list(all)),
                (Some("merges"), Some(gguf::Value::Strs(all))) => {
                    let kept = |m: &&String| m.split_once(' ').is_some_and(|(l, r)| stays(&texts, l, r));
                    pairs.strs(key, &all.iter().filter(kept).cloned().collect::<Vec<_>>());
                }
                (Some("scores"), _) => {
                    pairs.f32s(key, &self.of_list(&metadata.get_f32s(key).map_err(bad)?.unwrap_or_default()));
                }
                (Some("token_type"), _) => {
                    let kinds = metadata.get_ints(key).map_err(bad)?.unwrap_or_default();
                    pairs.i32s(key, self.of_list(&kinds).into_iter().map(|k| k as i32));
                }
                (Some(name), Some(_)) if name.ends_with("_token_id") => {
                    let id = metadata.get_u32(key).map_err(bad)?.and_then(|id| self.of(id.into()));
                    id.into_iter().for_each(|id| pairs.u32(key, id));
                }
                _ => pairs.raw(raw),
            }
        }
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend(0u64.to_le_bytes());
        out.extend(pairs.count.to_le_bytes());
        out.append(&mut pairs.bytes);
        Ok(out)
    }
}

/// The two halves of a merge, in either way of writing it.
fn merge(m: &Value) -> Option<(&str, &str)> {
    match m {
        Value::String(s) => s.split_once(' '),
        _ => Some((m[0].as_str()?, m[1].as_str()?)),
    }
}

/// Whether both halves and what they make stay.
fn stays(texts: &HashSet<String>, l: &str, r: &str) -> bool {
    texts.contains(l) && texts.contains(r) && texts.contains(&(l.to_owned() + r))
}

/// What lies beside the weights of a model of which the tokens `kept` (their ids rise) stay: names and contents.
/// `settings`: with its config.json as well.
pub(crate) fn shortened_files(
    source: &Checkpoint,
    kept: &[usize],
    settings: bool,
) -> Result<Vec<(String, Vec<u8>)>, TokenizerError> {
    let new = Renumbered::new(kept)?;
    let mut out = Vec::new();
    if let Some(file) = source.tokenizer_gguf().map_err(broken)? {
        let parsed = gguf::parse(&file).map_err(|e| broken(e.what))?;
        out.push(("tokenizer.gguf".to_owned(), new.metadata(&file, &parsed.metadata)?));
    }
    if source.kind() == Kind::Gguf {
        return Ok(out);
    }
    let read = |name: &str| {
        let path = source.dir().join(name);
        let fault = |source| TokenizerError::Read { path: path.display().to_string(), source };
        if path.is_file() { std::fs::read(&path).map(Some).map_err(fault) } else { Ok(None) }
    };
    let texts = new.pair(read("vocab.json")?.as_deref())?;
    for name in SIDE_FILES.iter().copied().chain(settings.then_some("config.json")) {
        if let Some(bytes) = read(name)? {
            out.extend(new.file(name, bytes, &texts)?.map(|bytes| (name.to_owned(), bytes)));
        }
    }
    Ok(out)
}

impl Tokenizer {
    /// This tokenizer, which is that of `source`, with the tokens `kept` alone (old ids, rising), as a model without
    /// the others will have it. Refused where a token would not come out as the same text.
    pub fn shortened(&self, source: &Checkpoint, kept: &[usize]) -> Result<Tokenizer, TokenizerError> {
        let mut files = shortened_files(source, kept, true)?;
        let mut take = |name: &str| Some(files.remove(files.iter().position(|f| f.0 == name)?).1);
        let made = match take("tokenizer.gguf") {
            Some(file) => Tokenizer::from_gguf(&gguf::parse(&file).map_err(|e| broken(e.what))?.metadata)?,
            None => Tokenizer::from_hf(&HfFiles {
                tokenizer: take("tokenizer.json"),
                vocab_and_merges: take("vocab.json").zip(take("merges.txt")),
                added_tokens: take("added_tokens.json"),
                tokenizer_config: take("tokenizer_config.json"),
                special_tokens_map: take("special_tokens_map.json"),
                generation_config: take("generation_config.json"),
                config: take("config.json"),
            })?,
        };
        if made.vocab_size() > kept.len() {
            return Err(broken(format!("{} tokens came out where {} stay", made.vocab_size(), kept.len())));
        }
        for (new, &old) in kept.iter().enumerate() {
            let (was, is) = (self.token_text(old as u32), made.token_text(new as u32));
            if was != is || self.is_special(old as u32) != made.is_special(new as u32) {
                return Err(broken(format!("token {old}, {was:?}, would become {new}, {is:?}")));
            }
        }
        Ok(made)
    }
}
