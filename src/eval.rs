//! `eval`: perplexity, divergence, tasks.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use lacuna_eval::{Eval, EvalError, HELD_OUT, Judged, Means, Reader, Table, TakeRows, Told, cut, tasks};
use lacuna_format::Weights;
use lacuna_run::{Engine, RunError};
use serde_json::{Map, Value, json};

use crate::across;
use crate::cli::{self, Cache, Global, Running};
use crate::common::{self, Usage};

/// Runs the verb.
pub fn run(g: &Global, a: &cli::Eval) -> anyhow::Result<ExitCode> {
    let start = Instant::now();
    let plan = common::run_plan(&a.plan)?;
    let m = common::open(g, &a.model)?;
    let tokenizer = m.tokenizer()?;
    let room =
        Means { max_ram: common::size(a.max_ram.as_deref())?, activations: a.activations.into(), ..Means::default() };
    let bos = match (a.bos, tokenizer.bos()) {
        (false, _) => None,
        (true, Some(b)) => Some(b),
        (true, None) => return Err(Usage(format!("--bos: {} has no BOS token", a.model)).into()),
    };
    // Under a run plan texts are read as the scheduler reads prompts.
    let running = Running { activations: a.activations, kv: Cache::F32, plan: a.plan.clone() };
    let engine = (!plan.is_empty()).then(|| m.engine(&running)).transpose()?.map(Arc::new);
    let reader = engine.as_ref().map(|e| move |texts: &[Vec<u32>], rows: TakeRows<'_>| read(e, texts, rows));
    let reader = reader.as_ref().map(|r| r as Reader<'_>);
    let mut out = Map::new();
    out.insert("model".into(), json!(a.model));
    let mut table = Table::new(["", ""]);
    if a.text.is_some() || a.tasks.is_empty() {
        let text = match &a.text {
            Some(p) => common::read_text(p)?,
            None => HELD_OUT.to_owned(),
        };
        let tokens = tokenizer.encode(&text, false)?;
        let bar = common::bar(0, "evaluating");
        let progress = |done: usize, all: usize| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        };
        let had = tokens.len() + usize::from(bos.is_some());
        let eval = Eval {
            ctx: common::window(a.ctx, 1024, m.checkpoint.spec().context, had)?,
            windows: a.windows,
            bos,
            room: room.clone(),
            progress: Some(&progress),
            reader,
        };
        let other = a.against.as_ref().map(|dense| common::open_alone(g, dense)).transpose()?;
        let mut told = None;
        let judged = match (&other, &engine) {
            (None, Some(engine)) => planned(engine, &eval, &tokens)?,
            (None, None) => eval.judge(&tokens, &m.checkpoint)?,
            (Some(d), _) if across::same_tokens((&m, &tokenizer), d)? => {
                let mut reference = eval.reference(&tokens, &d.checkpoint)?;
                eval.against(&m.checkpoint, &mut reference)?
            }
            (Some(d), _) => {
                let theirs = d.tokenizer()?;
                let text = theirs.encode(&text, false)?;
                told = Some(across::hold(&eval, &text, (&m.checkpoint, &tokenizer), (&d.checkpoint, &theirs))?);
                eval.judge(&tokens, &m.checkpoint)?
            }
        };
        let predicted = cut(&tokens, eval.ctx, eval.windows, bos)?;
        let predicted = predicted.iter().flat_map(|w| &w[1..]);
        let bytes = predicted.map(|&id| tokenizer.token_bytes(id).len()).sum();
        let own = Told::new(judged.nll, judged.tokens, bytes);
        bar.finish_and_clear();
        out.extend([
            ("ppl".to_owned(), json!(judged.ppl)),
            ("nll".to_owned(), json!(judged.nll)),
            ("tokens".to_owned(), json!(judged.tokens)),
            ("ctx".to_owned(), json!(judged.ctx)),
            ("windows".to_owned(), json!(judged.windows)),
            ("nats_a_byte".to_owned(), json!(own.nats_a_byte)),
            ("bits_a_byte".to_owned(), json!(own.bits_a_byte())),
            ("bos".to_owned(), json!(bos)),
            ("activations".to_owned(), json!(a.activations.name())),
            ("run".to_owned(), plan.to_json()),
        ]);
        table.row(["perplexity".to_owned(), format!("{:.4}", judged.ppl)]);
        table.row(["loss".to_owned(), format!("{:.5} nats a token", judged.nll)]);
        table.row(["tokens".to_owned(), format!("{} in {} windows of {}", judged.tokens, judged.windows, judged.ctx)]);
        match &told {
            None => across::by_the_byte(&mut table, &own),
            Some(x) => {
                out.extend(across::keys(x));
                out.insert("notes".to_owned(), json!([across::NO_KL]));
                across::rows(&mut table, x);
            }
        }
        if let Some(x) = &judged.against {
            out.extend([
                ("kl_mean".to_owned(), json!(x.kl_mean)),
                ("kl_p99".to_owned(), json!(x.kl_p99)),
                ("top1_agree".to_owned(), json!(x.top1_agree)),
                ("ppl_dense".to_owned(), json!(x.ppl_dense)),
            ]);
            table.row(["perplexity of the dense model".to_owned(), format!("{:.4}", x.ppl_dense)]);
            table.row(["KL(dense || model)".to_owned(), format!("{:.5} nats a token", x.kl_mean)]);
            table.row(["same first choice".to_owned(), format!("{:.2}%", 100.0 * x.top1_agree)]);
        }
    }
    let mut results = Vec::new();
    for path in &a.tasks {
        let mut text = common::read_text(path)?;
        if let Some(n) = a.limit {
            text = text.lines().take(n).flat_map(|l| [l, "\n"]).collect();
        }
        let encode = |t: &str| tokenizer.encode(t, false).map_err(|e| e.to_string());
        let bar = common::bar(0, "task");
        let progress = |done: usize, all: usize| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        };
        let ctx = Some(m.checkpoint.spec().context);
        let exam = tasks::Exam { bos, ctx, room: room.clone(), progress: Some(&progress), reader };
        let r = exam.run(&text, &encode, &m.checkpoint).with_context(|| format!("{}", path.display()))?;
        bar.finish_and_clear();
        let name = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        let cell = |x: Option<f64>| x.map_or_else(String::new, |x| format!("{:.2}%", 100.0 * x));
        let measures = &r.measures;
        let mut words = format!("{} of {} items", cell(measures.acc), r.items);
        if measures.acc_norm.is_some() {
            words += &format!(", {} by length", cell(measures.acc_norm));
        }
        table.row([name.clone(), words]);
        if a.tasks.len() == 1 {
            out.insert("acc".into(), json!(measures.acc));
            out.insert("acc_norm".into(), json!(measures.acc_norm));
        }
        let mut row = serde_json::to_value(&r)?;
        row["task"] = Value::String(name);
        results.push(row);
    }
    if !results.is_empty() {
        out.insert("tasks".into(), Value::Array(results));
    }
    out.insert("seconds".into(), json!(start.elapsed().as_secs_f64()));
    out.insert("peak_rss_bytes".into(), json!(lacuna_compress::memory::peak()));
    common::print(g, &Value::Object(out), || table.text())?;
    Ok(ExitCode::SUCCESS)
}

/// Loss on a text under a run plan.
fn planned(engine: &Arc<Engine>, eval: &Eval<'_>, tokens: &[u32]) -> anyhow::Result<Judged> {
    let windows = cut(tokens, eval.ctx, eval.windows, eval.bos)?;
    let mut progress = |done, all| {
        if let Some(p) = eval.progress {
            p(done, all);
        }
    };
    let losses = lacuna_run::score(Arc::clone(engine), &windows, &mut progress)?;
    Ok(Judged::of_losses(&losses, eval.ctx))
}

/// Hands over what an engine makes of texts.
fn read(engine: &Arc<Engine>, texts: &[Vec<u32>], rows: TakeRows<'_>) -> Result<(), EvalError> {
    let bar = common::bar(texts.len() as u64, "reading");
    let mut refused = None;
    let done =
        lacuna_run::read(Arc::clone(engine), texts, &mut |done, _| bar.set_position(done as u64), &mut |t, at, x| {
            rows(t, at, x).map_err(|e| {
                let what = RunError::Request(e.to_string());
                refused = Some(e);
                what
            })
        });
    bar.finish_and_clear();
    done.map_err(|e| refused.take().unwrap_or_else(|| EvalError::new(e.to_string())))
}
