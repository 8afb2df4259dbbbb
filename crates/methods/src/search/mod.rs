//! Searches: how much for each place?

pub(crate) mod evopress;
pub(crate) mod svd_llm_v2;
#[cfg(test)]
mod testkit;
pub(crate) mod uniform;
