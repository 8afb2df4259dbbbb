//! Solves: choose what stays, and compensate with the rest.

pub(crate) mod dsnot;
pub(crate) mod finequant;
pub(crate) mod gptq;
pub(crate) mod hqq;
pub(crate) mod llm_surgeon;
pub(crate) mod obert;
pub(crate) mod sparsegpt;
pub(crate) mod sparsellm;
pub(crate) mod spqr;
