//! The engine: sequences of tokens continued by a model, and what people want from that: text, a conversation, a speed.
//!
//! [`Engine`] holds the model and nothing that changes; a [`Sequence`] holds one text's tokens and keys and values.
//! Whoever owns sequences decides when which is continued. A [`Scheduler`] does so for many texts at once, in steps
//! that read the weights once for all of them, with keys and values in a [`BlockStore`].

mod bench;
mod blocks;
mod chat;
mod engine;
mod generate;
mod request;
mod sampler;
mod scheduler;

pub use bench::{Bench, BenchOptions, Spent};
pub use blocks::{BLOCK_TOKENS, BlockCounts, BlockStore};
pub use chat::Chat;
pub use engine::{DEFAULT_CHUNK, Engine, RunError, Sequence};
pub use generate::{Generated, Generation, Stats, Stop};
pub use request::{Event, Finished, Grammar, Job, Picked, Pooling, Request};
pub use sampler::{Probability, Sampler, Sampling};
pub use scheduler::{Gauges, Limits, Scheduler, Step};
