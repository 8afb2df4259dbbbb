//! What a method is asked and what it answers; what a family does with the answers: traits and plain data, no code that
//! computes, but for what drafts and their verifier must count alike ([`Tree`], [`Ledger`]).
//!
//! A *method* answers one question ([`Score`], [`Grid`], [`Solve`], ...) with plain data: it gets borrowed matrices and
//! statistics and never sees files, kernels, threads, the network or the engine. A *family* is a recipe verb (prune,
//! quantize, ...): from its keys and a method it makes a [`Step`], which turns answers into [`Edit`]s. The driver knows
//! steps, statistics, edits and the [`Lab`], and no family by name.

mod card;
mod lab;
mod pays;
mod questions;
mod running;
mod stats;
mod step;
mod tree;

pub use card::{Ability, Card, Family, Made, MadeRunning, Making, Method, MethodError, Registry, RunMethod};
pub use lab::{Assignment, Lab, Level, Outcome, Slot};
pub use pays::{Acceptance, Company, Ledger, MOST_COST, StepSeconds, best_nodes};
pub use questions::{
    Basis, Compete, Cut, Factor, FfnAsk, FfnMatrix, Grid, GridAsk, Learner, PruneAsk, Ranks, Recode, RoundAsk,
    RoundedForm, Scaled, ScaledAsk, ScaledTable, Scope, Score, Search, SearchAsk, Shortlist, ShortlistAsk, Shrink,
    Shrinking, Solve, SolveAsk, SolveFfn, Solved, Sparsity, Spectrum, Stack, Structure, StructureAsk, Table, Transform,
    Unit, Vocabulary,
};
pub use running::{
    Draft, Drafting, Gate, GatePlan, GateSide, Keep, KeepHead, KeepPlan, Pool, Pooled, PromptAsk, Select, SelectAsk,
    SelectPlan, SelectPrompt, SelectScope, Selector, TopK,
};
pub use stats::{Ask, Gathered, Site, Stats, Worked};
pub use step::{
    AtSize, Edit, Finished, LayerWork, Left, Local, ModelWide, Reader, Searching, Step, Turn, Varied, Walker, Work,
};
pub use tree::{Accepted, Tree};
