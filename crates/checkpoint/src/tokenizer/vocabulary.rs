//! A tokenizer made from bare lists: the vocabulary inside a GGUF file.

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::prepend::Prepend;
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::normalizers::utils::Sequence as Normalizers;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::{SpecialToken, TemplateProcessing};
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper};

use crate::gguf::{GgufError, Metadata};

use super::stream::{Pieces, fallback_byte};
use super::words::{SPACED, Words};
use super::{MAX_VOCAB, Marks, Tokenizer, TokenizerError, guarded};

/// Longest piece whose splits are tried: deriving merges costs the square of a piece's length.
const MAX_PIECE_BYTES: usize = 1024;

/// What a token is for: `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// A piece of text (1).
    Normal,
    /// Stands for what has no piece (2).
    Unknown,
    /// Steers and is no text (3).
    Control,
    /// Matched whole before anything else (4).
    UserDefined,
    /// Never produced (5).
    Unused,
    /// One byte (6).
    Byte,
}

impl TokenKind {
    /// The number in the file.
    pub fn number(self) -> i32 {
        self as i32 + 1
    }

    /// The kind of a number in the file.
    pub fn from_number(n: i64) -> Option<TokenKind> {
        use TokenKind::*;
        [Normal, Unknown, Control, UserDefined, Unused, Byte].get(usize::try_from(n).ok()?.checked_sub(1)?).copied()
    }
}

/// The lists that make a tokenizer, as a GGUF file's `tokenizer.ggml.*` keys hold them.
#[derive(Clone, Debug, Default)]
pub struct Vocabulary {
    /// `model`: `gpt2` (byte-level pair encoding), `llama` (SentencePiece with scores) or `gemma4` (its pieces, with
    /// merges).
    pub model: String,
    /// `pre`: how a byte-level model cuts words. Absent means `default`.
    pub pre: Option<String>,
    /// `tokens`: the written form of every id.
    pub tokens: Vec<String>,
    /// `scores`: the larger, the earlier a piece is made (`llama` only).
    pub scores: Vec<f32>,
    /// `token_type`; empty: all normal.
    pub kinds: Vec<TokenKind>,
    /// `merges`: `left right`, the earliest first (`gpt2`; a `llama` model without them has scores).
    pub merges: Vec<String>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`.
    pub eos: Option<u32>,
    /// Further ends: `eot_token_id`, `eom_token_id`.
    pub more_eos: Vec<u32>,
    /// `unknown_token_id`.
    pub unknown: Option<u32>,
    /// `add_bos_token`; absent: yes for `llama` and for Llama 3's words.
    pub add_bos: Option<bool>,
    /// `add_eos_token`; absent: no.
    pub add_eos: Option<bool>,
    /// `add_space_prefix` (`llama`); absent: yes.
    pub add_space_prefix: Option<bool>,
    /// Special tokens take the white space behind them away, but for `<unk>`, `<s>` and `<|endoftext|>`. No key says
    /// so, but `general.name`: a Phi-3.
    pub phi3: bool,
}

/// Marks in a file's name (`general.name`, in small letters) by which llama.cpp knows a Phi-3.
pub(super) const PHI3_NAMES: [&str; 2] = ["phi-3", "phi3"];
/// Special tokens of a Phi-3 that keep the white space behind them.
const PHI3_KEEPS: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];

/// Whether a file of this name is called a Phi-3. GGUF has no key for the white space that special tokens take away:
/// llama.cpp goes by the name.
pub(super) fn named_phi3(name: &str) -> bool {
    PHI3_NAMES.iter().any(|mark| name.to_ascii_lowercase().contains(mark))
}

/// Whether these are the tokens of a Phi-3: llama.cpp opens no file of that name without them. In such a file it takes
/// the white space behind every special token away, but for three.
pub(super) fn is_phi3(tokens: &[String]) -> bool {
    PHI3_KEEPS.iter().chain(&["</s>"]).all(|needed| tokens.iter().any(|t| t == needed))
}

impl Vocabulary {
    /// Reads the `tokenizer.ggml.*` keys.
    pub fn from_gguf(m: &Metadata) -> Result<Vocabulary, TokenizerError> {
        let bad = |e: GgufError| TokenizerError::Broken(e.what);
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        let id = |name: &str| m.get_u32(&key(name)).map_err(bad);
        let flag = |name: &str| m.get_bool(&key(name)).map_err(bad);
        let text = |name: &str| Ok(m.get_str(&key(name)).map_err(bad)?.map(str::to_owned));
        let texts = |name: &str| Ok(m.get_strs(&key(name)).map_err(bad)?.map(<[String]>::to_vec));
        let missing = |name: &str| TokenizerError::Missing(format!("the GGUF file has no {}", key(name)));
        let kinds = m.get_ints(&key("token_type")).map_err(bad)?.unwrap_or_default();
        let kind = |(id, &n): (usize, &i64)| {
            TokenKind::from_number(n)
                .ok_or_else(|| TokenizerError::Broken(format!("the type of token {id} is {n}; known are 1 to 6")))
        };
        let name = m.get_str("general.name").map_err(bad)?;
        let tokens = texts("tokens")?.ok_or_else(|| missing("tokens"))?;
        Ok(Vocabulary {
            model: text("model")?.ok_or_else(|| missing("model"))?,
            // llama.cpp takes an empty text for none.
            pre: text("pre")?.filter(|pre| !pre.is_empty()),
            phi3: name.is_some_and(named_phi3) && is_phi3(&tokens),
            tokens,
            scores: m.get_f32s(&key("scores")).map_err(bad)?.unwrap_or_default(),
            kinds: kinds.iter().enumerate().map(kind).collect::<Result<_, _>>()?,
            merges: texts("merges")?.unwrap_or_default(),
            bos: id("bos_token_id")?,
            eos: id("eos_token_id")?,
            more_eos: [id("eot_token_id")?, id("eom_token_id")?].into_iter().flatten().collect(),
            unknown: id("unknown_token_id")?,
            add_bos: flag("add_bos_token")?,
            add_eos: flag("add_eos_token")?,
            add_space_prefix: flag("add_space_prefix")?,
        })
    }
}

impl Tokenizer {
    /// What makes the tokenizer of a GGUF file doubtful, where something does: it can be read, but hardly gives the ids
    /// that the model knows.
    pub fn doubt(metadata: &Metadata) -> Option<String> {
        let text = |key: &str| metadata.get_str(key).ok().flatten().filter(|t| !t.is_empty());
        (text("tokenizer.ggml.model") == Some("gpt2") && text("tokenizer.ggml.pre").is_none()).then(|| {
            "the file has no tokenizer.ggml.pre: words are cut by llama.cpp's `default` pattern, and the model has \
             probably learned others"
                .into()
        })
    }

    /// A tokenizer from the metadata of a GGUF file.
    pub fn from_gguf(metadata: &Metadata) -> Result<Tokenizer, TokenizerError> {
        Tokenizer::from_vocabulary(Vocabulary::from_gguf(metadata)?)
    }

    /// A tokenizer from the lists of a GGUF file.
    pub fn from_vocabulary(mut v: Vocabulary) -> Result<Tokenizer, TokenizerError> {
        check(&v)?;
        let kind = |v: &Vocabulary, id: usize| v.kinds.get(id).copied().unwrap_or(TokenKind::Normal);
        let listed = v.model == "gemma4" || v.pre.as_deref().is_some_and(|p| SPACED.contains(&p));
        let spaced = match v.model.as_str() {
            "gpt2" | "gemma4" => listed,
            "llama" => true,
            other => {
                return Err(TokenizerError::Unsupported(format!(
                    "tokenizer.ggml.model is `{other}`; known are `gpt2`, `llama` and `gemma4`"
                )));
            }
        };
        if spaced {
            for id in 0..v.tokens.len() {
                // Old files write the spaces of such a token as SentencePiece does; it is matched in the raw text.
                if kind(&v, id) == TokenKind::UserDefined {
                    v.tokens[id] = v.tokens[id].replace('▁', " ");
                }
            }
        }
        let mut vocab = Vocab::default();
        for (id, text) in v.tokens.iter().enumerate() {
            // The first of equal texts is the one the encoder produces.
            vocab.entry(text.clone()).or_insert(id as u32);
        }
        let merges =
            if v.merges.is_empty() && v.model == "llama" { merges_by_score(&v, &vocab) } else { listed_merges(&v)? };
        let mut model = BPE::builder().vocab_and_merges(vocab, merges);
        if spaced {
            model = model.byte_fallback(true).fuse_unk(true);
            if let Some(unknown) = v.unknown {
                model = model.unk_token(v.tokens[unknown as usize].clone());
            }
        }
        let pre = v.pre.as_deref().unwrap_or("default");
        let cut = if spaced { None } else { Some(Words::named(pre)?) };
        model = model.ignore_merges(cut.as_ref().is_some_and(|c| c.whole_words));
        let model = guarded(|| model.build())
            .map_err(|e| TokenizerError::Broken(format!("its merges do not fit its vocabulary: {e}")))?;
        let mut encoder = tokenizers::Tokenizer::new(model);
        let add_bos = v.add_bos.unwrap_or(spaced || cut.as_ref().is_some_and(|c| c.add_bos));
        let strip = v.add_space_prefix.unwrap_or(!listed);
        let pieces = if let Some(cut) = cut {
            encoder.with_pre_tokenizer(Some(cut.steps()?));
            if cut.nfc {
                encoder.with_normalizer(Some(NFC));
            }
            encoder.with_decoder(Some(ByteLevel::new(false, true, true)));
            Pieces::ByteLevel
        } else {
            encoder.with_normalizer(Some(spaces_to_bars(strip)?));
            encoder.with_decoder(Some(bars_to_spaces(strip)?));
            Pieces::Spaced { strip }
        };
        let marks = [v.bos, v.eos].into_iter().flatten().chain(v.more_eos.iter().copied());
        let marks: std::collections::HashSet<usize> = marks.map(|id| id as usize).collect();
        let added: Vec<AddedToken> = (0..v.tokens.len())
            .filter(|&id| !v.tokens[id].is_empty())
            .filter_map(|id| match kind(&v, id) {
                TokenKind::Control | TokenKind::Unknown => Some((id, true)),
                _ if marks.contains(&id) => Some((id, true)),
                TokenKind::UserDefined => Some((id, false)),
                _ => None,
            })
            .map(|(id, special)| {
                // SentencePiece looks for runs of spaces after they have become bars, and so finds bars in the text,
                // too.
                let bars = spaced && !strip && v.tokens[id].contains(' ');
                let takes = v.phi3 && !PHI3_KEEPS.contains(&v.tokens[id].as_str());
                AddedToken::from(v.tokens[id].as_str(), special).normalized(bars).rstrip(takes)
            })
            .collect();
        guarded(|| Ok(encoder.add_tokens(&added))).map_err(TokenizerError::Broken)?;
        wrap(&mut encoder, v.bos.filter(|_| add_bos), v.eos.filter(|_| v.add_eos == Some(true)), &v.tokens)?;
        let marks = Marks { bos: v.bos, eos: v.eos, more_eos: v.more_eos };
        Tokenizer::assemble(encoder, Some(v.tokens), pieces, marks)
    }
}

/// Refuses lists that do not fit each other before anything indexes with them.
fn check(v: &Vocabulary) -> Result<(), TokenizerError> {
    let broken = |what: String| Err(TokenizerError::Broken(what));
    let n = v.tokens.len();
    if n == 0 || n > MAX_VOCAB {
        return broken(format!("a vocabulary of {n} tokens"));
    }
    if !v.kinds.is_empty() && v.kinds.len() != n {
        return broken(format!("{} token types for {n} tokens", v.kinds.len()));
    }
    if v.model == "llama" && v.merges.is_empty() {
        if v.scores.len() != n {
            return broken(format!("{} scores for {n} tokens", v.scores.len()));
        }
        if let Some(id) = v.scores.iter().position(|s| !s.is_finite()) {
            return broken(format!("the score of token {id} is {}", v.scores[id]));
        }
        if let Some(id) = v.tokens.iter().position(|t| t.len() > MAX_PIECE_BYTES) {
            return broken(format!("token {id} is {} bytes long, more than {MAX_PIECE_BYTES}", v.tokens[id].len()));
        }
    }
    let ids = [("bos", v.bos), ("eos", v.eos), ("unknown", v.unknown)]
        .into_iter()
        .chain(v.more_eos.iter().map(|&id| ("end", Some(id))));
    for (name, id) in ids {
        if let Some(id) = id.filter(|&id| id as usize >= n) {
            return broken(format!("the {name} token is id {id}, but there are only {n} tokens"));
        }
    }
    Ok(())
}

/// `left right` lines as pairs.
fn listed_merges(v: &Vocabulary) -> Result<Vec<(String, String)>, TokenizerError> {
    let pair = |(i, line): (usize, &String)| match line.split_once(' ') {
        Some((l, r)) if !l.is_empty() && !r.is_empty() && !r.contains(' ') => Ok((l.to_owned(), r.to_owned())),
        _ => Err(TokenizerError::Broken(format!("merge {i} is {line:?}, not two pieces with a space between"))),
    };
    v.merges.iter().enumerate().map(pair).collect()
}

/// SentencePiece joins, again and again, the neighbours that make the piece of the highest score. As an ordered list of
/// merges, that is every way to cut every piece in two, the pieces by falling score.
fn merges_by_score(v: &Vocabulary, vocab: &Vocab) -> Vec<(String, String)> {
    let joins =
        |id: usize| v.kinds.get(id).is_none_or(|&k| k == TokenKind::Normal) && fallback_byte(&v.tokens[id]).is_none();
    let mut order: Vec<usize> = (0..v.tokens.len()).filter(|&id| joins(id)).collect();
    order.sort_by(|&a, &b| v.scores[b].total_cmp(&v.scores[a]).then(a.cmp(&b)));
    let part = |text: &str| vocab.get(text).copied().filter(|&id| joins(id as usize));
    let mut merges = Vec::new();
    for id in order {
        let piece = v.tokens[id].as_str();
        if vocab.get(piece) != Some(&(id as u32)) {
            continue;
        }
        let mut cuts: Vec<(u32, u32, usize)> = Vec::new();
        for (at, _) in piece.char_indices().skip(1) {
            if let (Some(l), Some(r)) = (part(&piece[..at]), part(&piece[at..])) {
                cuts.push((l, r, at));
            }
        }
        cuts.sort_unstable();
        merges.extend(cuts.into_iter().map(|(_, _, at)| (piece[..at].to_owned(), piece[at..].to_owned())));
    }
    merges
}

/// SentencePiece's normalization: spaces become `▁`, and one is put in front where the model was trained so.
fn spaces_to_bars(prefix: bool) -> Result<NormalizerWrapper, TokenizerError> {
    let mut steps = Vec::new();
    if prefix {
        steps.push(NormalizerWrapper::Prepend(Prepend::new("▁".into())));
    }
    steps.push(NormalizerWrapper::Replace(guarded(|| Replace::new(" ", "▁")).map_err(TokenizerError::Broken)?));
    Ok(NormalizerWrapper::Sequence(Normalizers::new(steps)))
}

/// The way back, for a `tokenizer.json` made from this vocabulary.
fn bars_to_spaces(prefix: bool) -> Result<DecoderWrapper, TokenizerError> {
    let mut steps = vec![
        DecoderWrapper::Replace(guarded(|| Replace::new("▁", " ")).map_err(TokenizerError::Broken)?),
        DecoderWrapper::ByteFallback(ByteFallback::new()),
        DecoderWrapper::Fuse(Fuse::new()),
    ];
    if prefix {
        steps.push(DecoderWrapper::Strip(Strip::new(' ', 1, 0)));
    }
    Ok(DecoderWrapper::Sequence(Decoders::new(steps)))
}

/// Tells the encoder which tokens to put around a text.
pub(super) fn wrap(
    encoder: &mut tokenizers::Tokenizer,
    bos: Option<u32>,
    eos: Option<u32>,
    texts: &[String],
) -> Result<(), TokenizerError> {
    // The template language gives `:` and `$` a meaning, so that the tokens go by names of our own.
    let named = [("bos", bos), ("eos", eos)].into_iter().filter_map(|(name, id)| Some((name, id?)));
    let specials = named
        .map(|(name, id)| guarded(|| SpecialToken::new(name.into(), vec![id], vec![texts[id as usize].clone()])))
        .collect::<Result<Vec<_>, _>>()
        .map_err(TokenizerError::Broken)?;
    let template = |second: &'static str| {
        let mut parts = Vec::new();
        for text in ["$A", second] {
            if text.is_empty() {
                continue;
            }
            parts.extend(bos.map(|_| "bos"));
            parts.push(text);
            parts.extend(eos.map(|_| "eos"));
        }
        parts
    };
    let built = TemplateProcessing::builder()
        .try_single(template(""))
        .and_then(|b| b.try_pair(template("$B")))
        .map_err(|e| TokenizerError::Broken(e.to_string()))?
        .special_tokens(specials)
        .build()
        .map_err(|e| TokenizerError::Broken(e.to_string()))?;
    encoder.with_post_processor(Some(built));
    Ok(())
}
