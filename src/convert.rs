//! `convert`: models for other programs, and what the change of form cost.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, bail};
use lacuna_base::units::show_bytes;
use lacuna_checkpoint::save::{
    GgufKind, Loss, PackQuantized, Rounding, Saved, save_compressed_tensors, save_gguf, save_hf, save_peft,
};
use lacuna_checkpoint::{ChatTemplate, Tokenizer};
use lacuna_eval::{Eval, HELD_OUT, Means, Table};
use lacuna_format::{Float, Weights};
use serde_json::{Value, json};

use crate::cli::{Convert, Format, Global, Reader, Type};
use crate::common::{self, Model, Usage};

/// Runs the verb.
pub fn run(g: &Global, a: &Convert) -> anyhow::Result<ExitCode> {
    let start = Instant::now();
    let max_ram = common::size(a.max_ram.as_deref())?;
    if a.to == Format::Gguf && a.out.extension().is_none_or(|e| e != "gguf") {
        return Err(Usage(format!("{}: the name of a GGUF file ends in .gguf", a.out.display())).into());
    }
    if a.zero_points && a.to != Format::CompressedTensors {
        return Err(Usage("--zero-points is for --to compressed-tensors".into()).into());
    }
    let m = common::open(g, &a.model)?;
    let bar = common::bar(0, "converting");
    let mut progress = |done: usize, all: usize| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    };
    let (source, over) = (&m.checkpoint, a.overwrite);
    let mut saved = match a.to {
        Format::Gguf => save_gguf(source, &a.out, gguf_kind(a.kind)?, over, &mut progress)?,
        Format::Hf => save_hf(source, &a.out, float(a.kind, "hf")?, over, &mut progress)?,
        Format::CompressedTensors => save_compressed_tensors(source, &a.out, pack_quantized(a)?, over, &mut progress)?,
        Format::Peft => save_peft(source, &a.out, float(a.kind, "peft")?, over, &mut progress)?,
    };
    bar.finish_and_clear();
    let judged = judge(&m, a, max_ram, &mut saved)?;
    let mut all = Loss::default();
    saved.tensors.iter().for_each(|t| all.add(&t.loss));
    let forms = forms(&saved);
    let fallbacks: Vec<Value> = saved
        .tensors
        .iter()
        .filter_map(|t| Some(json!({"tensor": t.name, "instead_of": t.instead_of.as_ref()?, "type": t.to})))
        .collect();
    let mut out = json!({
        "model": a.model, "out": saved.path, "bytes": saved.bytes, "source_bytes": m.checkpoint.source_bytes(), "values": all.values,
        "changed": all.changed, "zeros_lost": all.zeros_lost, "relative_error": all.relative(), "fallbacks": fallbacks,
        "tensors": saved.tensors, "notes": saved.notes,
    });
    if let Some(j) = judged.as_object() {
        j.iter().for_each(|(k, v)| out[k] = v.clone());
    }
    out["seconds"] = json!(start.elapsed().as_secs_f64());
    out["peak_rss_bytes"] = json!(lacuna_compress::memory::peak());
    common::print(g, &out, || words(&saved, &forms, &all, &judged))?;
    Ok(ExitCode::SUCCESS)
}

/// Writes a packed model for another program, every value as it is stored.
pub fn write(g: &Global, packed: &Path, reader: Reader, out: &Path, overwrite: bool) -> anyhow::Result<()> {
    let m = common::open_alone(g, &packed.display().to_string())?;
    let bar = common::bar(0, "converting");
    let mut progress = |done: usize, all: usize| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    };
    let none = PackQuantized { rounding: None, zero_points: false };
    let saved = match reader {
        Reader::Gguf => save_gguf(&m.checkpoint, out, GgufKind::Source, overwrite, &mut progress)?,
        _ => save_compressed_tensors(&m.checkpoint, out, none, overwrite, &mut progress)?,
    };
    bar.finish_and_clear();
    saved.notes.iter().for_each(|n| common::say(format!("note: {n}")));
    Ok(())
}

fn gguf_kind(kind: Type) -> anyhow::Result<GgufKind> {
    Ok(match kind {
        Type::Source => GgufKind::Source,
        Type::F32 => GgufKind::F32,
        Type::F16 => GgufKind::F16,
        Type::Q8_0 => GgufKind::Q8_0,
        Type::Q4_0 => GgufKind::Q4_0,
        Type::Q4_K => GgufKind::Q4_K,
        Type::Q6_K => GgufKind::Q6_K,
        Type::Bf16 | Type::Int4 | Type::Int8 => {
            return Err(wrong_type("gguf", "source, f32, f16, q8_0, q4_0, q4_k, q6_k"));
        }
    })
}

fn float(kind: Type, to: &str) -> anyhow::Result<Option<Float>> {
    Ok(match kind {
        Type::Source => None,
        Type::F32 => Some(Float::F32),
        Type::F16 => Some(Float::F16),
        Type::Bf16 => Some(Float::Bf16),
        _ => return Err(wrong_type(to, "source, f32, f16, bf16")),
    })
}

fn pack_quantized(a: &Convert) -> anyhow::Result<PackQuantized> {
    let bits = match a.kind {
        Type::Source => None,
        Type::Int4 => Some(4),
        Type::Int8 => Some(8),
        _ => return Err(wrong_type("compressed-tensors", "source, int4, int8")),
    };
    Ok(PackQuantized { rounding: bits.map(|bits| Rounding { bits, group: a.group }), zero_points: a.zero_points })
}

fn wrong_type(to: &str, known: &str) -> anyhow::Error {
    Usage(format!("--to {to} knows --type {known}")).into()
}

/// Tensors that went the same way.
struct Way {
    tensors: usize,
    loss: Loss,
}

fn forms(saved: &Saved) -> BTreeMap<(String, String), Way> {
    let mut ways = BTreeMap::new();
    for t in &saved.tensors {
        let to = match &t.instead_of {
            Some(wanted) => format!("{} (rows do not divide into {wanted})", t.to),
            None => t.to.clone(),
        };
        let way = ways.entry((t.from.clone(), to)).or_insert(Way { tensors: 0, loss: Loss::default() });
        way.tensors += 1;
        way.loss.add(&t.loss);
    }
    ways
}

fn words(saved: &Saved, forms: &BTreeMap<(String, String), Way>, all: &Loss, judged: &Value) -> String {
    let mut t = Table::new(["was", "is", "tensors", "values changed", "relative error", "zeros lost"]);
    for ((from, to), way) in forms {
        let part = way.loss.changed as f64 / way.loss.values.max(1) as f64;
        t.row([
            from.clone(),
            to.clone(),
            way.tensors.to_string(),
            if way.loss.changed == 0 { "none".into() } else { format!("{:.1}%", 100.0 * part) },
            if way.loss.changed == 0 { String::new() } else { format!("{:.2e}", way.loss.relative()) },
            if way.loss.zeros_lost == 0 { String::new() } else { way.loss.zeros_lost.to_string() },
        ]);
    }
    let mut page = format!("{}: {}\n\n{}", saved.path.display(), show_bytes(saved.bytes), t.text());
    let fallen: Vec<&str> = saved.tensors.iter().filter(|t| t.instead_of.is_some()).map(|t| t.name.as_str()).collect();
    if !fallen.is_empty() {
        page += &format!("\nof another type than asked for: {}\n", fallen.join(", "));
    }
    page.extend(saved.notes.iter().map(|n| format!("\n{n}\n")));
    if all.zeros_lost > 0 {
        page += &format!(
            "\n{} weights that were zero are none any more: the type has no zero in their group's grid\n",
            all.zeros_lost
        );
    }
    match (judged["kl_mean"].as_f64(), judged["not_measured"].as_str()) {
        (Some(kl), _) => {
            page += &format!(
                "\nKL(source || converted) {kl:.6} nats a token, the same first choice {:.2}%, perplexity {:.3} -> \
                 {:.3} ({} tokens held out)\n",
                100.0 * judged["top1_agree"].as_f64().unwrap_or(0.0),
                judged["ppl_source"].as_f64().unwrap_or(0.0),
                judged["ppl"].as_f64().unwrap_or(0.0),
                judged["kl_tokens"],
            )
        }
        (None, Some(why)) => page += &format!("\nKL was not measured: {why}\n"),
        (None, None) => {}
    }
    page
}

/// The converted model beside its source on text that Lacuna carries; first of all, that both read the text as the same
/// tokens.
fn judge(m: &Model, a: &Convert, max_ram: Option<u64>, saved: &mut Saved) -> anyhow::Result<Value> {
    if a.to == Format::Peft {
        return Ok(json!({"not_measured": "an adapter and its base are two models until a reader adds them up"}));
    }
    let written = match lacuna_checkpoint::open(&saved.path) {
        Ok(written) => written,
        // What other readers are written for and this one does not open yet.
        Err(e) if a.to == Format::CompressedTensors => {
            return Ok(json!({"not_measured": format!("{e}")}));
        }
        Err(e) => return Err(e).context("what was written does not open"),
    };
    let source = match Tokenizer::open(&m.checkpoint) {
        Ok(t) => t,
        Err(e) => return Ok(json!({"not_measured": format!("the source has no tokenizer that can be read ({e})")})),
    };
    let tokens = source.encode(HELD_OUT, false)?;
    let other = Tokenizer::open(&written).context("the tokenizer that was written")?;
    let compared = source.compare(&other, ChatTemplate::open(&m.checkpoint).ok().as_ref(), &[HELD_OUT])?;
    if let Some(why) = compared.refused {
        remove(&saved.path);
        bail!(
            "the tokenizer that was written gives other ids than the source's ({why}): this tokenizer cannot be \
             converted; {} was taken away again",
            saved.path.display()
        );
    }
    for note in compared.notes {
        if !saved.notes.contains(&note) {
            saved.notes.push(note);
        }
    }
    if a.no_kl {
        return Ok(json!({"not_measured": "--no-kl"}));
    }
    let bar = common::bar(0, "measuring");
    let progress = |done: usize, all: usize| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    };
    let room = Means { max_ram, ..Means::default() };
    let context = m.checkpoint.spec().context.min(written.spec().context);
    let ctx = common::window(a.ctx, 512, context, tokens.len())?;
    let windows = (tokens.len() / ctx.max(1)).min(a.windows).max(1);
    let eval = Eval { ctx, windows: Some(windows), room, progress: Some(&progress), ..Eval::default() };
    let judged =
        eval.reference(&tokens, &m.checkpoint).and_then(|mut reference| eval.against(&written, &mut reference));
    bar.finish_and_clear();
    let judged = match judged {
        Err(e) if e.not_finite => {
            remove(&saved.path);
            bail!("{}: {} was taken away again (--no-kl keeps such a model)", e.what, saved.path.display());
        }
        judged => judged?,
    };
    let Some(x) = judged.against else { return Ok(Value::Null) };
    Ok(json!({
        "kl_mean": x.kl_mean, "top1_agree": x.top1_agree, "ppl_source": x.ppl_dense, "ppl": judged.ppl, "kl_tokens": judged.tokens,
    }))
}

/// Takes a converted model away again.
fn remove(path: &Path) {
    let gone = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    if let Err(e) = gone {
        common::say(format!("{}: {e}", path.display()));
    }
}
