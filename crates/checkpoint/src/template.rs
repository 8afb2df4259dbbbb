//! Chat templates: a list of messages becomes the text that the model was trained to continue.
//!
//! Templates are Jinja programs from the checkpoint, written against what `transformers` offers them: trimmed blocks, Python's string and dict
//! methods, `raise_exception`, `strftime_now`, a `tojson` that writes as Python does, `{% generation %}` marks. They are programs from
//! outside, so that they run on a budget of instructions. Departs from `transformers`: `strftime_now` tells UTC, not local time.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind};
use serde::Serialize;

use crate::Checkpoint;

/// Instructions that a template may use: a hundred times what a long conversation needs, and about a second.
const FUEL: u64 = 10_000_000;

/// Bytes of a rendered conversation.
const MAX_OUTPUT_BYTES: usize = 64 << 20;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant` (some models know more).
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A turn of `role` saying `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }
}

/// Why a conversation could not be rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The checkpoint has no template.
    #[error(
        "the model has no chat template ({0}): it was probably not trained to chat. Give the text itself with `generate`, or put the \
         template of the model's family into the checkpoint as chat_template.jinja"
    )]
    Missing(String),
    /// A file could not be read.
    #[error("cannot read {path}: {what}")]
    Read {
        /// The file.
        path: String,
        /// What was wrong.
        what: String,
    },
    /// The template is no valid Jinja.
    #[error("the chat template does not parse: {0}")]
    Syntax(String),
    /// The template refused the conversation, in its own words.
    #[error("the chat template refuses the conversation: {0}")]
    Refused(String),
    /// The template failed.
    #[error("the chat template failed: {0}")]
    Failed(String),
}

/// The chat templates of one model: one, or several by name.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    tool_use: bool,
    /// The program that is given tools.
    source: String,
}

impl ChatTemplate {
    /// A template from its source.
    pub fn new(source: &str) -> Result<ChatTemplate, TemplateError> {
        ChatTemplate::named([("default".to_owned(), source.to_owned())])
    }

    /// The template of an opened checkpoint: inside it where it came from a GGUF file that has one, otherwise in the files beside the weights.
    pub fn open(checkpoint: &Checkpoint) -> Result<ChatTemplate, TemplateError> {
        let Some(metadata) = checkpoint.metadata() else { return ChatTemplate::from_dir(checkpoint.dir()) };
        let source = metadata.get_str("tokenizer.chat_template").map_err(|e| TemplateError::Syntax(e.what))?;
        match source {
            None if checkpoint.dir().join("chat_template.jinja").exists() => ChatTemplate::from_dir(checkpoint.dir()),
            source => ChatTemplate::from_gguf(source),
        }
    }

    /// The template in the directory of a checkpoint: `chat_template.jinja`, or the one of `tokenizer_config.json`, or that of `chat_template.json`.
    pub fn from_dir(dir: &Path) -> Result<ChatTemplate, TemplateError> {
        let get = |name: &str| match std::fs::read_to_string(dir.join(name)) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(TemplateError::Read { path: dir.join(name).display().to_string(), what: e.to_string() }),
        };
        if let Some(source) = get("chat_template.jinja")? {
            return ChatTemplate::new(&source);
        }
        for name in ["tokenizer_config.json", "chat_template.json"] {
            let Some(text) = get(name)? else { continue };
            let config: serde_json::Value = crate::json::parse(text.as_bytes())
                .map_err(|what| TemplateError::Read { path: dir.join(name).display().to_string(), what })?;
            if !config["chat_template"].is_null() {
                return ChatTemplate::from_config(&config);
            }
        }
        Err(TemplateError::Missing(format!(
            "neither chat_template.jinja nor tokenizer_config.json in {} has one",
            dir.display()
        )))
    }

    /// The text of the template in the directory of a checkpoint (of several, the default one), where there is one.
    pub fn source_in(dir: &Path) -> Result<Option<String>, TemplateError> {
        for name in ["chat_template.jinja", "tokenizer_config.json", "chat_template.json"] {
            let fault = |what: String| TemplateError::Read { path: dir.join(name).display().to_string(), what };
            let text = match std::fs::read_to_string(dir.join(name)) {
                Ok(text) => text,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(e) => return Err(fault(e.to_string())),
            };
            if name.ends_with(".jinja") {
                return Ok(Some(text));
            }
            let config: serde_json::Value = crate::json::parse(text.as_bytes()).map_err(fault)?;
            match &config["chat_template"] {
                serde_json::Value::String(source) => return Ok(Some(source.clone())),
                serde_json::Value::Array(list) => {
                    let default = list.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str());
                    return Ok(default.map(str::to_owned));
                }
                _ => {}
            }
        }
        Ok(None)
    }

    /// The `chat_template` of a `tokenizer_config.json`: a string, or a list of `{name, template}`.
    pub fn from_config(config: &serde_json::Value) -> Result<ChatTemplate, TemplateError> {
        match &config["chat_template"] {
            serde_json::Value::String(source) => ChatTemplate::new(source),
            serde_json::Value::Array(list) => {
                let pair =
                    |t: &serde_json::Value| Some((t["name"].as_str()?.to_owned(), t["template"].as_str()?.to_owned()));
                let pairs: Option<Vec<_>> = list.iter().map(pair).collect();
                let pairs = pairs
                    .ok_or_else(|| TemplateError::Syntax("its list has an entry without name and template".into()))?;
                ChatTemplate::named(pairs)
            }
            serde_json::Value::Null => Err(TemplateError::Missing("tokenizer_config.json has none".into())),
            _ => Err(TemplateError::Syntax("chat_template is neither a text nor a list".into())),
        }
    }

    /// The template of a GGUF file: the value of `tokenizer.chat_template`.
    pub fn from_gguf(source: Option<&str>) -> Result<ChatTemplate, TemplateError> {
        let source =
            source.ok_or_else(|| TemplateError::Missing("the GGUF file has no tokenizer.chat_template".into()))?;
        ChatTemplate::new(source)
    }

    fn named(sources: impl IntoIterator<Item = (String, String)>) -> Result<ChatTemplate, TemplateError> {
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.set_fuel(Some(FUEL));
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_filter("tojson", tojson);
        env.add_function("raise_exception", |text: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, text).with_source(Raised))
        });
        env.add_function("strftime_now", |format: String| strftime(&format, SystemTime::now()));
        let mut names = Vec::new();
        let mut told_tools = String::new();
        for (name, source) in sources {
            if name == "tool_use" || (name == "default" && told_tools.is_empty()) {
                told_tools.clone_from(&source);
            }
            let source = without_generation_marks(&source);
            env.add_template_owned(name.clone(), source).map_err(|e| TemplateError::Syntax(told(&e)))?;
            names.push(name);
        }
        if !names.iter().any(|n| n == "default") {
            return Err(TemplateError::Missing(format!("it has templates named {names:?}, but none named default")));
        }
        Ok(ChatTemplate { env, tool_use: names.iter().any(|n| n == "tool_use"), source: told_tools })
    }

    /// The program that renders conversations with tools, as the checkpoint has it.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the template looks at tools. One that does not would leave them out in silence.
    pub fn takes_tools(&self) -> bool {
        let word = |c: char| c.is_alphanumeric() || c == '_';
        self.source
            .match_indices("tools")
            .any(|(at, t)| !self.source[..at].ends_with(word) && !self.source[at + t.len()..].starts_with(word))
    }

    /// The conversation as text. `add_generation_prompt`: end with the opening of the assistant's turn. `bos` and `eos` are the written forms of
    /// the model's tokens; the text already holds those that the template wants, so encode it without special tokens.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        bos: &str,
        eos: &str,
        tools: Option<&serde_json::Value>,
    ) -> Result<String, TemplateError> {
        self.render_values(&Value::from_serialize(messages), add_generation_prompt, bos, eos, tools)
    }

    /// As [`ChatTemplate::render`] for messages with more than a role and a content, such as calls of tools and their results.
    pub fn render_json(
        &self,
        messages: &serde_json::Value,
        add_generation_prompt: bool,
        bos: &str,
        eos: &str,
        tools: Option<&serde_json::Value>,
    ) -> Result<String, TemplateError> {
        self.render_values(&Value::from_serialize(messages), add_generation_prompt, bos, eos, tools)
    }

    fn render_values(
        &self,
        messages: &Value,
        add_generation_prompt: bool,
        bos: &str,
        eos: &str,
        tools: Option<&serde_json::Value>,
    ) -> Result<String, TemplateError> {
        let name = if tools.is_some() && self.tool_use { "tool_use" } else { "default" };
        let template = self.env.get_template(name).map_err(|e| TemplateError::Failed(told(&e)))?;
        // Templates ask `tools is not none`: absent means none, not undefined.
        let none = Value::from(());
        let context = minijinja::context! {
            messages => messages,
            add_generation_prompt,
            bos_token => bos,
            eos_token => eos,
            tools => tools.map_or(none.clone(), Value::from_serialize),
            documents => none,
        };
        let mut out = Bounded(Vec::new());
        template.render_captured_to(context, &mut out).map_err(|e| {
            let mut source = std::error::Error::source(&e);
            while let Some(s) = source {
                if s.is::<Raised>() {
                    return TemplateError::Refused(e.detail().unwrap_or("no reason given").to_owned());
                }
                source = s.source();
            }
            match e.kind() {
                ErrorKind::OutOfFuel => TemplateError::Failed(format!("it does not end within {FUEL} instructions")),
                _ => TemplateError::Failed(told(&e)),
            }
        })?;
        String::from_utf8(out.0).map_err(|e| TemplateError::Failed(e.to_string()))
    }
}

/// Marks an error that the template raised on purpose.
#[derive(Debug, thiserror::Error)]
#[error("raised by the template")]
struct Raised;

/// An output that refuses to grow without end.
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(std::io::Error::other(format!("its output is longer than {MAX_OUTPUT_BYTES} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// An error in one line, with the line of the template.
fn told(e: &minijinja::Error) -> String {
    let mut text = format!("{}{}", e.kind(), e.detail().map(|d| format!(": {d}")).unwrap_or_default());
    if let Some(line) = e.line() {
        text += &format!(" (line {line})");
    }
    if let Some(source) = std::error::Error::source(e) {
        text += &format!(": {source}");
    }
    text
}

/// `{% generation %}` tells a trainer which part the assistant wrote; for text it is a block that always holds.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(len) = rest[start..].find("%}") else { break };
        let inner = &rest[start + 2..start + len];
        let word = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replaced = match word {
            "generation" => inner.replace("generation", "if true"),
            "endgeneration" => inner.replace("endgeneration", "endif"),
            _ => inner.to_owned(),
        };
        out.push_str(&rest[..start + 2]);
        out.push_str(&replaced);
        out.push_str("%}");
        rest = &rest[start + len + 2..];
    }
    out + rest
}

/// JSON as Python's `json.dumps(x, ensure_ascii=False, indent=...)` writes it.
fn tojson(value: &Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    for ignored in ["ensure_ascii", "separators", "sort_keys"] {
        let _: Option<Value> = options.get(ignored)?;
    }
    options.assert_all_used()?;
    let json = serde_json::to_value(value)
        .map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, "no JSON").with_source(e))?;
    let mut out = String::new();
    dump(&json, indent.map(|n| n.min(16)), 0, &mut out);
    Ok(out)
}

fn dump(value: &serde_json::Value, indent: Option<usize>, depth: usize, out: &mut String) {
    let (open, close, len) = match value {
        serde_json::Value::Array(a) => ('[', ']', a.len()),
        serde_json::Value::Object(o) => ('{', '}', o.len()),
        plain => return out.push_str(&plain.to_string()),
    };
    let line = |depth: usize, out: &mut String| {
        if let Some(n) = indent.filter(|_| len > 0) {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', n * depth));
        }
    };
    out.push(open);
    for i in 0..len {
        if i > 0 {
            out.push_str(if indent.is_some() { "," } else { ", " });
        }
        line(depth + 1, out);
        match value {
            serde_json::Value::Array(a) => dump(&a[i], indent, depth + 1, out),
            serde_json::Value::Object(o) => {
                let (key, item) = o.iter().nth(i).expect("i is below the length");
                out.push_str(&serde_json::Value::from(key.as_str()).to_string());
                out.push_str(": ");
                dump(item, indent, depth + 1, out);
            }
            _ => {}
        }
    }
    line(depth, out);
    out.push(close);
}

/// Python's `strftime` for the directives that templates use; others stay as they are written.
fn strftime(format: &str, now: SystemTime) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let seconds = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    // Years that begin in March put the leap day last (Hinnant, "chrono-compatible low-level date algorithms").
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (month_name, weekday) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = chars.next();
        out += &match directive {
            Some('Y') => format!("{year}"),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{:02}", (hour + 11) % 12 + 1),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{second:02}"),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('%') => "%".to_owned(),
            Some(other) => format!("%{other}"),
            None => "%".to_owned(),
        };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(source: &str) -> Result<String, TemplateError> {
        ChatTemplate::new(source)?.render(&[Message::new("user", "hi")], true, "<s>", "</s>", None)
    }

    #[test]
    fn dates() {
        let at = |s: u64, f: &str| strftime(f, UNIX_EPOCH + Duration::from_secs(s));
        assert_eq!(at(0, "%d %B %Y, %A %a %H:%M:%S"), "01 January 1970, Thursday Thu 00:00:00");
        assert_eq!(at(951_827_696, "%Y-%m-%d %I:%M %p %b %y"), "2000-02-29 12:34 PM Feb 00");
        assert_eq!(at(1_735_689_599, "%Y-%m-%d 100%% %q %"), "2024-12-31 100% %q %");
    }

    #[test]
    fn json_is_written_as_python_does() {
        let tools = serde_json::json!([{"type": "é <b>", "a": [1, 2.5, null, true], "empty": {}, "none": []}]);
        let render =
            |source: &str| ChatTemplate::new(source).unwrap().render(&[], false, "", "", Some(&tools)).unwrap();
        assert_eq!(
            render("{{ tools | tojson }}"),
            r#"[{"type": "é <b>", "a": [1, 2.5, null, true], "empty": {}, "none": []}]"#
        );
        assert_eq!(render("{{ tools[0].a[:2] | tojson(indent=2) }}{{ {} | tojson(indent=4) }}"), "[\n  1,\n  2.5\n]{}");
    }

    #[test]
    fn refusals_and_failures_say_why() {
        assert!(matches!(one("{{ raise_exception('roles!') }}"), Err(TemplateError::Refused(t)) if t == "roles!"));
        assert!(matches!(one("{% for %}"), Err(TemplateError::Syntax(_))));
        assert!(matches!(one("{{ missing.field }}"), Err(TemplateError::Failed(t)) if t.contains("line 1")));
        assert!(matches!(ChatTemplate::from_gguf(None), Err(TemplateError::Missing(_))));
        let hang = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
        assert!(matches!(one(hang), Err(TemplateError::Failed(t)) if t.contains("instructions")));
        assert!(one("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}").is_err());
        assert!(one("{% for a in range(90000) %}{{ 'x' * 90000 }}{% endfor %}").is_err());
    }

    #[test]
    fn templates_that_look_at_tools_are_known() {
        let takes = |source: &str| ChatTemplate::new(source).unwrap().takes_tools();
        assert!(
            takes("{% if tools %}{{ tools | tojson }}{% endif %}") && takes("{%- if tools is not none -%}{% endif %}")
        );
        assert!(!takes("{{ messages[0].content }} has no mytools or tools_in_user_message"));
        let messages = serde_json::json!([{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]);
        let t = ChatTemplate::new("{{ messages[0].tool_calls[0].function.name }}").unwrap();
        assert_eq!(t.render_json(&messages, true, "", "", None).unwrap(), "f");
    }

    #[test]
    fn the_parts_that_transformers_adds() {
        assert_eq!(
            one("{% for m in messages %}\n  {%- generation %}\n{{ m.content }}{% endgeneration %}{% endfor %}")
                .unwrap(),
            "hi"
        );
        assert_eq!(one("{{ tools is none }}{{ bos_token + eos_token }}{{ nothing }}").unwrap(), "True<s></s>");
        assert_eq!(one("{{ strftime_now('%Y') | length }}").unwrap(), "4");
        let config = serde_json::json!({"chat_template": [
            {"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]});
        let t = ChatTemplate::from_config(&config).unwrap();
        assert_eq!(t.render(&[], false, "", "", None).unwrap(), "plain");
        assert_eq!(t.render(&[], false, "", "", Some(&serde_json::json!([]))).unwrap(), "tools");
    }
}
