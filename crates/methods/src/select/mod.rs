//! Selectors: which keys does this query read?

pub(crate) mod flexprefill;
pub(crate) mod pooled_blocks;
