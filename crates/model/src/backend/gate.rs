//! What a gate is asked about a row, and what its answer must be.

use lacuna_contract::Gate;
use lacuna_spec::Place;

use crate::ModelError;
use crate::gating::refused;

/// A gate at matrices that share their rows.
#[derive(Clone, Copy)]
pub struct GateAsk<'a> {
    /// The first of the matrices, for errors.
    pub place: &'a Place,
    /// Who is asked.
    pub gate: &'a dyn Gate,
    /// What it made of their weights.
    pub norms: &'a [f32],
}

impl GateAsk<'_> {
    /// The channels that a row needs, rising; none: all. Where a number is not finite nobody is asked: what is wrong
    /// shows then as it does without a gate.
    pub(super) fn channels(&self, row: &[f32]) -> Result<Option<Vec<u32>>, ModelError> {
        if row.iter().any(|x| !x.is_finite()) {
            return Ok(None);
        }
        let channels = self.gate.channels(row, self.norms).map_err(|e| refused(self.place, &e))?;
        let wrong = |what: String| Err(ModelError::Gate { what: format!("{}: {what}", self.place) });
        if let Some(w) = channels.windows(2).find(|w| w[0] >= w[1]) {
            return wrong(format!("channel {} after channel {}", w[1], w[0]));
        }
        match channels.last() {
            Some(&last) if last as usize >= row.len() => wrong(format!("channel {last} of {}", row.len())),
            _ => Ok((channels.len() < row.len()).then_some(channels)),
        }
    }
}

/// Makes zero what a row has outside of `channels`.
pub(super) fn leave<T: Default>(row: &mut [T], channels: &[u32]) {
    let mut next = channels.iter().copied().peekable();
    for (c, x) in (0u32..).zip(row) {
        if next.next_if_eq(&c).is_none() {
            *x = T::default();
        }
    }
}
