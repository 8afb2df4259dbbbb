//! Source into tokens: text between tags, and what is inside them. Blanks around tags are trimmed here, as
//! `trim_blocks` and `lstrip_blocks` say.

use std::sync::Arc;

use super::{Fault, Outcome};

/// A piece of a template.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token {
    Text(Arc<str>),
    BlockStart,
    BlockEnd,
    PrintStart,
    PrintEnd,
    Name(Arc<str>),
    Str(String),
    Int(i128),
    Float(f64),
    Op(&'static str),
    End,
}

impl Token {
    pub fn told(&self) -> String {
        match self {
            Token::Text(_) => "text".into(),
            Token::BlockStart => "'{%'".into(),
            Token::BlockEnd => "'%}'".into(),
            Token::PrintStart => "'{{'".into(),
            Token::PrintEnd => "'}}'".into(),
            Token::Name(n) => format!("'{n}'"),
            Token::Str(_) => "a string".into(),
            Token::Int(n) => format!("'{n}'"),
            Token::Float(x) => format!("'{x}'"),
            Token::Op(o) => format!("'{o}'"),
            Token::End => "the end of the template".into(),
        }
    }
}

const OPERATORS: [&str; 27] = [
    "**", "//", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<", "=", ".",
    ":", "|", ",", ";", "!",
];

/// Tokens of a template: each takes more memory than it takes letters.
const MAX_TOKENS: usize = 600_000;

/// The tokens of a template, each with its line.
pub(super) fn tokens(source: &str) -> Outcome<Vec<(u32, Token)>> {
    let mut source = source.replace("\r\n", "\n").replace('\r', "\n");
    if source.ends_with('\n') {
        source.pop();
    }
    let mut lexer = Lexer { source: &source, at: 0, line: 1, line_starts: true, out: Vec::new() };
    lexer.run()?;
    let line = lexer.line;
    let mut out = lexer.out;
    out.push((line, Token::End));
    Ok(out)
}

struct Lexer<'s> {
    source: &'s str,
    at: usize,
    line: u32,
    /// The last tag took the end of its line along.
    line_starts: bool,
    out: Vec<(u32, Token)>,
}

impl<'s> Lexer<'s> {
    fn rest(&self) -> &'s str {
        &self.source[self.at..]
    }

    fn advance(&mut self, bytes: usize) {
        self.line += self.source[self.at..self.at + bytes].matches('\n').count() as u32;
        self.at += bytes;
    }

    fn blanks(&mut self) {
        let rest = self.rest();
        self.advance(rest.len() - rest.trim_start().len());
    }

    fn fail<T>(&self, what: impl Into<String>) -> Outcome<T> {
        Err(Fault::syntax(what).at(self.line))
    }

    fn run(&mut self) -> Outcome<()> {
        loop {
            let rest = self.rest();
            let tag =
                rest.match_indices('{').find(|(i, _)| matches!(rest.as_bytes().get(i + 1), Some(b'%' | b'{' | b'#')));
            let Some((start, _)) = tag else {
                self.text(rest);
                self.advance(rest.len());
                return Ok(());
            };
            let kind = rest.as_bytes()[start + 1];
            self.before_tag(start, kind != b'{');
            match kind {
                b'#' => self.comment()?,
                b'%' => match raw_start(self.rest()) {
                    Some(bytes) => self.raw(bytes)?,
                    None => self.tag(Token::BlockStart)?,
                },
                _ => self.tag(Token::PrintStart)?,
            }
        }
    }

    fn text(&mut self, text: &str) {
        if !text.is_empty() {
            self.out.push((self.line, Token::Text(text.into())));
        }
    }

    /// Takes the text before a tag of two letters and perhaps a sign, and the tag's start.
    fn before_tag(&mut self, bytes: usize, strips: bool) {
        let text = &self.rest()[..bytes];
        let sign = self.rest().as_bytes().get(bytes + 2).copied().filter(|c| matches!(c, b'-' | b'+'));
        self.text(match sign {
            Some(b'-') => text.trim_end(),
            None if strips => {
                let line = text.rfind('\n').map_or(0, |i| i + 1);
                let blank = text[line..].chars().all(char::is_whitespace);
                if blank && (line > 0 || self.line_starts) { &text[..line] } else { text }
            }
            _ => text,
        });
        self.advance(bytes + 2 + usize::from(sign.is_some()));
    }

    /// Takes what ends a tag before `end`: a sign, `end`, and the blanks that go with it.
    fn end(&mut self, end: &str, newline: bool) -> bool {
        let rest = self.rest();
        let sign = rest.chars().next().filter(|c| *c == '-' || (*c == '+' && newline));
        let Some(after) = rest[usize::from(sign.is_some())..].strip_prefix(end) else { return false };
        let kept = match sign {
            Some('-') => after.trim_start(),
            None if newline => after.strip_prefix('\n').unwrap_or(after),
            _ => after,
        };
        let taken = rest.len() - kept.len();
        self.line_starts = rest[..taken].ends_with('\n');
        self.advance(taken);
        true
    }

    fn comment(&mut self) -> Outcome<()> {
        let Some(end) = self.rest().find("#}") else { return self.fail("a comment does not end") };
        let sign = end > 0 && matches!(self.rest().as_bytes()[end - 1], b'-' | b'+');
        self.advance(end - usize::from(sign));
        self.end("#}", true);
        Ok(())
    }

    /// What stands between `raw` and `endraw`, word for word.
    fn raw(&mut self, bytes: usize) -> Outcome<()> {
        let head = &self.rest()[..bytes];
        self.line_starts = head.ends_with('\n');
        self.advance(bytes);
        let rest = self.rest();
        let inner = |start: usize| rest[start + 2..].trim_start_matches(['-', '+']).trim_start().strip_prefix("endraw");
        let end = rest.match_indices("{%").find_map(|(start, _)| Some((start, inner(start)?.trim_start())));
        let Some((start, tail)) = end else { return self.fail("raw without endraw") };
        self.before_tag(start, true);
        self.advance(self.rest().len() - tail.len());
        if !self.end("%}", true) {
            return self.fail("endraw takes nothing");
        }
        Ok(())
    }

    /// The tokens of a tag, to its end.
    fn tag(&mut self, start: Token) -> Outcome<()> {
        let block = start == Token::BlockStart;
        self.out.push((self.line, start));
        let mut open: Vec<&'static str> = Vec::new();
        loop {
            let line = self.line;
            if open.is_empty() && self.end(if block { "%}" } else { "}}" }, block) {
                self.out.push((line, if block { Token::BlockEnd } else { Token::PrintEnd }));
                return Ok(());
            }
            if self.rest().starts_with(char::is_whitespace) {
                self.blanks();
                continue;
            }
            let Some(first) = self.rest().chars().next() else {
                return self.fail(if block { "a '{%' does not end" } else { "a '{{' does not end" });
            };
            let token = match first {
                '"' | '\'' => self.string(first)?,
                '0'..='9' => self.number()?,
                c if c.is_alphanumeric() || c == '_' => {
                    let rest = self.rest();
                    let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
                    self.advance(end);
                    Token::Name(rest[..end].into())
                }
                c => {
                    let Some(op) = OPERATORS.into_iter().find(|o| self.rest().starts_with(o)) else {
                        return self.fail(format!("unexpected letter {c:?}"));
                    };
                    match op {
                        "(" => open.push(")"),
                        "[" => open.push("]"),
                        "{" => open.push("}"),
                        ")" | "]" | "}" if open.pop() != Some(op) => return self.fail(format!("unexpected '{op}'")),
                        _ => {}
                    }
                    self.advance(op.len());
                    Token::Op(op)
                }
            };
            if self.out.len() >= MAX_TOKENS {
                return self.fail(format!("the template is too large: it has more than {MAX_TOKENS} tokens"));
            }
            self.out.push((line, token));
        }
    }

    fn number(&mut self) -> Outcome<Token> {
        let rest = self.rest();
        let bytes = rest.as_bytes();
        let digits = |from: usize, radix: u32| {
            let taken = rest[from..].chars().take_while(|c| c.is_digit(radix) || *c == '_').count();
            if taken > 0 && !rest[from..from + taken].ends_with('_') { from + taken } else { from }
        };
        let radix = match bytes.get(1) {
            Some(b'x' | b'X') if bytes[0] == b'0' => 16,
            Some(b'o' | b'O') if bytes[0] == b'0' => 8,
            Some(b'b' | b'B') if bytes[0] == b'0' => 2,
            _ => 10,
        };
        let start = if radix == 10 { 0 } else { 2 };
        let mut end = digits(start, radix);
        let mut float = false;
        // `x.0.1` asks for the item 1 of the item 0.
        if radix == 10 && !self.source[..self.at].ends_with('.') {
            if bytes.get(end) == Some(&b'.') && digits(end + 1, 10) > end + 1 {
                end = digits(end + 1, 10);
                float = true;
            }
            if matches!(bytes.get(end), Some(b'e' | b'E')) {
                let sign = usize::from(matches!(bytes.get(end + 1), Some(b'-' | b'+')));
                let after = digits(end + 1 + sign, 10);
                if after > end + 1 + sign {
                    end = after;
                    float = true;
                }
            }
        }
        let text = rest[start..end].replace('_', "");
        self.advance(end);
        if float {
            return text.parse().map(Token::Float).or_else(|_| self.fail(format!("'{text}' is no number")));
        }
        match i128::from_str_radix(&text, radix) {
            Ok(n) => Ok(Token::Int(n)),
            Err(_) => self.fail(format!("'{text}' is no number that fits")),
        }
    }

    fn string(&mut self, quote: char) -> Outcome<Token> {
        let rest = self.rest();
        let mut escaped = false;
        let end = rest[1..].find(|c| {
            let ends = c == quote && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        });
        let Some(end) = end else { return self.fail("a string does not end") };
        let text = unescaped(&rest[1..=end]).or_else(|what| self.fail(what))?;
        self.advance(end + 2);
        Ok(Token::Str(text))
    }
}

/// Bytes behind the start of a tag that are `raw` and the tag's end, where it is that.
fn raw_start(rest: &str) -> Option<usize> {
    let after = rest.trim_start().strip_prefix("raw")?.trim_start();
    let kept = match after.strip_prefix("-%}") {
        Some(after) => after.trim_start(),
        None => after.strip_prefix("%}")?,
    };
    Some(rest.len() - kept.len())
}

/// A string as Python's `unicode-escape` reads it.
fn unescaped(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let Some(c) = after.chars().next() else { break };
        rest = &after[c.len_utf8()..];
        let (from, most, radix) = match c {
            'x' => (rest, 2, 16),
            'u' => (rest, 4, 16),
            'U' => (rest, 8, 16),
            '0'..='7' => (after, 3, 8),
            _ => {
                match c {
                    '\n' => {}
                    '\\' | '\'' | '"' => out.push(c),
                    'a' => out.push('\u{7}'),
                    'b' => out.push('\u{8}'),
                    'f' => out.push('\u{c}'),
                    'n' => out.push('\n'),
                    'r' => out.push('\r'),
                    't' => out.push('\t'),
                    'v' => out.push('\u{b}'),
                    'N' => return Err("letters by name (\\N) are not read: write the letter itself".into()),
                    other => out.extend(['\\', other]),
                }
                continue;
            }
        };
        let digits = from.chars().take(most).take_while(|c| c.is_digit(radix)).count();
        let letter = u32::from_str_radix(&from[..digits], radix).ok().and_then(char::from_u32);
        let letter = letter.filter(|_| digits == most || radix == 8);
        out.push(letter.ok_or_else(|| format!("the escape \\{c} in a string stands for no letter"))?);
        rest = &from[digits..];
    }
    out.push_str(rest);
    Ok(out)
}
