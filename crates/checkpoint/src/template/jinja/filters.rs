//! What may stand behind `|`.

use super::eval::{Given, Machine};
use super::meter::Builder;
use super::methods::{int_arg, size};
use super::value::{MAX_TOLD, cut};
use super::{Fault, Outcome, Row, Value, methods};

pub(super) const NAMES: [&str; 45] = [
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "first",
    "float",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "unique",
    "upper",
    "wordcount",
];

pub(super) fn truth(value: &Option<Value>) -> bool {
    value.as_ref().is_some_and(Value::truth)
}

impl Machine {
    /// `value | name(given)`.
    pub(super) fn filter(&self, name: &str, value: Value, given: Given) -> Outcome<Value> {
        match name {
            "tojson" => self.tojson(&value, given),
            "default" | "d" => {
                let [default, falsy] = given.take(name, ["default_value", "boolean"])?;
                let keep = if truth(&falsy) { value.truth() } else { !matches!(value, Value::Undefined(_)) };
                if keep { Ok(value) } else { default.map_or_else(|| self.str(""), Ok) }
            }
            "string" | "safe" => Ok(Value::Str(self.text_of(&value)?)),
            "lower" | "upper" | "capitalize" | "title" | "trim" | "center" | "replace" | "escape" | "e" | "indent"
            | "truncate" | "wordcount" | "format" => self.text_filter(name, &value, given),
            "length" | "count" => Ok(Value::int(match &value {
                Value::Undefined(_) => 0,
                Value::Str(s) => {
                    self.meter.look(s.len())?;
                    s.chars().count()
                }
                Value::Seq(s) if s.row != Row::Generator => s.items.len(),
                Value::Dict(d) => d.entries().len(),
                other => return Err(Fault::error(format!("{} has no length", other.kind()))),
            })),
            "list" => self.row(Row::List, self.items(&value)?),
            "items" => match &value {
                Value::Undefined(_) => self.row(Row::Generator, Vec::new()),
                Value::Dict(_) => self.row(Row::Generator, self.items(&self.method(&value, name, given)?)?),
                other => Err(Fault::error(format!("items takes a dict, not {}", other.kind()))),
            },
            "first" | "last" => {
                let end = match &value {
                    Value::Seq(s) => if name == "first" { s.items.first() } else { s.items.last() }.cloned(),
                    Value::Str(s) => {
                        let letter = if name == "first" { s.chars().next() } else { s.chars().next_back() };
                        letter.map(|c| self.str(c.encode_utf8(&mut [0; 4]))).transpose()?
                    }
                    other => {
                        let items = self.items(other)?;
                        if name == "first" { items.into_iter().next() } else { items.into_iter().next_back() }
                    }
                };
                Ok(end.unwrap_or_else(|| Value::undefined(format!("{name} of nothing"))))
            }
            "reverse" => {
                if let Value::Str(_) = &value {
                    return self.slice(&value, [None, None, Some(-1)]);
                }
                let mut items = self.items(&value)?;
                items.reverse();
                self.row(Row::Generator, items)
            }
            "join" => {
                let [between, attribute] = given.take(name, ["d", "attribute"])?;
                let between = self.text_of(&between.unwrap_or_else(|| Value::undefined("")))?;
                let mut out = Builder::new(&self.meter)?;
                for (i, item) in self.items(&value)?.into_iter().enumerate() {
                    out.push(if i > 0 { &between } else { "" })?;
                    self.print(&self.reached(item, &attribute, &None)?, &mut out)?;
                }
                Ok(Value::Str(out.finish()))
            }
            "map" => self.mapped(&value, given),
            "select" | "reject" | "selectattr" | "rejectattr" => self.selected(name, &value, given),
            "sort" | "min" | "max" | "unique" | "groupby" | "dictsort" => self.ordered(name, &value, given),
            "sum" => {
                let [attribute, start] = given.take(name, ["attribute", "start"])?;
                let mut sum = start.unwrap_or(Value::Int(0));
                for item in self.items(&value)? {
                    sum = self.binary("+", &sum, self.reached(item, &attribute, &None)?.defined()?)?;
                }
                Ok(sum)
            }
            "batch" | "slice" => self.cut(name, &value, given),
            "attr" => {
                let [attribute] = given.take(name, ["name"])?;
                let attribute = methods::text_arg(name, attribute)?;
                match &value {
                    Value::Dict(_) if !methods::has(&value, &attribute) => {
                        Ok(Value::undefined(format!("dict has no attribute '{}'", cut(&attribute, MAX_TOLD))))
                    }
                    _ => self.attribute(&value, &attribute),
                }
            }
            "abs" | "round" | "int" | "float" => self.number_filter(name, &value, given),
            _ => Err(Fault::error(format!("there is no filter named '{}'", cut(name, MAX_TOLD)))),
        }
    }

    fn text_filter(&self, name: &str, value: &Value, given: Given) -> Outcome<Value> {
        let text = self.text_of(value)?;
        self.meter.walk(text.len())?;
        match name {
            "lower" | "upper" | "capitalize" => self.text_method(&text, name, given),
            "trim" => self.text_method(&text, "strip", given),
            "title" => {
                let [] = given.take(name, [])?;
                let room = self.meter.hold(text.len())?;
                let mut out = String::new();
                let mut first = true;
                for c in text.chars() {
                    let cut = c.is_whitespace() || "-({[<".contains(c);
                    if first && !cut {
                        out.extend(c.to_uppercase());
                    } else {
                        out.extend(c.to_lowercase());
                    }
                    first = cut;
                }
                drop(room);
                self.str(&out)
            }
            "center" => {
                let [width] = given.take(name, ["width"])?;
                let list = vec![Value::Int(int_arg(name, width, 80)?)];
                self.text_method(&text, name, Given { list, named: Vec::new() })
            }
            "replace" => {
                let [old, new, count] = given.take(name, ["old", "new", "count"])?;
                let [Some(old), Some(new)] = [old, new] else { return Err(Fault::error("replace takes two texts")) };
                let count = int_arg(name, count.filter(|v| !matches!(v, Value::None)), -1)?;
                self.replaced(&text, &self.text_of(&old)?, &self.text_of(&new)?, count)
            }
            "escape" | "e" => {
                let [] = given.take(name, [])?;
                let mut out = Builder::new(&self.meter)?;
                let mut bytes = [0; 4];
                for c in text.chars() {
                    out.push(match c {
                        '&' => "&amp;",
                        '<' => "&lt;",
                        '>' => "&gt;",
                        '\'' => "&#39;",
                        '"' => "&#34;",
                        c => c.encode_utf8(&mut bytes),
                    })?;
                }
                Ok(Value::Str(out.finish()))
            }
            "indent" => {
                let [width, first, blank] = given.take(name, ["width", "first", "blank"])?;
                let step = match width {
                    Some(Value::Str(s)) => s,
                    other => {
                        let mut step = Builder::new(&self.meter)?;
                        step.repeat(" ", size(int_arg(name, other, 4)?))?;
                        step.finish()
                    }
                };
                let mut out = Builder::new(&self.meter)?;
                // A line's end at the end begins no line of its own.
                let mut whole = Builder::new(&self.meter)?;
                whole.push(&text)?;
                whole.push("\n")?;
                let (lines, room) = self.lines(whole.as_str(), false)?;
                for (i, line) in lines.into_iter().enumerate() {
                    out.push(if i > 0 { "\n" } else { "" })?;
                    let indented = if i == 0 { truth(&first) } else { truth(&blank) || !line.is_empty() };
                    out.push(if indented { &step } else { "" })?;
                    out.push(line)?;
                }
                drop(room);
                Ok(Value::Str(out.finish()))
            }
            "truncate" => {
                let [length, kill, end, leeway] = given.take(name, ["length", "killwords", "end", "leeway"])?;
                let end = self.text_of(&end.unwrap_or(self.str("...")?))?;
                let leeway = leeway.filter(|v| !matches!(v, Value::None));
                let (length, leeway) = (size(int_arg(name, length, 255)?), size(int_arg(name, leeway, 5)?));
                let kept = length.checked_sub(end.chars().count());
                let kept = kept.ok_or_else(|| Fault::error("truncate leaves no room for its end"))?;
                if text.chars().count() <= length.saturating_add(leeway) {
                    return Ok(Value::Str(text));
                }
                let mut head = text.char_indices().nth(kept).map_or(&*text, |(i, _)| &text[..i]);
                if !truth(&kill) {
                    head = head.rsplit_once(' ').map_or(head, |(before, _)| before);
                }
                let mut out = Builder::new(&self.meter)?;
                out.push(head)?;
                out.push(&end)?;
                Ok(Value::Str(out.finish()))
            }
            "wordcount" => {
                let words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
                Ok(Value::int(words.filter(|w| !w.is_empty()).count()))
            }
            _ => {
                let named = given.named.into_iter();
                let pairs = named.map(|(n, v)| Ok((self.str(&n)?, v))).collect::<Outcome<Vec<_>>>()?;
                let values = match pairs.is_empty() {
                    true => Value::tuple(&self.meter, given.list)?,
                    false => Value::dict(&self.meter, pairs)?,
                };
                self.percent(&text, &values)
            }
        }
    }

    fn number_filter(&self, name: &str, value: &Value, given: Given) -> Outcome<Value> {
        self.meter.walk(value.as_str().map_or(0, str::len))?;
        let read = |text: &str| text.trim().replace('_', "").parse::<f64>().ok();
        match name {
            "abs" => {
                let [] = given.take(name, [])?;
                match (value.defined()?.as_int(), value) {
                    (Some(n), _) if n != i128::MIN => Ok(Value::Int(n.abs())),
                    (_, Value::Float(x)) => Ok(Value::Float(x.abs())),
                    _ => Err(Fault::error(format!("abs takes a number, not {}", value.kind()))),
                }
            }
            "float" => {
                let [default] = given.take(name, ["default"])?;
                let x = value.as_float().or_else(|| read(value.as_str()?));
                Ok(x.map(Value::Float).or(default).unwrap_or(Value::Float(0.0)))
            }
            "int" => {
                let [default, base] = given.take(name, ["default", "base"])?;
                let base = u32::try_from(int_arg(name, base, 10)?).ok().filter(|b| (2..=36).contains(b));
                let base = base.ok_or_else(|| Fault::error("int takes a base from 2 to 36"))?;
                let whole = |x: f64| (x.is_finite() && x.abs() < 1e38).then(|| x.trunc() as i128);
                let digits = |text: &str| {
                    let text = text.trim().replace('_', "");
                    let (sign, digits) = text.strip_prefix('-').map_or((1, &*text), |t| (-1, t));
                    let prefix = match base {
                        16 => "0x",
                        8 => "0o",
                        2 => "0b",
                        _ => "",
                    };
                    let digits = digits.strip_prefix(prefix).unwrap_or(digits);
                    // One sign, and none behind a prefix; the parser would take another.
                    if digits.starts_with(['-', '+']) && (sign < 0 || !text.starts_with('+')) {
                        return None;
                    }
                    i128::from_str_radix(digits, base).ok().map(|n| sign * n)
                };
                let n = match value {
                    Value::Str(s) => digits(s).or_else(|| whole(read(s)?)),
                    Value::Float(x) => whole(*x),
                    other => other.as_int(),
                };
                Ok(n.map(Value::Int).or(default).unwrap_or(Value::Int(0)))
            }
            _ => {
                let [precision, method] = given.take(name, ["precision", "method"])?;
                let places = int_arg(name, precision, 0)?.clamp(-300, 300) as i32;
                let method = self.text_of(&method.unwrap_or(self.str("common")?))?;
                let scale = 10_f64.powi(places);
                match (&*method, value.defined()?.as_int(), value.as_float()) {
                    ("common", Some(_), _) if places >= 0 => Ok(as_whole(value)),
                    ("common", _, Some(x)) if places >= 0 => {
                        let text = format!("{x:.*}", places.unsigned_abs() as usize);
                        Ok(Value::Float(text.parse().unwrap_or(x)))
                    }
                    ("common", int, Some(x)) => {
                        let rounded = (x * scale).round_ties_even() / scale;
                        Ok(if int.is_some() { Value::Int(rounded as i128) } else { Value::Float(rounded) })
                    }
                    ("ceil", _, Some(x)) => Ok(Value::Float((x * scale).ceil() / scale)),
                    ("floor", _, Some(x)) => Ok(Value::Float((x * scale).floor() / scale)),
                    (_, _, None) => Err(Fault::error(format!("round takes a number, not {}", value.kind()))),
                    _ => Err(Fault::error("round takes common, ceil or floor")),
                }
            }
        }
    }

    /// What an attribute's path, `a.0.b`, leads to; the value itself where there is no path. What is missing on the way
    /// is `default`, if given.
    pub(super) fn reached(&self, mut value: Value, path: &Option<Value>, default: &Option<Value>) -> Outcome<Value> {
        let parts = match path {
            None | Some(Value::None) => return Ok(value),
            Some(Value::Str(path)) => path.split('.').map(|part| self.str(part)).collect::<Outcome<_>>()?,
            Some(index) => vec![index.clone()],
        };
        for part in parts {
            let number = part.as_str().filter(|p| p.bytes().all(|b| b.is_ascii_digit())).and_then(|p| p.parse().ok());
            value = self.item(&value, &number.map_or(part, Value::Int))?;
            if let (Value::Undefined(_), Some(default)) = (&value, default) {
                value = default.clone();
            }
        }
        Ok(value)
    }

    fn mapped(&self, value: &Value, mut given: Given) -> Outcome<Value> {
        let by_name = given.list.is_empty() && given.named.iter().any(|(n, _)| &**n == "attribute");
        let mut out = Vec::new();
        // In Jinja whatever is false has no items here, None and zero, too.
        let items = if value.truth() { self.items(value)? } else { Vec::new() };
        if by_name {
            let [attribute, default] = given.take("map", ["attribute", "default"])?;
            for item in items {
                out.push(self.reached(item, &attribute, &default)?);
            }
        } else {
            let name = given.list.first().and_then(Value::as_str).map(str::to_owned);
            let name = name.ok_or_else(|| Fault::error("map takes a filter or an attribute"))?;
            given.list.remove(0);
            for item in items {
                // What is copied is paid for, and a filter that calls `map` again nests.
                self.meter.steps(1 + given.list.len() + given.named.len())?;
                let given = Given { list: given.list.clone(), named: given.named.clone() };
                out.push(self.deeper(|| self.filter(&name, item, given))?);
            }
        }
        self.row(Row::Generator, out)
    }

    fn selected(&self, name: &str, value: &Value, mut given: Given) -> Outcome<Value> {
        let mut attribute = None;
        if name.ends_with("attr") {
            if given.list.is_empty() {
                return Err(Fault::error(format!("{name} takes an attribute")));
            }
            attribute = Some(given.list.remove(0));
        }
        let test = given.list.first().map(|t| t.as_str().map(str::to_owned));
        if test.is_some() {
            given.list.remove(0);
        }
        let wanted = name.starts_with("select");
        let mut out = Vec::new();
        let items = if value.truth() { self.items(value)? } else { Vec::new() };
        for item in items {
            self.meter.steps(1 + given.list.len() + given.named.len())?;
            let found = self.reached(item.clone(), &attribute, &None)?;
            let holds = match &test {
                None => found.truth(),
                Some(Some(test)) => {
                    self.test(test, &found, Given { list: given.list.clone(), named: given.named.clone() })?
                }
                Some(None) => return Err(Fault::error(format!("{name} takes the name of a test"))),
            };
            if holds == wanted {
                out.push(item);
            }
        }
        self.row(Row::Generator, out)
    }

    /// Rows or columns of a list.
    fn cut(&self, name: &str, value: &Value, given: Given) -> Outcome<Value> {
        let [count, fill] = given.take(name, ["count", "fill_with"])?;
        let count = size(int_arg(name, count, 0)?);
        let fill = fill.filter(|v| !matches!(v, Value::None));
        let items = self.items(value)?;
        if count == 0 {
            return Err(Fault::error(format!("{name} takes a number above zero")));
        }
        drop(self.meter.hold(count.saturating_mul(64))?);
        let mut out = Vec::new();
        if name == "batch" {
            for part in items.chunks(count) {
                let mut part = part.to_vec();
                if let Some(fill) = &fill {
                    part.resize(count, fill.clone());
                }
                out.push(self.row(Row::List, part)?);
            }
        } else {
            let (each, longer) = (items.len() / count, items.len() % count);
            let mut rest = items.into_iter();
            for i in 0..count {
                let mut part: Vec<Value> = rest.by_ref().take(each + usize::from(i < longer)).collect();
                if i >= longer && longer > 0 {
                    part.extend(fill.clone());
                }
                out.push(self.row(Row::List, part)?);
            }
        }
        self.row(Row::Generator, out)
    }
}

/// A whole number as it is; a truth value as 0 or 1.
fn as_whole(value: &Value) -> Value {
    value.as_int().map_or_else(|| value.clone(), Value::Int)
}
