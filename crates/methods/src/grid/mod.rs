//! Grids: which values may a weight take?

pub(crate) mod bfp;
pub(crate) mod rtn;
pub(crate) mod squeezellm;
