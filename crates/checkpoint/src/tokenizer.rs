//! Text to token ids and back.
//!
//! One [`Tokenizer`] for both worlds: `tokenizer.json` of the Hugging Face layout is read by the `tokenizers` crate as
//! it is, and the vocabulary inside a GGUF file is turned into the same kind of object in memory ([`Vocabulary`]), so
//! that there is one encoder to trust. Decoding is our own, because a stream of tokens must give the same text as all
//! of them at once: every token is a run of bytes, and the bytes are cut into text only where UTF-8 allows.

mod bounds;
mod compare;
mod export;
mod hf;
mod lexicon;
mod pair;
mod shorten;
mod stream;
mod vocabulary;
mod words;

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::Checkpoint;
pub use compare::Compared;
pub use export::Export;
pub(crate) use export::{general_name, hf_files};
pub use hf::HfFiles;
pub use lexicon::Lexicon;
pub(crate) use shorten::shortened_files;
pub use stream::Decoder;
use stream::Pieces;
pub use vocabulary::{TokenKind, Vocabulary};

/// More ids than any vocabulary has; a file that asks for more is broken or hostile.
const MAX_VOCAB: usize = 1 << 24;

/// Tokens that end an answer, whatever the configuration forgot to say. They count only where the vocabulary marks them
/// as special.
const END_TOKENS: [&str; 9] = [
    "<|im_end|>",
    "<end_of_turn>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_sentence|>",
    "</s>",
];

/// Why a tokenizer could not be made or could not encode.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file of the checkpoint could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The checkpoint has no tokenizer that can be read.
    #[error("no tokenizer: {0}")]
    Missing(String),
    /// The tokenizer's data contradicts itself.
    #[error("broken tokenizer: {0}")]
    Broken(String),
    /// A kind of tokenizer that is not known here.
    #[error("unsupported tokenizer: {0}")]
    Unsupported(String),
    /// A text could not be encoded.
    #[error("cannot encode the text: {0}")]
    Encode(String),
}

/// Turns text into ids and ids into text. Cloning is cheap.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    encoder: tokenizers::Tokenizer,
    /// The written form of every id; empty where the vocabulary has a hole.
    texts: Vec<String>,
    /// Ids that are whole words of their own (added tokens), whose text is never byte-encoded.
    added: HashSet<u32>,
    /// Ids that steer and are not text: left out when decoding.
    special: HashSet<u32>,
    pieces: Pieces,
    bos: Option<u32>,
    eos: Option<u32>,
    eos_set: Vec<u32>,
    /// How much text a token may stand for, where that is known.
    bound: Option<bounds::Bound>,
}

/// The ids that a source names as beginning and end.
#[derive(Default)]
struct Marks {
    bos: Option<u32>,
    eos: Option<u32>,
    more_eos: Vec<u32>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({} tokens, bos {:?}, end {:?})", self.vocab_size(), self.bos(), self.eos_set())
    }
}

impl Tokenizer {
    /// The tokenizer of an opened checkpoint: inside it where it came from a GGUF file, otherwise in the files beside
    /// the weights.
    pub fn open(checkpoint: &Checkpoint) -> Result<Tokenizer, TokenizerError> {
        match checkpoint.metadata() {
            Some(metadata) => Tokenizer::from_gguf(metadata),
            None => Tokenizer::from_dir(checkpoint.dir()),
        }
    }

    /// Finishes a tokenizer: checks the ids, lists the texts, gathers the end tokens.
    /// `texts` is the table by id where the source has one (a GGUF vocabulary may hold the same text twice).
    fn assemble(
        encoder: tokenizers::Tokenizer,
        texts: Option<Vec<String>>,
        pieces: Pieces,
        marks: Marks,
    ) -> Result<Tokenizer, TokenizerError> {
        let texts = match texts {
            Some(texts) => texts,
            None => {
                let vocab = encoder.get_vocab(true);
                let size = vocab.values().max().map_or(0, |&id| id as usize + 1);
                if size > MAX_VOCAB {
                    return Err(TokenizerError::Broken(format!(
                        "token id {} is past {MAX_VOCAB}, the most allowed",
                        size - 1
                    )));
                }
                let mut texts = vec![String::new(); size];
                for (text, id) in vocab {
                    texts[id as usize] = text;
                }
                texts
            }
        };
        if texts.is_empty() {
            return Err(TokenizerError::Broken("the vocabulary is empty".into()));
        }
        let decoder = encoder.get_added_tokens_decoder();
        let added: HashSet<u32> = decoder.keys().copied().collect();
        let special: HashSet<u32> = decoder.iter().filter(|(_, t)| t.special).map(|(&id, _)| id).collect();
        if let Some(bos) = marks.bos.filter(|&id| id as usize >= texts.len()) {
            return Err(TokenizerError::Broken(format!(
                "the beginning token is id {bos}, but there are only {} tokens",
                texts.len()
            )));
        }
        let known = END_TOKENS.iter().filter_map(|t| encoder.token_to_id(t)).filter(|id| special.contains(id));
        let mut eos_set: Vec<u32> = marks.eos.into_iter().chain(marks.more_eos).chain(known).collect();
        // Where answers come in channels, one ends with a call or where it returns, and `<|end|>` ends a part of it.
        let special_id = |text: &str| encoder.token_to_id(text).filter(|id| special.contains(id));
        if let (Some(back), Some(call)) = (special_id("<|return|>"), special_id("<|call|>")) {
            let part = special_id("<|end|>");
            eos_set.retain(|id| Some(*id) != part);
            eos_set.extend([back, call]);
        }
        eos_set.sort_unstable();
        eos_set.dedup();
        let bound = bounds::Bound::of(&encoder);
        Ok(Tokenizer(Arc::new(Inner {
            encoder,
            texts,
            added,
            special,
            pieces,
            bos: marks.bos,
            eos: marks.eos,
            eos_set,
            bound,
        })))
    }

    /// The ids of `text`. `special`: with the tokens that the model expects around a text (usually a beginning token),
    /// as the tokenizer's own configuration says. Special tokens written out in the text, such as `<|im_end|>`, become
    /// their ids in both cases.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        guarded(|| self.0.encoder.encode_fast(text, special))
            .map(|e| e.get_ids().to_vec())
            .map_err(TokenizerError::Encode)
    }

    /// Whether `text` has more than `tokens` tokens for certain, told by its length alone: without the time and the
    /// memory that encoding takes. `false` says nothing.
    pub fn exceeds(&self, text: &str, tokens: usize) -> bool {
        self.0.bound.is_some_and(|b| b.exceeded(text, tokens))
    }

    /// The text of `ids`, without special tokens. An id that the vocabulary lacks gives nothing; bytes that are no
    /// UTF-8 give U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.decoder().run(ids)
    }

    /// The text of `ids` with special tokens written out.
    pub fn decode_with_special(&self, ids: &[u32]) -> String {
        self.decoder().with_special().run(ids)
    }

    /// A streaming decoder for a text from its beginning. For tokens that follow a prompt use [`Decoder::continuing`].
    pub fn decoder(&self) -> Decoder {
        Decoder::new(self.clone())
    }

    /// The token that begins a text, if the model has one.
    pub fn bos(&self) -> Option<u32> {
        self.0.bos
    }

    /// The main token that ends a text, if the model has one.
    pub fn eos(&self) -> Option<u32> {
        self.0.eos
    }

    /// Every token that ends an answer, in ascending order: the main one, those of the generation settings, and the
    /// known ends of a turn.
    pub fn eos_set(&self) -> &[u32] {
        &self.0.eos_set
    }

    /// One more than the largest id. A model may have more rows (padding), never usefully fewer.
    pub fn vocab_size(&self) -> usize {
        self.0.texts.len()
    }

    /// The id of a token by its written form.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.0.encoder.token_to_id(token)
    }

    /// The written form of a token (`Ġthe`, `▁the`, `<0x0A>`), not its text.
    pub fn token_text(&self, id: u32) -> Option<&str> {
        self.0.texts.get(id as usize).map(String::as_str).filter(|t| !t.is_empty())
    }

    /// Whether a token steers (beginning, end, turn) and is no text.
    pub fn is_special(&self, id: u32) -> bool {
        self.0.special.contains(&id)
    }

    /// The tokenizer in the form of a `tokenizer.json`, for export to the Hugging Face layout.
    pub fn to_json(&self) -> Result<String, TokenizerError> {
        self.0
            .encoder
            .to_string(false)
            .map_err(|e| TokenizerError::Unsupported(format!("it cannot be written as tokenizer.json: {e}")))
    }
}

/// Calls the tokenizer library so that neither an error nor a panic inside it (it indexes by numbers from the file)
/// reaches the user as more than a message.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the tokenizer's data contradicts itself".into()),
    }
}
