//! `bench`: speeds, beside what this machine's memory and arithmetic allow.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use lacuna_base::units::show_bytes;
use lacuna_compress::{Recipe, Shaped};
use lacuna_judge::Footprint;
use lacuna_kernels::{Isa, ceiling};
use lacuna_run::{BenchOptions, Engine, Spent};
use serde_json::json;

use crate::cli::{self, Global};
use crate::common::{self, Usage};
use crate::{recipes, shapes};

/// Runs the verb.
pub fn run(g: &Global, a: &cli::Bench) -> anyhow::Result<ExitCode> {
    if let Some(name) = &a.isa {
        let here: Vec<&str> = Isa::here().iter().map(|i| i.name()).collect();
        let isa = Isa::ALL.into_iter().find(|i| i.name() == name);
        if !isa.is_some_and(Isa::choose) {
            return Err(Usage(format!("--isa {name}: this machine has {}", here.join(", "))).into());
        }
    }
    let (name, engine) = engine(g, a)?;
    let engine = Arc::new(engine);
    let (context, why) = (engine.context(), common::NO_FURTHER);
    // A step needs a token before it.
    let room = context.saturating_sub(a.depth.max(1));
    if room == 0 {
        return Err(Usage(format!("--depth {}: this model takes less than {context} before a step", a.depth)).into());
    }
    let options = BenchOptions {
        prompt_tokens: a.prompt.unwrap_or_else(|| common::fitting("prompt tokens", 512, context, why)),
        gen_tokens: a.generate.unwrap_or_else(|| common::fitting("steps", 128, room, why)),
        depth: a.depth,
        reps: a.reps,
        seed: 0,
        profile: a.profile,
    };
    let bar = common::bar(a.reps as u64 + 1, "timing");
    let b = lacuna_run::bench(Arc::clone(&engine), &options, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    // What a token reads lies where the one before left it: in a cache that holds it all, or in memory.
    let footprint = engine.model().footprint_bytes() + b.kv_bytes;
    let bandwidth = ceiling::bandwidth(usize::try_from(footprint).unwrap_or(usize::MAX).min(ceiling::beyond_caches()));
    let from = if Footprint::of(footprint).cached() { "cache" } else { "memory" };
    let (floats, bytes) = ceiling::arithmetic();
    let of_memory = b.decode_tok_s.map(|t| t * b.token_bytes as f64 / bandwidth);
    let [on_floats, on_bytes] = engine.model().work().map(|w| w as f64);
    let of_arithmetic = b.prefill_tok_s.map(|t| t * (on_floats / floats + on_bytes / bytes));
    let threads = lacuna_kernels::threads();
    let out = json!({
        "model": name, "prefill_tok_s": b.prefill_tok_s, "decode_tok_s": b.decode_tok_s, "prefill_runs": b.prefill_all_tok_s,
        "decode_runs": b.decode_all_tok_s, "weights_bytes": b.weights_bytes, "kv_bytes": b.kv_bytes, "token_bytes": b.token_bytes,
        "read_bytes_per_second": bandwidth, "read_from": from, "roofline_fraction": of_memory, "f32_multiply_adds_per_second": floats,
        "int8_multiply_adds_per_second": bytes, "arithmetic_fraction": of_arithmetic, "threads": threads, "isa": Isa::best().name(), "prompt": options.prompt_tokens,
        "gen": options.gen_tokens, "depth": options.depth, "activations": a.running.activations.name(),
        "kv": format!("{:?}", a.running.kv).to_lowercase(), "peak_rss_bytes": lacuna_compress::memory::peak(),
        "run": engine.plan().to_json(), "prefill_profile": b.prefill_profile, "decode_profile": b.decode_profile,
    });
    common::print(g, &out, || {
        let mut page = String::new();
        if let (Some(p), Some(f)) = (b.prefill_tok_s, of_arithmetic) {
            page += &format!(
                "prefill  {p:>8.1} tok/s  ({} tokens): {:.0}% of the multiply-adds that {threads} threads can do out \
                 of registers\n",
                options.prompt_tokens,
                100.0 * f
            );
        }
        if let (Some(d), Some(f)) = (b.decode_tok_s, of_memory) {
            page += &format!("decode   {d:>8.1} tok/s  ({} tokens at depth {})\n", options.gen_tokens, options.depth);
            page += &format!(
                "bytes    {:>8} a token ({} weights, {} cache): {:.0}% of the {:.1} GB/s at which {threads} threads \
                 read as many bytes from {from}\n",
                show_bytes(b.token_bytes),
                show_bytes(b.weights_bytes),
                show_bytes(b.kv_bytes),
                100.0 * f,
                bandwidth / 1e9
            );
        }
        page + &table("prefill", &b.prefill_profile) + &table("decode", &b.decode_profile)
    })?;
    Ok(ExitCode::SUCCESS)
}

/// The model of the command line, ready to run.
fn engine(g: &Global, a: &cli::Bench) -> anyhow::Result<(String, Engine)> {
    if let Some(shape) = &a.shape {
        let registry = lacuna_methods::registry();
        let text = a.recipe.as_deref().map_or_else(|| Ok("version = 1".to_owned()), recipes::text)?;
        let recipe = Recipe::parse(&text, &registry, &a.set).map_err(|e| Usage(format!("the recipe: {e}")))?;
        let weights = Shaped::new(shapes::spec(shape)?, &recipe)?;
        let name = a.recipe.as_ref().map_or_else(|| shape.clone(), |r| format!("{shape}, {r}"));
        return Ok((name, common::engine(&weights, &a.running)?));
    }
    let name = a.model.as_deref().context("a model or --shape")?;
    Ok((name.to_owned(), common::open(g, name)?.engine(&a.running)?))
}

/// Where the time of a run went.
fn table(of: &str, spent: &[Spent]) -> String {
    let whole: f64 = spent.iter().map(|s| s.seconds).sum();
    if spent.is_empty() {
        return String::new();
    }
    let row = |s: &Spent| {
        let (ms, share) = (1e3 * s.seconds, 100.0 * s.seconds / whole);
        format!("  {:<24} {:>8} {ms:>10.2} {share:>6.1}%\n", s.name, s.calls)
    };
    format!("\n{of:<26} {:>8} {:>10} {:>7}\n", "calls", "ms", "share") + &spent.iter().map(row).collect::<String>()
}
