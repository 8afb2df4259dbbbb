//! Structures: which heads, channels or whole parts go?

pub(crate) mod cfsp;
pub(crate) mod flap;
pub(crate) mod llm_drop;
pub(crate) mod llm_pruner;
pub(crate) mod prunenet;
pub(crate) mod random;
pub(crate) mod wanda_sp;

use lacuna_base::MatRef;
use lacuna_contract::{MethodError, StructureAsk};

use crate::make;

/// The matrix that reads what heads or channels write, with as many columns as they have; or why `whose` question
/// cannot be answered.
pub(crate) fn reader<'a>(whose: &str, ask: &StructureAsk<'a>) -> Result<MatRef<'a>, MethodError> {
    let Some(w) = ask.reader.filter(|_| ask.width > 0) else {
        return Err(MethodError::new(format!("{whose} scores heads and channels, not whole parts")));
    };
    if ask.count.checked_mul(ask.width) != Some(w.cols()) {
        let what = format!("{} units of {} columns for a matrix of {}", ask.count, ask.width, w.cols());
        return Err(MethodError::new(what));
    }
    make::finite(w)?;
    Ok(w)
}

/// The sum of `of` over each column, row after row.
fn columns(w: MatRef<'_>, of: impl Fn(f64) -> f64) -> Vec<f64> {
    let mut sums = vec![0.0; w.cols()];
    for r in 0..w.rows() {
        sums.iter_mut().zip(w.row(r)).for_each(|(s, v)| *s += of(f64::from(*v)));
    }
    sums
}
