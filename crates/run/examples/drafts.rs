//! Drafts on real prompts: whether every answer is the one without a draft, token by token, alone and eight at a time,
//! and what they save. `drafts MODEL PROMPTS.jsonl TOKENS DRAFT...`: a line of PROMPTS is `{"prompt": TEXT}`, which goes
//! through the model's chat template; DRAFT is what `--draft` takes. Prints a line of JSON for each draft. Plain and
//! drafted answers are timed by turns, one after the other.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use lacuna_checkpoint::{ChatTemplate, Checkpoint, Message, Tokenizer};
use lacuna_kernels::{Activations, KvFormat};
use lacuna_model::{Decoder, LoadOptions};
use lacuna_run::{Engine, Event, Generation, Limits, Request, RunPlan, Scheduler, Session};
use serde_json::{Value, json};

type Tried<T> = Result<T, Box<dyn std::error::Error>>;

fn engine(model: &Checkpoint, draft: &str) -> Tried<Engine> {
    let mut plan = RunPlan::none();
    plan.flag("draft", draft, &lacuna_methods::registry())?;
    let options = LoadOptions { activations: Activations::Int8, ..LoadOptions::default() };
    Ok(Engine::new(Decoder::load(model, &options)?).with_kv(KvFormat::F16).with_plan(plan))
}

/// The prompts as the model's chat template writes them.
fn prompts(model: &Checkpoint, tokenizer: &Tokenizer, file: &str) -> Tried<Vec<Vec<u32>>> {
    let template = ChatTemplate::open(model)?;
    let name = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id)).unwrap_or("");
    let mut all = Vec::new();
    for line in std::fs::read_to_string(file)?.lines() {
        let value: Value = serde_json::from_str(line)?;
        let text = value["prompt"].as_str().ok_or("a line without a prompt")?;
        let said =
            template.render(&[Message::new("user", text)], true, name(tokenizer.bos()), name(tokenizer.eos()), None)?;
        all.push(tokenizer.encode(&said, false)?);
    }
    Ok(all)
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of.get(of.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() -> Tried<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, file, tokens, drafts @ ..] = args.as_slice() else {
        return Err("drafts MODEL PROMPTS.jsonl TOKENS DRAFT...".into());
    };
    let model = lacuna_checkpoint::open(model)?;
    let tokenizer = Tokenizer::open(&model)?;
    let max_tokens: usize = tokens.parse()?;
    let asked: Vec<Generation> = prompts(&model, &tokenizer, file)?
        .into_iter()
        .map(|prompt| Generation { prompt, max_tokens, ..Generation::default() })
        .collect();
    let plain = Arc::new(engine(&model, "none")?);
    let mut plain = Session::new(Arc::clone(&plain), tokenizer.clone());
    let timed = |session: &mut Session, g: &Generation| -> Tried<(Vec<u32>, f64, [u64; 2])> {
        let out = session.generate(g, &mut |_| ControlFlow::Continue(()))?;
        let stats = out.stats;
        let speed = stats.decode_tok_s.unwrap_or(f64::NAN);
        Ok((out.tokens, speed, [stats.drafted_tokens, stats.accepted_tokens]))
    };
    for draft in drafts {
        let drafted = Arc::new(engine(&model, draft)?);
        let mut session = Session::new(Arc::clone(&drafted), tokenizer.clone());
        let mut batch = Scheduler::new(
            Arc::clone(&drafted),
            tokenizer.clone(),
            Limits { batch: 8, prefill_rows: 512, kv_bytes: 4 << 30, reuse: true },
        );
        let (mut alone, mut written) = (0, Vec::new());
        let (mut plain_s, mut drafted_s, mut ratios, mut counts) = (0.0, 0.0, Vec::new(), [0u64; 2]);
        for (i, g) in asked.iter().enumerate() {
            let (a, b) = if i % 2 == 0 {
                let a = timed(&mut plain, g)?;
                (a, timed(&mut session, g)?)
            } else {
                let b = timed(&mut session, g)?;
                (timed(&mut plain, g)?, b)
            };
            alone += usize::from(a.0 == b.0);
            if a.1.is_finite() && b.1.is_finite() {
                ratios.push(b.1 / a.1);
                (plain_s, drafted_s) = (plain_s + a.0.len() as f64 / a.1, drafted_s + b.0.len() as f64 / b.1);
            }
            counts = [counts[0] + b.2[0], counts[1] + b.2[1]];
            written.push(a.0);
        }
        for (i, g) in asked.iter().enumerate() {
            batch.submit(i as u64, Request::generate(g.clone()))?;
        }
        let (start, mut together, mut failed) = (Instant::now(), 0, None);
        while !batch.is_idle() && failed.is_none() {
            batch.step(&mut |id, event| match event {
                Event::Finished(f) => together += usize::from(written.get(id as usize) == Some(&f.ids)),
                Event::Failed(e) => failed = Some(e),
                _ => {}
            });
        }
        failed.map_or(Ok(()), Err)?;
        let all: usize = written.iter().map(Vec::len).sum();
        let line = json!({
            "draft": draft, "prompts": asked.len(), "tokens": all, "same_alone": alone, "same_of_eight": together,
            "speed_over_plain": plain_s / drafted_s, "median_of_ratios": median(ratios), "drafted": counts[0],
            "accepted": counts[1], "cost_of_eight": batch.gauges().draft_cost,
            "seconds_of_eight": start.elapsed().as_secs_f64(),
        });
        println!("{line}");
    }
    Ok(())
}
