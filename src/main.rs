//! The Lacuna binary.
fn main() {}
