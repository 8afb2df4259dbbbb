//! Files in, files out: checkpoints of several formats opened as a [`Spec`](lacuna_spec::Spec) and weights by place.
//!
//! [`open`] takes a directory in the Hugging Face layout, a packed model, a `.gguf` or a `.safetensors` file. Files are
//! mapped, never read whole, and everything in them is checked before it is believed.

mod along;
mod content;
mod examine;
mod files;
mod foreign;
pub mod gguf;
mod imatrix;
pub mod json;
mod map;
mod open;
pub mod packed;
mod repair;
pub mod safetensors;
pub mod save;
mod template;
mod tensor;
mod tokenizer;
pub mod torch;
mod writer;

pub use examine::{Found, Problem};
#[cfg(feature = "faults")]
pub use files::faults;
pub use foreign::{Adapter, Quantized};
pub use imatrix::Imatrix;
pub use open::{Checkpoint, Kind, OpenError, examine, open, open_like};
pub use repair::{Fault, diagnose, mendable, repair};
pub use template::{ChatTemplate, Message, Setting, TemplateError};
pub use tensor::{TensorInfo, TensorType};
pub use tokenizer::{Compared, Decoder, Export, HfFiles, Lexicon, TokenKind, Tokenizer, TokenizerError, Vocabulary};
pub use writer::{PackedWriter, SaveError, left_behind, refuse_existing};
