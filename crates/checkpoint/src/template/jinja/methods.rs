//! Functions of the language, and methods of everything but texts.

use std::sync::Arc;

use super::eval::{Given, Machine};
use super::same::equal;
use super::value::{MAX_TOLD, cut};
use super::{Fault, FaultKind, Outcome, Row, Str, Value, text};

/// Values that `range` may give, as in the sandbox.
const MAX_RANGE: i128 = 100_000;

const FUNCTIONS: [&str; 5] = ["range", "dict", "namespace", "raise_exception", "strftime_now"];

/// Whether the sandbox hides the name: it would change a value in place, or is Python's own.
pub(super) fn unsafe_name(value: &Value, name: &str) -> bool {
    const OF_LIST: [&str; 8] = ["append", "clear", "pop", "reverse", "insert", "sort", "extend", "remove"];
    const OF_DICT: [&str; 5] = ["clear", "pop", "popitem", "setdefault", "update"];
    name.starts_with("__")
        || match value {
            Value::Dict(_) => OF_DICT.contains(&name),
            Value::Seq(s) => s.row == Row::List && OF_LIST.contains(&name),
            _ => false,
        }
}

/// Whether the value has a method of that name.
pub(super) fn has(value: &Value, name: &str) -> bool {
    match value {
        Value::Str(_) => text::METHODS.contains(&name),
        Value::Dict(_) => ["get", "items", "keys", "values", "copy"].contains(&name),
        Value::Seq(s) => match s.row {
            Row::List => ["count", "index", "copy"].contains(&name),
            Row::Tuple | Row::Range(..) => ["count", "index"].contains(&name),
            _ => false,
        },
        Value::Loop(_) => ["cycle", "changed"].contains(&name),
        Value::Function("dict") => name == "fromkeys",
        _ => false,
    }
}

impl Machine {
    /// A function of the language by its name.
    pub(super) fn global(name: &str) -> Value {
        match FUNCTIONS.into_iter().find(|f| *f == name) {
            Some(f) => Value::Function(f),
            None => Value::undefined(format!("'{}' is undefined", cut(name, MAX_TOLD))),
        }
    }

    pub(super) fn function(&self, name: &str, given: Given) -> Outcome<Value> {
        match name {
            "range" => self.range(given),
            "dict" => self.dict(given),
            "namespace" => {
                let Value::Dict(names) = self.dict(given)? else { return self.namespace(Vec::new()) };
                let name = |v: &Value| v.as_str().map(Arc::from);
                let letters = names.entries().iter().map(|(k, _)| k.as_str().map_or(0, str::len)).sum();
                drop(self.meter.hold(letters)?);
                let names = names.entries().iter().filter_map(|(k, v)| Some((name(k)?, v.clone())));
                self.namespace(names.collect())
            }
            "raise_exception" => {
                let [message] = given.take(name, ["message"])?;
                let what = self.text_of(&message.unwrap_or(Value::None))?;
                Err(Fault::of(FaultKind::Raised, &what))
            }
            _ => {
                let [format] = given.take(name, ["format"])?;
                let format = text_arg(name, format)?;
                self.strftime(&format)
            }
        }
    }

    fn range(&self, given: Given) -> Outcome<Value> {
        let mut bounds = [0, 0, 1];
        if !given.named.is_empty() {
            return Err(Fault::error("range() takes no names"));
        }
        let numbers = given.list.iter().map(Value::as_int).collect::<Option<Vec<_>>>();
        match numbers.as_deref() {
            Some([stop]) => bounds[1] = *stop,
            Some([start, stop]) => bounds[..2].copy_from_slice(&[*start, *stop]),
            Some([start, stop, step]) if *step != 0 => bounds = [*start, *stop, *step],
            _ => return Err(Fault::error("range() takes one to three whole numbers, the step not 0")),
        }
        let fits = bounds.map(|n| i64::try_from(n).ok());
        let [Some(start), Some(stop), Some(step)] = fits else { return Err(Fault::error("a range is too far off")) };
        let [from, to, by] = bounds;
        let count = if by > 0 { (to - from + by - 1) / by } else { (from - to - by - 1) / -by }.max(0);
        if count > MAX_RANGE {
            return Err(Fault::error(format!("a range of {count} is too large: {MAX_RANGE} is the most")));
        }
        let items = (0..count).map(|i| Value::Int(from + i * by)).collect();
        self.row(Row::Range(start, stop, step), items)
    }

    fn dict(&self, given: Given) -> Outcome<Value> {
        let mut pairs = Vec::new();
        if given.list.len() > 1 {
            return Err(Fault::error("dict() takes one value, and names"));
        }
        match given.list.first() {
            Some(Value::Dict(d)) => pairs.extend(d.entries().iter().cloned()),
            Some(list) => {
                for pair in self.items(list.defined()?)? {
                    let Ok([key, value]) = <[Value; 2]>::try_from(self.items(&pair)?) else {
                        return Err(Fault::error("dict() takes pairs"));
                    };
                    pairs.push((key, value));
                }
            }
            None => {}
        }
        for (name, value) in given.named {
            pairs.push((Value::str(&self.meter, &name)?, value));
        }
        Value::dict(&self.meter, pairs)
    }

    pub(super) fn method(&self, of: &Value, name: &str, given: Given) -> Outcome<Value> {
        match (of, name) {
            (Value::Str(s), _) => self.text_method(s, name, given),
            (Value::Dict(d), "get") => {
                let [key, default] = given.take("get", ["key", "default"])?;
                let key = key.ok_or_else(|| Fault::error("get() takes a key"))?;
                Ok(d.get(&key, &self.meter)?.cloned().or(default).unwrap_or(Value::None))
            }
            (Value::Dict(d), "copy") => self.items(of).and_then(|_| Value::dict(&self.meter, d.entries().to_vec())),
            (Value::Dict(d), _) => {
                let [] = given.take(name, [])?;
                let entries = d.entries().iter();
                match name {
                    "keys" => self.row(Row::Keys, entries.map(|(k, _)| k.clone()).collect()),
                    "values" => self.row(Row::Values, entries.map(|(_, v)| v.clone()).collect()),
                    _ => {
                        let pair = |(k, v): &(Value, Value)| Value::tuple(&self.meter, vec![k.clone(), v.clone()]);
                        self.row(Row::Items, entries.map(pair).collect::<Outcome<_>>()?)
                    }
                }
            }
            (Value::Seq(_), "copy") => self.row(Row::List, self.items(of)?),
            (Value::Seq(s), _) => {
                let [value] = given.take(name, ["value"])?;
                let value = value.ok_or_else(|| Fault::error(format!("{name}() takes a value")))?;
                let mut places = Vec::new();
                for (i, item) in s.items.iter().enumerate() {
                    self.meter.steps(1)?;
                    if equal(&self.meter, item, &value)? {
                        places.push(i);
                    }
                }
                match (name, places.first()) {
                    ("count", _) => Ok(Value::int(places.len())),
                    (_, Some(i)) => Ok(Value::int(*i)),
                    _ => Err(Fault::error(format!("the value is not in the {}", of.kind()))),
                }
            }
            (Value::Loop(l), "cycle") => {
                let chosen = given.list.get(l.index.get() % given.list.len().max(1)).cloned();
                chosen.ok_or_else(|| Fault::error("cycle() takes values"))
            }
            (Value::Loop(l), _) if l.ended.get() => Err(Fault::error(format!("{name}() of a loop that has ended"))),
            (Value::Loop(l), _) => {
                let now = Value::tuple(&self.meter, given.list)?;
                let before = l.changed.replace(Some(now.clone()));
                Ok(Value::Bool(match before {
                    Some(before) => !equal(&self.meter, &before, &now)?,
                    None => true,
                }))
            }
            _ => {
                let [keys, value] = given.take(name, ["keys", "value"])?;
                let keys = self.items(&keys.unwrap_or_else(|| Value::undefined("")))?;
                let value = value.unwrap_or(Value::None);
                Value::dict(&self.meter, keys.into_iter().map(|k| (k, value.clone())).collect())
            }
        }
    }
}

/// An argument that has to be a text.
pub(super) fn text_arg(of: &str, value: Option<Value>) -> Outcome<Str> {
    match value {
        Some(Value::Str(s)) => Ok(s),
        Some(other) => Err(Fault::error(format!("{of}() takes a str, not {}", other.defined()?.kind()))),
        None => Err(Fault::error(format!("{of}() takes a str"))),
    }
}

/// An argument that has to be a whole number, or `default`.
pub(super) fn int_arg(of: &str, value: Option<Value>, default: i128) -> Outcome<i128> {
    match value {
        None => Ok(default),
        Some(value) => match value.as_int() {
            Some(n) => Ok(n),
            None => Err(Fault::error(format!("{of}() takes an int, not {}", value.defined()?.kind()))),
        },
    }
}

/// A width or a count: what is below zero is zero.
pub(super) fn size(n: i128) -> usize {
    usize::try_from(n.max(0)).unwrap_or(usize::MAX)
}
