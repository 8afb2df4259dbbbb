//! JSON into values, and values into JSON as Python's `json.dumps` writes it.

use std::rc::Rc;

use super::eval::{Given, Machine};
use super::meter::{Builder, Meter};
use super::methods::size;
use super::{Fault, Outcome, Row, Value, print};

/// A value of the language.
pub(super) fn value(meter: &Rc<Meter>, json: &serde_json::Value) -> Outcome<Value> {
    match json {
        serde_json::Value::Null => Ok(Value::None),
        serde_json::Value::Bool(b) => Ok(Value::Bool(*b)),
        serde_json::Value::Number(n) => {
            let int = n.as_i64().map(i128::from).or_else(|| n.as_u64().map(i128::from));
            Ok(int.map_or_else(|| Value::Float(n.as_f64().unwrap_or(f64::NAN)), Value::Int))
        }
        serde_json::Value::String(s) => Value::str(meter, s),
        serde_json::Value::Array(list) => {
            Value::list(meter, list.iter().map(|v| value(meter, v)).collect::<Outcome<_>>()?)
        }
        serde_json::Value::Object(map) => {
            let pair = |(k, v): (&String, &serde_json::Value)| Ok((Value::str(meter, k)?, value(meter, v)?));
            Value::dict(meter, map.iter().map(pair).collect::<Outcome<_>>()?)
        }
    }
}

/// How it is laid out.
struct Layout {
    ascii: bool,
    sorted: bool,
    /// A step of indentation; without one everything stands on one line.
    indent: Option<String>,
    between: String,
    behind_key: String,
}

impl Machine {
    /// The filter `tojson`, as `transformers` defines it.
    pub(super) fn tojson(&self, value: &Value, given: Given) -> Outcome<Value> {
        let params = ["ensure_ascii", "indent", "separators", "sort_keys"];
        let [ascii, indent, separators, sorted] = given.take("tojson", params)?;
        let given = |v: Option<Value>| v.filter(|v| !matches!(v, Value::None));
        let indent = match given(indent) {
            None => None,
            Some(Value::Str(s)) => Some(s.to_string()),
            Some(n) => {
                let n = n.as_int().ok_or_else(|| Fault::error("indent takes a number or a text"))?;
                let mut blanks = Builder::new(&self.meter)?;
                blanks.repeat(" ", size(n))?;
                Some(blanks.into_string())
            }
        };
        let (mut between, mut behind_key) = (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned());
        if let Some(pair) = given(separators) {
            let pair = self.items(&pair)?;
            let [Some(a), Some(b)] = [pair.first(), pair.get(1)].map(|v| v.and_then(Value::as_str)) else {
                return Err(Fault::error("separators takes two texts"));
            };
            (between, behind_key) = (a.into(), b.into());
        }
        let truth = |v: Option<Value>| v.is_some_and(|v| v.truth());
        let layout = Layout { ascii: truth(ascii), sorted: truth(sorted), indent, between, behind_key };
        let mut out = Builder::new(&self.meter)?;
        self.dump(value, &layout, 0, &mut out)?;
        Ok(Value::Str(out.finish()))
    }

    fn dump(&self, value: &Value, layout: &Layout, depth: usize, out: &mut Builder) -> Outcome<()> {
        self.meter.steps(1)?;
        let line = |depth: usize, out: &mut Builder| match &layout.indent {
            Some(step) => {
                out.push("\n")?;
                out.repeat(step, depth)
            }
            None => Ok(()),
        };
        match value {
            Value::None => out.push("null"),
            Value::Bool(b) => out.push(if *b { "true" } else { "false" }),
            Value::Int(n) => out.push(&n.to_string()),
            Value::Float(x) => out.push(&float(*x)),
            Value::Str(s) => {
                self.meter.walk(s.len())?;
                quoted(s, layout.ascii, out)
            }
            Value::Seq(s) if matches!(s.row, Row::List | Row::Tuple) => {
                out.push("[")?;
                for (i, item) in s.items.iter().enumerate() {
                    out.push(if i > 0 { &layout.between } else { "" })?;
                    line(depth + 1, out)?;
                    self.dump(item, layout, depth + 1, out)?;
                }
                if !s.items.is_empty() {
                    line(depth, out)?;
                }
                out.push("]")
            }
            Value::Dict(d) => {
                let _room = self.meter.hold(d.entries().len().saturating_mul(2 * size_of::<Value>()))?;
                let mut entries = d.entries().to_vec();
                if layout.sorted {
                    entries = self.sorted(entries, |(k, _)| k.clone(), false)?;
                }
                out.push("{")?;
                for (i, (key, item)) in entries.iter().enumerate() {
                    out.push(if i > 0 { &layout.between } else { "" })?;
                    line(depth + 1, out)?;
                    match key {
                        Value::Str(s) => {
                            self.meter.walk(s.len())?;
                            quoted(s, layout.ascii, out)?;
                        }
                        Value::None => out.push("\"null\"")?,
                        Value::Bool(b) => out.push(if *b { "\"true\"" } else { "\"false\"" })?,
                        Value::Int(n) => out.push(&format!("\"{n}\""))?,
                        Value::Float(x) => out.push(&format!("\"{}\"", float(*x)))?,
                        other => return Err(Fault::error(format!("{} is no key of JSON", other.kind()))),
                    }
                    out.push(&layout.behind_key)?;
                    self.dump(item, layout, depth + 1, out)?;
                }
                if !entries.is_empty() {
                    line(depth, out)?;
                }
                out.push("}")
            }
            other => Err(Fault::error(format!("{} cannot be written as JSON", other.kind()))),
        }
    }
}

fn float(x: f64) -> String {
    match x {
        x if x.is_nan() => "NaN".into(),
        f64::INFINITY => "Infinity".into(),
        f64::NEG_INFINITY => "-Infinity".into(),
        x => print::float(x),
    }
}

fn quoted(text: &str, ascii: bool, out: &mut Builder) -> Outcome<()> {
    out.push("\"")?;
    let mut kept = 0;
    for (at, c) in text.char_indices() {
        let escape = match c {
            '"' => "\\\"".to_owned(),
            '\\' => "\\\\".to_owned(),
            '\n' => "\\n".to_owned(),
            '\r' => "\\r".to_owned(),
            '\t' => "\\t".to_owned(),
            '\u{8}' => "\\b".to_owned(),
            '\u{c}' => "\\f".to_owned(),
            c if c < ' ' || (ascii && !(' '..='~').contains(&c)) => {
                c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect()
            }
            _ => continue,
        };
        out.push(&text[kept..at])?;
        out.push(&escape)?;
        kept = at + c.len_utf8();
    }
    out.push(&text[kept..])?;
    out.push("\"")
}
