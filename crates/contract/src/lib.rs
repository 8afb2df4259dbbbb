//! What a method is asked, and what it answers: traits and plain data, no code that computes.
//!
//! A method gets borrowed matrices and statistics and returns a small value. It never sees files, kernels, threads, the network or the
//! engine. It declares the statistics it needs; one calibration pass gathers the union of what a recipe's methods asked for.

mod answers;
mod questions;

pub use answers::{DropPart, Made, Method, MethodError, Outcome, Slot, Solved};
pub use questions::{
    Budget, Card, Drop, DropStats, Factor, Grid, GridAsk, Needs, PruneAsk, RoundAsk, Scope, Score, Solve, SolveAsk,
    Sparsity, Stats, Verb,
};
