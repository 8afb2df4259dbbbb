//! A network as data: what a decoder-only language model is made of, layer by layer, and the names of its parts.
//!
//! [`Spec`] says everything the one decoder needs to know; no other room asks for an architecture's name. [`Place`]
//! names one tensor of a model (`layers.3.attn.q`), whatever a file calls it. `lacuna-arch` translates both ways between
//! a file's own configuration and names and these.

mod inputs;
mod latent;
mod mixer;
mod mixture;
mod place;
mod spec;

pub use inputs::{AltUp, LayerInputs};
pub use latent::Latent;
pub use mixer::{Delta, GateNorm, Mamba, Mixer, ShortConv, Ssd};
pub use mixture::{ExpertGroups, Experts, RouterScore, SharedExpert};
pub use place::{Part, Place, Role, Target};
pub use spec::{
    Activation, AttnSpec, FfnSpec, LayerSpec, Norm, NormKind, NormVectors, Order, Positions, QkNorm, Rope, RopeScaling,
    RopeStyle, Spec, SpecError, Temperature,
};
