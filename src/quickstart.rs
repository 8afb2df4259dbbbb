//! `quickstart`: the whole story in one command.

use std::process::ExitCode;
use std::time::Instant;

use lacuna_run::{Generation, Sampling};
use serde_json::json;

use crate::cli::{Activations, Cache, Compress, Gate, Global, Quickstart, Running};
use crate::common::{self, Model};
use crate::{compress, generate, out, report};

/// Both run as `generate` would.
const RUNNING: Running = Running { activations: Activations::Int8, kv: Cache::F16 };
/// What both models are asked.
const PROMPT: &str = "Explain in two sentences why the sky is blue.";

/// Runs the verb. Whatever the verdict, a finished story exits with 0.
pub fn run(g: &Global, a: &Quickstart) -> anyhow::Result<ExitCode> {
    let start = Instant::now();
    common::say(format!("1. pulling {}", a.model));
    let source = common::open(g, &a.model)?;
    let recipe = a.recipe.clone().unwrap_or_else(|| "default".into());
    common::say(format!(
        "2. compressing by the recipe '{recipe}', then judging on held-out text beside plain rounding"
    ));
    let args = Compress {
        scratch: None,
        model: a.model.clone(),
        recipe: recipe.clone(),
        out: a.out.clone(),
        sets: Vec::new(),
        calibration: None,
        // A quarter of what the recipe asks for, and few windows: the whole story within minutes on two cores.
        samples: Some(8),
        seq_len: None,
        seed: None,
        eval: None,
        ctx: None,
        windows: Some(6),
        gate: Gate::Full,
        max_ram: None,
        resume: false,
        overwrite: true,
        accept: true,
        report: None,
    };
    let done = compress::work(g, &args, &source)?;
    if !g.json {
        out::write(&compress::words(&done))?;
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
        let chat = model.template().is_ok();
        let generation = Generation {
            prompt: generate::prompt_tokens(model, &tokenizer, PROMPT, chat)?,
            max_tokens: 64,
            stop: Vec::new(),
            sampling: Sampling::default(),
            ignore_end: false,
        };
        let said = generate::stream(&engine, &tokenizer, &generation, false)?;
        if !g.json {
            out::write(&format!("\n{who}: {}\n", said.text.trim()))?;
        }
        generate::tell(&said);
        // An answer begins anew; a continuation goes on.
        let asked = if chat { format!("{PROMPT}\n\n") } else { PROMPT.to_owned() };
        samples.push((who.to_owned(), asked, said.text));
    }
    report::write(&a.report, &a.model, &recipe, &done, &samples, &[])?;
    let json = json!({
        "model": a.model, "out": done.outcomes.path, "report": a.report, "source_bytes": done.source_bytes,
        "bytes_after": done.outcomes.bytes, "ppl": done.judged.as_ref().map(|j| j.ppl),
        "pays": done.verdict.as_ref().map(|v| v.pays), "baselines": done.verdict.as_ref().map(|v| &v.against),
        "samples": samples.iter().map(|(who, _, text)| json!({ "who": who, "text": text })).collect::<Vec<_>>(),
        "seconds": start.elapsed().as_secs_f64(),
    });
    common::print(g, &json, || {
        let out = a.out.display();
        format!("\nreport: {}\nmodel:  {out}   (try: lacuna chat {out})\n", a.report.display())
    })?;
    Ok(ExitCode::SUCCESS)
}
