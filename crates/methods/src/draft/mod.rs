//! Drafts: what may come next?

pub(crate) mod copyspec;
pub(crate) mod token_recycling;
