//! Does an omission pay? Baselines made once from the same source, measured on the same text and clock, and the rule
//! that compares.

mod baselines;
mod cost;
pub mod fit;
mod footprint;
mod gate;
mod shelf;
mod speed;

pub use baselines::{
    Baseline, BaselineError, Baselines, Bench, OwnBits, SOURCE, TOKEN_FREQUENCIES, baselines, frequencies, measure,
};
pub use cost::{CostTable, Forecast, Products};
pub use footprint::Footprint;
pub use gate::{Against, LOSS_SLACK, Measured, Speed, Verdict, competes, judge};
pub use shelf::{MAX_AGE, MAX_BYTES, kept_baselines, remove_baselines};
pub use speed::{Hold, time_decode};
