//! Drops: which whole pieces go?

pub(crate) mod llm_drop;
