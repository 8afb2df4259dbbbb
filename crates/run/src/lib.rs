//! The engine: texts continued by a model, and what people want from that: an answer, a conversation, a speed.
//!
//! [`Engine`] holds the model and nothing that changes. There is one way to run it: a [`Scheduler`] continues texts,
//! one or many, in steps that read the weights once for all of them, with keys and values in a [`BlockStore`].
//! [`Session`] is a scheduler with room for one text, [`Chat`] a session that knows what was said;
//! [`bench()`] times one text.

mod bench;
mod blocks;
mod chat;
mod engine;
mod generate;
mod plan;
mod request;
mod sampler;
mod scheduler;
mod score;
mod session;

pub use bench::{Bench, BenchOptions, Spent, bench};
pub use blocks::{BLOCK_TOKENS, BlockCounts, BlockStore, SNAPSHOT_TOKENS};
pub use chat::Chat;
pub use engine::{Engine, RunError};
pub use generate::{Generation, Stop};
pub use lacuna_model::Reads;
pub use plan::{QUESTIONS, RunPlan};
pub use request::{Event, Finished, Grammar, Job, Picked, Pooling, Request};
pub use sampler::{Probability, Sampler, Sampling};
pub use scheduler::{Gauges, Limits, Scheduler, Step};
pub use score::{read, score};
pub use session::{DEFAULT_CHUNK, Generated, Session, Stats};
