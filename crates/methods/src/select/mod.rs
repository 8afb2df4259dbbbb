//! Selectors: which keys does this query read?

pub(crate) mod pooled_blocks;
