//! The engine: sequences of tokens continued by a model, and what people want from that: text, a conversation, a speed.
//!
//! [`Engine`] holds the model and nothing that changes; a [`Sequence`] holds one text's tokens and keys and values. Whoever owns sequences
//! decides when which is continued.

mod bench;
mod chat;
mod engine;
mod generate;
mod sampler;

pub use bench::{Bench, BenchOptions, Spent};
pub use chat::Chat;
pub use engine::{DEFAULT_CHUNK, Engine, RunError, Sequence};
pub use generate::{Generated, Generation, Stats, Stop};
pub use sampler::{Sampler, Sampling};
