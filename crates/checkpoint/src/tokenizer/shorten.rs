//! Tokenizer files for a model that has lost tokens: those that stay get new ids, their places among them.

use std::collections::HashSet;
use std::path::Path;

use serde_json::{Map, Value};

use super::{HfFiles, Tokenizer, TokenizerError};
use crate::along::SIDE_FILES;
use crate::gguf;
use crate::save::Pairs;
use crate::{Checkpoint, Kind};

/// Vocabularies in forms that are not rewritten; what they hold is in the others.
const LEFT_OUT: [&str; 1] = ["tokenizer.model"];

/// Lists of ids in settings, beside those whose names end in `_token_id`.
const LISTS: [&str; 2] = ["suppress_tokens", "begin_suppress_tokens"];

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
        let none = || broken("tokenizer.json: the model has no vocab");
        let model = json.get_mut("model").and_then(Value::as_object_mut).ok_or_else(none)?;
        match model.get_mut("vocab") {
            Some(Value::Object(map)) => {
                self.vocab(map);
                let texts: HashSet<String> = map.keys().cloned().collect();
                if let Some(list) = model.get_mut("merges").and_then(Value::as_array_mut) {
                    list.retain(|m| merge(m).is_some_and(|(l, r)| stays(&texts, l, r)));
                }
            }
            Some(Value::Array(list)) => *list = self.of_list(list),
            _ => return Err(none()),
        }
        if let Some(id) = model.get_mut("unk_id") {
            self.ids(id);
        }
        for token in json.get_mut("added_tokens").and_then(Value::as_array_mut).into_iter().flatten() {
            token.get_mut("id").into_iter().for_each(|id| self.ids(id));
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

    /// Renumbers an id or a list of ids; false where one of them goes.
    fn all(&self, v: &mut Value) -> bool {
        match v {
            Value::Number(n) => match n.as_u64().and_then(|id| self.of(id)) {
                Some(id) => {
                    *v = Value::from(id);
                    true
                }
                None => false,
            },
            Value::Array(list) => list.iter_mut().all(|v| self.all(v)),
            _ => false,
        }
    }

    /// Keeps of a list what `renumber` could say in the new ids.
    fn phrases(&self, v: &mut Value, renumber: impl Fn(&Self, &mut Value) -> bool) {
        if let Some(list) = v.as_array_mut() {
            list.retain_mut(|p| renumber(self, p));
        }
        if v.as_array().is_some_and(Vec::is_empty) {
            *v = Value::Null;
        }
    }

    /// generation_config.json and config.json.
    fn settings(&self, json: &mut Value) {
        for (key, v) in json.as_object_mut().into_iter().flatten() {
            match key.as_str() {
                // Phrases: one that has lost a token means something else.
                "bad_words_ids" => self.phrases(v, Self::all),
                // Pairs of a place and an id, pairs of a phrase and a number.
                "forced_decoder_ids" => self.phrases(v, |s, p| p.get_mut(1).is_some_and(|id| s.all(id))),
                "sequence_bias" => self.phrases(v, |s, p| p.get_mut(0).is_some_and(|ids| s.all(ids))),
                name if name.ends_with("_token_id") || LISTS.contains(&name) => self.ids(v),
                _ => {}
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
        let mut map: Map<String, Value> = crate::json::parse(bytes).map_err(|e| broken(format!("vocab.json: {e}")))?;
        self.vocab(&mut map);
        Ok(map.into_iter().map(|(text, _)| text).collect())
    }

    /// The files in the directory of a checkpoint.
    fn dir(&self, dir: &Path, settings: bool) -> Result<Vec<(String, Vec<u8>)>, TokenizerError> {
        let read = |name: &str| {
            let path = dir.join(name);
            let fault = |source| TokenizerError::Read { path: path.display().to_string(), source };
            if path.is_file() { std::fs::read(&path).map(Some).map_err(fault) } else { Ok(None) }
        };
        let texts = self.pair(read("vocab.json")?.as_deref())?;
        let mut out = Vec::new();
        for name in SIDE_FILES.iter().copied().chain(settings.then_some("config.json")) {
            if let Some(bytes) = read(name)? {
                out.extend(self.file(name, bytes, &texts)?.map(|bytes| (name.to_owned(), bytes)));
            }
        }
        Ok(out)
    }

    /// The metadata of a GGUF file, which has nothing else, with lists of the tokens that stay.
    fn metadata(&self, file: &[u8]) -> Result<Vec<u8>, TokenizerError> {
        const KEY: &str = "tokenizer.ggml.";
        let metadata = &gguf::parse(file).map_err(|e| broken(e.what))?.metadata;
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
        out.push(("tokenizer.gguf".to_owned(), new.metadata(&file)?));
    }
    if source.kind() != Kind::Gguf {
        out.extend(new.dir(source.dir(), settings)?);
    }
    Ok(out)
}

impl Tokenizer {
    /// This tokenizer, which is that of `source`, with the tokens `kept` alone (old ids, rising), as a model without
    /// the others will have it. Refused where a token would not come out as the same text.
    pub fn shortened(&self, source: &Checkpoint, kept: &[usize]) -> Result<Tokenizer, TokenizerError> {
        self.shortened_by(shortened_files(source, kept, true)?, kept)
    }

    fn shortened_by(&self, mut files: Vec<(String, Vec<u8>)>, kept: &[usize]) -> Result<Tokenizer, TokenizerError> {
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::tokenizer::Export;
    use lacuna_base::Rng;
    use serde_json::json;

    const ROWS: usize = 700;

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tokenizers").join(name)
    }

    /// Texts of one line each, from a page written to be hard and from a page that anyone reads.
    fn texts() -> Vec<String> {
        let page = std::fs::read(golden("bytelevel").join("golden.json")).unwrap();
        let page: Value = serde_json::from_slice(&page).unwrap();
        let hard = page["cases"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap().to_owned());
        let plain = Path::new(env!("CARGO_MANIFEST_DIR")).join("../eval/texts/held-out.txt");
        let plain = std::fs::read_to_string(plain).unwrap();
        hard.chain(plain.split_inclusive(' ').take(1500).map(str::to_owned)).collect()
    }

    /// What must stay and `more`, with all pieces.
    fn closed(tokenizer: &Tokenizer, more: impl Fn(usize) -> bool) -> Vec<usize> {
        let lexicon = tokenizer.lexicon_with(ROWS, None).unwrap();
        let mut stays: Vec<bool> =
            (0..ROWS).map(|id| lexicon.must[id] || (more(id) && !lexicon.bytes[id].is_empty())).collect();
        loop {
            let kept: Vec<usize> = (0..ROWS).filter(|&id| stays[id]).collect();
            let fresh: Vec<u32> = kept.iter().flat_map(|&id| lexicon.pieces[id].iter().copied()).collect();
            fresh.iter().for_each(|&p| stays[p as usize] = true);
            if stays.iter().filter(|s| **s).count() == kept.len() {
                return kept;
            }
        }
    }

    /// Files for the tokens that stay.
    type Files<'a> = dyn Fn(&[usize]) -> Vec<(String, Vec<u8>)> + 'a;

    /// Texts of kept tokens have the same ids but for their names; any other is written all the same.
    fn holds(name: &str, old: &Tokenizer, files: &Files<'_>) {
        let texts = texts();
        let (mut same, mut other, mut shorter) = (0, 0, 0);
        for seed in 0..6 {
            let mut rng = Rng::new(seed);
            let chosen: Vec<bool> = (0..ROWS).map(|_| rng.below(6) < seed as usize).collect();
            let kept = closed(old, |id| chosen[id]);
            let new = old.shortened_by(files(&kept), &kept).unwrap_or_else(|e| panic!("{name} {seed}: {e}"));
            shorter += usize::from(kept.len() < old.vocab_size());
            let id = |old: Option<u32>| old.map(|id| kept.binary_search(&(id as usize)).unwrap() as u32);
            assert_eq!((new.bos(), new.eos()), (id(old.bos()), id(old.eos())), "{name}");
            let ends: Vec<u32> = old.eos_set().iter().filter_map(|&e| id(Some(e))).collect();
            assert_eq!(new.eos_set(), ends, "{name}");
            for text in &texts {
                for special in [false, true] {
                    let ids = old.encode(text, special).unwrap();
                    let renamed: Option<Vec<u32>> =
                        ids.iter().map(|&i| kept.binary_search(&(i as usize)).ok().map(|at| at as u32)).collect();
                    let have = new.encode(text, special).unwrap();
                    match renamed {
                        Some(want) => assert_eq!(have, want, "{name} {seed}: {text:?}"),
                        None => other += 1,
                    }
                    same += 1;
                    assert_eq!(new.decode(&have), old.decode(&ids), "{name} {seed}: {text:?}");
                }
            }
        }
        assert!(shorter > 3 && other > 200 && same - other > 200, "{name}: {shorter} {same} {other}");
    }

    #[test]
    fn texts_of_kept_tokens_keep_their_ids_and_others_are_still_written() {
        for name in ["bytelevel", "metaspace", "phi3", "pair"] {
            let dir = golden(name);
            let old = Tokenizer::from_dir(&dir);
            let Ok(old) = old else {
                // Its class stands in the model's configuration.
                let home = tempfile::tempdir().unwrap();
                for file in ["vocab.json", "merges.txt"] {
                    std::fs::copy(dir.join(file), home.path().join(file)).unwrap();
                }
                std::fs::write(home.path().join("config.json"), json!({"model_type": "gpt2"}).to_string()).unwrap();
                let old = Tokenizer::from_dir(home.path()).unwrap();
                holds(name, &old, &|kept| Renumbered::new(kept).unwrap().dir(home.path(), true).unwrap());
                continue;
            };
            holds(name, &old, &|kept| Renumbered::new(kept).unwrap().dir(&dir, true).unwrap());
        }
    }

    #[test]
    fn lists_of_a_gguf_file_are_shortened_as_well() {
        for name in ["bytelevel", "metaspace"] {
            let export = Export::of_dir(&golden(name), ROWS).unwrap();
            let old = Tokenizer::from_vocabulary(export.vocabulary.clone()).unwrap();
            let mut pairs = Pairs::default();
            pairs.str("general.architecture", "llama");
            pairs.tokenizer(&export);
            let file = [b"GGUF\x03\0\0\0".as_slice(), &[0; 8], &pairs.count.to_le_bytes(), &pairs.bytes].concat();
            holds(name, &old, &|kept| {
                vec![("tokenizer.gguf".into(), Renumbered::new(kept).unwrap().metadata(&file).unwrap())]
            });
        }
    }

    #[test]
    fn a_unigram_model_keeps_its_cuts() {
        let words = ["▁the", "▁ri", "ver", "▁", "t", "h", "e", "r", "i", "v", "he", "▁t", "er", "re", "▁bridge", "in"];
        let mut vocab = vec![json!(["<unk>", 0.0]), json!(["<s>", 0.0]), json!(["</s>", 0.0])];
        vocab.extend((0..256).map(|b| json!([format!("<0x{b:02X}>"), -20.0])));
        vocab.extend(words.iter().enumerate().map(|(i, w)| json!([w, -2.0 - (i as f64) * 0.37])));
        let special = |id: usize, text: &str| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        let space = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
            "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")], "pre_tokenizer": space,
            "decoder": space, "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": true},
        });
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("tokenizer.json"), file.to_string()).unwrap();
        let old = Tokenizer::from_dir(home.path()).unwrap();
        holds("unigram", &old, &|kept| Renumbered::new(kept).unwrap().dir(home.path(), true).unwrap());
    }

    #[test]
    fn merges_lead_to_a_token_through_its_pieces() {
        let home = tempfile::tempdir().unwrap();
        let write = |model: Value| {
            let level =
                json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
            let file = json!({"added_tokens": [], "decoder": level, "model": model});
            std::fs::write(home.path().join("tokenizer.json"), file.to_string()).unwrap();
            Tokenizer::from_dir(home.path()).unwrap().lexicon_with(8, None)
        };
        let vocab = json!({"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5, "cab": 6});
        // "abc" can be joined in two ways; the earlier merge of "bc" decides. Nothing leads to "cab".
        let merges = json!(["b c", "a b", "ab c", "a bc"]);
        let lexicon = write(json!({"type": "BPE", "vocab": vocab, "merges": merges})).unwrap();
        let want: [&[u32]; 8] = [&[], &[], &[], &[0, 1], &[1, 2], &[0, 4], &[], &[]];
        assert_eq!(lexicon.pieces, want);
        // Letters alone can write every text here, since there are no bytes to fall back on.
        assert_eq!(lexicon.must, [true, true, true, false, false, false, false, false]);
        assert!(lexicon.bytes[7].is_empty());
        let prefixed =
            json!({"type": "BPE", "vocab": {"a": 0, "##b": 1}, "merges": [], "continuing_subword_prefix": "##"});
        assert!(write(prefixed).unwrap_err().to_string().contains("continuing_subword_prefix"));
    }

    #[test]
    fn torn_files_are_refused_and_never_panic() {
        let home = tempfile::tempdir().unwrap();
        let new = Renumbered::new(&[0, 2, 3]).unwrap();
        assert!(Renumbered::new(&[]).is_err() && Renumbered::new(&[2, 1]).is_err());
        assert!(Renumbered::new(&[usize::MAX]).is_err());
        for name in
            ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json", "generation_config.json"]
        {
            for text in ["", "[1]", "7", "{", "{\"model\": 5}", "{\"model\": {\"vocab\": null}}", "null"] {
                std::fs::write(home.path().join(name), text).unwrap();
                // Not all of them are wrong for all files.
                let _ = new.dir(home.path(), true);
                if !text.starts_with("{\"") {
                    assert!(new.dir(home.path(), true).is_err(), "{name}: {text}");
                }
            }
            std::fs::remove_file(home.path().join(name)).unwrap();
        }
        let odd = json!({"model": {"vocab": {"a": 0, "b": "x", "c": -1, "d": 3}, "merges": [3, "a", ["a"], "a d"]},
            "added_tokens": [5, {"id": 1}, {}], "post_processor": {"processors": [{"sep": 3, "special_tokens": []}]}});
        std::fs::write(home.path().join("tokenizer.json"), odd.to_string()).unwrap();
        let _ = new.dir(home.path(), true);
        for torn in [&b"GGUF"[..], b"", b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"] {
            assert!(new.metadata(torn).is_err());
        }
    }

    #[test]
    fn settings_follow_and_what_went_is_named_no_more() {
        let home = tempfile::tempdir().unwrap();
        let settings = json!({"eos_token_id": [2, 1, 3], "pad_token_id": 1, "temperature": 1, "suppress_tokens": [0, 1],
                "bad_words_ids": [[1], [3, 1], [3, 2]], "sequence_bias": [[[3, 0], -5.0], [[1], 2.0]],
                "forced_decoder_ids": [[1, 1]]});
        std::fs::write(home.path().join("generation_config.json"), settings.to_string()).unwrap();
        std::fs::write(home.path().join("tokenizer.model"), [1, 2]).unwrap();
        let files = Renumbered::new(&[0, 2, 3]).unwrap().dir(home.path(), false).unwrap();
        assert_eq!(files.len(), 1);
        let is: Value = serde_json::from_slice(&files[0].1).unwrap();
        // A phrase that has lost a token would forbid what is left of it.
        let want = json!({"eos_token_id": [1, 2], "pad_token_id": null, "temperature": 1, "suppress_tokens": [0],
            "bad_words_ids": [[2, 1]], "sequence_bias": [[[2, 0], -5.0]], "forced_decoder_ids": null});
        assert_eq!(is, want);
    }
}
