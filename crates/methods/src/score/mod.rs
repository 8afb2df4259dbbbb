//! Scores: how much does each weight matter?

pub(crate) mod constant_blocks;
pub(crate) mod fisher;
pub(crate) mod gblm;
pub(crate) mod gqsa;
pub(crate) mod magnitude;
pub(crate) mod wanda;
