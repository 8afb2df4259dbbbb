//! The way back through the one decoder: gradients of a sequence's mean next-token loss.
//!
//! Beside every operation of the decoder stands its adjoint, a plain function of the same values: what is known of the
//! loss's gradient after the operation becomes what is known before it. [`RecordedBlock`] runs a block's own forward
//! over a backend that records what each operation's adjoint reads; [`gradients`] walks a model's blocks from last to
//! first, one loaded at a time, their inputs in a store that may spill.
//!
//! A [`GradientSink`] is shown, for every matrix, the rows that it multiplied and the gradients of what it put out: all
//! that second-order and gradient statistics are made of ([`stats`]). Weights are those that are stored, activations
//! exact; nothing moves.
//!
//! Not here: gradients of the embedding and of learned positions. A tied matrix is shown as the head alone.
//!
//! Every result is the same bits with any number of threads: orders of summation follow from shapes.

mod activation;
mod attention;
mod block;
#[cfg(test)]
mod differences;
mod experts;
mod loss;
mod norm;
mod product;
mod recorder;
mod recurrent;
mod rope;
mod rows;
mod sink;
pub mod stats;
mod streams;
mod tape;
mod walk;

pub use activation::{activation, clip, gated_activation, softcap, xielu};
pub use attention::{AttentionGradients, attention};
pub use block::{Record, RecordedBlock};
pub(crate) use experts::{routing, weigh_rows};
pub use loss::{RecordedHead, cross_entropy};
pub use norm::{NormGradients, norm};
pub use product::{bias, product, product_weight};
pub use rope::rope;
pub use sink::GradientSink;
pub use walk::{BlockInputs, MemoryInputs, gradients};
