//! What a shorter vocabulary must respect: which tokens have to stay, and by which pieces each is reached.
//!
//! Pair encoding reaches a token by merges, and those within a token's own text are the same whatever stands around
//! it: the last of them joins two tokens, each of which is reached by its own. Where a token stays with those two, and
//! theirs with them, every text that is made of kept tokens is cut as before, merge by merge. A unigram model weighs
//! whole cuts against each other: taking pieces away takes cuts away, the best one stays the best, as long as no letter
//! becomes unknown and what is unknown weighs the same.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::stream::Pieces;
use super::{HfFiles, TokenKind, Tokenizer, TokenizerError, Vocabulary};
use crate::template::Setting;
use crate::{ChatTemplate, Checkpoint};

/// Longest token whose merges are followed, letters: that takes the square of its length.
const MAX_LETTERS: usize = 1024;

/// The tokens of a model, by id.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Lexicon {
    /// The bytes that each stands for; none where no token has the id.
    pub bytes: Vec<Vec<u8>>,
    /// Whether it has to stay: special and added tokens, bytes, what the chat template writes.
    pub must: Vec<bool>,
    /// The tokens without which it cannot be reached; theirs are theirs.
    pub pieces: Vec<Vec<u32>>,
}

fn broken(e: impl ToString) -> TokenizerError {
    TokenizerError::Broken(e.to_string())
}

impl Tokenizer {
    /// What a shorter vocabulary of this tokenizer must respect, for a model of `rows` rows from `checkpoint`.
    pub fn lexicon(&self, checkpoint: &Checkpoint, rows: usize) -> Result<Lexicon, TokenizerError> {
        let mut lexicon = self.lexicon_with(rows, ChatTemplate::open(checkpoint).ok().as_ref())?;
        let mut ids = Vec::new();
        match checkpoint.metadata() {
            Some(metadata) => {
                let named = |key: &str| key.starts_with("tokenizer.") && key.ends_with("_token_id");
                let keys: Vec<&str> = metadata.iter().map(|(key, _)| key).filter(|k| named(k)).collect();
                for key in keys {
                    ids.extend(metadata.get_u32(key).map_err(|e| broken(e.what))?);
                }
                let kinds = Vocabulary::from_gguf(metadata)?.kinds;
                let unused = kinds.iter().enumerate().filter(|(_, k)| **k == TokenKind::Unused);
                unused.filter(|(id, _)| *id < rows).for_each(|(id, _)| lexicon.bytes[id].clear());
            }
            None => {
                let files = HfFiles::read(checkpoint.dir())?;
                for bytes in [&files.generation_config, &files.config].into_iter().flatten() {
                    numbers(&crate::json::parse(bytes).map_err(TokenizerError::Broken)?, &mut ids);
                }
            }
        }
        ids.iter().for_each(|&id| lexicon.must_stay(id));
        Ok(lexicon)
    }

    /// The same by the tokenizer alone.
    pub(super) fn lexicon_with(&self, rows: usize, chat: Option<&ChatTemplate>) -> Result<Lexicon, TokenizerError> {
        let inner = &self.0;
        if inner.texts.len() > rows {
            return Err(broken(format!("{} tokens for an embedding of {rows} rows", inner.texts.len())));
        }
        let json: Value = serde_json::from_str(&self.to_json()?).map_err(broken)?;
        let model = &json["model"];
        let mut lexicon = Lexicon {
            bytes: (0..rows as u32).map(|id| self.token_bytes(id)).collect(),
            must: vec![false; rows],
            pieces: vec![Vec::new(); rows],
        };
        let mut must: Vec<u32> = inner.added.iter().chain(&inner.eos_set).copied().collect();
        must.extend(inner.bos.into_iter().chain(inner.eos));
        must.extend(self.encode("", true)?);
        match model["type"].as_str() {
            Some("BPE") => {
                let merger = Merger::new(model)?;
                for (id, text) in inner.texts.iter().enumerate().filter(|t| !t.1.is_empty()) {
                    lexicon.pieces[id] = merger.pieces(id as u32, text)?;
                }
                must.extend(model["unk_token"].as_str().and_then(|t| self.id_of(t)));
                must.extend(self.letters(model["byte_fallback"] == true));
            }
            Some("Unigram") => {
                let pieces = unigram(model)?;
                for (id, (text, _)) in pieces.iter().enumerate().filter(|(id, _)| *id < rows) {
                    let letters = text.chars().filter_map(|c| self.id_of(&c.to_string()));
                    lexicon.pieces[id] = letters.filter(|l| *l as usize != id && (*l as usize) < rows).collect();
                }
                // What no piece covers weighs as much less than the lightest of them.
                let lightest = pieces.iter().enumerate().min_by(|a, b| a.1.1.total_cmp(&b.1.1));
                must.extend(lightest.map(|(id, _)| id as u32));
                must.extend(model["unk_id"].as_u64().and_then(|id| u32::try_from(id).ok()));
                must.extend(self.letters(model["byte_fallback"] == true));
            }
            other => {
                return Err(TokenizerError::Unsupported(format!(
                    "its model is {}, and only BPE and Unigram can lose tokens here",
                    other.unwrap_or("of no type")
                )));
            }
        }
        for chat in chat.map_or_else(Vec::new, |t| self.moments(t)) {
            must.extend(self.encode(&chat, false)?);
        }
        must.iter().for_each(|&id| lexicon.must_stay(id));
        Ok(lexicon)
    }

    /// The tokens by which any text can be written: bytes where the tokenizer falls back on them all, else every
    /// letter.
    fn letters(&self, fallback: bool) -> Vec<u32> {
        let alphabet: Vec<String> = match self.0.pieces {
            Pieces::ByteLevel => ByteLevel::alphabet().into_iter().map(String::from).collect(),
            Pieces::Spaced { .. } => (0..=255u8).map(|b| format!("<0x{b:02X}>")).collect(),
        };
        let mut ids: Vec<u32> = alphabet.iter().filter_map(|t| self.id_of(t)).collect();
        let spaced = self.0.pieces != Pieces::ByteLevel;
        if ids.len() < alphabet.len() || (spaced && !fallback) {
            let texts = self.0.texts.iter().enumerate();
            ids.extend(texts.filter(|(_, t)| t.chars().count() == 1).map(|(id, _)| id as u32));
        }
        // As bytes it would come back as itself and not as a space.
        ids.extend(self.id_of("▁"));
        ids
    }

    /// Chats in the template's words, at fixed moments: some templates write the date, and what has to stay may not
    /// depend on the day.
    fn moments(&self, template: &ChatTemplate) -> Vec<String> {
        let text = |id: Option<u32>| id.and_then(|i| self.token_text(i)).unwrap_or_default();
        let (bos, eos) = (text(self.bos()), text(self.eos()));
        let turn = |role: &str, content: &str| json!({"role": role, "content": content});
        let (ask, answer) = (turn("user", "Why?"), turn("assistant", "It is."));
        let plain = json!([ask]);
        let more = [json!([ask, answer, ask]), json!([turn("system", "Be brief."), ask, answer])];
        let day = Duration::from_secs(24 * 3600);
        // From 15 January 2026 on, a month apart.
        let moment = |month: u32| SystemTime::UNIX_EPOCH + day * (20468 + month * 61 / 2);
        let at = |messages: &Value, month: u32| {
            let now = moment(month);
            template
                .render_with(messages, &Setting { add_generation_prompt: true, bos, eos, tools: None, now, args: None })
                .ok()
        };
        let months = (0..12).map(|m| at(&plain, m));
        months.chain(more.iter().map(|m| at(m, 0))).flatten().collect()
    }
}

impl Lexicon {
    fn must_stay(&mut self, id: u32) {
        // A configuration may name ids that the model has no rows for.
        if let Some(must) = self.must.get_mut(id as usize) {
            *must = true;
        }
    }
}

/// Every number that a configuration gives a token.
fn numbers(config: &Value, out: &mut Vec<u32>) {
    for (_, v) in config.as_object().into_iter().flatten().filter(|(key, _)| key.ends_with("_token_id")) {
        let list = v.as_array().map_or(std::slice::from_ref(v), Vec::as_slice);
        out.extend(list.iter().filter_map(|v| u32::try_from(v.as_u64()?).ok()));
    }
}

/// The pieces of a unigram model with their scores, by id.
fn unigram(model: &Value) -> Result<Vec<(String, f64)>, TokenizerError> {
    let list = model["vocab"].as_array().map_or(&[][..], Vec::as_slice);
    let one = |v: &Value| Some((v[0].as_str()?.to_owned(), v[1].as_f64()?));
    list.iter().map(|v| one(v).ok_or_else(|| broken("a piece of its vocabulary has no text or score"))).collect()
}

/// Pair encoding over ids.
struct Merger {
    ids: HashMap<String, u32>,
    /// What two tokens become, and how early.
    merges: HashMap<(u32, u32), (usize, u32)>,
    fallback: bool,
}

impl Merger {
    fn new(model: &Value) -> Result<Merger, TokenizerError> {
        for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
            if model[key].as_str().is_some_and(|s| !s.is_empty()) {
                return Err(TokenizerError::Unsupported(format!("it has a {key}, with which no token can go here")));
            }
        }
        let mut ids = HashMap::new();
        for (text, id) in model["vocab"].as_object().into_iter().flatten() {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            ids.insert(text.clone(), id.ok_or_else(|| broken(format!("the id of {text:?} is no number")))?);
        }
        let mut merges = HashMap::new();
        for (rank, (l, r)) in super::export::merges(model)?.into_iter().enumerate() {
            // A later merge of the same two replaces the earlier, as in the encoder itself.
            if let (Some(&a), Some(&b), Some(&whole)) = (ids.get(&l), ids.get(&r), ids.get(&(l.clone() + &r))) {
                merges.insert((a, b), (rank, whole));
            }
        }
        Ok(Merger { ids, merges, fallback: model["byte_fallback"] == true })
    }

    /// What a letter begins as; nothing where the vocabulary has no word for it.
    fn first(&self, letter: char) -> Option<Vec<u32>> {
        let mut buffer = [0; 4];
        let text = &*letter.encode_utf8(&mut buffer);
        match self.ids.get(text) {
            Some(id) => Some(vec![*id]),
            None if self.fallback => text.bytes().map(|b| self.ids.get(&format!("<0x{b:02X}>")).copied()).collect(),
            None => None,
        }
    }

    /// The tokens by which the one of `id`, written `text`, is reached.
    fn pieces(&self, id: u32, text: &str) -> Result<Vec<u32>, TokenizerError> {
        match self.ids.get(text) {
            // A token that is written as another one is: encoding gives that one.
            Some(&first) if first != id => return Ok(vec![first]),
            Some(_) => {}
            None => return Ok(Vec::new()),
        }
        if text.chars().count() > MAX_LETTERS {
            return Err(broken(format!("token {id} has {} letters, more than {MAX_LETTERS}", text.chars().count())));
        }
        let Some(letters) = text.chars().map(|c| self.first(c)).collect::<Option<Vec<_>>>() else {
            return Ok(Vec::new());
        };
        let mut parts: Vec<u32> = letters.into_iter().flatten().collect();
        let mut last = Vec::new();
        loop {
            let joined = |i: usize| self.merges.get(&(parts[i], parts[i + 1])).map(|&(rank, whole)| (rank, i, whole));
            // The earliest merge, the leftmost of equals.
            let Some((_, i, whole)) = (0..parts.len().saturating_sub(1)).filter_map(joined).min() else { break };
            last = vec![parts[i], parts[i + 1]];
            parts.splice(i..i + 2, [whole]);
        }
        // One that merges do not reach is found as a whole word or never.
        Ok(if parts == [id] { last } else { Vec::new() })
    }
}
