//! What a tokenizer's parts bound: how much a text may grow before it is cut, and how many bytes a token may stand for.

use serde_json::Value;
use tokenizers::models::ModelWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::TokenizerError;

/// Most times its length that a text may have after normalizing. What is known stays at 4.
const MAX_GROWTH: usize = 64;

/// Refuses normalizers that make a long text out of a short one, by themselves or one after the other.
pub(super) fn check_growth(encoder: &tokenizers::Tokenizer) -> Result<(), TokenizerError> {
    let normalizer = serde_json::to_value(encoder.get_normalizer()).unwrap_or(Value::Null);
    let times = growth(&normalizer);
    if times > MAX_GROWTH {
        return Err(TokenizerError::Broken(format!(
            "tokenizer.json: its Replace normalizers can make a text {times} times as long; at most {MAX_GROWTH} \
             times is accepted"
        )));
    }
    Ok(())
}

fn parts<'a>(v: &'a Value, key: &str) -> &'a [Value] {
    v[key].as_array().map_or(&[], Vec::as_slice)
}

fn growth(normalizer: &Value) -> usize {
    match normalizer["type"].as_str() {
        Some("Sequence") => parts(normalizer, "normalizers").iter().map(growth).fold(1, usize::saturating_mul),
        Some("Replace") => {
            let content = normalizer["content"].as_str().unwrap_or("").len();
            match normalizer["pattern"]["String"].as_str() {
                Some(p) if !p.is_empty() => content.div_ceil(p.len()).max(1),
                // It may match what is empty, before each byte.
                _ => content + 1,
            }
        }
        _ => 1,
    }
}

/// How many bytes of a text its tokens can stand for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Bound {
    /// Most bytes of the text for a token.
    bytes: usize,
    /// Whether some tokens take any amount of white space beside them as well.
    strips: bool,
}

impl Bound {
    /// `None`: a token may stand for any number of bytes, as far as is known.
    pub fn of(encoder: &tokenizers::Tokenizer) -> Option<Bound> {
        let ModelWrapper::BPE(bpe) = encoder.get_model() else { return None };
        // Characters that the vocabulary lacks with these around them disappear.
        if bpe.continuing_subword_prefix.is_some() || bpe.end_of_word_suffix.is_some() {
            return None;
        }
        let added: Vec<_> = encoder.get_added_tokens_decoder().into_values().collect();
        let strips = added.iter().any(|t| t.lstrip || t.rstrip);
        let normalizer = serde_json::to_value(encoder.get_normalizer()).ok()?;
        let shrinks = shrinking(&normalizer, strips)?;
        let cutter = serde_json::to_value(encoder.get_pre_tokenizer()).ok()?;
        let of_bytes = keeps_all(&cutter)?;
        let has = |t: &str| encoder.token_to_id(t).is_some();
        let covered = if of_bytes {
            ByteLevel::alphabet().iter().all(|c| has(&c.to_string()))
        } else {
            bpe.byte_fallback && (0..=255u8).all(|b| has(&format!("<0x{b:02X}>")))
        };
        let counted = !bpe.fuse_unk && bpe.unk_token.as_deref().is_some_and(has);
        if !covered && !counted {
            return None;
        }
        // In a vocabulary of bytes each is written as a character.
        let length = |t: &String| if of_bytes { t.chars().count() } else { t.len() };
        let longest = encoder.get_vocab(false).keys().map(length).max().unwrap_or(0);
        let longest = added.iter().map(|t| t.content.len()).fold(longest.max(4), usize::max);
        Some(Bound { bytes: longest.saturating_mul(shrinks), strips })
    }

    /// Whether `text` has more than `tokens` tokens for certain.
    pub fn exceeded(self, text: &str, tokens: usize) -> bool {
        let most = self.bytes.saturating_mul(tokens);
        if text.len() <= most || !self.strips {
            return text.len() > most;
        }
        text.chars().filter(|c| !c.is_whitespace()).map(char::len_utf8).sum::<usize>() > most
    }
}

/// How many times shorter a text may become; `None`: any number of times.
fn shrinking(normalizer: &Value, strips: bool) -> Option<usize> {
    if normalizer.is_null() {
        return Some(1);
    }
    match normalizer["type"].as_str()? {
        // Three parts of a Hangul syllable, nine bytes, become three, and the Kelvin sign's three bytes a K.
        "NFC" | "NFD" => Some(4),
        "Prepend" => Some(1),
        "Replace" => {
            let (pattern, content) = (normalizer["pattern"]["String"].as_str()?, normalizer["content"].as_str()?);
            let lost = content.is_empty() || strips && content.contains(char::is_whitespace);
            (!lost).then(|| pattern.len().div_ceil(content.len()).max(1))
        }
        "Sequence" => {
            let each = parts(normalizer, "normalizers").iter().map(|n| shrinking(n, strips));
            each.into_iter().try_fold(1usize, |a, b| Some(a.saturating_mul(b?)))
        }
        _ => None,
    }
}

/// Whether what cuts a text into words also writes bytes as characters; `None`: it may leave something out.
fn keeps_all(cutter: &Value) -> Option<bool> {
    if cutter.is_null() {
        return Some(false);
    }
    match cutter["type"].as_str()? {
        "ByteLevel" => Some(true),
        "Metaspace" | "Digits" => Some(false),
        "Split" if cutter["behavior"].as_str()? != "Removed" => Some(false),
        "Sequence" => {
            let each = parts(cutter, "pretokenizers").iter().map(keeps_all);
            each.into_iter().try_fold(false, |a, b| Some(a | b?))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::{HfFiles, Tokenizer};

    fn files(name: &str, change: impl Fn(&mut Value)) -> HfFiles {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tokenizers").join(name);
        let mut files = HfFiles::read(&dir).unwrap();
        let mut json = serde_json::from_slice(files.tokenizer.as_ref().unwrap()).unwrap();
        change(&mut json);
        files.tokenizer = Some(json.to_string().into());
        files
    }

    #[test]
    fn texts_that_would_grow_are_refused() {
        let replace = |n: usize| json!({"type": "Replace", "pattern": {"String": "l"}, "content": "l".repeat(n)});
        let with = |n: Value| Tokenizer::from_hf(&files("bytelevel", |t| t["normalizer"] = n.clone()));
        let rows = |n: Vec<Value>| json!({"type": "Sequence", "normalizers": n});
        for n in [replace(65), rows(vec![replace(100); 6]), rows(vec![replace(5), rows(vec![replace(13)])])] {
            let e = with(n).unwrap_err().to_string();
            assert!(e.contains("Replace normalizers can make a text"), "{e}");
        }
        assert!(with(rows(vec![replace(8), replace(8)])).is_ok());
    }

    #[test]
    fn a_text_that_fits_is_never_refused() {
        for name in ["bytelevel", "metaspace"] {
            let t = Tokenizer::from_hf(&files(name, |_| ())).unwrap();
            for text in
                ["", "a ", "hello, world\n", "\u{1112}\u{1161}\u{11ab}", "\u{212a}", "🙂", "<|im_start|>", "</s>"]
            {
                let text = text.repeat(50);
                assert!(!t.exceeds(&text, t.encode(&text, false).unwrap().len()), "{name} {text:?}");
            }
            assert!(t.exceeds(&"a ".repeat(100_000), 100), "{name}");
        }
        // What leaves something out bounds nothing.
        let t = Tokenizer::from_hf(&files("bytelevel", |t| t["normalizer"] = json!({"type": "Lowercase"}))).unwrap();
        assert!(!t.exceeds(&"a ".repeat(100_000), 100));
    }
}
