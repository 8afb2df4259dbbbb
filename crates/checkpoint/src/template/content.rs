//! What is said in a message is a text, or a list of parts (`{"type": "text", "text": ...}`). A template may know
//! either, or both, and what it does not know it leaves out in silence or prints as a list. Each template is therefore
//! tried once, role by role, with a word in either form.

use std::borrow::Cow;
use std::time::UNIX_EPOCH;

use serde_json::{Map, Value, json};

use super::jinja::Program;
use super::{Setting, TemplateError, run};

/// The word looked for. No filter of case or blanks changes it.
const WORD: &str = "quokkaburrow";

/// The roles that are tried.
const ROLES: [&str; 4] = ["user", "assistant", "system", "tool"];

/// In what form a role's words come through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Accepts {
    text: bool,
    parts: bool,
}

/// What a template makes of each role's words. `None`: it refused the trial, so that nothing is known.
#[derive(Debug)]
pub(super) struct Taste([Option<Accepts>; 4]);

impl Taste {
    pub fn of(program: &Program, tools: bool) -> Taste {
        let mut taste = Taste([None; 4]);
        for (i, role) in ROLES.into_iter().enumerate() {
            // The other messages are in the form that is known to come through by then.
            taste.0[i] = form(program, tools, |content| taste.trial(role, content));
        }
        taste
    }

    fn form(&self, role: &str) -> Option<Accepts> {
        let i = ROLES.iter().position(|r| *r == role).unwrap_or(0);
        // A role that refused its trial has the user's form: most templates treat all alike.
        self.0[i].or(self.0[0])
    }

    /// A conversation in which `role` says `content`.
    fn trial(&self, role: &str, content: Value) -> Vec<Value> {
        let says = |role: &str, text: &str| {
            let parts = self.form(role).is_some_and(|f| f.parts && !f.text);
            let content = if parts { json!([{"type": "text", "text": text}]) } else { json!(text) };
            json!({"role": role, "content": content})
        };
        let own = json!({"role": role, "content": content});
        match role {
            "assistant" => vec![says("user", "Hi"), own, says("user", "Yes")],
            "system" => vec![own, says("user", "Hi")],
            "tool" => {
                let call = json!({"name": "look", "arguments": {"at": "x"}});
                let mut asks = says("assistant", "");
                asks["tool_calls"] = json!([{"id": "call00001", "type": "function", "function": call}]);
                let mut own = own;
                own["name"] = "look".into();
                own["tool_call_id"] = "call00001".into();
                vec![says("user", "Hi"), asks, own]
            }
            _ => vec![own],
        }
    }

    /// The messages in forms that come through.
    pub fn fit<'m>(&self, messages: &'m Value) -> Result<Cow<'m, Value>, TemplateError> {
        let mut out = Cow::Borrowed(messages);
        for (i, message) in messages.as_array().into_iter().flatten().enumerate() {
            let role = message["role"].as_str().unwrap_or_default();
            if let (Some(form), Some(content)) = (self.form(role), message.get("content"))
                && let Some(other) = fitted(content, form, role)?
            {
                out.to_mut()[i]["content"] = other;
            }
        }
        Ok(out)
    }
}

/// A content in another form, where its own does not come through.
fn fitted(content: &Value, form: Accepts, role: &str) -> Result<Option<Value>, TemplateError> {
    let said = match content {
        Value::String(text) => !text.trim().is_empty(),
        Value::Array(parts) => !parts.is_empty(),
        _ => return Ok(None),
    };
    if form == (Accepts { text: false, parts: false }) {
        let how = format!("what '{role}' says: neither a text nor a list of parts comes through");
        return if said { Err(TemplateError::LeftOut(how)) } else { Ok(None) };
    }
    match content {
        Value::String(text) if !form.text => Ok(Some(json!([{"type": "text", "text": text}]))),
        Value::Array(parts) if !form.parts => {
            let text = |part: &Value| match part {
                Value::String(text) => Some(text.clone()),
                part => Some(part.get("text")?.as_str()?.to_owned()),
            };
            let other = |part: &Value| {
                let kind = part["type"].as_str().unwrap_or("unknown");
                TemplateError::LeftOut(format!("a part of type '{kind}' in what '{role}' says: it takes text alone"))
            };
            let joined: Result<String, _> = parts.iter().map(|p| text(p).ok_or_else(|| other(p))).collect();
            Ok(Some(joined?.into()))
        }
        _ => Ok(None),
    }
}

/// In what form a word comes through.
fn form(program: &Program, tools: bool, trial: impl Fn(Value) -> Vec<Value>) -> Option<Accepts> {
    let tool = json!([{"type": "function", "function": {"name": "look", "description": "Looks.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "What."}}}}}]);
    let with = Setting {
        add_generation_prompt: true,
        bos: "",
        eos: "",
        tools: tools.then_some(&tool),
        now: UNIX_EPOCH,
        args: None,
    };
    let rendered = |content: Value| run(program, &trial(content).into(), &with, &Map::new()).ok();
    let text = rendered(json!(WORD));
    let parts = rendered(json!([{"type": "text", "text": WORD}]));
    if text.is_none() && parts.is_none() {
        return None;
    }
    let shown = |out: &Option<String>| out.as_deref().is_some_and(|out| out.contains(WORD));
    // A part that was printed whole, in Python or in JSON, is no text.
    let whole = ["'text': '", "\"text\": \"", "\"text\":\""].map(|before| format!("{before}{WORD}"));
    let printed = whole.iter().any(|w| parts.as_deref().is_some_and(|out| out.contains(w)));
    Some(Accepts { text: shown(&text), parts: shown(&parts) && !printed })
}
