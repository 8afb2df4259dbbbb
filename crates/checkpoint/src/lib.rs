//! Files in, files out: checkpoints of several formats opened as a [`Spec`](lacuna_spec::Spec) and weights by place.

pub mod gguf;
mod template;
mod tokenizer;

pub use template::{ChatTemplate, Message, TemplateError};
pub use tokenizer::{Decoder, HfFiles, TokenKind, Tokenizer, TokenizerError, Vocabulary};
