//! The arithmetic of a forward pass, compiled for several instruction sets and chosen once at run time.
//!
//! - [`Linear`]: a stored matrix ready to multiply, whatever its patterns and codecs; [`Transposed`]: the same from its
//!   other side.
//! - [`Attention`] over the pages of a [`KvPool`], [`RopeTable`], [`norm`], [`gated_activation`], [`softmax`] and the
//!   small operations between.
//! - [`ceiling`]: what this machine's memory and arithmetic allow.
//! - [`table`]: which kernels are compiled in and which this machine uses; [`Isa`]: the instruction sets.
//!
//! The law of this room: a row's result depends on the row, the matrix and the instruction set alone. Not on the number
//! of rows in a call, their place among them, or the number of threads ([`set_threads`]; by default as many as the
//! current rayon pool has).
//!
//! NaN and infinity pass through like any value: they reach the results that they take part in, and panic nowhere.

pub mod ceiling;
pub mod cpu;
mod gate;
mod kv;
mod linear;
mod memory;
mod op;
mod panel;
mod parallel;
mod scratch;
mod simd;
mod simulated;
mod sync;
pub mod table;

pub use cpu::Isa;
pub use kv::{KEY_BLOCK, KeyPool, KvFormat, KvLayout, KvPage, KvPool, KvView};
pub use linear::{Activations, Group, Linear, Packing, Transposed};
pub use op::adjoint::{activation_slope, softmax_lanes, xielu_slope};
pub use op::attention::{Attention, Chosen};
pub use op::elementwise::{Xielu, activation, add, add_scaled, clip, gated_activation, softcap, softmax, xielu};
pub use op::mass::{HeadMass, Mass};
pub use op::norm::{norm, norm_in_place};
pub use op::recurrent::{Recurrence, StateRun};
pub use op::rope::{RopeRows, RopeTable};
pub use parallel::{set_threads, tasks, threads};
pub use simulated::Simulated;

/// Raised whenever products become faster or slower: what was measured under another revision tells nothing about
/// these.
pub const REVISION: u32 = 3;
