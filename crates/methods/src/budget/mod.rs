//! Budgets: how much for each place?

pub(crate) mod uniform;
