//! Factors: thin matrices instead of one.

pub(crate) mod eora;
pub(crate) mod svd;
pub(crate) mod svd_llm;
#[cfg(test)]
mod testkit;
