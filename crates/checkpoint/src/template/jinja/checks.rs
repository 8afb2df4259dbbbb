//! What may stand behind `is`.

use super::eval::{Given, Machine};
use super::same::equal;
use super::value::{MAX_TOLD, cut};
use super::{Fault, Outcome, Row, Value, filters};

const NAMES: [&str; 24] = [
    "boolean",
    "callable",
    "defined",
    "divisibleby",
    "escaped",
    "even",
    "false",
    "filter",
    "float",
    "in",
    "integer",
    "iterable",
    "lower",
    "mapping",
    "none",
    "number",
    "odd",
    "sameas",
    "sequence",
    "string",
    "test",
    "true",
    "undefined",
    "upper",
];

/// Comparisons by their names.
const COMPARISONS: [(&str, &str); 16] = [
    ("==", "=="),
    ("eq", "=="),
    ("equalto", "=="),
    ("!=", "!="),
    ("ne", "!="),
    (">", ">"),
    ("gt", ">"),
    ("greaterthan", ">"),
    (">=", ">="),
    ("ge", ">="),
    ("<", "<"),
    ("lt", "<"),
    ("lessthan", "<"),
    ("<=", "<="),
    ("le", "<="),
    ("in", "in"),
];

impl Machine {
    /// Whether `value is name(given)`.
    pub(super) fn test(&self, name: &str, value: &Value, given: Given) -> Outcome<bool> {
        if let Some((_, op)) = COMPARISONS.iter().find(|(n, _)| *n == name) {
            let [other] = given.take(name, ["other"])?;
            let other = other.ok_or_else(|| Fault::error(format!("the test '{name}' takes a value")))?;
            return self.compare(op, value, &other);
        }
        if matches!(name, "divisibleby" | "sameas") {
            let [other] = given.take(name, ["other"])?;
            let other = other.ok_or_else(|| Fault::error(format!("the test '{name}' takes a value")))?;
            return match name {
                "sameas" => Ok(same(value, &other)),
                _ => equal(&self.meter, &self.binary("%", value.defined()?, other.defined()?)?, &Value::Int(0)),
            };
        }
        let [] = given.take(name, [])?;
        Ok(match name {
            "defined" => !matches!(value, Value::Undefined(_)),
            "undefined" => matches!(value, Value::Undefined(_)),
            "none" => matches!(value, Value::None),
            "boolean" => matches!(value, Value::Bool(_)),
            "true" => matches!(value, Value::Bool(true)),
            "false" => matches!(value, Value::Bool(false)),
            "integer" => matches!(value, Value::Int(_)),
            "float" => matches!(value, Value::Float(_)),
            "number" => matches!(value, Value::Int(_) | Value::Float(_) | Value::Bool(_)),
            "string" => matches!(value, Value::Str(_)),
            "mapping" => matches!(value, Value::Dict(_)),
            "iterable" => matches!(value, Value::Str(_) | Value::Seq(_) | Value::Dict(_) | Value::Undefined(_)),
            "sequence" => match value {
                Value::Seq(s) => matches!(s.row, Row::List | Row::Tuple | Row::Range(..)),
                other => matches!(other, Value::Str(_) | Value::Dict(_) | Value::Undefined(_)),
            },
            "callable" => {
                matches!(
                    value,
                    Value::Macro(_) | Value::Function(_) | Value::Method(..) | Value::Undefined(_) | Value::Loop(_)
                )
            }
            "odd" | "even" => {
                let rest = self.binary("%", value.defined()?, &Value::Int(2))?;
                equal(&self.meter, &rest, &Value::Int(i128::from(name == "odd")))?
            }
            "lower" | "upper" => {
                let text = self.text_of(value)?;
                self.text_method(&text, if name == "lower" { "islower" } else { "isupper" }, Given::default())?.truth()
            }
            "escaped" => false,
            "filter" => value.as_str().is_some_and(|n| filters::NAMES.contains(&n)),
            "test" => {
                let known = |n: &str| NAMES.contains(&n) || COMPARISONS.iter().any(|(name, _)| *name == n);
                value.as_str().is_some_and(known)
            }
            _ => return Err(Fault::error(format!("there is no test named '{}'", cut(name, MAX_TOLD)))),
        })
    }
}

/// The same object: small values are one object for each value.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Bool(a), Value::Bool(b)) => a == b,
        (Value::Int(a), Value::Int(b)) => a == b,
        (Value::Str(a), Value::Str(b)) => std::ptr::eq::<str>(&**a, &**b),
        (Value::Seq(a), Value::Seq(b)) => std::rc::Rc::ptr_eq(a, b),
        (Value::Dict(a), Value::Dict(b)) => std::rc::Rc::ptr_eq(a, b),
        (Value::None, Value::None) => true,
        (Value::Namespace(a), Value::Namespace(b)) => std::rc::Rc::ptr_eq(a, b),
        _ => false,
    }
}
