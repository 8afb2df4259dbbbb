//! Numbers that come back as they were given. A JSON value holds integers of 64 bits and floats; the grammar library
//! turns all into floats. What neither can hold is refused and named, and what a model wrote stays the text it is.

use std::collections::HashMap;

use serde::de::IgnoredAny;
use serde_json::{Map, Number, Value};

use crate::error::ApiError;
use crate::schema::Path;

/// Fields of messages that clients make of an answer and send back, and that nobody looks at here.
const UNSEEN: &[&str] = &["annotations", "index", "parsed", "parsed_arguments"];

/// Up to here a float tells every integer from its neighbours.
const SAFE: f64 = 9_007_199_254_740_991.0;

/// The largest step between numbers that the grammar library knows.
const STEP: f64 = 4_294_967_295.0;

/// Takes what nobody looks at out of a message or a part of one, so that no template finds it.
pub fn drop_unseen(fields: &mut Map<String, Value>) {
    fields.retain(|name, _| !UNSEEN.contains(&name.as_str()));
}

/// The integers in a text of JSON that a JSON value cannot hold.
fn long_integers(json: &str) -> impl Iterator<Item = &str> {
    let mut rest = json;
    std::iter::from_fn(move || {
        loop {
            rest = &rest[rest.find(|c: char| c == '"' || c == '-' || c.is_ascii_digit())?..];
            if rest.starts_with('"') {
                let mut escaped = false;
                let end = rest.bytes().skip(1).position(|b| {
                    let end = b == b'"' && !escaped;
                    escaped = b == b'\\' && !escaped;
                    end
                })?;
                rest = &rest[end + 2..];
                continue;
            }
            let end = rest.find(|c: char| !(c.is_ascii_digit() || "+-.eE".contains(c))).unwrap_or(rest.len());
            let (number, after) = rest.split_at(end);
            rest = after;
            let whole = !number.contains(['.', 'e', 'E']);
            if whole && number.parse::<i64>().is_err() && number.parse::<u64>().is_err() {
                return Some(number);
            }
        }
    })
}

/// Whether a text of JSON is the same once it was a value, as far as its integers go.
pub fn survives(json: &str) -> bool {
    long_integers(json).next().is_none()
}

/// Refuses a request with an integer that its value cannot hold. `json`: what `value` was read from.
pub fn check_request(json: &str, value: &Value) -> Result<(), ApiError> {
    // By the bits of what became of them: of a value alone nobody can tell how it was written.
    let long: HashMap<u64, &str> =
        long_integers(json).filter_map(|text| Some((text.parse::<f64>().ok()?.to_bits(), text))).collect();
    let mut fields = value.as_object().into_iter().flatten().filter(|_| !long.is_empty());
    fields.try_for_each(|(name, v)| find(&long, v, &Path::Field(&Path::Root, name), name == "messages"))
}

fn find(long: &HashMap<u64, &str>, value: &Value, path: &Path<'_>, message: bool) -> Result<(), ApiError> {
    match value {
        Value::Number(n) => match n.as_f64().filter(|_| n.is_f64()).and_then(|x| long.get(&x.to_bits())) {
            Some(text) => {
                let shown: String = text.chars().take(40).collect();
                Err(path.bad(format!("is {shown}; integers here have 64 bits at the most. Send it as a text")))
            }
            None => Ok(()),
        },
        Value::Array(all) => {
            all.iter().enumerate().try_for_each(|(i, v)| find(long, v, &Path::Index(path, i), message))
        }
        Value::Object(all) => {
            let mut seen = all.iter().filter(|(name, _)| !message || !UNSEEN.contains(&name.as_str()));
            seen.try_for_each(|(name, v)| find(long, v, &Path::Field(path, name), message))
        }
        _ => Ok(()),
    }
}

/// Refuses a schema with a number that an answer cannot be held to exactly. `path`: where it stands in the request.
pub fn check_schema(schema: &Value, path: &Path<'_>) -> Result<(), ApiError> {
    let Some(fields) = schema.as_object() else { return Ok(()) };
    let each = |v: &Value, path: &Path<'_>| match v {
        Value::Array(all) => all.iter().enumerate().try_for_each(|(i, s)| check_schema(s, &Path::Index(path, i))),
        one => check_schema(one, path),
    };
    for (key, value) in fields {
        let path = Path::Field(path, key);
        match key.as_str() {
            "const" | "enum" => check_literal(value, &path)?,
            "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum" | "multipleOf" => match value {
                Value::Number(n) if !bound_is_held(fields, key, n) => {
                    return Err(not_held(n, if key == "multipleOf" { STEP } else { SAFE }, &path));
                }
                _ => {}
            },
            "default" | "examples" => {}
            // Names, not keywords.
            "properties" | "patternProperties" | "$defs" | "definitions" => {
                for (name, schema) in value.as_object().into_iter().flatten() {
                    check_schema(schema, &Path::Field(&path, name))?;
                }
            }
            _ => each(value, &path)?,
        }
    }
    Ok(())
}

fn check_literal(value: &Value, path: &Path<'_>) -> Result<(), ApiError> {
    match value {
        Value::Number(n) if !literal_is_held(n) => Err(not_held(n, SAFE, path)),
        Value::Array(all) => all.iter().enumerate().try_for_each(|(i, v)| check_literal(v, &Path::Index(path, i))),
        Value::Object(all) => all.iter().try_for_each(|(k, v)| check_literal(v, &Path::Field(path, k))),
        _ => Ok(()),
    }
}

fn not_held(n: &Number, most: f64, path: &Path<'_>) -> ApiError {
    path.bad(format!(
        "is {n}, which answers cannot be held to exactly: of numbers beyond {most} the grammar holds only some or \
         none. Leave it out, or let the value be a text"
    ))
}

/// An integer of 64 bits with a sign becomes a float and then digits again; any other number is written as the float it
/// becomes.
fn literal_is_held(n: &Number) -> bool {
    let Some(x) = n.as_f64() else { return false };
    match (n.as_i64(), n.as_u64()) {
        (Some(i), _) => x as i64 == i && i != i64::MIN,
        (None, Some(u)) => x.to_string() == u.to_string(),
        (None, None) => true,
    }
}

/// A bound becomes a float. Where only integers are meant, it is made an integer of 64 bits with a sign after that, one
/// less or more where it is itself not allowed; otherwise the shortest digits that lead to the float are taken, which
/// large integers do not survive.
fn bound_is_held(fields: &Map<String, Value>, key: &str, n: &Number) -> bool {
    let Some(x) = n.as_f64() else { return false };
    if key == "multipleOf" {
        return x.abs() <= STEP;
    }
    if x.abs() <= SAFE {
        return true;
    }
    let exclusive = match key {
        "minimum" => fields.get("exclusiveMinimum") == Some(&Value::Bool(true)),
        "maximum" => fields.get("exclusiveMaximum") == Some(&Value::Bool(true)),
        _ => true,
    };
    let kinds = fields.get("type");
    let is = |kind: &str| match kinds {
        Some(Value::Array(all)) => all.iter().any(|k| k == kind),
        one => one.is_some_and(|k| k == kind),
    };
    n.as_i64().is_some_and(|i| x as i64 == i && i != i64::MIN) && is("integer") && !is("number") && !exclusive
}

/// The fields of an object in a text of JSON, each value as the text it is; none where the text is no object.
pub fn fields(json: &str) -> Option<Vec<(String, &str)>> {
    let mut rest = json.trim().strip_prefix('{')?.trim_start();
    let mut all = Vec::new();
    while !rest.starts_with('}') {
        let (name, after) = piece(rest)?;
        let (value, after) = piece(after.trim_start().strip_prefix(':')?)?;
        all.push((serde_json::from_str(name).ok()?, value));
        rest = next(after, '}')?;
    }
    (rest == "}").then_some(all)
}

/// The items of a list in a text of JSON, each as the text it is; none where the text is no list.
pub fn items(json: &str) -> Option<Vec<&str>> {
    let mut rest = json.trim().strip_prefix('[')?.trim_start();
    let mut all = Vec::new();
    while !rest.starts_with(']') {
        let (value, after) = piece(rest)?;
        all.push(value);
        rest = next(after, ']')?;
    }
    (rest == "]").then_some(all)
}

/// A value at the beginning of a text, and the text behind it.
fn piece(json: &str) -> Option<(&str, &str)> {
    let mut values = serde_json::Deserializer::from_str(json).into_iter::<IgnoredAny>();
    values.next()?.ok()?;
    let (value, after) = json.split_at(values.byte_offset());
    Some((value.trim(), after))
}

/// The text from the next item on, or from what closes.
fn next(after: &str, close: char) -> Option<&str> {
    let after = after.trim_start();
    match after.strip_prefix(',') {
        Some(more) => Some(more.trim_start()).filter(|more| !more.starts_with(close)),
        None => after.starts_with(close).then_some(after),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use lacuna_base::Rng;
    use serde_json::json;

    #[test]
    fn integers_of_more_than_64_bits_are_found() {
        for fine in [
            "",
            "{}",
            r#"{"a": 18446744073709551615, "b": -9223372036854775808, "c": [0, -0, 1e99, 12345678901234567890123.5]}"#,
            r#""123456789012345678901234567890""#,
            r#"{"a\"123456789012345678901": "\\", "b": "\\\"123456789012345678901"}"#,
        ] {
            assert!(survives(fine), "{fine}");
        }
        for (long, number) in [
            ("18446744073709551616", "18446744073709551616"),
            (r#"{"a": -9223372036854775809}"#, "-9223372036854775809"),
            (r#"["\\", 1, 123456789012345678901234567890]"#, "123456789012345678901234567890"),
        ] {
            assert_eq!(long_integers(long).collect::<Vec<_>>(), [number]);
        }
        let json = r#"{"n": 1e30, "messages": [{"parsed": {"x": 1000000000000000000002}}],
            "tools": [{"parsed": {"const": 1000000000000000000001}}]}"#;
        let e = check_request(json, &serde_json::from_str(json).unwrap()).unwrap_err();
        assert_eq!(e.param.as_deref(), Some("tools.0.parsed.const"));
        assert!(e.message.contains("1000000000000000000001"), "{e:?}");
    }

    #[test]
    fn pieces_are_cut_where_they_end() {
        let text = r#" {"a": 12345678901234567890123 , "b\n" : {"x": [1, "}"]}, "c":"q"} "#;
        let expected = [("a", "12345678901234567890123"), ("b\n", r#"{"x": [1, "}"]}"#), ("c", r#""q""#)];
        assert_eq!(fields(text).unwrap(), expected.map(|(k, v)| (k.to_owned(), v)));
        assert_eq!(items("[1.50, {} ,\n[2]]").unwrap(), ["1.50", "{}", "[2]"]);
        assert_eq!((fields("{}").unwrap().len(), items(" [ ] ").unwrap().len()), (0, 0));
        for broken in
            ["", "{", "[", "{\"a\"}", "{\"a\": 1,}", "{1: 2}", "{\"a\": 1} x", "{\"a\": }", "{\"a\": 1 \"b\": 2}"]
        {
            assert!(fields(broken).is_none(), "{broken}");
        }
        for broken in ["[1,]", "[,1]", "[1 2]", "[1] 2", "[1", "{}"] {
            assert!(items(broken).is_none(), "{broken}");
        }
    }

    /// Spoilt texts are no pieces exactly where they are no JSON, and nothing panics.
    #[test]
    fn pieces_are_what_json_says() {
        let mut rng = Rng::new(7);
        let letters: Vec<char> = "{}[]\":,\\ \nue0159.-tr\u{e9}".chars().collect();
        let (mut good, mut bad) = (0, 0);
        for _ in 0..20_000 {
            let text = r#"{"a":[1,{"\u00e9":""}], "e" : -5.1e9,"":true ,"b":[] }"#;
            let mut text: Vec<char> = text.chars().collect();
            for _ in 0..rng.below(4) {
                let at = rng.below(text.len());
                match rng.below(3) {
                    0 => text[at] = letters[rng.below(letters.len())],
                    1 => text.insert(at, letters[rng.below(letters.len())]),
                    _ => drop(text.remove(at)),
                }
            }
            let text: String = text.into_iter().collect();
            let object = serde_json::from_str::<BTreeMap<String, IgnoredAny>>(&text).is_ok();
            assert_eq!(fields(&text).is_some(), object, "{text}");
            let list = format!("[{text}]");
            let is_list = serde_json::from_str::<Vec<IgnoredAny>>(&list).is_ok();
            assert_eq!(items(&list).is_some(), is_list, "{list}");
            survives(&text);
            *(if object { &mut good } else { &mut bad }) += 1;
        }
        assert!(good > 2000 && bad > 2000, "{good} {bad}");
    }

    #[test]
    fn what_a_grammar_would_round_is_named() {
        let refused = |schema: Value| check_schema(&schema, &Path::Field(&Path::Root, "s")).err().and_then(|e| e.param);
        for held in [
            json!({"const": 9_007_199_254_740_992_i64}),
            json!({"const": -1_152_921_504_606_846_976_i64}),
            json!({"const": i64::MAX}),
            json!({"enum": [0.1, 1e22, 10_000_000_000_000_000_000_u64]}),
            json!({"type": "integer", "minimum": -9_007_199_254_740_991_i64, "maximum": i64::MAX}),
            json!({"type": ["integer", "null"], "maximum": 1_152_921_504_606_846_976_i64}),
            json!({"type": "number", "minimum": 0.1, "multipleOf": 0.25, "default": 1_234_567_890_123_456_789_i64}),
            json!({"properties": {"const": {"type": "integer"}, "minimum": {"title": "x"}}, "maximum": true}),
        ] {
            assert_eq!(refused(held.clone()), None, "{held}");
        }
        for (schema, param) in [
            (json!({"const": 1_234_567_890_123_456_789_i64}), "s.const"),
            (json!({"const": u64::MAX}), "s.const"),
            (json!({"const": i64::MIN}), "s.const"),
            (json!({"const": {"a": [9_007_199_254_740_993_i64]}}), "s.const.a.0"),
            (json!({"enum": ["x", 9_007_199_254_740_993_i64]}), "s.enum.1"),
            (json!({"properties": {"const": {"maximum": u64::MAX}}}), "s.properties.const.maximum"),
            (json!({"type": "integer", "maximum": 9_007_199_254_740_993_i64}), "s.maximum"),
            (json!({"type": "number", "maximum": i64::MAX}), "s.maximum"),
            (json!({"type": ["integer", "number"], "maximum": i64::MAX}), "s.maximum"),
            (json!({"type": "integer", "exclusiveMaximum": 9_007_199_254_740_992_i64}), "s.exclusiveMaximum"),
            (json!({"type": "integer", "maximum": i64::MAX, "exclusiveMaximum": true}), "s.maximum"),
            (json!({"type": "integer", "multipleOf": 4_294_967_296_u64}), "s.multipleOf"),
            (json!({"anyOf": [{}, {"items": {"minimum": i64::MIN}}]}), "s.anyOf.1.items.minimum"),
            (json!({"$defs": {"a": {"exclusiveMinimum": 1e300}}}), "s.$defs.a.exclusiveMinimum"),
        ] {
            assert_eq!(refused(schema.clone()).as_deref(), Some(param), "{schema}");
        }
    }
}
