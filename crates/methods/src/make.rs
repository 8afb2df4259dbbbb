//! What every method needs to come into being: its parameters read, its inputs checked.

use lacuna_base::{Gram, MatRef};
use lacuna_contract::{MethodError, Stats};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// A method's parameters from a JSON object; nothing given is all defaults.
pub(crate) fn parameters<T: DeserializeOwned>(name: &str, given: Value) -> Result<T, MethodError> {
    let given = if given.is_null() { Value::Object(Default::default()) } else { given };
    serde_json::from_value(given).map_err(|e| MethodError::new(format!("{name}: {e}")))
}

/// Refuses weights that are not finite numbers.
pub(crate) fn finite(w: MatRef<'_>) -> Result<(), MethodError> {
    for r in 0..w.rows() {
        if let Some(c) = w.row(r).iter().position(|v| !v.is_finite()) {
            return Err(MethodError::new(format!(
                "the weight at row {r}, column {c} is {}, not a finite number",
                w.at(r, c)
            )));
        }
    }
    Ok(())
}

/// The Gram matrix of a matrix with `cols` inputs, or what is wrong with it.
pub(crate) fn gram<'a>(stats: &Stats<'a>, cols: usize) -> Result<&'a Gram, MethodError> {
    let gram = stats.gram.ok_or_else(|| MethodError::new("the Gram matrix of the inputs was not gathered"))?;
    if gram.n() != cols {
        return Err(MethodError::new(format!("a Gram matrix of {} inputs for a matrix of {cols}", gram.n())));
    }
    if gram.tokens() == 0 {
        return Err(MethodError::new("no calibration token reached this matrix; calibrate on more text"));
    }
    match gram.data().iter().position(|v| !v.is_finite()) {
        None => Ok(gram),
        Some(i) => Err(MethodError::new(format!(
            "calibration gave inputs beyond the range of numbers: XᵀX is {} for inputs {} and {}",
            gram.data()[i],
            i / cols,
            i % cols
        ))),
    }
}
