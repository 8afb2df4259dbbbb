//! Values as Python prints them: `str` and `repr`.

use super::eval::Machine;
use super::meter::Builder;
use super::{Fault, Outcome, Row, Value};

impl Machine {
    /// As `str`: a text is itself, what is not there is nothing.
    pub fn print(&self, value: &Value, out: &mut Builder) -> Outcome<()> {
        match value {
            Value::Str(s) => out.push(s),
            Value::Undefined(_) => Ok(()),
            other => self.repr(other, out),
        }
    }

    /// As `repr`: texts are quoted.
    pub fn repr(&self, value: &Value, out: &mut Builder) -> Outcome<()> {
        self.meter.steps(1)?;
        match value {
            Value::Undefined(_) => out.push("Undefined"),
            Value::None => out.push("None"),
            Value::Bool(b) => out.push(if *b { "True" } else { "False" }),
            Value::Int(n) => out.push(&n.to_string()),
            Value::Float(x) => out.push(&float(*x)),
            Value::Str(s) => {
                self.meter.walk(s.len())?;
                quoted(s, out)
            }
            Value::Seq(s) => {
                let (open, close) = match s.row {
                    Row::List => ("[", "]"),
                    Row::Tuple => ("(", if s.items.len() == 1 { ",)" } else { ")" }),
                    Row::Keys => ("dict_keys([", "])"),
                    Row::Values => ("dict_values([", "])"),
                    Row::Items => ("dict_items([", "])"),
                    Row::Generator => return Err(Fault::error("a generator has no text; make it a list first")),
                    Row::Range(start, stop, 1) => return out.push(&format!("range({start}, {stop})")),
                    Row::Range(start, stop, step) => return out.push(&format!("range({start}, {stop}, {step})")),
                };
                out.push(open)?;
                for (i, item) in s.items.iter().enumerate() {
                    out.push(if i > 0 { ", " } else { "" })?;
                    self.repr(item, out)?;
                }
                out.push(close)
            }
            Value::Dict(d) => {
                out.push("{")?;
                for (i, (key, item)) in d.entries().iter().enumerate() {
                    out.push(if i > 0 { ", " } else { "" })?;
                    self.repr(key, out)?;
                    out.push(": ")?;
                    self.repr(item, out)?;
                }
                out.push("}")
            }
            // A namespace may hold itself.
            Value::Namespace(_) => out.push("<Namespace>"),
            Value::Macro(m) => out.push(&format!("<Macro '{}'>", m.node.name)),
            Value::Loop(l) => out.push(&format!("<LoopContext {}/{}>", l.index.get() + 1, l.row.items.len())),
            Value::Function(name) => out.push(&format!("<function {name}>")),
            Value::Method(of, name) => out.push(&format!("<built-in method {name} of {} object>", of.kind())),
        }
    }
}

/// A float: the fewest digits that give it back, with an exponent where it is far from one.
pub(super) fn float(x: f64) -> String {
    if x.is_nan() {
        return "nan".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf" } else { "-inf" }.into();
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = x.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

fn quoted(text: &str, out: &mut Builder) -> Outcome<()> {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut bytes = [0; 4];
    out.push(quote.encode_utf8(&mut bytes))?;
    for c in text.chars() {
        match c {
            '\\' => out.push("\\\\")?,
            '\n' => out.push("\\n")?,
            '\r' => out.push("\\r")?,
            '\t' => out.push("\\t")?,
            c if c == quote => {
                out.push("\\")?;
                out.push(c.encode_utf8(&mut bytes))?;
            }
            c if printable(c) => out.push(c.encode_utf8(&mut bytes))?,
            c => out.push(&match c as u32 {
                n @ 0..=0xff => format!("\\x{n:02x}"),
                n @ 0x100..=0xffff => format!("\\u{n:04x}"),
                n => format!("\\U{n:08x}"),
            })?,
        }
    }
    out.push(quote.encode_utf8(&mut bytes))
}

/// Whether Python shows the letter as it is. Rust's own rule for what it shows is the same, but for letters that join
/// those before them.
pub(super) fn printable(c: char) -> bool {
    if c.is_ascii() {
        return !c.is_ascii_control();
    }
    let mut behind = "a".to_owned();
    behind.push(c);
    !behind.escape_debug().any(|e| e == '\\')
}
