//! A network as data: what a decoder-only language model is made of, layer by layer, and the names of its parts.
//!
//! [`Spec`] says everything the one decoder needs to know; no other room asks for an architecture's name. [`Place`]
//! names one tensor of a model (`layers.3.attn.q`), whatever a file calls it. `lacuna-arch` translates both ways between
//! a file's own configuration and names and these.

mod mixer;
mod place;
mod spec;

pub use mixer::{Delta, GateNorm, Mixer, ShortConv, Ssd};
pub use place::{Part, Place, Role, Target};
pub use spec::{
    Activation, AttnSpec, Experts, FfnSpec, LayerSpec, Norm, NormKind, Positions, Rope, RopeScaling, RopeStyle, Spec,
    SpecError,
};
