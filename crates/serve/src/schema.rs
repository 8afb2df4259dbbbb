//! Requests held against the OpenAPI document that the server publishes.
//!
//! The document is the only description of a request: what it does not name is refused, and what it promises is checked
//! here before anything else looks at the request. The checker knows the part of JSON Schema that the document uses,
//! and a test holds the document to that part.
//!
//! Fields of OpenAI's API that this server does not have are in the document, too: their schema allows the values that
//! ask for what is done anyway, and `x-unsupported` says why there are no others.

use std::cmp::Ordering;

use serde_json::{Map, Number, Value};

use crate::error::ApiError;

/// Fields that hold JSON of the client's own, in which null is a value like others.
const FOREIGN: &[&str] =
    &["arguments", "chat_template_kwargs", "format", "input", "input_schema", "parameters", "schema"];

/// Takes the fields that are null out of a request: they count as absent. A message's content may be null and still be
/// said.
pub fn drop_nulls(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        Value::Object(fields) => {
            fields.retain(|name, value| name == "content" || !value.is_null());
            fields.iter_mut().filter(|(name, _)| !FOREIGN.contains(&name.as_str())).for_each(|(_, v)| drop_nulls(v));
        }
        _ => {}
    }
}

/// The published document.
pub struct Schema {
    document: Value,
}

impl Schema {
    /// The document of this server, which serves `model`, whose vectors have `width` numbers. `ollama`: whether it has
    /// Ollama's interface.
    pub fn new(model: &str, width: usize, ollama: bool) -> Schema {
        let mut document: Value = serde_json::from_str(include_str!("openapi.json")).unwrap_or_default();
        document["info"]["version"] = env!("CARGO_PKG_VERSION").into();
        let schemas = &mut document["components"]["schemas"];
        schemas["ModelName"]["enum"] = Value::from(vec![model]);
        schemas["OllamaModelName"]["enum"] = Value::from(vec![model.to_owned(), format!("{model}:latest")]);
        for request in ["EmbeddingRequest", "OllamaEmbedRequest"] {
            schemas[request]["properties"]["dimensions"]["enum"] = Value::from(vec![width.into(), Value::Null]);
        }
        let theirs = |page: &Value| {
            let mut pages = page.as_object().into_iter().flat_map(|p| p.values());
            pages.any(|p| p["tags"].as_array().is_some_and(|t| t.iter().any(|t| t == "Ollama")))
        };
        if let Some(paths) = document["paths"].as_object_mut().filter(|_| !ollama) {
            paths.retain(|_, page| !theirs(page));
        }
        Schema { document }
    }

    /// The document.
    pub fn document(&self) -> &Value {
        &self.document
    }

    /// Holds `value` against the component `name`. The error's `param` is the path of the field at fault.
    pub fn check(&self, name: &str, value: &Value) -> Result<(), ApiError> {
        self.visit(&self.document["components"]["schemas"][name], value, &Path::Root)
    }

    fn visit(&self, schema: &Value, value: &Value, path: &Path<'_>) -> Result<(), ApiError> {
        let Some(schema) = schema.as_object() else { return Ok(()) };
        if let Some(to) = schema.get("$ref").and_then(Value::as_str) {
            return self.visit(self.document.pointer(to.trim_start_matches('#')).unwrap_or(&Value::Null), value, path);
        }
        if let Some(choices) = schema.get("anyOf").and_then(Value::as_array) {
            self.any_of(schema, choices, value, path)?;
        }
        self.kind(schema, value, path)?;
        if let Some(only) = schema.get("const").filter(|&c| c != value) {
            return Err(path.bad(format!("must be {only}")));
        }
        if let Some(choices) = schema.get("enum").and_then(Value::as_array).filter(|c| !c.contains(value)) {
            let all: Vec<String> = choices.iter().map(Value::to_string).collect();
            return Err(path.bad(format!("must be one of {}, not {}", all.join(", "), brief(value))));
        }
        match value {
            Value::Number(n) => {
                let against =
                    |key: &str| schema.get(key).and_then(Value::as_number).and_then(|bound| compare(n, bound));
                if against("minimum") == Some(Ordering::Less) || against("maximum") == Some(Ordering::Greater) {
                    return Err(path.bad(format!("is {n}; it must be {}", range(schema))));
                }
                if against("exclusiveMinimum").is_some_and(Ordering::is_le) {
                    return Err(path.bad(format!("is {n}; it must be above {}", schema["exclusiveMinimum"])));
                }
            }
            Value::String(s) => {
                self.length(schema, s.chars().count(), ["minLength", "maxLength"], "characters", path)?
            }
            Value::Array(items) => {
                self.length(schema, items.len(), ["minItems", "maxItems"], "items", path)?;
                if let Some(each) = schema.get("items") {
                    for (i, item) in items.iter().enumerate() {
                        self.visit(each, item, &Path::Index(path, i))?;
                    }
                }
            }
            Value::Object(fields) => self.object(schema, fields, path)?,
            _ => {}
        }
        Ok(())
    }

    fn object(
        &self,
        schema: &Map<String, Value>,
        fields: &Map<String, Value>,
        path: &Path<'_>,
    ) -> Result<(), ApiError> {
        let none = Map::new();
        let known = schema.get("properties").and_then(Value::as_object).unwrap_or(&none);
        for name in schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
            if !fields.contains_key(name) {
                return Err(Path::Field(path, name).bad("is missing").code("missing_required_parameter"));
            }
        }
        let other = schema.get("additionalProperties");
        self.length(schema, fields.len(), ["minProperties", "maxProperties"], "entries", path)?;
        for (name, value) in fields {
            let path = Path::Field(path, name);
            match (known.get(name), other) {
                (Some(schema), _) => {
                    self.visit(schema, value, &path).map_err(|e| match schema["x-unsupported"].as_str() {
                        Some(why) => path.bad(format!("is not supported: {why}")).code("unsupported_parameter"),
                        None => e,
                    })?
                }
                // Null counts as absent, also where nothing is known of that name.
                (None, _) if value.is_null() => {}
                (None, Some(Value::Bool(false))) => return Err(path.bad("is not known").code("unknown_parameter")),
                (None, Some(schema)) => self.visit(schema, value, &path)?,
                (None, None) => {}
            }
        }
        Ok(())
    }

    /// One choice must fit. The error is that of the choice that is meant: of the right type, and of the right tag
    /// where objects have one.
    fn any_of(
        &self,
        schema: &Map<String, Value>,
        choices: &[Value],
        value: &Value,
        path: &Path<'_>,
    ) -> Result<(), ApiError> {
        let mut first = None;
        let tag = schema.get("discriminator").and_then(|d| d["propertyName"].as_str());
        for choice in choices {
            let Err(e) = self.visit(choice, value, path) else { return Ok(()) };
            let of_its_kind = |s: &Map<String, Value>| self.kind(s, value, path).is_ok();
            let meant = self.target(choice).as_object().is_some_and(of_its_kind)
                && tag.is_none_or(|tag| match value.get(tag) {
                    Some(v) => self.tags(choice, tag).any(|t| t == v),
                    None => self.tags(choice, tag).next().is_none(),
                });
            if meant {
                first.get_or_insert(e);
            }
        }
        Err(first.unwrap_or_else(|| match tag {
            Some(tag) if value.is_object() => {
                let all: Vec<String> = choices.iter().flat_map(|c| self.tags(c, tag)).map(Value::to_string).collect();
                Path::Field(path, tag).bad(format!("must be one of {}", all.join(", ")))
            }
            _ => path.bad(format!("has a form that is not known: {}", brief(value))),
        }))
    }

    /// What a schema stands for, if it is a reference.
    fn target<'a>(&'a self, schema: &'a Value) -> &'a Value {
        let to = schema["$ref"].as_str().and_then(|r| self.document.pointer(r.trim_start_matches('#')));
        to.unwrap_or(schema)
    }

    /// The values that a schema allows for the field that tells objects apart.
    fn tags<'a>(&'a self, schema: &'a Value, tag: &str) -> impl Iterator<Item = &'a Value> {
        let p = &self.target(schema)["properties"][tag];
        p.get("const").into_iter().chain(p["enum"].as_array().into_iter().flatten())
    }

    fn kind(&self, schema: &Map<String, Value>, value: &Value, path: &Path<'_>) -> Result<(), ApiError> {
        let Some(kind) = schema.get("type") else { return Ok(()) };
        let kinds: Vec<&str> = kind
            .as_str()
            .map_or_else(|| kind.as_array().into_iter().flatten().filter_map(Value::as_str).collect(), |one| vec![one]);
        let fits = |kind: &&str| match *kind {
            "null" => value.is_null(),
            "boolean" => value.is_boolean(),
            "string" => value.is_string(),
            "array" => value.is_array(),
            "object" => value.is_object(),
            "number" => value.is_number(),
            // 5.0 is an integer to JSON Schema.
            "integer" => value.as_f64().is_some_and(|x| x.fract() == 0.0 && x.abs() < 1.9e19),
            _ => false,
        };
        if kinds.iter().any(fits) {
            return Ok(());
        }
        Err(path.bad(format!("must be of type {}, not {}", kinds.join(" or "), brief(value))).code("invalid_type"))
    }

    fn length(
        &self,
        schema: &Map<String, Value>,
        n: usize,
        keys: [&str; 2],
        of: &str,
        path: &Path<'_>,
    ) -> Result<(), ApiError> {
        let bound = |key| schema.get(key).and_then(Value::as_u64);
        if let Some(least) = bound(keys[0]).filter(|&least| (n as u64) < least) {
            return Err(path.bad(format!("has {n} {of}; it must have at least {least}")));
        }
        if let Some(most) = bound(keys[1]).filter(|&most| (n as u64) > most) {
            return Err(path.bad(format!("has {n} {of}; it must have at most {most}")));
        }
        Ok(())
    }
}

/// Integers are compared as such, whatever their length.
fn compare(a: &Number, b: &Number) -> Option<Ordering> {
    let whole = |n: &Number| n.as_i64().map(i128::from).or(n.as_u64().map(i128::from));
    match (whole(a), whole(b)) {
        (Some(a), Some(b)) => Some(a.cmp(&b)),
        _ => a.as_f64()?.partial_cmp(&b.as_f64()?),
    }
}

fn range(schema: &Map<String, Value>) -> String {
    match (schema.get("minimum"), schema.get("maximum")) {
        (Some(a), Some(b)) => format!("between {a} and {b}"),
        (Some(a), None) => format!("at least {a}"),
        (None, Some(b)) => format!("at most {b}"),
        (None, None) => "a number".to_owned(),
    }
}

/// A value in a message: what it is, never a long text.
fn brief(value: &Value) -> String {
    match value {
        Value::String(s) if s.chars().count() > 40 => "a long text".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        plain => plain.to_string(),
    }
}

/// Where in the request whoever checks it is.
pub enum Path<'a> {
    /// At its top.
    Root,
    /// At a field of what lies there.
    Field(&'a Path<'a>, &'a str),
    /// At an item of what lies there.
    Index(&'a Path<'a>, usize),
}

impl Path<'_> {
    fn text(&self) -> String {
        let join = |before: String, part: String| if before.is_empty() { part } else { format!("{before}.{part}") };
        match self {
            Path::Root => String::new(),
            Path::Field(before, name) => join(before.text(), (*name).chars().take(64).collect()),
            Path::Index(before, i) => join(before.text(), i.to_string()),
        }
    }

    /// An error about what lies there.
    pub fn bad(&self, what: impl AsRef<str>) -> ApiError {
        let path = self.text();
        if path.is_empty() {
            return ApiError { param: None, ..ApiError::bad("", format!("the request {}", what.as_ref())) };
        }
        ApiError::bad(path.as_str(), format!("'{path}' {}", what.as_ref()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn wrong(name: &str, value: Value) -> (String, &'static str) {
        let e = Schema::new("m", 64, true).check(name, &value).unwrap_err();
        assert_eq!(e.status, 400, "{e:?}");
        (e.param.unwrap_or_default(), e.code.unwrap_or_default())
    }

    #[test]
    fn the_document_stays_within_what_the_checker_knows() {
        const KNOWN: &[&str] = &[
            "$ref",
            "additionalProperties",
            "anyOf",
            "const",
            "default",
            "description",
            "discriminator",
            "enum",
            "example",
            "exclusiveMinimum",
            "format",
            "items",
            "maxItems",
            "maxLength",
            "maxProperties",
            "maximum",
            "minItems",
            "minLength",
            "minProperties",
            "minimum",
            "properties",
            "required",
            "type",
            "x-unsupported",
        ];
        fn walk(schema: &Value, at: &str) {
            let fields = schema.as_object().unwrap_or_else(|| panic!("{at} is no schema"));
            for (key, value) in fields {
                assert!(KNOWN.contains(&key.as_str()), "{at}: the checker does not know '{key}'");
                match key.as_str() {
                    "properties" => value.as_object().unwrap().iter().for_each(|(k, v)| walk(v, &format!("{at}.{k}"))),
                    "items" => walk(value, &format!("{at}[]")),
                    "anyOf" => value.as_array().unwrap().iter().for_each(|v| walk(v, at)),
                    "additionalProperties" if value.is_object() => walk(value, at),
                    _ => {}
                }
            }
        }
        let schema = Schema::new("m", 64, true);
        let all = schema.document()["components"]["schemas"].as_object().unwrap();
        assert!(all.len() > 10);
        all.iter().for_each(|(name, s)| walk(s, name));
        // Every reference leads somewhere.
        fn refs(v: &Value, all: &mut Vec<String>) {
            match v {
                Value::Object(o) => o.iter().for_each(|(k, v)| match v.as_str().filter(|_| k == "$ref") {
                    Some(to) => all.push(to.to_owned()),
                    None => refs(v, all),
                }),
                Value::Array(a) => a.iter().for_each(|v| refs(v, all)),
                _ => {}
            }
        }
        let mut found = Vec::new();
        refs(schema.document(), &mut found);
        for to in found {
            assert!(schema.document().pointer(to.trim_start_matches('#')).is_some(), "{to} leads nowhere");
        }
    }

    /// What the document says of fields that may be left out: they may be null as well.
    #[test]
    fn null_is_allowed_wherever_nothing_is() {
        let s = Schema::new("m", 64, true);
        let mut todo = ["ChatCompletionRequest", "CompletionRequest", "EmbeddingRequest"]
            .map(|n| (n.to_owned(), &s.document["components"]["schemas"][n]))
            .to_vec();
        let (mut seen, mut fields) = (Vec::new(), 0);
        while let Some((at, schema)) = todo.pop() {
            let to = s.target(schema);
            if seen.contains(&std::ptr::from_ref(to)) {
                continue;
            }
            seen.push(to);
            let required = to["required"].as_array().cloned().unwrap_or_default();
            for (name, field) in to["properties"].as_object().into_iter().flatten() {
                let at = format!("{at}.{name}");
                let optional = !required.iter().any(|r| r == name);
                let allowed = s.visit(field, &Value::Null, &Path::Root).is_ok();
                assert!(allowed || !optional, "{at} may be left out, but may not be null");
                fields += usize::from(optional);
                todo.push((at, field));
            }
            todo.extend(to["anyOf"].as_array().into_iter().flatten().map(|s| (at.clone(), s)));
            todo.extend(to.get("items").map(|s| (at.clone(), s)));
        }
        assert!(fields > 60, "{fields}");
    }

    #[test]
    fn nulls_are_dropped_but_for_those_that_say_something() {
        let mut v = json!({
            "seed": null, "stop": ["a", null], "messages": [{"role": "assistant", "content": null, "audio": null,
                "tool_calls": [{"id": null, "function": {"name": "f", "arguments": "null"}}]}],
            "tools": [{"function": {"description": null, "strict": null, "parameters": {"const": null, "default": null}}}],
            "response_format": {"json_schema": {"strict": null, "schema": {"enum": [null], "x": {"const": null}}}},
        });
        drop_nulls(&mut v);
        let expected = json!({
            "stop": ["a", null], "messages": [{"role": "assistant", "content": null,
                "tool_calls": [{"function": {"name": "f", "arguments": "null"}}]}],
            "tools": [{"function": {"parameters": {"const": null, "default": null}}}],
            "response_format": {"json_schema": {"schema": {"enum": [null], "x": {"const": null}}}},
        });
        assert_eq!(v, expected);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let chat = |more: Value| {
            let mut v = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
            v.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            v
        };
        let name = "ChatCompletionRequest";
        assert!(
            Schema::new("m", 64, true)
                .check(name, &chat(json!({"temperature": 0.5, "n": 2.0, "stop": ["a", "b"]})))
                .is_ok()
        );
        // Null counts as absent, whatever it is said of.
        let null = json!({"zzz": null, "logit_bias": {"5": null}, "stream_options": {"zzz": null},
            "messages": [{"role": "user", "content": "hi", "zzz": null}]});
        assert!(Schema::new("m", 64, true).check(name, &chat(null)).is_ok());
        for (more, param, code) in [
            (json!({"temperature": 3}), "temperature", "invalid_value"),
            (json!({"temperature": "hot"}), "temperature", "invalid_type"),
            (json!({"n": 1.5}), "n", "invalid_type"),
            (json!({"n": 0}), "n", "invalid_value"),
            (json!({"top_p": 0}), "top_p", "invalid_value"),
            (json!({"stop": vec!["a"; 33]}), "stop", "invalid_value"),
            (json!({"zzz": 1}), "zzz", "unknown_parameter"),
            (json!({"seed": 9_223_372_036_854_775_808_u64}), "seed", "invalid_value"),
            (json!({"store": true}), "store", "unsupported_parameter"),
            (json!({"audio": {"voice": "x", "format": "wav"}}), "audio", "unsupported_parameter"),
            (json!({"modalities": ["text", "audio"]}), "modalities", "unsupported_parameter"),
            (json!({"metadata": {"a": 1}}), "metadata.a", "invalid_type"),
            (json!({"reasoning_effort": "some"}), "reasoning_effort", "invalid_value"),
            (json!({"chat_template_kwargs": {"messages": 1}, "enable_thinking": 1}), "enable_thinking", "invalid_type"),
            (json!({"prompt_cache_options": {"ttl": "30m"}}), "prompt_cache_options", "unsupported_parameter"),
            (
                json!({"stream_options": {"include_obfuscation": true}}),
                "stream_options.include_obfuscation",
                "unsupported_parameter",
            ),
            (json!({"messages": [{"role": "user", "content": null}]}), "messages.0.content", "invalid_value"),
            (json!({"messages": [{"role": "user", "content": "x", "name": 7}]}), "messages.0.name", "invalid_type"),
            (
                json!({"messages": [{"role": "assistant", "content": "x", "annotations": [{"type": "url_citation"}]}]}),
                "messages.0.annotations",
                "unsupported_parameter",
            ),
            (
                json!({"tools": [{"type": "custom", "custom": {"name": "x"}}]}),
                "tools.0.function",
                "missing_required_parameter",
            ),
            (json!({"messages": []}), "messages", "invalid_value"),
            (json!({"messages": [{"role": "user"}]}), "messages.0.content", "missing_required_parameter"),
            (json!({"messages": [{"role": "pope", "content": "x"}]}), "messages.0.role", "invalid_value"),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": ""}}]}]}),
                "messages.0.content.0.type",
                "invalid_value",
            ),
            (
                json!({"response_format": {"type": "json_schema"}}),
                "response_format.json_schema",
                "missing_required_parameter",
            ),
            (json!({"stream_options": {"include_usage": 1}}), "stream_options.include_usage", "invalid_type"),
            (json!({"logit_bias": {"5": 101}}), "logit_bias.5", "invalid_value"),
            (
                json!({"tools": [{"type": "function", "function": {}}]}),
                "tools.0.function.name",
                "missing_required_parameter",
            ),
        ] {
            assert_eq!(wrong(name, chat(more.clone())), (param.to_owned(), code), "{more}");
        }
        assert_eq!(wrong(name, json!({"model": "m"})), ("messages".to_owned(), "missing_required_parameter"));
        assert_eq!(wrong(name, json!([])), (String::new(), "invalid_type"));
    }
}
