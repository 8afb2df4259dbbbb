//! Chat templates: a list of messages becomes the text that the model was trained to continue.
//!
//! Templates are Jinja programs from the checkpoint, written against what `transformers` offers them ([`jinja`]). They
//! are programs from outside, so that they run on a budget of steps and of memory. Each wants what is said in a message
//! as a text, or as a list of parts; which of the two is found out by trying ([`content`]). Departs from
//! `transformers`: `strftime_now` tells UTC, not local time.

mod content;
mod jinja;
mod sources;

use std::path::Path;
use std::time::SystemTime;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::Checkpoint;
use crate::gguf::Metadata;
use content::Taste;
use jinja::{Fault, FaultKind, Program};
pub(crate) use sources::{DIR_OF_NAMED, named_files, templates_in, templates_of};

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
        "the model has no chat template ({0}): it was probably not trained to chat. Give the text itself with \
         `generate`, or put the \
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
    /// The template has no place for what a message says.
    #[error("the chat template leaves out {0}")]
    LeftOut(String),
    /// The template failed.
    #[error("the chat template failed: {0}")]
    Failed(String),
    /// An argument that the template cannot take.
    #[error("the chat template's argument '{name}' {why}")]
    Argument {
        /// Its name.
        name: String,
        /// What is wrong with it.
        why: String,
    },
}

/// The chat templates of one model: one, or several by name.
#[derive(Debug)]
pub struct ChatTemplate {
    default: Named,
    /// The one that conversations with tools go to, where it is another.
    tool_use: Option<Named>,
    /// Arguments of every rendering, unless it brings its own.
    args: Map<String, Value>,
}

/// What every template is told; arguments have other names.
const TOLD: [&str; 6] = ["messages", "add_generation_prompt", "bos_token", "eos_token", "tools", "documents"];

/// A template with its name.
#[derive(Debug)]
struct Named {
    name: String,
    source: String,
    program: Program,
    taste: Taste,
}

impl Named {
    fn new((name, source): (String, String)) -> Result<Named, TemplateError> {
        let program = Program::parse(&source).map_err(|f| TemplateError::Syntax(told(&name, &f)))?;
        let taste = Taste::of(&program, name == "tool_use");
        Ok(Named { name, source, program, taste })
    }
}

/// A fault in one line, with the template's name and its line.
fn told(name: &str, fault: &Fault) -> String {
    let name = if name == "default" { String::new() } else { format!("'{name}', ") };
    match fault.line {
        Some(line) => format!("{name}line {line}: {}", fault.what),
        None => format!("{name}{}", fault.what),
    }
}

/// What a conversation is rendered with.
#[derive(Clone, Copy, Debug)]
pub struct Setting<'a> {
    /// End with the opening of the assistant's turn.
    pub add_generation_prompt: bool,
    /// The written form of the model's first token.
    pub bos: &'a str,
    /// The written form of the model's last token.
    pub eos: &'a str,
    /// What the model may call.
    pub tools: Option<&'a Value>,
    /// The time that the template is told.
    pub now: SystemTime,
    /// Further variables, such as `enable_thinking`, that [`ChatTemplate::check_args`] let through; they go before
    /// those of [`ChatTemplate::with_args`].
    pub args: Option<&'a Map<String, Value>>,
}

impl ChatTemplate {
    /// A template from its source.
    pub fn new(source: &str) -> Result<ChatTemplate, TemplateError> {
        ChatTemplate::named(vec![("default".to_owned(), source.to_owned())])
    }

    /// The template of an opened checkpoint: inside it where it came from a GGUF file that has one, otherwise in the
    /// files beside the weights.
    pub fn open(checkpoint: &Checkpoint) -> Result<ChatTemplate, TemplateError> {
        match checkpoint.metadata() {
            Some(metadata) if !templates_of(metadata)?.is_empty() => ChatTemplate::from_gguf(metadata),
            None => ChatTemplate::from_dir(checkpoint.dir()),
            Some(_) if checkpoint.dir().join("chat_template.jinja").exists() => {
                ChatTemplate::from_dir(checkpoint.dir())
            }
            Some(metadata) => ChatTemplate::from_gguf(metadata),
        }
    }

    /// The templates in the directory of a checkpoint: `chat_template.jinja` and
    /// `additional_chat_templates/NAME.jinja`, or those of `tokenizer_config.json`, or those of `chat_template.json`.
    pub fn from_dir(dir: &Path) -> Result<ChatTemplate, TemplateError> {
        let found = templates_in(dir)?;
        if found.is_empty() {
            let dir = dir.display();
            return Err(TemplateError::Missing(format!(
                "neither chat_template.jinja nor tokenizer_config.json in {dir} has one"
            )));
        }
        ChatTemplate::named(found)
    }

    /// The `chat_template` of a `tokenizer_config.json`: a string, or a list of `{name, template}`.
    pub fn from_config(config: &Value) -> Result<ChatTemplate, TemplateError> {
        let found = sources::of_config(config)?;
        if found.is_empty() {
            return Err(TemplateError::Missing("tokenizer_config.json has none".into()));
        }
        ChatTemplate::named(found)
    }

    /// The templates of a GGUF file: `tokenizer.chat_template`, and `tokenizer.chat_template.NAME`.
    pub fn from_gguf(metadata: &Metadata) -> Result<ChatTemplate, TemplateError> {
        let found = templates_of(metadata)?;
        if found.is_empty() {
            return Err(TemplateError::Missing("the GGUF file has no tokenizer.chat_template".into()));
        }
        ChatTemplate::named(found)
    }

    /// Of templates that are not named in a request, two are ever used; the others only have to be kept.
    fn named(mut found: Vec<(String, String)>) -> Result<ChatTemplate, TemplateError> {
        let names: Vec<String> = found.iter().map(|(name, _)| name.clone()).collect();
        let mut take = |name: &str| Some(found.remove(found.iter().position(|(n, _)| n == name)?));
        let (default, tool_use) = (take("default"), take("tool_use"));
        let default = default.ok_or_else(|| {
            TemplateError::Missing(format!("it has templates named {}, but none named default", names.join(", ")))
        })?;
        let tool_use = tool_use.map(Named::new).transpose()?;
        Ok(ChatTemplate { default: Named::new(default)?, tool_use, args: Map::new() })
    }

    fn told_tools(&self) -> &Named {
        self.tool_use.as_ref().unwrap_or(&self.default)
    }

    /// The program that renders conversations with tools, as the checkpoint has it.
    pub fn source(&self) -> &str {
        &self.told_tools().source
    }

    /// Whether the template looks at tools. One that does not would leave them out in silence.
    pub fn takes_tools(&self) -> bool {
        names(self.source(), "tools")
    }

    /// Whether the template names `name`, so that an argument of it may say something.
    pub fn takes(&self, name: &str) -> bool {
        names(&self.default.source, name) || names(self.source(), name)
    }

    /// Refuses arguments that the template does not look at, and those that would take the place of what it is told.
    pub fn check_args(&self, args: &Map<String, Value>) -> Result<(), TemplateError> {
        for name in args.keys() {
            let why = if TOLD.contains(&name.as_str()) {
                "is what the conversation says itself"
            } else if !self.takes(name) {
                "is nothing that this template looks at"
            } else {
                continue;
            };
            let name = name.chars().take(64).collect();
            return Err(TemplateError::Argument { name, why: why.into() });
        }
        Ok(())
    }

    /// The template with arguments for every rendering.
    pub fn with_args(self, args: Map<String, Value>) -> Result<ChatTemplate, TemplateError> {
        self.check_args(&args)?;
        Ok(ChatTemplate { args, ..self })
    }

    /// The conversation as text. `add_generation_prompt`: end with the opening of the assistant's turn. `bos` and `eos`
    /// are the written forms of the model's tokens; the text already holds those that the template wants, so encode it
    /// without special tokens.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        bos: &str,
        eos: &str,
        tools: Option<&Value>,
    ) -> Result<String, TemplateError> {
        let message = |m: &Message| serde_json::json!({"role": m.role, "content": m.content});
        let messages = Value::Array(messages.iter().map(message).collect());
        self.render_json(&messages, add_generation_prompt, bos, eos, tools)
    }

    /// As [`ChatTemplate::render`] for messages with more than a role and a content, such as calls of tools and their
    /// results. A content is a text, null, or a list of parts (`{"type": "text", "text": ...}`).
    pub fn render_json(
        &self,
        messages: &Value,
        add_generation_prompt: bool,
        bos: &str,
        eos: &str,
        tools: Option<&Value>,
    ) -> Result<String, TemplateError> {
        let now = SystemTime::now();
        self.render_with(messages, &Setting { add_generation_prompt, bos, eos, tools, now, args: None })
    }

    /// As [`ChatTemplate::render_json`], at a moment of the caller's.
    pub fn render_with(&self, messages: &Value, with: &Setting<'_>) -> Result<String, TemplateError> {
        let named = if with.tools.is_some() { self.told_tools() } else { &self.default };
        let messages = named.taste.fit(messages)?;
        run(&named.program, &messages, with, &self.args).map_err(|fault| match fault.kind {
            FaultKind::Raised => TemplateError::Refused(fault.what),
            _ => TemplateError::Failed(told(&named.name, &fault)),
        })
    }
}

/// Whether a program names `name`: a word of it, wherever it stands.
fn names(source: &str, name: &str) -> bool {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let mut found = source.match_indices(name).filter(|_| !name.is_empty());
    found.any(|(at, t)| !source[..at].ends_with(word) && !source[at + t.len()..].starts_with(word))
}

fn run(program: &Program, messages: &Value, with: &Setting<'_>, args: &Map<String, Value>) -> Result<String, Fault> {
    // Templates ask `tools is not none`: absent means none, not undefined.
    let none = Value::Null;
    let (opens, bos, eos) = (with.add_generation_prompt.into(), with.bos.into(), with.eos.into());
    let told = [messages, &opens, &bos, &eos, with.tools.unwrap_or(&none), &none];
    let args = args.iter().chain(with.args.into_iter().flatten()).map(|(name, value)| (name.as_str(), value));
    // What is set later counts.
    let context: Vec<(&str, &Value)> = args.chain(TOLD.into_iter().zip(told)).collect();
    program.render(&context, with.now)
}

#[cfg(test)]
mod tests;
