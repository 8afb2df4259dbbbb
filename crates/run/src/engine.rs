//! A loaded model, and the state of one text that it continues.

use lacuna_base::MatRef;
use lacuna_checkpoint::{TemplateError, TokenizerError};
use lacuna_kernels::KvFormat;
use lacuna_model::{Batch, ContiguousKv, Decoder, ModelError, NoTap};
use lacuna_spec::RopeScaling;

/// Rows of a prompt computed in one call: enough to keep a processor busy, few enough to keep activations small.
pub const DEFAULT_CHUNK: usize = 512;

/// What can go wrong while running a model.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The model could not compute.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The text could not be encoded.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The conversation could not be rendered.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// There is nothing to continue.
    #[error("the prompt is empty; a model without a beginning token needs at least one token to continue")]
    Empty,
    /// The text does not fit.
    #[error("{tokens} tokens do not fit the context of {context} tokens{hint}")]
    Context {
        /// Tokens there are.
        tokens: usize,
        /// Tokens that fit.
        context: usize,
        /// What to do.
        hint: &'static str,
    },
    /// The model computed no numbers.
    #[error(
        "the logit of token {token} is {value} after {tokens} tokens: the model is broken or its weights were damaged"
    )]
    Logits {
        /// The token.
        token: usize,
        /// The value.
        value: f32,
        /// Tokens before.
        tokens: usize,
    },
    /// A sampling setting out of its range.
    #[error("{setting} is {value}; it must be {range}")]
    Setting {
        /// Which.
        setting: &'static str,
        /// What it is.
        value: f32,
        /// What it may be.
        range: &'static str,
    },
    /// A request that asks for nothing measurable.
    #[error("{0}")]
    Request(String),
}

/// A model ready to continue sequences.
pub struct Engine {
    model: Decoder,
    context: usize,
    chunk: usize,
    kv: KvFormat,
    /// LongRoPE's original contexts.
    originals: Vec<usize>,
}

/// One text: its tokens so far and their keys and values.
pub struct Sequence {
    tokens: Vec<u32>,
    kv: ContiguousKv,
    /// The class of the keys.
    class: u32,
    /// The rows of the last call, and the logits after it.
    batch: Batch,
    logits: Vec<f32>,
}

impl Sequence {
    /// The tokens that the model has read.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Forgets everything from token `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.tokens.truncate(len);
        self.kv.truncate(0, len);
    }

    /// Bytes of keys and values held.
    pub fn kv_bytes(&self) -> usize {
        self.kv.bytes()
    }
}

impl Engine {
    /// An engine over a loaded model, with the model's own context.
    pub fn new(model: Decoder) -> Engine {
        let context = model.spec.context;
        let ropes = model.spec.layers.iter().filter_map(|l| l.attn.as_ref()?.rope.as_ref());
        let mut originals: Vec<usize> = ropes
            .filter_map(|r| match r.scaling {
                RopeScaling::Longrope { original, .. } => Some(original),
                _ => None,
            })
            .collect();
        originals.sort_unstable();
        originals.dedup();
        Engine { model, context, chunk: DEFAULT_CHUNK, kv: KvFormat::F32, originals }
    }

    /// Another form of the cached keys and values; by default they are exactly what was computed.
    #[must_use]
    pub fn with_kv(mut self, kv: KvFormat) -> Engine {
        self.kv = kv;
        self
    }

    /// Another limit on a text's length. A longer one than the model was made for is the caller's risk.
    #[must_use]
    pub fn with_context(mut self, tokens: usize) -> Engine {
        self.context = tokens;
        self
    }

    /// Another number of prompt rows computed in one call, at least 1. It changes speed and memory, never a result.
    #[must_use]
    pub fn with_chunk(mut self, rows: usize) -> Engine {
        self.chunk = rows.max(1);
        self
    }

    /// How keys and values are kept.
    pub fn kv_format(&self) -> KvFormat {
        self.kv
    }

    /// The model.
    pub fn model(&self) -> &Decoder {
        &self.model
    }

    /// Most tokens that a text may have.
    pub fn context(&self) -> usize {
        self.context
    }

    /// An empty text.
    pub fn sequence(&self) -> Sequence {
        Sequence {
            tokens: Vec::new(),
            kv: ContiguousKv::with_format(&self.model.spec, 1, self.kv),
            class: 0,
            batch: Batch::new(),
            logits: Vec::new(),
        }
    }

    /// Prepares `seq` for a text that begins with `prompt`: keeps what it has read of it already, short of the last
    /// token, and forgets the rest. Makes room for `room` tokens in all. Returns how many tokens are kept.
    pub fn reuse(&self, seq: &mut Sequence, prompt: &[u32], room: usize) -> usize {
        let same = seq.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let keep = if self.class(prompt.len()) == seq.class { same.min(prompt.len().saturating_sub(1)) } else { 0 };
        seq.truncate(keep);
        seq.tokens.reserve(room.min(self.context).saturating_sub(keep));
        keep
    }

    /// The class of a text of `length` tokens. Texts of different classes have no keys in common: LongRoPE turns a text
    /// that is longer than the original context by other factors, from its first token on. A text that outgrows its
    /// class is read again, so that what it says is what one pass over the whole of it says, however it was cut. In
    /// transformers Phi-3 does the same; other architectures keep the short keys beside long ones there, and what they
    /// say depends on how the text was cut.
    pub fn class(&self, length: usize) -> u32 {
        self.originals.iter().filter(|&&original| length > original).count() as u32
    }

    /// Reads `tokens` after what `seq` has, a chunk at a time, and returns the logits of what follows. Where the class
    /// of the text changes, all of it is read again. On an error the sequence is as before, or empty where its class
    /// had changed.
    pub fn extend<'s>(&self, seq: &'s mut Sequence, tokens: &[u32]) -> Result<&'s [f32], RunError> {
        let total = seq.tokens.len() + tokens.len();
        if tokens.is_empty() {
            return Err(RunError::Empty);
        }
        if total > self.context {
            return Err(RunError::Context { tokens: total, context: self.context, hint: "" });
        }
        let class = self.class(total);
        let read = if class == seq.class {
            self.read(seq, tokens)
        } else {
            let all = [seq.tokens.as_slice(), tokens].concat();
            seq.truncate(0);
            seq.class = class;
            self.read(seq, &all)
        };
        read.map(|()| seq.logits.as_slice())
    }

    /// Reads `tokens`, with which the text ends. On an error the sequence is as before.
    fn read(&self, seq: &mut Sequence, tokens: &[u32]) -> Result<(), RunError> {
        let before = seq.tokens.len();
        let read = self.read_chunks(seq, tokens);
        if read.is_err() {
            seq.truncate(before);
        }
        read
    }

    fn read_chunks(&self, seq: &mut Sequence, tokens: &[u32]) -> Result<(), RunError> {
        let total = seq.tokens.len() + tokens.len();
        for (i, chunk) in tokens.chunks(self.chunk).enumerate() {
            let at = seq.tokens.len();
            seq.batch.clear();
            seq.batch.push_part(0, at..at + chunk.len(), total);
            let hidden = self.model.forward(chunk, &seq.batch, &mut seq.kv, &mut NoTap)?;
            seq.tokens.extend_from_slice(chunk);
            if (i + 1) * self.chunk >= tokens.len() {
                let last = hidden.row(hidden.rows() - 1);
                let logits = self.model.logits(MatRef::new(1, last.len(), last));
                seq.logits.clear();
                seq.logits.extend_from_slice(logits.row(0));
            }
        }
        Ok(())
    }
}
