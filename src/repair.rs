//! `repair`: checkpoints that other programs left broken, mended.

use std::process::ExitCode;

use anyhow::Context;
use serde_json::json;

use crate::cli::{Global, Repair};
use crate::common;

/// Runs the verb.
pub fn run(g: &Global, a: &Repair) -> anyhow::Result<ExitCode> {
    let path = common::pull(g, &a.model)?.path;
    let bar = common::bar(0, "mending");
    let mut progress = |done: usize, all: usize| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    };
    let mended = lacuna_checkpoint::repair(&path, &a.out, a.overwrite, &mut progress)?;
    bar.finish_and_clear();
    lacuna_checkpoint::open(&a.out).with_context(|| format!("{} was mended and still does not open", a.model))?;
    let mended: Vec<&str> = mended.iter().map(|f| f.what.as_str()).collect();
    let out = json!({"model": a.model, "out": a.out, "mended": mended});
    common::print(g, &out, || {
        let lines: String = mended.iter().map(|m| format!("mended: {m}\n")).collect();
        format!("{lines}{} opens\n", a.out.display())
    })?;
    Ok(ExitCode::SUCCESS)
}
