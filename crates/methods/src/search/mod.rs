//! Searches: how much for each place?

#[cfg(test)]
mod testkit;
pub(crate) mod uniform;
