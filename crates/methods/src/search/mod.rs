//! Searches: how much for each place?

pub(crate) mod evopress;
#[cfg(test)]
mod testkit;
pub(crate) mod uniform;
