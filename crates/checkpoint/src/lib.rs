//! Files in, files out: checkpoints of several formats opened as a [`Spec`](lacuna_spec::Spec) and weights by place.

pub mod gguf;
