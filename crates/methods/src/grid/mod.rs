//! Grids: which values may a weight take?

pub(crate) mod any_precision;
pub(crate) mod bfp;
pub(crate) mod float_format;
pub(crate) mod rtn;
pub(crate) mod squeezellm;
pub(crate) mod weighted_rtn;
