//! Factors: thin matrices instead of one.

pub(crate) mod asvd;
pub(crate) mod dobi_svd;
pub(crate) mod eora;
pub(crate) mod fwsvd;
pub(crate) mod gfwsvd;
pub(crate) mod svd;
pub(crate) mod svd_llm;
#[cfg(test)]
mod testkit;
pub(crate) mod welore;
