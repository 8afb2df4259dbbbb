//! Operators, attributes, items and slices.

use std::cmp::Ordering;

use super::eval::Machine;
use super::meter::Builder;
use super::same::equal;
use super::value::{MAX_TOLD, cut};
use super::{Fault, Outcome, Row, Value, methods};

fn unsupported<T>(op: &str, a: &Value, b: &Value) -> Outcome<T> {
    Err(Fault::error(format!("{op} is not for {} and {}", a.kind(), b.kind())))
}

fn whole(n: Option<i128>) -> Outcome<Value> {
    n.map(Value::Int).ok_or_else(|| Fault::error("a number is too large"))
}

pub(super) fn negative(value: &Value) -> Outcome<Value> {
    match (value.as_int(), value) {
        (Some(n), _) => whole(n.checked_neg()),
        (None, Value::Float(x)) => Ok(Value::Float(-x)),
        _ => Err(Fault::error(format!("- is not for {}", value.kind()))),
    }
}

pub(super) fn positive(value: &Value) -> Outcome<Value> {
    match (value.as_int(), value) {
        (Some(n), _) => Ok(Value::Int(n)),
        (None, Value::Float(_)) => Ok(value.clone()),
        _ => Err(Fault::error(format!("+ is not for {}", value.kind()))),
    }
}

/// `//` and `%` of whole numbers: the remainder has the divisor's sign.
fn floor_division(a: i128, b: i128) -> Option<(i128, i128)> {
    let (q, r) = (a.checked_div(b)?, a.checked_rem(b)?);
    if r != 0 && (r < 0) != (b < 0) { Some((q - 1, r + b)) } else { Some((q, r)) }
}

/// The larger and smaller of two values of one kind; `None` for kinds without an order.
pub(super) fn order(machine: &Machine, a: &Value, b: &Value) -> Outcome<Option<Ordering>> {
    machine.meter.steps(1)?;
    if let (Some(a), Some(b)) = (a.as_int(), b.as_int()) {
        return Ok(Some(a.cmp(&b)));
    }
    if let (Some(a), Some(b)) = (a.as_float(), b.as_float()) {
        // What is no number is neither larger nor smaller.
        return Ok(Some(a.partial_cmp(&b).unwrap_or(Ordering::Equal)));
    }
    match (a, b) {
        (Value::Str(a), Value::Str(b)) => {
            machine.meter.look(a.len().min(b.len()))?;
            Ok(Some(a.cmp(b)))
        }
        (Value::Seq(a), Value::Seq(b)) if a.row == b.row && matches!(a.row, Row::List | Row::Tuple) => {
            for (x, y) in a.items.iter().zip(&b.items) {
                if !equal(&machine.meter, x, y)? {
                    return order(machine, x, y);
                }
            }
            Ok(Some(a.items.len().cmp(&b.items.len())))
        }
        _ => Ok(None),
    }
}

impl Machine {
    pub(super) fn binary(&self, op: &str, a: &Value, b: &Value) -> Outcome<Value> {
        match (op, a, b) {
            ("%", Value::Str(format), values) => return self.percent(format, values),
            ("+", Value::Str(a), Value::Str(b)) => {
                let mut out = Builder::new(&self.meter)?;
                out.push(a)?;
                out.push(b)?;
                return Ok(Value::Str(out.finish()));
            }
            ("+", Value::Seq(x), Value::Seq(y)) if x.row == y.row && matches!(x.row, Row::List | Row::Tuple) => {
                let mut items = self.items(a)?;
                items.extend(self.items(b)?);
                return self.row(x.row, items);
            }
            ("*", Value::Str(_) | Value::Seq(_), n) if n.as_int().is_some() => return self.repeated(a, n),
            ("*", n, Value::Str(_) | Value::Seq(_)) if n.as_int().is_some() => return self.repeated(b, n),
            _ => {}
        }
        if let (Some(a), Some(b)) = (a.as_int(), b.as_int()) {
            let zero = || Fault::error("division by zero");
            return match op {
                "+" => whole(a.checked_add(b)),
                "-" => whole(a.checked_sub(b)),
                "*" => whole(a.checked_mul(b)),
                "/" if b == 0 => Err(zero()),
                "/" => Ok(Value::Float(a as f64 / b as f64)),
                "//" | "%" if b == 0 => Err(zero()),
                "//" => whole(floor_division(a, b).map(|d| d.0)),
                "%" => whole(floor_division(a, b).map(|d| d.1)),
                _ if b < 0 && a == 0 => Err(zero()),
                _ if b < 0 => Ok(Value::Float((a as f64).powf(b as f64))),
                _ => whole(u32::try_from(b).ok().and_then(|b| a.checked_pow(b))),
            };
        }
        let (Some(x), Some(y)) = (a.as_float(), b.as_float()) else { return unsupported(op, a, b) };
        if matches!(op, "/" | "//" | "%") && y == 0.0 {
            return Err(Fault::error("division by zero"));
        }
        let remainder = || {
            let r = x % y;
            if r != 0.0 && (r < 0.0) != (y < 0.0) { r + y } else { r }
        };
        Ok(Value::Float(match op {
            "+" => x + y,
            "-" => x - y,
            "*" => x * y,
            "/" => x / y,
            "//" => ((x - remainder()) / y).round(),
            "%" => remainder(),
            _ => x.powf(y),
        }))
    }

    fn repeated(&self, value: &Value, times: &Value) -> Outcome<Value> {
        let times = usize::try_from(times.as_int().unwrap_or(0).max(0)).unwrap_or(usize::MAX);
        match value {
            Value::Str(s) => {
                let mut out = Builder::new(&self.meter)?;
                out.repeat(s, times)?;
                Ok(Value::Str(out.finish()))
            }
            Value::Seq(s) if matches!(s.row, Row::List | Row::Tuple) => {
                let room = self.meter.hold(s.items.len().saturating_mul(size_of::<Value>()).saturating_mul(times))?;
                let items = s.items.iter().cycle().take(s.items.len() * times).cloned().collect();
                drop(room);
                self.row(s.row, items)
            }
            other => Err(Fault::error(format!("* is not for {}", other.kind()))),
        }
    }

    pub(super) fn compare(&self, op: &str, a: &Value, b: &Value) -> Outcome<bool> {
        match op {
            "==" => return equal(&self.meter, a, b),
            "!=" => return Ok(!equal(&self.meter, a, b)?),
            "in" => return self.contains(b, a),
            "not in" => return Ok(!self.contains(b, a)?),
            _ => {}
        }
        let nan = |v: &Value| matches!(v, Value::Float(x) if x.is_nan());
        let Some(order) = order(self, a.defined()?, b.defined()?)? else { return unsupported(op, a, b) };
        Ok(!nan(a)
            && !nan(b)
            && match op {
                "<" => order.is_lt(),
                "<=" => order.is_le(),
                ">" => order.is_gt(),
                _ => order.is_ge(),
            })
    }

    pub(super) fn contains(&self, container: &Value, value: &Value) -> Outcome<bool> {
        match (container, value) {
            (Value::Str(s), Value::Str(part)) => {
                self.meter.look(s.len())?;
                Ok(s.contains(&**part))
            }
            (Value::Seq(s), value) => {
                for item in &s.items {
                    self.meter.steps(1)?;
                    if equal(&self.meter, item, value)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            (Value::Dict(d), key) => Ok(d.get(key, &self.meter)?.is_some()),
            (Value::Undefined(_), _) => Ok(false),
            (container, value) => unsupported("in", value, container),
        }
    }

    /// `value.name`: what Python has under the name, and else the item.
    pub(super) fn attribute(&self, value: &Value, name: &str) -> Outcome<Value> {
        value.defined()?;
        self.meter.look(name.len())?;
        let told = cut(name, MAX_TOLD);
        let missing = || Value::undefined(format!("{} has no attribute '{told}'", value.kind()));
        if methods::unsafe_name(value, name) {
            return Ok(Value::undefined(format!("{told} of {} is not for templates", value.kind())));
        }
        if methods::has(value, name) {
            return Ok(Value::Method(value.clone().into(), name.into()));
        }
        Ok(match value {
            Value::Dict(d) => d.get_str(name).cloned().unwrap_or_else(missing),
            Value::Namespace(n) => {
                let found = n.borrow().get(name).cloned();
                found.unwrap_or_else(missing)
            }
            Value::Loop(l) => {
                let (i, len) = (l.index.get(), l.row.items.len());
                let at = |i: Option<usize>, what: &str| {
                    let item = i.and_then(|i| l.row.items.get(i)).cloned();
                    item.unwrap_or_else(|| Value::undefined(format!("there is no {what} item")))
                };
                match name {
                    "index" => Value::int(i + 1),
                    "index0" => Value::int(i),
                    "revindex" => Value::int(len - i),
                    "revindex0" => Value::int(len - i - 1),
                    "first" => Value::Bool(i == 0),
                    "last" => Value::Bool(i + 1 == len),
                    "length" => Value::int(len),
                    "depth" => Value::int(l.level + 1),
                    "depth0" => Value::int(l.level),
                    "previtem" => at(i.checked_sub(1), "previous"),
                    "nextitem" => at(Some(i + 1), "next"),
                    _ => missing(),
                }
            }
            Value::Macro(m) if name == "name" => Value::str(&self.meter, &m.node.name)?,
            _ => missing(),
        })
    }

    /// `value[index]`: the item, and else, for a text, the attribute.
    pub(super) fn item(&self, value: &Value, index: &Value) -> Outcome<Value> {
        let missing = || match index.as_str() {
            Some(name) => self.attribute(value, name),
            None => Ok(Value::undefined(format!("{} has no such item", value.kind()))),
        };
        let place = |len: usize| {
            let n = index.as_int()?;
            usize::try_from(if n < 0 { n.checked_add(len as i128)? } else { n }).ok()
        };
        match value.defined()? {
            Value::Dict(d) => match d.get(index, &self.meter) {
                Ok(Some(found)) => Ok(found.clone()),
                _ => missing(),
            },
            Value::Seq(s) if matches!(s.row, Row::List | Row::Tuple | Row::Range(..)) => {
                place(s.items.len()).and_then(|i| s.items.get(i)).cloned().map_or_else(missing, Ok)
            }
            Value::Str(s) if index.as_int().is_some() => {
                self.meter.look(s.len())?;
                let letter = place(s.chars().count()).and_then(|i| s.chars().nth(i));
                match letter {
                    Some(c) => Value::str(&self.meter, c.encode_utf8(&mut [0; 4])),
                    None => missing(),
                }
            }
            _ => missing(),
        }
    }

    /// `value[start:stop:step]`.
    pub(super) fn slice(&self, value: &Value, [start, stop, step]: [Option<i128>; 3]) -> Outcome<Value> {
        let step = step.unwrap_or(1);
        if step == 0 {
            return Err(Fault::error("a slice's step is zero"));
        }
        // The places from the first to before the last, `step` apart.
        let places = |len: usize| {
            let len = len as i128;
            let (least, most) = if step > 0 { (0, len) } else { (-1, len - 1) };
            let bound = |n: i128| if n < 0 { n.saturating_add(len) } else { n }.clamp(least, most);
            let (from, to) = if step > 0 { (least, most) } else { (most, least) };
            let (first, to) = (start.map_or(from, bound), stop.map_or(to, bound));
            let open = move |at: &i128| if step > 0 { *at < to } else { *at > to };
            std::iter::successors(Some(first), move |at| at.checked_add(step)).take_while(open).map(|at| at as usize)
        };
        match value.defined()? {
            Value::Str(s) => {
                self.meter.look(s.len().saturating_mul(16))?;
                let mut out = Builder::new(&self.meter)?;
                if step == 1 {
                    let len = s.chars().count();
                    let count = places(len).count();
                    let byte = |n: usize| s.char_indices().nth(n).map_or(s.len(), |(i, _)| i);
                    let first = places(len).next().unwrap_or(0);
                    out.push(&s[byte(first)..byte(first + count)])?;
                } else {
                    let room = self.meter.hold(s.len().saturating_mul(size_of::<char>()))?;
                    let letters: Vec<char> = s.chars().collect();
                    for i in places(letters.len()) {
                        out.push(letters[i].encode_utf8(&mut [0; 4]))?;
                    }
                    drop((room, letters));
                }
                Ok(Value::Str(out.finish()))
            }
            Value::Seq(s) if matches!(s.row, Row::List | Row::Tuple | Row::Range(..)) => {
                let row = if s.row == Row::Tuple { Row::Tuple } else { Row::List };
                self.row(row, places(s.items.len()).map(|i| s.items[i].clone()).collect())
            }
            other => Err(Fault::error(format!("{} has no slices", other.kind()))),
        }
    }
}
