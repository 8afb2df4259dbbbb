//! Grids: which values may a weight take?

pub(crate) mod rtn;
