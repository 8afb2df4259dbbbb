//! Bases: which change of axes first?

pub(crate) mod axes;
pub(crate) mod slicegpt;
