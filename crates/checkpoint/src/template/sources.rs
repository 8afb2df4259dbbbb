//! Where a checkpoint keeps its templates.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::TemplateError;
use crate::gguf::Metadata;

/// The directory of the templates beside `chat_template.jinja`, each in a file of its name.
pub(crate) const DIR_OF_NAMED: &str = "additional_chat_templates";

/// Bytes of a template.
const MAX_BYTES: u64 = 4 << 20;

type Found = Vec<(String, String)>;

fn unreadable(path: &Path, what: impl ToString) -> TemplateError {
    TemplateError::Read { path: path.display().to_string(), what: what.to_string() }
}

/// A file's text, where there is one.
fn read(path: &Path, most: u64) -> Result<Option<String>, TemplateError> {
    let bytes = match std::fs::metadata(path) {
        Ok(m) => m.len(),
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(unreadable(path, e)),
    };
    if bytes > most {
        return Err(unreadable(path, format!("it has {bytes} bytes; a template has {most} at the most")));
    }
    std::fs::read_to_string(path).map(Some).map_err(|e| unreadable(path, e))
}

/// The templates of a directory by their names; `default` is the usual one. As in `transformers`, files of their own
/// come before those inside `tokenizer_config.json`.
pub(crate) fn templates_in(dir: &Path) -> Result<Found, TemplateError> {
    let mut found = Vec::new();
    if let Some(text) = read(&dir.join("chat_template.jinja"), MAX_BYTES)? {
        found.push(("default".to_owned(), text));
    }
    for (name, path) in named_files(dir).map_err(|e| unreadable(&dir.join(DIR_OF_NAMED), e))? {
        found.extend(read(&path, MAX_BYTES)?.map(|text| (name, text)));
    }
    for name in ["tokenizer_config.json", "chat_template.json"] {
        if found.iter().any(|(n, _)| n == "default") {
            break;
        }
        let path = dir.join(name);
        let Some(text) = read(&path, crate::json::MAX_SETTINGS)? else { continue };
        crate::json::few_objects(text.as_bytes()).map_err(|e| unreadable(&path, e))?;
        let config: Value = crate::json::parse(text.as_bytes()).map_err(|e| unreadable(&path, e))?;
        for (name, text) in of_config(&config)? {
            if !found.iter().any(|(n, _)| *n == name) {
                found.push((name, text));
            }
        }
    }
    Ok(found)
}

/// Names and files of the templates beside `chat_template.jinja`, in the order of their names.
pub(crate) fn named_files(dir: &Path) -> std::io::Result<Vec<(String, PathBuf)>> {
    let entries = match std::fs::read_dir(dir.join(DIR_OF_NAMED)) {
        Ok(entries) => entries,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix(".jinja"));
        if let Some(name) = name.filter(|n| !n.is_empty() && path.is_file()) {
            files.push((name.to_owned(), path));
        }
    }
    files.sort();
    Ok(files)
}

/// The `chat_template` of a `tokenizer_config.json`.
pub(super) fn of_config(config: &Value) -> Result<Found, TemplateError> {
    let found: Option<Found> = match &config["chat_template"] {
        Value::Null => Some(Vec::new()),
        Value::String(source) => Some(vec![("default".to_owned(), source.clone())]),
        Value::Array(list) => {
            let pair = |t: &Value| Some((t["name"].as_str()?.to_owned(), t["template"].as_str()?.to_owned()));
            list.iter().map(pair).collect()
        }
        Value::Object(map) => map.iter().map(|(name, t)| Some((name.clone(), t.as_str()?.to_owned()))).collect(),
        _ => None,
    };
    let found = found.ok_or_else(|| {
        let what = "the chat_template of the configuration is neither a text nor a list of {name, template}";
        TemplateError::Syntax(what.into())
    })?;
    bounded(found)
}

/// Templates inside other files have no more bytes than those in files of their own.
fn bounded(found: Found) -> Result<Found, TemplateError> {
    match found.iter().find(|(_, text)| text.len() as u64 > MAX_BYTES) {
        Some((_, text)) => {
            let bytes = text.len();
            Err(TemplateError::Syntax(format!("it has {bytes} bytes; a template has {MAX_BYTES} at the most")))
        }
        None => Ok(found),
    }
}

/// The templates of a GGUF file by their names.
pub(crate) fn templates_of(metadata: &Metadata) -> Result<Found, TemplateError> {
    let text = |key: &str| metadata.get_str(key).map_err(|e| TemplateError::Syntax(e.what));
    let mut found = Vec::new();
    if let Some(source) = text("tokenizer.chat_template")? {
        found.push(("default".to_owned(), source.to_owned()));
    }
    for (key, _) in metadata.iter() {
        let Some(name) = key.strip_prefix("tokenizer.chat_template.") else { continue };
        found.extend(text(key)?.map(|source| (name.to_owned(), source.to_owned())));
    }
    bounded(found)
}
