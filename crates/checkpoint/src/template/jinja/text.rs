//! The methods of a text, by letters as Python counts them.

use super::eval::{Given, Machine};
use super::meter::{Builder, Held};
use super::methods::{int_arg, size, text_arg};
use super::{Fault, Outcome, Str, Value};

pub(super) const METHODS: [&str; 44] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "upper",
    "zfill",
    "isprintable",
];

/// Python counts four separators as blanks that Unicode's property leaves out.
fn blank(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

pub(super) fn line_end(c: char) -> bool {
    matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

fn has_case(c: char) -> bool {
    c.is_lowercase() || c.is_uppercase()
}

/// Lines, with what ended them where `keep` is set.
fn lines(text: &str, keep: bool) -> Vec<&str> {
    let mut out = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(line_end) {
        let end = &rest[at..];
        let bytes = if end.starts_with("\r\n") { 2 } else { end.chars().next().map_or(0, char::len_utf8) };
        out.push(&rest[..if keep { at + bytes } else { at }]);
        rest = &rest[at + bytes..];
    }
    if !rest.is_empty() {
        out.push(rest);
    }
    out
}

pub(super) fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |c| c.to_uppercase().chain(chars.as_str().to_lowercase().chars()).collect())
}

/// The first letter of every word large, a word being letters that have a case.
fn title(text: &str) -> String {
    let mut inside = false;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        inside = has_case(c);
    }
    out
}

/// Trims letters of a set, or blanks, from the sides asked for.
pub(super) fn stripped<'t>(text: &'t str, letters: Option<&str>, left: bool, right: bool) -> &'t str {
    let of = |c: char| letters.map_or_else(|| blank(c), |l| l.contains(c));
    let text = if left { text.trim_start_matches(of) } else { text };
    if right { text.trim_end_matches(of) } else { text }
}

/// Pieces between `separator`, or between blanks; at most `most` cuts, from the right where `right` is set.
pub(super) fn split<'t>(text: &'t str, separator: Option<&str>, most: usize, right: bool) -> Vec<&'t str> {
    let mut out: Vec<&str> = match separator {
        Some(s) if right => text.rsplitn(most.saturating_add(1), s).collect(),
        Some(s) => text.splitn(most.saturating_add(1), s).collect(),
        None => {
            let mut out = Vec::new();
            let mut rest = stripped(text, None, !right, right);
            while !rest.is_empty() {
                let cut = if out.len() >= most {
                    None
                } else if right {
                    rest.char_indices().rev().find(|(_, c)| blank(*c)).map(|(i, c)| (i, i + c.len_utf8()))
                } else {
                    rest.char_indices().find(|(_, c)| blank(*c)).map(|(i, c)| (i, i + c.len_utf8()))
                };
                let Some((start, end)) = cut else {
                    out.push(rest);
                    break;
                };
                let (piece, others) =
                    if right { (&rest[end..], &rest[..start]) } else { (&rest[..start], &rest[end..]) };
                out.push(piece);
                rest = stripped(others, None, !right, right);
            }
            out
        }
    };
    if right {
        out.reverse();
    }
    out
}

impl Machine {
    /// A text of the machine.
    pub(super) fn str(&self, text: &str) -> Outcome<Value> {
        Value::str(&self.meter, text)
    }

    /// The lines of a text, and the memory that they take.
    pub(super) fn lines<'t>(&self, text: &'t str, keep: bool) -> Outcome<(Vec<&'t str>, Held)> {
        let room = self.meter.hold(text.matches(line_end).count().saturating_mul(size_of::<&str>()))?;
        Ok((lines(text, keep), room))
    }

    fn texts<'t>(&self, list: impl IntoIterator<Item = &'t str>) -> Outcome<Vec<Value>> {
        list.into_iter().map(|t| self.str(t)).collect()
    }

    pub(super) fn text_method(&self, s: &Str, name: &str, given: Given) -> Outcome<Value> {
        // Starts and ends are looked at alone; everything else goes through the letters.
        match name {
            "startswith" | "endswith" | "removeprefix" | "removesuffix" => self.meter.look(s.len())?,
            _ => self.meter.walk(s.len())?,
        }
        match name {
            "find" | "rfind" | "index" | "rindex" | "count" | "startswith" | "endswith" => self.search(s, name, given),
            "split" | "rsplit" => {
                let [separator, most] = given.take(name, ["sep", "maxsplit"])?;
                let separator = separator.filter(|v| !matches!(v, Value::None));
                let separator = separator.map(|v| text_arg(name, Some(v))).transpose()?;
                if separator.as_ref().is_some_and(|s| s.is_empty()) {
                    return Err(Fault::error("an empty separator"));
                }
                let most = int_arg(name, most, -1)?;
                let most = if most < 0 { usize::MAX } else { size(most) };
                // Its pieces are counted before they are made.
                let pieces = match separator.as_deref() {
                    Some(s2) => s.matches(s2).count(),
                    None => s.matches(blank).count(),
                };
                let room = self.meter.hold(pieces.min(most).saturating_mul(64))?;
                let out = self.texts(split(s, separator.as_deref(), most, name == "rsplit"));
                drop(room);
                Value::list(&self.meter, out?)
            }
            "partition" | "rpartition" => {
                let [separator] = given.take(name, ["sep"])?;
                let separator = text_arg(name, separator)?;
                if separator.is_empty() {
                    return Err(Fault::error("an empty separator"));
                }
                let found = if name == "partition" { s.split_once(&*separator) } else { s.rsplit_once(&*separator) };
                let parts = match found {
                    Some((before, after)) => [before, &separator, after],
                    None if name == "partition" => [s, "", ""],
                    None => ["", "", s],
                };
                Value::tuple(&self.meter, self.texts(parts)?)
            }
            "splitlines" => {
                let [keep] = given.take(name, ["keepends"])?;
                let (lines, room) = self.lines(s, keep.is_some_and(|k| k.truth()))?;
                let lines = self.texts(lines);
                drop(room);
                Value::list(&self.meter, lines?)
            }
            "join" => {
                let [list] = given.take(name, ["iterable"])?;
                let list = list.ok_or_else(|| Fault::error("join() takes an iterable"))?;
                let mut out = Builder::new(&self.meter)?;
                for (i, item) in self.items(list.defined()?)?.into_iter().enumerate() {
                    out.push(if i > 0 { s } else { "" })?;
                    out.push(&text_arg(name, Some(item))?)?;
                }
                Ok(Value::Str(out.finish()))
            }
            "replace" => {
                let [old, new, count] = given.take(name, ["old", "new", "count"])?;
                self.replaced(s, &text_arg(name, old)?, &text_arg(name, new)?, int_arg(name, count, -1)?)
            }
            "strip" | "lstrip" | "rstrip" => {
                let [letters] = given.take(name, ["chars"])?;
                let letters = letters.filter(|v| !matches!(v, Value::None));
                let letters = letters.map(|v| text_arg(name, Some(v))).transpose()?;
                self.meter.look(s.len().saturating_mul(letters.as_ref().map_or(0, |l| l.len())))?;
                self.str(stripped(s, letters.as_deref(), name != "rstrip", name != "lstrip"))
            }
            "removeprefix" | "removesuffix" => {
                let [part] = given.take(name, ["part"])?;
                let part = text_arg(name, part)?;
                let rest = if name == "removeprefix" { s.strip_prefix(&*part) } else { s.strip_suffix(&*part) };
                self.str(rest.unwrap_or(s))
            }
            "ljust" | "rjust" | "center" | "zfill" => self.padded(s, name, given),
            "expandtabs" => {
                let [size_] = given.take(name, ["tabsize"])?;
                let tab = size(int_arg(name, size_, 8)?);
                let mut out = Builder::new(&self.meter)?;
                let mut column = 0_usize;
                for c in s.chars() {
                    match c {
                        '\t' if tab > 0 => {
                            out.repeat(" ", tab - column % tab)?;
                            column += tab - column % tab;
                        }
                        '\t' => {}
                        c => {
                            out.push(c.encode_utf8(&mut [0; 4]))?;
                            column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
                        }
                    }
                }
                Ok(Value::Str(out.finish()))
            }
            "format" => self.format(s, given),
            "format_map" => {
                let [map] = given.take(name, ["mapping"])?;
                match map {
                    Some(Value::Dict(d)) => {
                        let pair = |(k, v): &(Value, Value)| Some((k.as_str()?.into(), v.clone()));
                        let named = d.entries().iter().filter_map(pair).collect();
                        self.format(s, Given { list: Vec::new(), named })
                    }
                    _ => Err(Fault::error("format_map() takes a dict")),
                }
            }
            _ => {
                let [] = given.take(name, [])?;
                let room = self.meter.hold(s.len())?;
                let out = self.plain(s, name);
                drop(room);
                out
            }
        }
    }

    /// The methods without arguments.
    fn plain(&self, s: &str, name: &str) -> Outcome<Value> {
        let all = |is: fn(char) -> bool| Ok(Value::Bool(!s.is_empty() && s.chars().all(is)));
        let cased = |other: fn(char) -> bool| Ok(Value::Bool(s.chars().any(has_case) && !s.chars().any(other)));
        match name {
            "upper" => self.str(&s.to_uppercase()),
            "lower" => self.str(&s.to_lowercase()),
            "casefold" => self.str(&s.to_lowercase().replace('ß', "ss").replace('ς', "σ")),
            "capitalize" => self.str(&capitalized(s)),
            "title" => self.str(&title(s)),
            "swapcase" => {
                let swap = |c: char| -> String {
                    if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
                };
                self.str(&s.chars().map(swap).collect::<String>())
            }
            "islower" => cased(char::is_uppercase),
            "isupper" => cased(char::is_lowercase),
            "istitle" => Ok(Value::Bool(s.chars().any(has_case) && title(s) == s)),
            "isspace" => all(blank),
            "isalpha" => all(char::is_alphabetic),
            "isalnum" => all(char::is_alphanumeric),
            "isnumeric" => all(char::is_numeric),
            // Fractions and the like are numbers without being digits.
            "isdigit" | "isdecimal" => all(|c| c.is_ascii_digit() || (c.is_numeric() && !('¼'..='¾').contains(&c))),
            "isascii" => Ok(Value::Bool(s.is_ascii())),
            "isprintable" => Ok(Value::Bool(s.chars().all(super::print::printable))),
            _ => {
                let word = |c: char| c.is_alphanumeric() || c == '_';
                Ok(Value::Bool(!s.is_empty() && s.chars().all(word) && !s.starts_with(char::is_numeric)))
            }
        }
    }

    /// What asks where a text is, perhaps within a part of it.
    fn search(&self, s: &Str, name: &str, given: Given) -> Outcome<Value> {
        let [what, start, end] = given.take(name, ["sub", "start", "end"])?;
        let part = start.is_some() || end.is_some();
        let (mut from, mut within) = (0, &**s);
        if part {
            let len = s.chars().count() as i128;
            let bound = |v: Option<Value>, default| {
                let v = v.filter(|v| !matches!(v, Value::None));
                int_arg(name, v, default).map(|n| if n < 0 { (n.saturating_add(len)).max(0) } else { n })
            };
            let (start, end) = (bound(start, 0)?, bound(end, len)?.min(len));
            if start > end {
                return match name {
                    "find" | "rfind" => Ok(Value::Int(-1)),
                    "count" => Ok(Value::Int(0)),
                    "startswith" | "endswith" => Ok(Value::Bool(false)),
                    _ => Err(Fault::error("substring not found")),
                };
            }
            let byte = |n: i128| s.char_indices().nth(size(n)).map_or(s.len(), |(i, _)| i);
            (from, within) = (start, &s[byte(start)..byte(end)]);
        }
        if matches!(name, "startswith" | "endswith") {
            let one = |t: &str| if name == "startswith" { within.starts_with(t) } else { within.ends_with(t) };
            return match &what {
                Some(Value::Seq(list)) if list.row == super::Row::Tuple => {
                    let mut any = false;
                    for item in &list.items {
                        let item = text_arg(name, Some(item.clone()))?;
                        self.meter.look(item.len().min(within.len()))?;
                        any |= one(&item);
                    }
                    Ok(Value::Bool(any))
                }
                _ => Ok(Value::Bool(one(&text_arg(name, what)?))),
            };
        }
        let what = text_arg(name, what)?;
        if name == "count" {
            let n = if what.is_empty() { within.chars().count() + 1 } else { within.matches(&*what).count() };
            return Ok(Value::int(n));
        }
        let found = if name.starts_with('r') { within.rfind(&*what) } else { within.find(&*what) };
        match found {
            Some(byte) => Ok(Value::Int(from + within[..byte].chars().count() as i128)),
            None if name.ends_with("find") => Ok(Value::Int(-1)),
            None => Err(Fault::error("substring not found")),
        }
    }

    /// `replace` of Python and of Jinja.
    pub(super) fn replaced(&self, s: &str, old: &str, new: &str, count: i128) -> Outcome<Value> {
        let most = if count < 0 { usize::MAX } else { size(count) };
        let mut out = Builder::new(&self.meter)?;
        let mut kept = 0;
        for (at, found) in s.match_indices(old).take(most) {
            self.meter.steps(1)?;
            out.push(&s[kept..at])?;
            out.push(new)?;
            kept = at + found.len();
        }
        out.push(&s[kept..])?;
        Ok(Value::Str(out.finish()))
    }

    fn padded(&self, s: &Str, name: &str, given: Given) -> Outcome<Value> {
        let [width, fill] = given.take(name, ["width", "fillchar"])?;
        let width = size(int_arg(name, width, -1)?);
        let len = s.chars().count();
        let missing = width.saturating_sub(len);
        let fill = match (name, fill) {
            ("zfill", _) => "0".to_owned(),
            (_, None) => " ".to_owned(),
            (_, Some(fill)) => text_arg(name, Some(fill))?.to_string(),
        };
        if fill.chars().count() != 1 {
            return Err(Fault::error(format!("{name}() takes one letter to fill with")));
        }
        let left = match name {
            "ljust" => 0,
            // Python puts the odd one where the width is odd to the left.
            "center" => missing / 2 + (missing & width & 1),
            _ => missing,
        };
        let sign = if name == "zfill" && s.starts_with(['+', '-']) { 1 } else { 0 };
        let mut out = Builder::new(&self.meter)?;
        out.push(&s[..sign])?;
        out.repeat(&fill, left)?;
        out.push(&s[sign..])?;
        out.repeat(&fill, missing - left)?;
        Ok(Value::Str(out.finish()))
    }
}
