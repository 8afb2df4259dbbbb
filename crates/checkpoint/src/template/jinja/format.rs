//! `"..." % values` and `"...".format(...)`.

use super::eval::{Given, Machine};
use super::meter::Builder;
use super::{Fault, Outcome, Row, Value, print};

/// Digits behind the point.
const MAX_PRECISION: usize = 1000;

/// How a value is laid out.
#[derive(Default)]
struct Spec {
    fill: Option<char>,
    /// `<`, `>`, `^`, or `=`: between sign and digits.
    align: Option<char>,
    sign: Option<char>,
    alternate: bool,
    group: Option<char>,
    width: usize,
    precision: Option<usize>,
    kind: Option<char>,
}

fn bad<T>(what: impl Into<String>) -> Outcome<T> {
    Err(Fault::error(what))
}

/// A number at the start, and what follows it.
fn count(text: &str) -> Outcome<(Option<usize>, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    if end == 0 {
        return Ok((None, text));
    }
    match text[..end].parse() {
        Ok(n) => Ok((Some(n), &text[end..])),
        Err(_) => bad("a width is too large"),
    }
}

impl Spec {
    /// From what stands behind the colon.
    fn parse(text: &str) -> Outcome<Spec> {
        let mut spec = Spec::default();
        let mut letters = text.chars();
        let (first, second) = (letters.next(), letters.next());
        let side = |c: Option<char>| c.filter(|c| "<>^=".contains(*c));
        let mut rest = text;
        if let (Some(fill), Some(align)) = (first, side(second)) {
            (spec.fill, spec.align) = (Some(fill), Some(align));
            rest = letters.as_str();
        } else if let Some(align) = side(first) {
            spec.align = Some(align);
            rest = &text[1..];
        }
        let mut take = |set: &str| {
            let c = rest.chars().next().filter(|c| set.contains(*c))?;
            rest = &rest[1..];
            Some(c)
        };
        spec.sign = take("+- ");
        take("z");
        spec.alternate = take("#").is_some();
        if take("0").is_some() {
            spec.fill.get_or_insert('0');
            spec.align.get_or_insert('=');
        }
        let (width, rest) = count(rest)?;
        spec.width = width.unwrap_or(0);
        let mut rest = rest;
        if let Some(group) = rest.chars().next().filter(|c| ",_".contains(*c)) {
            spec.group = Some(group);
            rest = &rest[1..];
        }
        if let Some(digits) = rest.strip_prefix('.') {
            let (precision, after) = count(digits)?;
            spec.precision = Some(precision.ok_or_else(|| Fault::error("a format lacks its precision"))?);
            rest = after;
        }
        let mut kinds = rest.chars();
        spec.kind = kinds.next();
        if kinds.next().is_some() {
            return bad(format!("'{text}' is no format"));
        }
        Ok(spec)
    }

    /// Writes a sign or prefix and a body, filled up to the width.
    fn put(&self, head: &str, body: &str, align: char, out: &mut Builder) -> Outcome<()> {
        let missing = self.width.saturating_sub(head.chars().count() + body.chars().count());
        let fill = self.fill.unwrap_or(' ').to_string();
        let align = self.align.unwrap_or(align);
        let left = match align {
            '<' => 0,
            '^' => missing / 2,
            _ => missing,
        };
        if align == '=' {
            out.push(head)?;
            out.repeat(&fill, left)?;
        } else {
            out.repeat(&fill, left)?;
            out.push(head)?;
        }
        out.push(body)?;
        out.repeat(&fill, missing - left)
    }

    fn text(&self, text: &str, align: char, out: &mut Builder) -> Outcome<()> {
        let end = self.precision.and_then(|p| text.char_indices().nth(p)).map_or(text.len(), |(i, _)| i);
        self.put("", &text[..end], align, out)
    }

    fn sign(&self, negative: bool) -> String {
        match self.sign {
            _ if negative => "-".into(),
            Some(sign @ ('+' | ' ')) => sign.into(),
            _ => String::new(),
        }
    }

    fn int(&self, n: i128, out: &mut Builder) -> Outcome<()> {
        let kind = self.kind.unwrap_or('d');
        let size = n.unsigned_abs();
        let (prefix, digits) = match kind {
            'd' | 'n' => ("", size.to_string()),
            'x' => ("0x", format!("{size:x}")),
            'X' => ("0X", format!("{size:X}")),
            'o' => ("0o", format!("{size:o}")),
            'b' => ("0b", format!("{size:b}")),
            'c' => {
                let letter = u32::try_from(n).ok().and_then(char::from_u32);
                let letter = letter.ok_or_else(|| Fault::error("a number stands for no letter"))?;
                return self.put("", letter.encode_utf8(&mut [0; 4]), '<', out);
            }
            _ => return self.float(n as f64, out),
        };
        let head = self.sign(n < 0) + if self.alternate { prefix } else { "" };
        let step = if matches!(kind, 'd' | 'n') { 3 } else { 4 };
        self.put(&head, &grouped(&digits, self.group, step), '>', out)
    }

    fn float(&self, x: f64, out: &mut Builder) -> Outcome<()> {
        let kind = self.kind.unwrap_or(' ');
        if self.precision.is_some_and(|p| p > MAX_PRECISION) {
            return bad(format!("more than {MAX_PRECISION} digits behind the point"));
        }
        let size = x.abs();
        let places = self.precision.unwrap_or(6);
        let mut body = match kind.to_ascii_lowercase() {
            'f' => format!("{size:.places$}"),
            '%' => format!("{:.places$}%", size * 100.0),
            'e' => exponential(size, places),
            'g' | 'n' => self.general(size, places, false),
            ' ' => match self.precision {
                Some(places) => self.general(size, places, true),
                None => print::float(size),
            },
            _ => return bad(format!("'{kind}' is no format of a float")),
        };
        if !size.is_finite() {
            body = if size.is_nan() { "nan" } else { "inf" }.to_owned() + if kind == '%' { "%" } else { "" };
        }
        if kind.is_ascii_uppercase() {
            body = body.to_ascii_uppercase();
        }
        let end = body.find(|c: char| !c.is_ascii_digit()).unwrap_or(body.len());
        let body = grouped(&body[..end], self.group, 3) + &body[end..];
        self.put(&self.sign(x.is_sign_negative() && !x.is_nan()), &body, '>', out)
    }

    /// `places` digits in all, with an exponent where that is shorter.
    fn general(&self, x: f64, places: usize, point: bool) -> String {
        let places = places.max(1);
        let scientific = exponential(x, places - 1);
        let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
        let exponent: i32 = exponent.parse().unwrap_or(0);
        let trim = |s: &str| match s.contains('.') && !self.alternate {
            true => s.trim_end_matches('0').trim_end_matches('.').to_owned(),
            false => s.to_owned(),
        };
        let most = places as i32 - i32::from(point);
        if x != 0.0 && (exponent < -4 || exponent >= most) {
            return format!("{}e{}{:02}", trim(digits), if exponent < 0 { '-' } else { '+' }, exponent.abs());
        }
        let behind = usize::try_from(places as i32 - 1 - exponent).unwrap_or(0);
        let plain = trim(&format!("{x:.behind$}"));
        if point && !plain.contains('.') { plain + ".0" } else { plain }
    }
}

fn exponential(x: f64, places: usize) -> String {
    let text = format!("{x:.places$e}");
    let Some((digits, exponent)) = text.split_once('e') else { return text };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

fn grouped(digits: &str, group: Option<char>, step: usize) -> String {
    let Some(group) = group else { return digits.to_owned() };
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(step) {
            out.push(group);
        }
        out.push(c);
    }
    out
}

impl Machine {
    /// `format % values`.
    pub(super) fn percent(&self, format: &str, values: &Value) -> Outcome<Value> {
        self.meter.look(format.len())?;
        let list = match values {
            Value::Seq(s) if s.row == Row::Tuple => self.items(values)?,
            other => vec![other.clone()],
        };
        let mut list = list.into_iter();
        let mut next = || list.next().ok_or_else(|| Fault::error("a format has more places than values"));
        let mut out = Builder::new(&self.meter)?;
        let mut rest = format;
        while let Some(at) = rest.find('%') {
            self.meter.steps(1)?;
            out.push(&rest[..at])?;
            rest = &rest[at + 1..];
            let mut named = None;
            if let Some(inner) = rest.strip_prefix('(') {
                let Some((name, after)) = inner.split_once(')') else { return bad("a format's name does not end") };
                let Value::Dict(d) = values else { return bad("a format with names takes a dict") };
                named = Some(d.get_str(name).cloned().ok_or_else(|| Fault::error(format!("no value '{name}'")))?);
                rest = after;
            }
            let flags = rest.len() - rest.trim_start_matches(['-', '+', ' ', '#', '0']).len();
            let (flags, after) = rest.split_at(flags);
            let number = |text: &'_ str, next: &mut dyn FnMut() -> Outcome<Value>| match text.strip_prefix('*') {
                Some(_) => match next()?.as_int() {
                    Some(n) => Ok((Some(n), 1)),
                    None => bad("* takes a whole number"),
                },
                None => count(text).map(|(n, after)| (n.map(|n| n as i128), text.len() - after.len())),
            };
            let (width, taken) = number(after, &mut next)?;
            let mut after = &after[taken..];
            let mut spec = Spec { alternate: flags.contains('#'), ..Spec::default() };
            if let Some(digits) = after.strip_prefix('.') {
                let (precision, taken) = number(digits, &mut next)?;
                spec.precision = Some(super::methods::size(precision.unwrap_or(0)));
                after = &digits[taken..];
            }
            let after = after.strip_prefix(['h', 'l', 'L']).unwrap_or(after);
            let Some(kind) = after.chars().next() else { return bad("a format ends within a place") };
            rest = &after[kind.len_utf8()..];
            if kind == '%' {
                out.push("%")?;
                continue;
            }
            let width = width.unwrap_or(0);
            spec.width = super::methods::size(width.saturating_abs());
            spec.sign = ['+', ' '].into_iter().find(|c| flags.contains(*c));
            let value = named.map_or_else(&mut next, Ok)?;
            if flags.contains('-') || width < 0 {
                spec.align = Some('<');
            } else if flags.contains('0') && !"srac".contains(kind) {
                (spec.fill, spec.align) = (Some('0'), Some('='));
            }
            self.place(kind, spec, &value, &mut out)?;
        }
        out.push(rest)?;
        let mapping = matches!(values, Value::Dict(_)) || matches!(values, Value::Seq(s) if s.row == Row::List);
        if list.next().is_some() && !mapping {
            return bad("a format has fewer places than values");
        }
        Ok(Value::Str(out.finish()))
    }

    /// One place of a `%` format.
    fn place(&self, kind: char, mut spec: Spec, value: &Value, out: &mut Builder) -> Outcome<()> {
        let int = value.as_int();
        match (kind, int, value) {
            ('s', ..) => spec.text(&self.text_of(value)?, '>', out),
            ('r' | 'a', ..) => {
                let mut text = Builder::new(&self.meter)?;
                self.repr(value, &mut text)?;
                spec.text(text.as_str(), '>', out)
            }
            ('c', Some(n), _) => {
                spec.kind = Some('c');
                spec.align.get_or_insert('>');
                spec.int(n, out)
            }
            ('c', None, Value::Str(s)) if s.chars().count() == 1 => spec.text(s, '>', out),
            ('d' | 'i' | 'u' | 'x' | 'X' | 'o', ..) => {
                let n = match (int, value) {
                    (Some(n), _) => n,
                    (None, Value::Float(x)) if x.abs() < 1e38 && !"xXo".contains(kind) => x.trunc() as i128,
                    _ => return bad(format!("%{kind} takes a number, not {}", value.kind())),
                };
                spec.kind = Some(if "xXo".contains(kind) { kind } else { 'd' });
                // A precision asks for so many digits.
                let digits = spec.precision.take().unwrap_or(0);
                let mut body = Builder::new(&self.meter)?;
                let inner = Spec {
                    fill: Some('0'),
                    align: Some('='),
                    width: 0,
                    precision: None,
                    sign: spec.sign,
                    alternate: spec.alternate,
                    kind: spec.kind,
                    group: None,
                };
                let head = inner.sign(n < 0).len() + if spec.alternate && kind != 'd' { 2 } else { 0 };
                Spec { width: digits.saturating_add(head), ..inner }.int(n, &mut body)?;
                let (head, body) = body.as_str().split_at(head.min(body.as_str().len()));
                spec.put(head, body, '>', out)
            }
            ('e' | 'E' | 'f' | 'F' | 'g' | 'G', ..) => {
                let x = value.as_float().ok_or_else(|| Fault::error(format!("%{kind} takes a number")))?;
                spec.kind = Some(kind);
                spec.float(x, out)
            }
            _ => bad(format!("'%{kind}' is no place of a format for {}", value.kind())),
        }
    }

    /// `text.format(...)`.
    pub(super) fn format(&self, text: &str, given: Given) -> Outcome<Value> {
        let mut out = Builder::new(&self.meter)?;
        let mut auto = Some(0);
        self.fields(text, &given, &mut auto, 0, &mut out)?;
        Ok(Value::Str(out.finish()))
    }

    fn fields(
        &self,
        text: &str,
        given: &Given,
        auto: &mut Option<usize>,
        depth: usize,
        out: &mut Builder,
    ) -> Outcome<()> {
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            self.meter.steps(1)?;
            out.push(&rest[..at])?;
            let brace = &rest[at..=at];
            rest = &rest[at + 1..];
            if rest.starts_with(brace) {
                out.push(brace)?;
                rest = &rest[1..];
                continue;
            }
            if brace == "}" {
                return bad("a format has a single '}'");
            }
            let mut open = 1;
            let end = rest.find(|c| {
                open += i32::from(c == '{') - i32::from(c == '}');
                open == 0
            });
            let Some(end) = end else { return bad("a format has a single '{'") };
            self.meter.walk(end)?;
            let field = &rest[..end];
            rest = &rest[end + 1..];
            if depth > 1 {
                return bad("formats nest too deep");
            }
            let (field, spec) = field.split_once(':').unwrap_or((field, ""));
            let (path, conversion) = field.split_once('!').map_or((field, None), |(p, c)| (p, Some(c)));
            let value = self.field(path, given, auto)?;
            let mut layout = Builder::new(&self.meter)?;
            self.fields(spec, given, auto, depth + 1, &mut layout)?;
            let value = match conversion {
                None => value,
                Some("s") => Value::Str(self.text_of(&value)?),
                Some("r" | "a") => {
                    let mut text = Builder::new(&self.meter)?;
                    self.repr(&value, &mut text)?;
                    Value::Str(text.finish())
                }
                Some(other) => return bad(format!("'!{other}' is no conversion")),
            };
            if layout.as_str().is_empty() {
                self.print(&value, out)?;
                continue;
            }
            let spec = Spec::parse(layout.as_str())?;
            match (&value, value.as_int()) {
                (Value::Str(s), _) if matches!(spec.kind, None | Some('s')) && spec.align != Some('=') => {
                    spec.text(s, '<', out)?;
                }
                (_, Some(n)) => spec.int(n, out)?,
                (Value::Float(x), _) => spec.float(*x, out)?,
                _ => return bad(format!("'{}' is no format for {}", layout.as_str(), value.kind())),
            }
        }
        out.push(rest)
    }

    /// The value that a field names: `0`, `name`, `name.attribute[item]`, or the next one.
    fn field(&self, path: &str, given: &Given, auto: &mut Option<usize>) -> Outcome<Value> {
        let end = path.find(['.', '[']).unwrap_or(path.len());
        let (first, mut rest) = path.split_at(end);
        let mut value = if first.is_empty() || first.bytes().all(|b| b.is_ascii_digit()) {
            let place = match (first.parse().ok(), *auto) {
                (None, Some(n)) => {
                    *auto = Some(n + 1);
                    n
                }
                (Some(n), None | Some(0)) => {
                    *auto = None;
                    n
                }
                _ => return bad("a format counts its places either by itself or not at all"),
            };
            given.list.get(place).ok_or_else(|| Fault::error("a format has more places than values"))?.clone()
        } else {
            self.meter.steps(given.named.len())?;
            let found = given.named.iter().find(|(n, _)| &**n == first);
            found.ok_or_else(|| Fault::error(format!("no value '{first}'")))?.1.clone()
        };
        while !rest.is_empty() {
            if let Some(inner) = rest.strip_prefix('[') {
                let Some((index, after)) = inner.split_once(']') else { return bad("a format's '[' does not end") };
                let index = match index.parse() {
                    Ok(n) => Value::Int(n),
                    Err(_) => self.str(index)?,
                };
                value = self.item(&value, &index)?;
                rest = after;
            } else if let Some(inner) = rest.strip_prefix('.') {
                let end = inner.find(['.', '[']).unwrap_or(inner.len());
                value = self.attribute(&value, &inner[..end])?;
                rest = &inner[end..];
            } else {
                return bad(format!("'{path}' is no field of a format"));
            }
            value.defined()?;
        }
        Ok(value)
    }
}
