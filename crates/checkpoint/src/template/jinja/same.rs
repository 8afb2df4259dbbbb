//! `==` of values, paid for by what is compared: values that share their parts may stand for more than can be walked.

use std::rc::Rc;

use super::meter::Meter;
use super::value::Dict;
use super::{Outcome, Row, Value};

/// Whether two values are equal, as Python sees it.
pub(super) fn equal(meter: &Meter, a: &Value, b: &Value) -> Outcome<bool> {
    meter.steps(1)?;
    Ok(match (a, b) {
        (Value::Undefined(_), Value::Undefined(_)) | (Value::None, Value::None) => true,
        (Value::Str(a), Value::Str(b)) => {
            if a.len() == b.len() {
                meter.look(a.len())?;
            }
            **a == **b
        }
        (Value::Seq(a), Value::Seq(b)) => {
            if Rc::ptr_eq(a, b) {
                return Ok(true);
            }
            let plain = |r: Row| match r {
                Row::Keys | Row::Items => Row::Keys,
                Row::Range(..) => Row::Range(0, 0, 0),
                other => other,
            };
            if plain(a.row) != plain(b.row)
                || matches!(a.row, Row::Generator | Row::Values)
                || a.items.len() != b.items.len()
            {
                return Ok(false);
            }
            for (x, y) in a.items.iter().zip(&b.items) {
                if !equal(meter, x, y)? {
                    return Ok(false);
                }
            }
            true
        }
        (Value::Dict(a), Value::Dict(b)) => Rc::ptr_eq(a, b) || dicts(meter, a, b)?,
        (Value::Namespace(a), Value::Namespace(b)) => Rc::ptr_eq(a, b),
        (Value::Macro(a), Value::Macro(b)) => Rc::ptr_eq(a, b),
        (Value::Loop(a), Value::Loop(b)) => Rc::ptr_eq(a, b),
        (Value::Function(a), Value::Function(b)) => a == b,
        (a, b) => match (a.as_int(), b.as_int()) {
            (Some(a), Some(b)) => a == b,
            _ => matches!((a.as_float(), b.as_float()), (Some(a), Some(b)) if a == b),
        },
    })
}

fn dicts(meter: &Meter, a: &Dict, b: &Dict) -> Outcome<bool> {
    if a.entries().len() != b.entries().len() {
        return Ok(false);
    }
    for (key, value) in a.entries() {
        match b.get(key, meter)? {
            Some(other) if equal(meter, value, other)? => {}
            _ => return Ok(false),
        }
    }
    Ok(true)
}
