//! Transform: which maps of a matrix's inputs make it easier to write with few bits?

pub(crate) mod awq;
pub(crate) mod hadamard;
pub(crate) mod rearrange;
#[cfg(test)]
mod testkit;
