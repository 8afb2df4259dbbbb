//! Methods that take a matrix apart into a stack of one-bit blocks.

pub(crate) mod bitstack;
