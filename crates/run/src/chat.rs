//! A conversation: history in, the next answer out.

use std::ops::ControlFlow;

use lacuna_checkpoint::{ChatTemplate, Message};

use crate::{Generated, Generation, RunError, Session};

/// A conversation with a model. Keys and values of what was said stay, so that a turn costs its own tokens only.
pub struct Chat<'a> {
    session: Session,
    template: &'a ChatTemplate,
    messages: Vec<Message>,
}

impl<'a> Chat<'a> {
    /// An empty conversation.
    pub fn new(session: Session, template: &'a ChatTemplate) -> Chat<'a> {
        Chat { session, template, messages: Vec::new() }
    }

    /// What was said so far.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Sets the system message, which comes first; an empty text takes it away.
    pub fn system(&mut self, text: &str) {
        self.messages.retain(|m| m.role != "system");
        if !text.is_empty() {
            self.messages.insert(0, Message::new("system", text));
        }
    }

    /// Starts over, keeping the system message.
    pub fn reset(&mut self) {
        self.messages.retain(|m| m.role == "system");
    }

    /// Says `text` and returns the answer; both join the history. `g.prompt` is ignored: the prompt is the
    /// conversation. A conversation that no longer fits is refused, never cut in silence; then the history is as
    /// before.
    pub fn say(
        &mut self,
        text: &str,
        g: &Generation,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generated, RunError> {
        self.messages.push(Message::new("user", text));
        let answer = self.answer(g, on_text);
        match &answer {
            Ok(a) => self.messages.push(Message::new("assistant", a.text.trim())),
            Err(_) => {
                self.messages.pop();
            }
        }
        answer
    }

    fn answer(
        &mut self,
        g: &Generation,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generated, RunError> {
        let tokenizer = self.session.tokenizer();
        let name = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id)).unwrap_or("");
        let (bos, eos) = (name(tokenizer.bos()), name(tokenizer.eos()));
        let prompt = self.template.render(&self.messages, true, bos, eos, None)?;
        // The template has written out the special tokens that the model wants.
        let prompt = tokenizer.encode(&prompt, false)?;
        let context = self.session.engine().context();
        if prompt.len() >= context {
            let hint =
                ": the conversation is too long. Start over, or ask for a longer context if memory and model allow";
            return Err(RunError::Context { tokens: prompt.len(), context, hint });
        }
        let g = Generation { prompt, ..g.clone() };
        self.session.generate(&g, on_text)
    }
}
