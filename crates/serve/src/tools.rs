//! Calls of functions: how a model's template writes them, and how they are found in what the model writes.

use serde_json::{Value, json};

use crate::api::types::name;
use crate::channels;
use crate::error::ApiError;
use crate::exact;
use crate::schema::Path;

/// How a model writes its calls, read off its chat template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallFormat {
    /// `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one for each call.
    Tagged,
    /// `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`.
    List,
    /// The whole answer is `{"name": ..., "parameters": {...}}`.
    Parameters,
    /// A message in a channel, `to=functions.NAME`, that holds the arguments (GPT-OSS).
    Channels,
    /// The template knows no tools: the whole answer is `{"name": ..., "arguments": {...}}`, forced by a grammar.
    Constrained,
}

/// A call that a model wants made.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// The function.
    pub name: String,
    /// Its arguments: an object as JSON, the very text that the model wrote.
    pub arguments: String,
}

impl Call {
    /// As OpenAI's clients know it.
    pub fn json(&self) -> Value {
        json!({
            "id": name("call_"), "type": "function",
            "function": { "name": self.name, "arguments": self.arguments },
        })
    }
}

/// What a request says about tools.
#[derive(Clone, Debug)]
pub struct Tools {
    /// The functions as they came, for the template.
    pub list: Vec<Value>,
    /// How the model writes calls.
    pub form: CallFormat,
    /// The functions of which one must be called, if one must.
    pub forced: Vec<usize>,
    /// Whether only the first call counts.
    pub single: bool,
}

impl CallFormat {
    /// The form of a template.
    pub fn of(template: &str, takes_tools: bool) -> CallFormat {
        match () {
            () if !takes_tools => CallFormat::Constrained,
            () if template.contains(channels::CHANNEL) => CallFormat::Channels,
            () if template.contains("<tool_call>") => CallFormat::Tagged,
            () if template.contains("[TOOL_CALLS]") => CallFormat::List,
            () => CallFormat::Parameters,
        }
    }

    fn arguments(self) -> &'static str {
        if self == CallFormat::Parameters { "parameters" } else { "arguments" }
    }

    /// What may begin calls in an answer that need not be one.
    fn mark(self) -> &'static str {
        match self {
            CallFormat::Tagged => "<tool_call>",
            CallFormat::List => "[TOOL_CALLS]",
            CallFormat::Channels => channels::CHANNEL,
            CallFormat::Parameters | CallFormat::Constrained => "{",
        }
    }

    /// What ends a call before the answer ends.
    fn end(self) -> Option<&'static str> {
        match self {
            CallFormat::Tagged => Some("</tool_call>"),
            CallFormat::Channels => Some(channels::CALL),
            CallFormat::List | CallFormat::Parameters | CallFormat::Constrained => None,
        }
    }
}

impl Tools {
    /// Reads `tools`, `tool_choice` and `parallel_tool_calls`; none where there is nothing to call.
    pub fn read(
        list: Option<Vec<Value>>,
        choice: Option<&Value>,
        parallel: Option<bool>,
        form: CallFormat,
    ) -> Result<Option<Tools>, ApiError> {
        let list = list.unwrap_or_default();
        let bad = |message: String| ApiError::bad("tool_choice", message);
        if list.is_empty() {
            return match choice {
                Some(c) if c != "none" && c != "auto" => Err(bad("'tool_choice' needs tools".into())),
                _ => Ok(None),
            };
        }
        let named = |tool: &Value| tool["function"]["name"].as_str().unwrap_or_default().to_owned();
        for (i, tool) in list.iter().enumerate() {
            let name = named(tool);
            let param = format!("tools.{i}.function.name");
            if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-') {
                return Err(ApiError::bad(param.as_str(), format!("'{param}' may have letters, digits, _ and - only")));
            }
            if list[..i].iter().any(|other| named(other) == name) {
                return Err(ApiError::bad(param.as_str(), format!("'{param}' is there twice")));
            }
        }
        let forced: Vec<usize> = match choice {
            None => Vec::new(),
            Some(Value::String(word)) if word == "none" => return Ok(None),
            Some(Value::String(word)) if word == "required" => (0..list.len()).collect(),
            Some(Value::Object(one)) => {
                let wanted = one["function"]["name"].as_str().unwrap_or_default();
                let at = list.iter().position(|t| named(t) == wanted);
                vec![at.ok_or_else(|| bad(format!("'tool_choice' names '{wanted}', which is not among the tools")))?]
            }
            Some(_) => Vec::new(),
        };
        if forced.is_empty() && form == CallFormat::Constrained {
            return Err(ApiError::bad(
                "tools",
                "this model was not made to choose tools by itself: its chat template has no place for them. With \
                 tool_choice \
                 \"required\" or a named function the answer is held to a call by a grammar",
            )
            .code("unsupported_parameter"));
        }
        Ok(Some(Tools { list, form, forced, single: parallel == Some(false) }))
    }

    /// What a forced call begins with, before its JSON.
    pub fn opening(&self) -> String {
        match self.form {
            CallFormat::Tagged => "<tool_call>\n".to_owned(),
            CallFormat::List => "[TOOL_CALLS] ".to_owned(),
            CallFormat::Channels => match self.named() {
                Some(name) => channels::call_of(name),
                // Which one it is stands in what is written.
                None => format!("{}commentary{}", channels::CHANNEL, channels::MESSAGE),
            },
            CallFormat::Parameters | CallFormat::Constrained => String::new(),
        }
    }

    /// The function that must be called, where its name stands before the call.
    fn named(&self) -> Option<&str> {
        match self.forced[..] {
            [one] if self.form == CallFormat::Channels => self.list[one]["function"]["name"].as_str(),
            _ => None,
        }
    }

    /// The schema of a forced call.
    pub fn schema(&self) -> Value {
        let key = self.form.arguments();
        let named = self.named().is_some();
        let one = |&i: &usize| {
            let function = &self.list[i]["function"];
            let mut schema = function.get("parameters").cloned().unwrap_or_else(|| json!({ "type": "object" }));
            if schema.as_object().is_some_and(|s| s.is_empty()) {
                schema = json!({ "type": "object" });
            }
            // References inside lead to definitions, which must stand at the root.
            if named {
                return (schema, [("$defs", None), ("definitions", None)]);
            }
            let definitions = ["$defs", "definitions"].map(|k| (k, schema.as_object_mut().and_then(|s| s.remove(k))));
            let properties = json!({ "name": { "const": function["name"] }, key: schema });
            let call = json!({
                "type": "object", "properties": properties, "required": ["name", key], "additionalProperties": false,
            });
            (call, definitions)
        };
        let mut calls = Vec::new();
        let mut root = serde_json::Map::new();
        for (call, definitions) in self.forced.iter().map(one) {
            calls.push(call);
            for (k, more) in definitions {
                if let Some(Value::Object(more)) = more {
                    let here = root.entry(k).or_insert_with(|| json!({}));
                    here.as_object_mut().into_iter().for_each(|h| h.extend(more.clone()));
                }
            }
        }
        let call = if calls.len() == 1 { calls.remove(0) } else { json!({ "anyOf": calls }) };
        let whole = if self.form == CallFormat::List {
            json!({ "type": "array", "items": call, "minItems": 1, "maxItems": 1 })
        } else {
            call
        };
        if let Value::Object(fields) = whole {
            root.extend(fields);
        }
        Value::Object(root)
    }

    /// Refuses numbers that a forced call could not be held to.
    pub fn check_numbers(&self) -> Result<(), ApiError> {
        let tools = Path::Field(&Path::Root, "tools");
        self.forced.iter().try_for_each(|&i| {
            let tool = Path::Index(&tools, i);
            let function = Path::Field(&tool, "function");
            let schema = &self.list[i]["function"]["parameters"];
            exact::check_schema(schema, &Path::Field(&function, "parameters"))
        })
    }

    /// The words that tell a model of tools where its template has no place for them.
    pub fn instruction(&self) -> String {
        let list: Vec<&Value> = self.forced.iter().map(|&i| &self.list[i]["function"]).collect();
        format!(
            "You can call these functions: {}\nAnswer with one call, written as JSON: {{\"name\": ..., \"arguments\": \
             {{...}}}}",
            Value::from_iter(list.into_iter().cloned())
        )
    }

    fn call(&self, text: &str) -> Option<Call> {
        let fields = exact::fields(text)?;
        let field = |name: &str| fields.iter().rev().find(|(key, _)| key == name).map(|(_, value)| *value);
        let name: String = serde_json::from_str(field("name")?).ok()?;
        self.list.iter().find(|t| t["function"]["name"] == name)?;
        let arguments = field("arguments").or_else(|| field("parameters")).unwrap_or("{}");
        // Some models write the arguments as a text of JSON.
        let arguments = serde_json::from_str(arguments).unwrap_or_else(|_| arguments.to_owned());
        exact::fields(&arguments).is_some().then_some(Call { name, arguments })
    }

    /// The calls of a piece of JSON: one or a list; none where it is not all calls. In a channel, those of a message
    /// behind its beginning.
    fn calls(&self, text: &str) -> Option<Vec<Call>> {
        if self.form == CallFormat::Channels {
            let (name, arguments) = match (text.split_once(channels::MESSAGE), self.named()) {
                (Some((head, arguments)), _) => (channels::called(head)?, arguments),
                (None, Some(name)) => (name, text),
                (None, None) => return Some(vec![self.call(text)?]),
            };
            self.list.iter().find(|t| t["function"]["name"] == name)?;
            let arguments = if arguments.trim().is_empty() { "{}" } else { arguments.trim() };
            exact::fields(arguments)?;
            return Some(vec![Call { name: name.to_owned(), arguments: arguments.to_owned() }]);
        }
        match exact::items(text) {
            Some(all) if !all.is_empty() => all.into_iter().map(|one| self.call(one)).collect(),
            _ => Some(vec![self.call(text)?]),
        }
    }
}

/// Parts an answer, as it comes, into text and calls.
pub struct Splitter {
    tools: Tools,
    held: String,
    /// What was seen so far is text, so that a bare brace is no call.
    spoke: bool,
    inside: bool,
    calls: Vec<Call>,
}

impl Splitter {
    /// A splitter at the beginning of an answer. A forced call has its opening in the prompt.
    pub fn new(tools: Tools) -> Splitter {
        let inside = !tools.forced.is_empty();
        Splitter { tools, held: String::new(), spoke: false, inside, calls: Vec::new() }
    }

    /// Takes more of the answer; returns what is text for certain.
    pub fn push(&mut self, piece: &str) -> String {
        self.held.push_str(piece);
        let mut text = String::new();
        let form = self.tools.form;
        loop {
            if self.inside {
                let found = form.end().and_then(|mark| Some((self.held.find(mark)?, mark)));
                let Some((end, mark)) = found else { return text };
                let inner = self.held[..end].to_owned();
                self.held.drain(..end + mark.len());
                self.inside = false;
                match self.tools.calls(&inner) {
                    Some(calls) => self.calls.extend(calls),
                    None => text += &format!("{}{inner}{mark}", form.mark()),
                }
                continue;
            }
            let mark = form.mark();
            let bare = mark == "{";
            if bare && self.spoke {
                return text + &std::mem::take(&mut self.held);
            }
            if let Some(at) = self.held.find(mark) {
                let before = self.held[..at].to_owned();
                if bare && !before.trim().is_empty() {
                    self.spoke = true;
                    continue;
                }
                self.held.drain(..at + if bare { 0 } else { mark.len() });
                text += before.trim_end();
                self.inside = true;
                continue;
            }
            // The end of what is held may be the beginning of a mark, and white space before calls is no text.
            let open = |at: &usize| mark.starts_with(self.held[*at..].trim_start());
            let cut = self.held.char_indices().map(|(at, _)| at).find(open).unwrap_or(self.held.len());
            let rest = self.held.split_off(cut);
            let certain = std::mem::replace(&mut self.held, rest);
            self.spoke |= !certain.trim().is_empty();
            text += &certain;
            if !(bare && self.spoke && !self.held.is_empty()) {
                return text;
            }
        }
    }

    /// The answer is over: what is left of its text, and the calls.
    pub fn finish(mut self) -> (String, Vec<Call>) {
        let mut text = String::new();
        let left = std::mem::take(&mut self.held);
        if self.inside {
            match self.tools.calls(&left) {
                Some(calls) => self.calls.extend(calls),
                // Broken off: what there is, is shown.
                None if self.tools.forced.is_empty() && self.tools.form.mark() != "{" => {
                    text = format!("{}{left}", self.tools.form.mark());
                }
                None => text = left,
            }
        } else if self.calls.is_empty() {
            text = left;
        }
        if self.tools.single {
            self.calls.truncate(1);
        }
        (text, self.calls)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools(form: CallFormat, choice: Value) -> Tools {
        let list = vec![
            json!({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}),
            json!({"type": "function", "function": {"name": "now"}}),
        ];
        Tools::read(Some(list), Some(&choice), None, form).unwrap().unwrap()
    }

    fn split(tools: &Tools, text: &str, step: usize) -> (String, Vec<Call>) {
        let mut s = Splitter::new(tools.clone());
        let chars: Vec<char> = text.chars().collect();
        let mut out = String::new();
        for piece in chars.chunks(step) {
            out += &s.push(&piece.iter().collect::<String>());
        }
        let (rest, calls) = s.finish();
        (out + &rest, calls)
    }

    #[test]
    fn calls_are_found_however_the_answer_is_cut() {
        let call = |name: &str, arguments: &str| Call { name: name.into(), arguments: arguments.into() };
        let add = r#"{"name": "add", "arguments": {"a": 1}}"#;
        let cases = [
            (CallFormat::Tagged, format!("Let me see.\n<tool_call>\n{add}\n</tool_call>"), "Let me see.", 1),
            (
                CallFormat::Tagged,
                format!("<tool_call>{add}</tool_call>\n<tool_call>{{\"name\": \"now\"}}</tool_call>"),
                "",
                2,
            ),
            (CallFormat::Tagged, format!("<tool_call>{add}"), "", 1),
            (CallFormat::Tagged, "a < b <tool".to_owned(), "a < b <tool", 0),
            (
                CallFormat::Tagged,
                "<tool_call>{\"name\": \"rm\"}</tool_call>".to_owned(),
                "<tool_call>{\"name\": \"rm\"}</tool_call>",
                0,
            ),
            (CallFormat::List, format!("[TOOL_CALLS][{add}, {add}]"), "", 2),
            (CallFormat::List, "[TOOL_CALLS] nonsense".to_owned(), "[TOOL_CALLS] nonsense", 0),
            (CallFormat::Parameters, r#"{"name": "add", "parameters": {"a": 1}}"#.to_owned(), "", 1),
            (CallFormat::Parameters, "A set is {1, 2}.".to_owned(), "A set is {1, 2}.", 0),
            (CallFormat::Parameters, "{1, 2} is a set".to_owned(), "{1, 2} is a set", 0),
        ];
        for (form, text, expected, n) in cases {
            let tools = tools(form, json!("auto"));
            for step in [1, 2, 3, 7, 1000] {
                let (said, calls) = split(&tools, &text, step);
                assert_eq!((said.as_str(), calls.len()), (expected, n), "{form:?} {text} by {step}");
                if n > 0 {
                    assert_eq!(calls[0], call("add", r#"{"a": 1}"#));
                }
            }
        }
        let channel = |to: &str, inner: &str| format!("<|channel|>commentary to={to}<|message|>{inner}<|call|>");
        let auto = tools(CallFormat::Channels, json!("auto"));
        for step in [1, 3, 1000] {
            let two = format!("Well. {}{}", channel("functions.add", "{\"a\": 1}"), channel("functions.now", ""));
            let (said, calls) = split(&auto, &two, step);
            assert_eq!((said.as_str(), calls), ("Well.", vec![call("add", r#"{"a": 1}"#), call("now", "{}")]));
            for none in [channel("functions.rm", "{}"), channel("functions.add", "[1]"), channel("python", "{}")] {
                assert_eq!(split(&auto, &none, step), (none, vec![]));
            }
        }
        let named = json!({"type": "function", "function": {"name": "add"}});
        let forced = tools(CallFormat::Channels, named);
        assert_eq!(forced.opening(), "<|channel|>commentary to=functions.add <|constrain|>json<|message|>");
        assert_eq!(forced.schema(), json!({"type": "object"}));
        assert_eq!(split(&forced, "{\"a\": 1}", 2), (String::new(), vec![call("add", "{\"a\": 1}")]));
        let forced = tools(CallFormat::Channels, json!("required"));
        assert_eq!(forced.opening(), "<|channel|>commentary<|message|>");
        assert_eq!(split(&forced, add, 2), (String::new(), vec![call("add", r#"{"a": 1}"#)]));
        let forced = tools(CallFormat::Tagged, json!("required"));
        assert_eq!(split(&forced, add, 2), (String::new(), vec![call("add", r#"{"a": 1}"#)]));
        assert_eq!(split(&forced, "{\"name\": \"ad", 3).0, "{\"name\": \"ad");
        // The very text, whatever its numbers, and however it is wrapped.
        let long = r#"{"b": 1.50,  "a": 12345678901234567890123456789}"#;
        let wrapped = format!(r#"{{"name": "add", "arguments": {}}}"#, json!(long));
        for text in [format!(r#"{{"arguments": {long}, "name": "add"}}"#), wrapped] {
            assert_eq!(split(&forced, &text, 5).1, [call("add", long)]);
        }
        for none in ["[1, 2]", "\"text\"", "7", "{\"a\": 01}", "null"] {
            let text = format!(r#"{{"name": "add", "arguments": {none}}}"#);
            assert_eq!(split(&forced, &text, 5), (text, vec![]));
        }
        let single = Tools { single: true, ..tools(CallFormat::List, json!("auto")) };
        assert_eq!(split(&single, &format!("[TOOL_CALLS][{add}, {add}]"), 4).1.len(), 1);
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        let tool = |name: &str| json!({"type": "function", "function": {"name": name}});
        let read = |tools: Vec<Value>, choice: Value, form| {
            let choice = Some(choice).filter(|c| !c.is_null());
            Tools::read(Some(tools), choice.as_ref(), None, form).map(|t| t.is_some()).map_err(|e| e.param.unwrap())
        };
        let named = |n: &str| json!({"type": "function", "function": {"name": n}});
        assert_eq!(read(vec![tool("a")], Value::Null, CallFormat::Tagged), Ok(true));
        assert_eq!(read(vec![tool("a")], json!("none"), CallFormat::Constrained), Ok(false));
        assert_eq!(read(vec![tool("a")], json!("auto"), CallFormat::Constrained), Err("tools".into()));
        assert_eq!(read(vec![tool("a")], named("a"), CallFormat::Constrained), Ok(true));
        assert_eq!(read(vec![tool("a")], named("b"), CallFormat::Tagged), Err("tool_choice".into()));
        assert_eq!(read(vec![], json!("required"), CallFormat::Tagged), Err("tool_choice".into()));
        assert_eq!(read(vec![], named("a"), CallFormat::Tagged), Err("tool_choice".into()));
        assert_eq!(read(vec![], json!("auto"), CallFormat::Tagged), Ok(false));
        assert_eq!(
            read(vec![tool("a"), tool("a")], Value::Null, CallFormat::Tagged),
            Err("tools.1.function.name".into())
        );
        assert_eq!(read(vec![tool("a b")], Value::Null, CallFormat::Tagged), Err("tools.0.function.name".into()));
        assert_eq!(CallFormat::of("{{ tools }}<tool_call>", true), CallFormat::Tagged);
        assert_eq!(CallFormat::of("{{ tools }}<|channel|>", true), CallFormat::Channels);
        assert_eq!(CallFormat::of("<|im_start|>", false), CallFormat::Constrained);
    }

    #[test]
    fn the_schema_of_a_forced_call() {
        let one = tools(CallFormat::Constrained, json!({"type": "function", "function": {"name": "add"}})).schema();
        assert_eq!(one["properties"]["name"]["const"], "add");
        let any = tools(CallFormat::Parameters, json!("required")).schema();
        assert_eq!(any["anyOf"][1]["required"], json!(["name", "parameters"]));
        let list = vec![json!({"type": "function", "function": {"name": "f", "parameters":
            {"$defs": {"x": {"type": "integer"}}, "type": "object", "properties": {"v": {"$ref": "#/$defs/x"}}}}})];
        let deep = Tools::read(Some(list), Some(&json!("required")), None, CallFormat::List).unwrap().unwrap().schema();
        assert_eq!((&deep["$defs"]["x"]["type"], &deep["maxItems"]), (&json!("integer"), &json!(1)));
    }
}
