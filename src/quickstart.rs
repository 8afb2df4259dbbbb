//! `quickstart`: the whole story in one command.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use lacuna_run::{Generation, Sampling, Session};
use serde_json::json;

use crate::cli::{
    Activations, Cache, Compress, Effort, Fit, Global, Judging, Plan, Quickstart, Reader, Running, Strategy,
};
use crate::common::{self, Model};
use crate::{compress, fit, generate, out, report};

/// Both run as `generate` would.
const RUNNING: Running = Running {
    activations: Activations::Int8,
    kv: Cache::F16,
    plan: Plan { file: None, draft: None, keep: None, select: None, gate: None },
};
/// What both models are asked.
const PROMPT: &str = "Explain in two sentences why the sky is blue.";

/// Runs the verb. Whatever the verdict, a finished story exits with 0.
pub fn run(g: &Global, a: &Quickstart) -> anyhow::Result<ExitCode> {
    let start = Instant::now();
    common::say(format!("1. pulling {}", a.model));
    let source = common::open(g, &a.model)?;
    let made = match &a.recipe {
        None => by_search(g, a, &source)?,
        Some(recipe) => by_recipe(g, a, recipe, &source)?,
    };
    let done = &made.done;
    if !g.json {
        out::write(&made.words)?;
    }
    common::say("3. the same prompt, dense and compressed");
    let mut samples = Vec::new();
    let result = Model {
        name: a.out.display().to_string(),
        path: done.outcomes.path.clone(),
        checkpoint: lacuna_checkpoint::open(&done.outcomes.path)?,
    };
    for (who, model) in [("dense", &source), ("compressed", &result)] {
        let (tokenizer, engine) = (model.tokenizer()?, model.engine(&RUNNING)?);
        let template = model.template().ok();
        let chat = template.is_some();
        let generation = Generation {
            prompt: generate::prompt_tokens(&tokenizer, PROMPT, template.as_ref())?,
            max_tokens: 64,
            stop: Vec::new(),
            sampling: Sampling::default(),
            ignore_end: false,
        };
        let said = generate::stream(&mut Session::new(engine, tokenizer), &generation, false)?;
        if !g.json {
            out::write(&format!("\n{who}: {}\n", said.text.trim()))?;
        }
        generate::tell(&said);
        // An answer begins anew; a continuation goes on.
        let asked = if chat { format!("{PROMPT}\n\n") } else { PROMPT.to_owned() };
        samples.push((who.to_owned(), asked, said.text));
    }
    report::write(&a.report, &a.model, &made.by, done, &samples, &made.front)?;
    let mut json = made.json;
    json["report"] = json!(a.report);
    json["samples"] = samples.iter().map(|(who, _, text)| json!({ "who": who, "text": text })).collect();
    json["seconds"] = json!(start.elapsed().as_secs_f64());
    common::print(g, &json, || {
        let out = a.out.display();
        format!("\nreport: {}\nmodel:  {out}   (try: lacuna chat {out})\n", a.report.display())
    })?;
    Ok(ExitCode::SUCCESS)
}

/// A compression on the way, with what is shown of it.
struct Made {
    done: compress::Done,
    by: String,
    words: String,
    json: serde_json::Value,
    front: Vec<(String, u64, f64)>,
}

/// Judging windows: few, so that the whole story takes minutes on two cores.
const WINDOWS: usize = 6;

/// The best model that a short search finds.
fn by_search(g: &Global, a: &Quickstart, source: &Model) -> anyhow::Result<Made> {
    common::say("2. searching for the best model, then judging it on held-out text beside plain rounding");
    let args = Fit {
        model: a.model.clone(),
        out: a.out.clone(),
        max_bytes: None,
        max_loss: None,
        min_decode_tok_s: None,
        max_ram: None,
        context: None,
        reader: Reader::Lacuna,
        effort: Effort::Quick,
        strategy: Strategy::Races,
        keep: Vec::new(),
        calibration: Vec::new(),
        imatrix: None,
        samples: Some(8),
        search: None,
        seed: 0,
        dry_run: false,
        scratch: None,
        resume: false,
        overwrite: true,
        judging: Judging { windows: Some(WINDOWS), accept: true, ..Judging::default() },
    };
    let fitted = fit::work(g, &args, source)?;
    let (words, json, front) = (fit::words(&args, &fitted), fit::to_json(&args, &fitted), fit::marks(&fitted));
    let done = fitted.done.context("the search made no model")?;
    Ok(Made { done, by: "fit".into(), words, json, front })
}

/// What a recipe of the user's own makes.
fn by_recipe(g: &Global, a: &Quickstart, recipe: &str, source: &Model) -> anyhow::Result<Made> {
    common::say(format!(
        "2. compressing by the recipe '{recipe}', then judging on held-out text beside plain rounding"
    ));
    let args = Compress {
        scratch: None,
        model: a.model.clone(),
        recipe: recipe.to_owned(),
        out: a.out.clone(),
        sets: Vec::new(),
        calibration: Vec::new(),
        imatrix: None,
        // A quarter of what recipes ask for.
        samples: Some(8),
        seq_len: None,
        seed: None,
        max_ram: None,
        resume: false,
        overwrite: true,
        judging: Judging { windows: Some(WINDOWS), accept: true, ..Judging::default() },
    };
    let done = compress::work(g, &args, source)?;
    let (words, json) = (compress::words(&done), compress::json_of(&a.model, recipe, &done));
    Ok(Made { done, by: recipe.to_owned(), words, json, front: Vec::new() })
}
