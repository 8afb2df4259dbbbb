//! `chat`: a conversation on the terminal.

use std::io::BufRead;
use std::process::ExitCode;

use lacuna_run::{Chat, Generation, Session};
use serde_json::json;

use crate::cli::{self, Global};
use crate::generate::{show, tell};
use crate::{common, out};

/// Runs the verb.
pub fn run(g: &Global, a: &cli::Chat) -> anyhow::Result<ExitCode> {
    let m = common::open(g, &a.model)?;
    let (tokenizer, template, engine) = (m.tokenizer()?, m.template_with(&a.template)?, m.engine(&a.running)?);
    let mut chat = Chat::new(Session::new(engine, tokenizer), &template);
    if let Some(s) = &a.system {
        chat.system(s);
    }
    common::say("type a message; /reset forgets the conversation, /exit or end of input leaves");
    let mut generation = Generation {
        prompt: Vec::new(),
        max_tokens: a.n,
        stop: a.sampling.stop.clone(),
        sampling: common::sampling(&a.sampling),
        ignore_end: false,
    };
    let stdin = std::io::stdin();
    loop {
        out::say("> ");
        let mut line = String::new();
        if stdin.lock().read_line(&mut line)? == 0 {
            break;
        }
        match line.trim() {
            "" => continue,
            "/exit" | "/quit" => break,
            "/reset" => {
                chat.reset();
                if let Some(s) = &a.system {
                    chat.system(s);
                }
                continue;
            }
            text => {
                let mut shown = Ok(());
                let mut on_text = |t: &str| show(t, !g.json, &mut shown);
                let said = chat.say(text, &generation, &mut on_text);
                shown?;
                match said {
                    Ok(done) => {
                        common::print(g, &json!({ "text": done.text, "stats": done.stats }), || "\n".into())?;
                        tell(&done);
                    }
                    Err(e) => common::say(format!("error: {e}")),
                }
                // Another draw for the next answer, still the same for the same seed and conversation.
                generation.sampling.seed = generation.sampling.seed.wrapping_add(1);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
