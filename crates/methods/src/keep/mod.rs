//! Keepers: which cached entries stay?

pub(crate) mod h2o;
pub(crate) mod streaming_llm;

use lacuna_contract::{KeepHead, MethodError};

/// Refuses a head whose slots are out of order or whose mass, where it is read, is not what a softmax gives.
fn check(head: &KeepHead<'_>, mass: bool) -> Result<(), MethodError> {
    let error = |what: String| Err(MethodError::new(format!("layer {}, head {}: {what}", head.layer, head.head)));
    if let Some(w) = head.positions.windows(2).find(|w| w[0] >= w[1]) {
        return error(format!("a slot of position {} stands before one of {}", w[0], w[1]));
    }
    if !mass {
        return Ok(());
    }
    if head.mass.len() != head.positions.len() {
        return error(format!("the mass of {} slots for {}", head.mass.len(), head.positions.len()));
    }
    match head.mass.iter().position(|m| !(m.is_finite() && *m >= 0.0)) {
        Some(i) => error(format!("the attention to position {} adds up to {}", head.positions[i], head.mass[i])),
        None => Ok(()),
    }
}
