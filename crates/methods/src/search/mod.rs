//! Searches: how much for each place?

mod divide;
pub(crate) mod essential_sparsity;
pub(crate) mod evopress;
pub(crate) mod owl;
pub(crate) mod sv_nup;
pub(crate) mod svd_llm_v2;
#[cfg(test)]
mod testkit;
pub(crate) mod uniform;
pub(crate) mod ziplm;
