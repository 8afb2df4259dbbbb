//! A number that is not finite in a configuration: an error with the key's name where the key is read, no difference
//! where it is not.

use std::path::Path;

use lacuna_arch::from_config;
use lacuna_checkpoint::json::parse;
use serde_json::{Value, json};

/// The configuration with `NaN` at a path of keys, by way of the text that Python would write.
fn with_nan(config: &Value, path: &[&str]) -> Value {
    let mut changed = config.clone();
    let at = path.iter().fold(&mut changed, |v, key| &mut v[*key]);
    *at = json!("a place for NaN");
    let text = changed.to_string().replace("\"a place for NaN\"", "NaN");
    parse(text.as_bytes()).unwrap()
}

#[test]
fn a_nan_in_a_key_that_is_read_is_named() {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny");
    let mut refused = 0;
    for dir in std::fs::read_dir(tiny).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()) {
        let config: Value = parse(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
        let Ok(spec) = from_config(&config) else { continue };
        let mut paths: Vec<Vec<&str>> = Vec::new();
        for (key, value) in config.as_object().unwrap() {
            paths.push(vec![key]);
            paths.extend(value.as_object().into_iter().flatten().map(|(inner, _)| vec![key.as_str(), inner]));
        }
        for path in paths {
            let key = path.last().unwrap();
            match from_config(&with_nan(&config, &path)) {
                Err(e) => {
                    assert!(e.what.contains(key), "{}: {path:?}: {}", dir.display(), e.what);
                    refused += 1;
                }
                Ok(other) => assert_eq!(other, spec, "{}: {path:?} was taken for something else", dir.display()),
            }
        }
    }
    assert!(refused > 50, "{refused} keys were refused");
}
