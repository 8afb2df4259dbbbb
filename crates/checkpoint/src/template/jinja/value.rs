//! Values as Python has them: what a program computes with.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Deref;
use std::rc::Rc;
use std::sync::Arc;

use super::eval::{Loop, Scope};
use super::meter::{Held, Meter};
use super::same::equal;
use super::tree::MacroNode;
use super::{Fault, Outcome};

/// Containers within containers: values are walked and dropped by recursion.
pub(super) const MAX_DEPTH: usize = 200;

/// A text, shared.
#[derive(Clone)]
pub(super) struct Str(Rc<(Box<str>, Held)>);

impl Str {
    /// Bytes that a text takes beside its letters.
    pub const OWN_BYTES: usize = 64;

    pub fn new(meter: &Rc<Meter>, text: &str) -> Outcome<Str> {
        Ok(Str::held(text.into(), meter.hold(text.len() + Str::OWN_BYTES)?))
    }

    pub fn held(text: String, held: Held) -> Str {
        Str(Rc::new((text.into_boxed_str(), held)))
    }
}

impl Deref for Str {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0.0
    }
}

/// What a row of values is called in Python.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Row {
    List,
    Tuple,
    /// What filters such as `map` give: it can be walked, not measured, indexed or printed.
    Generator,
    Range(i64, i64, i64),
    Keys,
    Values,
    Items,
}

pub(super) struct Seq {
    pub row: Row,
    pub items: Vec<Value>,
    depth: usize,
    _held: Held,
}

impl Seq {
    pub fn new(meter: &Rc<Meter>, row: Row, items: Vec<Value>) -> Outcome<Seq> {
        let depth = 1 + items.iter().map(Value::depth).max().unwrap_or(0);
        check_depth(depth)?;
        let told: usize = items.iter().map(Value::told).sum();
        let held = meter.hold(64 + told + items.len().saturating_mul(size_of::<Value>()))?;
        Ok(Seq { row, items, depth, _held: held })
    }
}

/// Keys and values in their order.
pub(super) struct Dict {
    entries: Vec<(Value, Value)>,
    /// Where a text key is, once there are many.
    places: HashMap<Box<str>, usize>,
    depth: usize,
    _held: Held,
}

/// Entries that are searched one by one.
const FEW: usize = 8;

impl Dict {
    pub fn entries(&self) -> &[(Value, Value)] {
        &self.entries
    }

    pub fn get_str(&self, key: &str) -> Option<&Value> {
        if self.places.is_empty() {
            return self.entries.iter().find(|(k, _)| matches!(k, Value::Str(s) if &**s == key)).map(|e| &e.1);
        }
        self.places.get(key).map(|&i| &self.entries[i].1)
    }

    /// The value of a key; a list or a dict is none.
    pub fn get(&self, key: &Value, meter: &Meter) -> Outcome<Option<&Value>> {
        if let Value::Str(s) = key {
            meter.look(s.len().saturating_mul(FEW))?;
            return Ok(self.get_str(s));
        }
        key.hashable(meter)?;
        Ok(place(&self.entries, key, meter)?.map(|i| &self.entries[i].1))
    }
}

/// Where a key is, searched one by one.
fn place(entries: &[(Value, Value)], key: &Value, meter: &Meter) -> Outcome<Option<usize>> {
    for (i, (known, _)) in entries.iter().enumerate() {
        if equal(meter, known, key)? {
            return Ok(Some(i));
        }
    }
    Ok(None)
}

pub(super) struct MacroValue {
    pub node: Arc<MacroNode>,
    pub scope: Rc<Scope>,
}

pub(super) type Namespace = RefCell<HashMap<Arc<str>, Value>>;

/// A value.
#[derive(Clone)]
pub(super) enum Value {
    /// Nothing under that name; the text says what was looked for.
    Undefined(Rc<str>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Str),
    Seq(Rc<Seq>),
    Dict(Rc<Dict>),
    Namespace(Rc<Namespace>),
    Macro(Rc<MacroValue>),
    Loop(Rc<Loop>),
    /// A function of the language.
    Function(&'static str),
    /// A method with its object.
    Method(Rc<Value>, Arc<str>),
}

impl Value {
    pub fn undefined(what: impl AsRef<str>) -> Value {
        Value::Undefined(cut(what.as_ref(), MAX_TOLD).into())
    }

    /// Bytes of what is said of something missing: a list of many such holds them.
    fn told(&self) -> usize {
        match self {
            Value::Undefined(what) => what.len(),
            _ => 0,
        }
    }

    pub fn str(meter: &Rc<Meter>, text: &str) -> Outcome<Value> {
        Ok(Value::Str(Str::new(meter, text)?))
    }

    pub fn seq(meter: &Rc<Meter>, row: Row, items: Vec<Value>) -> Outcome<Value> {
        Ok(Value::Seq(Rc::new(Seq::new(meter, row, items)?)))
    }

    pub fn list(meter: &Rc<Meter>, items: Vec<Value>) -> Outcome<Value> {
        Value::seq(meter, Row::List, items)
    }

    pub fn tuple(meter: &Rc<Meter>, items: Vec<Value>) -> Outcome<Value> {
        Value::seq(meter, Row::Tuple, items)
    }

    /// A dict of the pairs; a later value of the same key takes the earlier one's place.
    pub fn dict(meter: &Rc<Meter>, pairs: Vec<(Value, Value)>) -> Outcome<Value> {
        let depth = 1 + pairs.iter().map(|(k, v)| k.depth().max(v.depth())).max().unwrap_or(0);
        let told: usize = pairs.iter().map(|(_, v)| v.told()).sum();
        let mut bytes = 64 + told + pairs.len().saturating_mul(3 * size_of::<Value>());
        check_depth(depth)?;
        let many = pairs.len() > FEW;
        let mut entries: Vec<(Value, Value)> = Vec::with_capacity(pairs.len());
        let mut places = HashMap::new();
        for (key, value) in pairs {
            key.hashable(meter)?;
            let known = match &key {
                Value::Str(s) if many => {
                    meter.look(s.len())?;
                    places.get(&**s).copied()
                }
                key => place(&entries, key, meter)?,
            };
            match (known, &key) {
                (Some(i), _) => entries[i].1 = value,
                (None, Value::Str(s)) if many => {
                    bytes += s.len() + Str::OWN_BYTES;
                    places.insert(Box::from(&**s), entries.len());
                    entries.push((key, value));
                }
                (None, _) => entries.push((key, value)),
            }
        }
        let held = meter.hold(bytes)?;
        Ok(Value::Dict(Rc::new(Dict { entries, places, depth, _held: held })))
    }

    /// A number of things, or their place.
    pub fn int(n: usize) -> Value {
        Value::Int(n as i128)
    }

    /// Containers from here to the innermost.
    pub fn depth(&self) -> usize {
        match self {
            Value::Seq(s) => s.depth,
            Value::Dict(d) => d.depth,
            // A loop holds what it walks over, which may be loops.
            Value::Loop(l) => l.row.depth + 1,
            Value::Method(of, _) => of.depth(),
            _ => 0,
        }
    }

    fn hashable(&self, meter: &Meter) -> Outcome<()> {
        meter.steps(1)?;
        match self {
            Value::Dict(_) => Err(Fault::error("a dict cannot be a key")),
            Value::Seq(s) if s.row == Row::Tuple => s.items.iter().try_for_each(|v| v.hashable(meter)),
            Value::Seq(s) if s.row == Row::List => Err(Fault::error("a list cannot be a key")),
            _ => Ok(()),
        }
    }

    /// Whether it holds in a condition.
    pub fn truth(&self) -> bool {
        match self {
            Value::Undefined(_) | Value::None => false,
            Value::Bool(b) => *b,
            Value::Int(n) => *n != 0,
            Value::Float(x) => *x != 0.0,
            Value::Str(s) => !s.is_empty(),
            Value::Seq(s) => s.row == Row::Generator || !s.items.is_empty(),
            Value::Dict(d) => !d.entries.is_empty(),
            _ => true,
        }
    }

    /// The name of its type, as errors say it.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Undefined(_) => "undefined",
            Value::None => "None",
            Value::Bool(_) => "bool",
            Value::Int(_) => "int",
            Value::Float(_) => "float",
            Value::Str(_) => "str",
            Value::Seq(s) => match s.row {
                Row::List => "list",
                Row::Tuple => "tuple",
                Row::Generator => "generator",
                Row::Range(..) => "range",
                Row::Keys => "dict_keys",
                Row::Values => "dict_values",
                Row::Items => "dict_items",
            },
            Value::Dict(_) => "dict",
            Value::Namespace(_) => "namespace",
            Value::Macro(_) => "macro",
            Value::Loop(_) => "loop",
            Value::Function(_) => "function",
            Value::Method(..) => "method",
        }
    }

    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::Str(s) => Some(s),
            _ => None,
        }
    }

    /// A whole number; truth values count as 0 and 1.
    pub fn as_int(&self) -> Option<i128> {
        match self {
            Value::Int(n) => Some(*n),
            Value::Bool(b) => Some(i128::from(*b)),
            _ => None,
        }
    }

    pub fn as_float(&self) -> Option<f64> {
        match self {
            Value::Float(x) => Some(*x),
            other => other.as_int().map(|n| n as f64),
        }
    }

    /// Fails for what is not there, as every use but printing and asking does.
    pub fn defined(&self) -> Outcome<&Value> {
        match self {
            Value::Undefined(what) => Err(Fault::error(what.to_string())),
            value => Ok(value),
        }
    }
}

/// Bytes of a name, or of what is said of something missing, that are kept.
pub(super) const MAX_TOLD: usize = 200;

/// The start of a text, in whole letters: what a program makes up may be of any length.
pub(super) fn cut(text: &str, most: usize) -> &str {
    let end = (0..=most.min(text.len())).rev().find(|&at| text.is_char_boundary(at));
    &text[..end.unwrap_or(0)]
}

fn check_depth(depth: usize) -> Outcome<()> {
    if depth > MAX_DEPTH {
        return Err(Fault::error(format!("it nests values more than {MAX_DEPTH} deep")));
    }
    Ok(())
}
