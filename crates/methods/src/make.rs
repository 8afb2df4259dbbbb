//! What every method and family needs to come into being: its parameters read, its inputs checked.

use lacuna_base::{Gram, MatRef};
use lacuna_contract::{Made, Making, MethodError, Stats};
use serde::Serialize;
use serde::de::{DeserializeOwned, Deserializer, Error, Visitor, value};
use serde_json::{Map, Value};

/// Keys that every step has, for advice on misspelt ones.
const COMMON: [&str; 5] = ["method", "name", "verb", "targets", "except"];

/// Names of a struct's fields, as its derived reader lists them.
pub(crate) fn keys<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut names: &'static [&'static str] = &[];
    // The probe ends every reading with an error on purpose: by then it has heard the names.
    let _ = T::deserialize(Probe(&mut names));
    names
}

/// The values that parameters have beside those that are given, without those that have none.
pub(crate) fn defaults<T: Default + Serialize>(given: &Map<String, Value>) -> Map<String, Value> {
    match serde_json::to_value(T::default()) {
        Ok(Value::Object(all)) => all.into_iter().filter(|(k, v)| !v.is_null() && !given.contains_key(k)).collect(),
        _ => Map::new(),
    }
}

struct Probe<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Probe<'_> {
    type Error = value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, value::Error> {
        Err(value::Error::custom("names alone are asked for"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        v: V,
    ) -> Result<V::Value, value::Error> {
        *self.0 = fields;
        self.deserialize_any(v)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct newtype_struct
        seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// Parameters from a JSON object; nothing given is all defaults. An error names `whose` they are and the key.
pub(crate) fn parameters<T: DeserializeOwned>(whose: &str, given: Value) -> Result<T, MethodError> {
    let map = match given {
        Value::Null => Map::new(),
        Value::Object(map) => map,
        other => return Err(MethodError::new(format!("{whose}: {other} is no table of parameters"))),
    };
    if let Some(key) = map.keys().find(|k| !keys::<T>().contains(&k.as_str())) {
        return Err(unknown(whose, key, keys::<T>()));
    }
    // All have defaults, so that each can be read alone, which tells whose fault it is.
    for (key, value) in &map {
        let one: Map<String, Value> = [(key.clone(), value.clone())].into_iter().collect();
        if let Err(e) = serde_json::from_value::<T>(Value::Object(one)) {
            return Err(MethodError::new(format!("{key} = {value}: {e}")));
        }
    }
    serde_json::from_value(Value::Object(map)).map_err(|e| MethodError::new(format!("{whose}: {e}")))
}

/// A step's keys, read: those of its family, and the method made from its own.
pub(crate) fn split<K: DeserializeOwned>(making: &Making<'_>) -> Result<(K, Made), MethodError> {
    let (shared, own) = (keys::<K>(), (making.method.keys)());
    let (mut family, mut method) = (Map::new(), Map::new());
    for (key, value) in making.keys {
        let to = if shared.contains(&key.as_str()) {
            &mut family
        } else if own.contains(&key.as_str()) {
            &mut method
        } else {
            let all: Vec<&str> = shared.iter().chain(own).copied().collect();
            return Err(unknown(making.method.card.name, key, &all));
        };
        to.insert(key.clone(), value.clone());
    }
    let keys = parameters::<K>(making.method.card.verb, Value::Object(family))?;
    Ok((keys, (making.method.make)(Value::Object(method))?))
}

/// An unknown key's error: it names the nearest known one and all of them.
fn unknown(whose: &str, key: &str, known: &[&str]) -> MethodError {
    let near = known
        .iter()
        .chain(&COMMON)
        .map(|k| (distance(key, k), k))
        .min()
        .filter(|(d, k)| *d <= 1 + k.len().max(key.len()) / 3)
        .map_or_else(String::new, |(_, k)| format!("; did you mean '{k}'?"));
    let list =
        if known.is_empty() { "it has none of its own".to_owned() } else { format!("known: {}", known.join(", ")) };
    MethodError::new(format!("{whose} has no key '{key}'{near} ({list})"))
}

/// Least number of letters to insert, delete or replace.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let here = (corner + usize::from(x != *y)).min(row[j] + 1).min(row[j + 1] + 1);
            corner = row[j + 1];
            row[j + 1] = here;
        }
    }
    row[b.len()]
}

/// Refuses weights that are not finite numbers.
pub(crate) fn finite(w: MatRef<'_>) -> Result<(), MethodError> {
    for r in 0..w.rows() {
        if let Some(c) = w.row(r).iter().position(|v| !v.is_finite()) {
            return Err(MethodError::new(format!(
                "the weight at row {r}, column {c} is {}, not a finite number",
                w.at(r, c)
            )));
        }
    }
    Ok(())
}

/// The Gram matrix of a matrix with `cols` inputs, or what is wrong with it.
pub(crate) fn gram<'a>(stats: &Stats<'a>, cols: usize) -> Result<&'a Gram, MethodError> {
    let gram = stats.gram()?;
    if gram.n() != cols {
        return Err(MethodError::new(format!("a Gram matrix of {} inputs for a matrix of {cols}", gram.n())));
    }
    if gram.tokens() == 0 {
        return Err(MethodError::new("no calibration token reached this matrix; calibrate on more text"));
    }
    match gram.data().iter().position(|v| !v.is_finite()) {
        None => Ok(gram),
        Some(i) => Err(MethodError::new(format!(
            "calibration gave inputs beyond the range of numbers: XᵀX is {} for inputs {} and {}",
            gram.data()[i],
            i / cols,
            i % cols
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_json::json;

    #[derive(Debug, Default, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Two {
        damping: f64,
        block: usize,
        #[serde(skip)]
        _inner: bool,
    }

    #[test]
    fn names_of_fields_and_errors_that_name_a_key() {
        assert_eq!(keys::<Two>(), ["damping", "block"]);
        let fails = |v: Value| parameters::<Two>("two", v).expect_err("refused").what;
        let said = fails(json!({ "dampng": 1 }));
        assert!(said.contains("'dampng'") && said.contains("did you mean 'damping'"), "{said}");
        let said = fails(json!({ "block": 1, "damping": "x" }));
        assert!(said.starts_with("damping = \"x\""), "{said}");
        assert!(!fails(json!({ "sparsity": 1 })).contains("did you mean 'damping'"));
        assert!(fails(json!([1])).contains("no table"));
        let two = parameters::<Two>("two", json!({ "damping": 0.5 })).expect("read");
        assert_eq!((two.damping, two.block), (0.5, 0));
    }

    #[test]
    fn edits_between_words() {
        for (a, b, d) in [("", "abc", 3), ("bit", "bits", 1), ("kitten", "sitting", 3), ("same", "same", 0)] {
            assert_eq!((distance(a, b), distance(b, a)), (d, d), "{a} {b}");
        }
    }
}
