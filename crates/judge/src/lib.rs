//! Does an omission pay? Baselines made once from the same source, measured on the same text and clock, and the rule that compares.

mod baselines;
mod cost;
mod gate;
mod speed;

pub use baselines::{Baseline, BaselineError, Bench, baselines, fingerprint, frequencies, measure};
pub use cost::{CostTable, Forecast};
pub use gate::{Against, LOSS_SLACK, Measured, Speed, Verdict, judge};
pub use speed::{TIMING_BYTES, time_decode};
