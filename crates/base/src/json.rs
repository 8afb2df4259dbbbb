//! JSON as Python's `json` writes and reads it, made into what a strict parser reads.
//!
//! Python writes and reads `NaN`, `Infinity` and `-Infinity`, takes numbers beyond the range of f64 for infinite, and
//! editors of some systems put a byte order mark in front. A number that is not finite becomes the object that
//! transformers itself writes for one where JSON must be strict, `{"__float__": "NaN"}`.

use std::borrow::Cow;

/// Most numbers that are not finite: each becomes an object.
pub const MAX_SPECIAL: usize = 10_000;

/// The text behind a byte order mark.
pub fn without_mark(text: &[u8]) -> &[u8] {
    text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text)
}

/// The text with an object in the place of every number that strict JSON does not know; borrowed where there is none.
/// What is no JSON in any other way stays so, and more than [`MAX_SPECIAL`] such numbers are an error.
pub fn strict(text: &[u8]) -> Result<Cow<'_, [u8]>, String> {
    let (mut out, mut copied, mut at, mut found) = (Vec::new(), 0, 0, 0);
    while at < text.len() {
        let begin = at;
        match text[at] {
            b'"' => {
                at += 1;
                while at < text.len() && text[at] != b'"' {
                    at += if text[at] == b'\\' { 2 } else { 1 };
                }
                at += 1;
            }
            b'-' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => {
                let word = |c: &u8| c.is_ascii_alphanumeric() || matches!(c, b'+' | b'-' | b'.');
                at += text[at..].iter().take_while(|c| word(c)).count();
                if let Some(name) = special(&text[begin..at]) {
                    found += 1;
                    if found > MAX_SPECIAL {
                        return Err(format!("more than {MAX_SPECIAL} numbers that are not finite (NaN, Infinity)"));
                    }
                    out.extend_from_slice(&text[copied..begin]);
                    out.extend_from_slice(format!(r#"{{"__float__":"{name}"}}"#).as_bytes());
                    copied = at;
                }
            }
            _ => at += 1,
        }
    }
    if copied == 0 {
        return Ok(Cow::Borrowed(text));
    }
    out.extend_from_slice(&text[copied..]);
    Ok(Cow::Owned(out))
}

/// Python's name of the number that a word stands for, where that is none of strict JSON's.
fn special(word: &[u8]) -> Option<&'static str> {
    match word {
        b"NaN" => Some("NaN"),
        b"Infinity" => Some("Infinity"),
        b"-Infinity" => Some("-Infinity"),
        [b'-', b'0'..=b'9', ..] | [b'0'..=b'9', ..] => {
            // Whole numbers of any length have a nearest f64 or none, as others.
            let x: f64 = std::str::from_utf8(word).ok()?.parse().ok()?;
            x.is_infinite().then_some(if x > 0.0 { "Infinity" } else { "-Infinity" })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_strict_parsers_refuse_is_put_in_their_words() {
        let made = |text: &str| String::from_utf8(strict(text.as_bytes()).unwrap().into_owned()).unwrap();
        assert_eq!(
            made(r#"[NaN, -Infinity,1e999]"#),
            r#"[{"__float__":"NaN"}, {"__float__":"-Infinity"},{"__float__":"Infinity"}]"#
        );
        for text in [r#"{"NaN": "NaN \" Infinity", "x": -1.5e-7}"#, "[nan, -NaN, inf]", "\"NaN", ""] {
            assert!(matches!(strict(text.as_bytes()), Ok(Cow::Borrowed(t)) if t == text.as_bytes()), "{text}");
        }
        assert_eq!(without_mark("\u{feff}{}".as_bytes()), b"{}");
        assert!(strict("NaN,".repeat(MAX_SPECIAL).as_bytes()).is_ok());
        assert!(strict("NaN,".repeat(MAX_SPECIAL + 1).as_bytes()).is_err());
    }
}
