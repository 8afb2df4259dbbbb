//! `generate`: continue a text.

use std::io::Read;
use std::ops::ControlFlow;
use std::process::ExitCode;

use anyhow::Context;
use lacuna_base::units::show_bytes;
use lacuna_checkpoint::{ChatTemplate, Message, Tokenizer};
use lacuna_compress::memory;
use lacuna_run::{Generated, Generation, Session};
use serde_json::json;

use crate::cli::{Generate, Global};
use crate::common::{self, Usage};
use crate::out::{self, Closed};

/// Runs the verb.
pub fn run(g: &Global, a: &Generate) -> anyhow::Result<ExitCode> {
    if !a.chat && !a.template.args.is_empty() {
        return Err(Usage("--template-arg is for --chat".into()).into());
    }
    let m = common::open(g, &a.model)?;
    let before = memory::resident().unwrap_or_default();
    let tokenizer = m.tokenizer()?;
    let tokenizer_bytes = memory::resident().unwrap_or_default().saturating_sub(before);
    let mut prompt = a.prompt.clone();
    if prompt == "-" {
        prompt.clear();
        std::io::stdin().read_to_string(&mut prompt).context("standard input")?;
    }
    let engine = m.engine(&a.running)?;
    let template = a.chat.then(|| m.template_with(&a.template)).transpose()?;
    let tokens = prompt_tokens(&tokenizer, &prompt, template.as_ref())?;
    let mut session = Session::new(engine, tokenizer);
    let generation = Generation {
        prompt: tokens,
        max_tokens: a.n,
        stop: a.sampling.stop.clone(),
        sampling: common::sampling(&a.sampling),
        ignore_end: false,
    };
    session.check(&generation)?;
    if !g.json && !a.chat {
        out::write(&prompt)?;
    }
    let done = stream(&mut session, &generation, !g.json)?;
    let json = json!({
        "text": done.text, "tokens": done.stats.tokens, "token_ids": done.tokens, "prompt_tokens": done.stats.prompt_tokens,
        "prefill_tok_s": done.stats.prefill_tok_s, "decode_tok_s": done.stats.decode_tok_s, "stop": done.stats.stop,
        "peak_rss_bytes": memory::peak(), "weights_bytes": session.engine().model().weights_bytes(), "kv_bytes": done.stats.kv_bytes,
        "tokenizer_bytes": tokenizer_bytes, "run": session.engine().plan().to_json(),
        "drafted_tokens": done.stats.drafted_tokens, "accepted_tokens": done.stats.accepted_tokens,
    });
    common::print(g, &json, || "\n".into())?;
    if !g.json {
        tell(&done);
        if let Some(peak) = memory::peak() {
            common::say(format!(
                "[{} of memory at the most: weights {}, keys and values {}, tokenizer {}]",
                show_bytes(peak),
                show_bytes(session.engine().model().weights_bytes()),
                show_bytes(done.stats.kv_bytes),
                show_bytes(tokenizer_bytes)
            ));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The prompt's tokens: the text, behind BOS where the model wants one; or the chat template's rendering of it.
pub fn prompt_tokens(tokenizer: &Tokenizer, prompt: &str, template: Option<&ChatTemplate>) -> anyhow::Result<Vec<u32>> {
    if let Some(template) = template {
        let text = |id: Option<u32>| id.and_then(|i| tokenizer.token_text(i)).unwrap_or_default().to_owned();
        let messages = [Message::new("user", prompt)];
        let rendered = template.render(&messages, true, &text(tokenizer.bos()), &text(tokenizer.eos()), None)?;
        return Ok(tokenizer.encode(&rendered, false)?);
    }
    Ok(tokenizer.encode(prompt, true)?)
}

/// Generates, printing as it comes.
pub fn stream(session: &mut Session, g: &Generation, show: bool) -> anyhow::Result<Generated> {
    let mut shown = Ok(());
    let done = session.generate(g, &mut |t| self::show(t, show, &mut shown));
    shown?;
    Ok(done?)
}

/// Shows a piece of text as it comes. Where it cannot be written, the generation ends and `shown` keeps why.
pub fn show(text: &str, wanted: bool, shown: &mut Result<(), Closed>) -> ControlFlow<()> {
    if wanted {
        *shown = out::write(text);
    }
    if shown.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
}

/// Counts and speeds, in words.
pub fn tell(done: &Generated) {
    let s = &done.stats;
    let decode = s.decode_tok_s.map_or_else(String::new, |x| format!(", {x:.1} tok/s written"));
    let drafts = match s.drafted_tokens {
        0 => String::new(),
        n => format!("; {} of {n} drafted tokens came", s.accepted_tokens),
    };
    common::say(format!(
        "[{} tokens read at {:.0} tok/s, {} tokens{decode}{drafts}]",
        s.prompt_tokens, s.prefill_tok_s, s.tokens
    ));
}
