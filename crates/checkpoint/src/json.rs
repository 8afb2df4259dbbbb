//! JSON that other programs wrote, read as Python's `json` reads it.
//!
//! A number that is not finite becomes an object ([`lacuna_base::json::strict`]): no reader takes it for a number, so a
//! key that is read gives an error with its name, and one that is not does no harm.

use std::borrow::Cow;
use std::path::Path;

use lacuna_base::json::strict;
pub(crate) use lacuna_base::json::without_mark;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::OpenError;
use crate::content::{self, Content};

/// Largest list of tensors or tokens read, bytes.
pub(crate) const MAX_LIST: u64 = 100_000_000;

/// Largest file of settings read, bytes. Those of a packed model name each matrix of each expert.
pub(crate) const MAX_SETTINGS: u64 = 32_000_000;

/// Most objects in settings: each takes some 700 bytes of memory where the file may have three for it. Braces in texts
/// (templates) count as well, which is quicker and far from the bound.
const MAX_OBJECTS: usize = 250_000;

/// Most values in lists and objects of settings, which take up to 128 bytes each; told by commas and brackets.
const MAX_VALUES: usize = 2_000_000;

/// The bytes of a file of settings.
pub(crate) fn bytes(path: &Path) -> Result<Vec<u8>, OpenError> {
    let bytes = bytes_up_to(path, MAX_SETTINGS)?;
    few_objects(&bytes).map_err(|e| OpenError::bad(path, e))?;
    Ok(bytes)
}

/// The bytes of a file that lists tensors.
pub(crate) fn list_bytes(path: &Path) -> Result<Vec<u8>, OpenError> {
    bytes_up_to(path, MAX_LIST)
}

fn bytes_up_to(path: &Path, most: u64) -> Result<Vec<u8>, OpenError> {
    let io = |source| OpenError::Io { file: path.display().to_string(), source };
    let bytes = read_up_to(path, most).map_err(io)?;
    bytes.map_err(|length| OpenError::bad(path, too_long(length, most)))
}

/// The bytes of a file, or its length where that is more than `most`.
pub(crate) fn read_up_to(path: &Path, most: u64) -> std::io::Result<Result<Vec<u8>, u64>> {
    let length = std::fs::metadata(path)?.len();
    if length > most { Ok(Err(length)) } else { std::fs::read(path).map(Ok) }
}

/// What is said of a file that is longer than it may be.
pub(crate) fn too_long(length: u64, most: u64) -> String {
    format!("{length} bytes; at most {most} are read of such a file")
}

/// Refuses settings that would take memory far beyond the file's length.
pub(crate) fn few_objects(json: &[u8]) -> Result<(), String> {
    let braces = json.iter().filter(|b| **b == b'{').count();
    if braces > MAX_OBJECTS {
        return Err(format!("{braces} opening braces; at most {MAX_OBJECTS} are read in a file of settings"));
    }
    let values = json.iter().filter(|b| matches!(b, b',' | b'[')).count();
    if values > MAX_VALUES {
        return Err(format!("{values} commas and brackets; at most {MAX_VALUES} are read in a file of settings"));
    }
    Ok(())
}

/// The value in a file of settings.
pub(crate) fn read(path: &Path) -> Result<Value, OpenError> {
    parse(&bytes(path)?).map_err(|e| OpenError::bad(path, e))
}

/// What JSON says. The error is a sentence without the file's name; where the bytes are something else altogether, it
/// says what.
pub fn parse<T: DeserializeOwned>(json: &[u8]) -> Result<T, String> {
    let json = without_mark(json);
    let first = match serde_json::from_slice(json) {
        Ok(value) => return Ok(value),
        Err(e) => e,
    };
    match strict(json)? {
        Cow::Owned(text) => serde_json::from_slice(&text).map_err(|e| e.to_string()),
        Cow::Borrowed(_) => Err(explain(json, first)),
    }
}

/// What keeps bytes from being read as JSON: that they are something else, where that is known, else what the parser
/// says.
pub(crate) fn explain(json: &[u8], error: impl ToString) -> String {
    match content::of(json) {
        Content::Json | Content::Text | Content::Unknown => error.to_string(),
        other => format!("this is no JSON but {other}"),
    }
}

/// A value as the file has it.
pub(crate) fn shown(v: &Value) -> String {
    not_finite(v).map_or_else(|| v.to_string(), str::to_owned)
}

/// The name of a number that is not finite, where `v` is one.
pub(crate) fn not_finite(v: &Value) -> Option<&str> {
    v.as_object().filter(|o| o.len() == 1)?.get("__float__")?.as_str()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use lacuna_base::json::MAX_SPECIAL;

    use super::*;

    fn value(text: &str) -> Value {
        parse(text.as_bytes()).unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    #[test]
    fn what_python_reads_is_read() {
        let float = |name: &str| json!({"__float__": name});
        assert_eq!(value("\u{feff}{\"a\": 1}"), json!({"a": 1}));
        let text = r#"{"a": NaN, "b":[-Infinity,Infinity , 1], "c": 1e999, "d": -1e400, "NaN": "NaN, \" Infinity", "e": -1.5e-7}"#;
        let want = json!({
            "a": float("NaN"), "b": [float("-Infinity"), float("Infinity"), 1], "c": float("Infinity"), "d": float("-Infinity"),
            "NaN": "NaN, \" Infinity", "e": -1.5e-7,
        });
        assert_eq!(value(text), want);
        assert_eq!(value(&format!("\u{feff}{text}")), want);
        assert_eq!(value("NaN"), float("NaN"));
        // What transformers writes for a length without a bound.
        assert_eq!(value("1000000000000000019884624838656"), json!(1e30));
        assert_eq!(not_finite(&want["a"]), Some("NaN"));
        assert_eq!(not_finite(&want["e"]), None);
    }

    #[test]
    fn what_python_refuses_is_refused() {
        for text in [
            "",
            "nan",
            "[Nan]",
            "[-NaN]",
            "[-inf]",
            "[+Infinity]",
            "[inf]",
            "[infinity]",
            "{\"a\": NaN,}",
            "[NaN",
            "\"NaN",
            "\"\\",
            "1e5x",
        ] {
            assert!(parse::<Value>(text.as_bytes()).is_err(), "{text}");
        }
    }

    /// Each of these would take hundreds of times its length in memory.
    #[test]
    fn what_takes_too_much_memory_is_refused() {
        let many = |n: usize| format!("[{}0]", "NaN,".repeat(n));
        assert!(parse::<Value>(many(MAX_SPECIAL).as_bytes()).is_ok());
        let e = parse::<Value>(many(MAX_SPECIAL + 1).as_bytes()).unwrap_err();
        assert!(e.contains("10000 numbers that are not finite"), "{e}");

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let said = |text: String| {
            std::fs::write(&path, text).unwrap();
            read(&path).map_or_else(|e| e.to_string(), |_| "nothing".into())
        };
        assert_eq!(said(format!("[{}{{}}]", "{},".repeat(1000))), "nothing");
        let e = said(format!("[{}{{}}]", "{},".repeat(MAX_OBJECTS)));
        assert!(e.contains("config.json") && e.contains("250001 opening braces"), "{e}");
        let e = said(format!("[{}0]", "0,".repeat(MAX_VALUES)));
        assert!(e.contains("config.json") && e.contains("2000001 commas"), "{e}");
        std::fs::File::create(&path).unwrap().set_len(MAX_SETTINGS + 1).unwrap();
        let e = read(&path).unwrap_err().to_string();
        assert!(e.contains("config.json") && e.contains("32000001 bytes; at most 32000000"), "{e}");
        // A list of tensors may be longer.
        assert!(list_bytes(&path).is_ok());
    }

    #[test]
    fn what_is_no_json_is_named() {
        let said = |bytes: &[u8]| parse::<Value>(bytes).unwrap_err();
        assert!(said(b"").contains("empty"));
        assert!(said(b"<!DOCTYPE html><html></html>").contains("HTML"));
        assert!(said(b"\xff\xfe{\0\"\0").contains("UTF-16"));
        assert!(said(b"{\"a\": }").contains("line 1 column 7"));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_taken(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..60)) {
            let _ = parse::<Value>(&bytes);
        }

        #[test]
        fn strict_json_stays(x in proptest::prelude::any::<f64>(), s in "\\PC{0,20}") {
            let text = json!({"x": x, s.clone(): [s, null, true]}).to_string();
            proptest::prop_assert!(matches!(strict(text.as_bytes()), Ok(Cow::Borrowed(_))));
        }
    }
}
