//! The one decoder, over a [`Spec`](lacuna_spec::Spec), [`Weights`](lacuna_format::Weights) and a [`Backend`]; it knows
//! no files, and not where rows lie.
//!
//! [`Decoder`] is [`Embedding`], [`Block`]s and [`Head`]; each loads alone, so that a compressor can hold one block at
//! a time. A [`Batch`] says which rows of a call belong to which sequence and position; a [`KvStore`] keeps their keys
//! and values; a [`Tap`] looks on.
//!
//! [`backend`] is the seam: the processor ([`Cpu`], what is meant where nothing is said), and [`Naive`], slow and in
//! f64, for tests.
//!
//! [`derive`] goes the way back: gradients of a text's loss, block by block.
//!
//! A row's result is the same bits whatever else is in the call: the prompt whole, in chunks, in a batch, or token by
//! token.

mod altup;
pub mod backend;
mod batch;
mod block;
mod carried;
mod decoder;
pub mod derive;
mod error;
mod ffn;
mod gating;
mod heads;
mod kv;
mod latent;
mod lent;
mod mixer;
mod parts;
mod profile;
mod tap;

pub use backend::{Asks, Backend, Cpu, Decisions, GateAsk, Naive, Pages, PromptRead, Reads, States, Table, Tables};
pub use batch::Batch;
pub use block::{Block, PromptPass};
pub use decoder::{Decoder, Embedding, Head, LoadOptions};
pub use error::ModelError;
pub use gating::GateStore;
pub use kv::{ContiguousKv, KvStore, STEP_TOKENS};
pub use lacuna_kernels::{HeadMass, Mass};
pub use lent::Lent;
pub use profile::{end_profile, start_profile};
pub use tap::{BlockPart, NoTap, Shown, Tap, Wants};
