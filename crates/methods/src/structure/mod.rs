//! Structures: which heads, channels or whole parts go?

pub(crate) mod llm_drop;
