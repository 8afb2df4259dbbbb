//! `bench`: speeds, beside what this machine's memory allows.

use std::process::ExitCode;

use lacuna_base::units::show_bytes;
use lacuna_run::BenchOptions;
use serde_json::json;

use crate::cli::{self, Global};
use crate::common;

/// Runs the verb.
pub fn run(g: &Global, a: &cli::Bench) -> anyhow::Result<ExitCode> {
    let m = common::open(g, &a.model)?;
    let engine = m.engine(&a.running)?;
    let options =
        BenchOptions { prompt_tokens: a.prompt, gen_tokens: a.generate, depth: a.depth, reps: a.reps, seed: 0 };
    let bar = common::bar(a.reps as u64 + 1, "timing");
    let b = engine.bench(&options, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    let ceiling = lacuna_judge::bandwidth(512 << 20);
    let fraction = b.decode_tok_s.map(|t| t * b.token_bytes as f64 / ceiling);
    let threads = rayon::current_num_threads();
    let out = json!({
        "model": a.model, "prefill_tok_s": b.prefill_tok_s, "decode_tok_s": b.decode_tok_s, "prefill_runs": b.prefill_all_tok_s,
        "decode_runs": b.decode_all_tok_s, "weights_bytes": b.weights_bytes, "kv_bytes": b.kv_bytes, "token_bytes": b.token_bytes,
        "read_bytes_per_second": ceiling, "roofline_fraction": fraction, "threads": threads, "prompt": a.prompt, "gen": a.generate,
        "depth": a.depth, "activations": a.running.activations.name(), "kv": format!("{:?}", a.running.kv).to_lowercase(), "peak_rss_bytes": lacuna_compress::memory::peak(),
    });
    common::print(g, &out, || {
        if let Some(p) = b.prefill_tok_s {
            println!("prefill  {p:>8.1} tok/s  ({} tokens)", a.prompt);
        }
        if let (Some(d), Some(f)) = (b.decode_tok_s, fraction) {
            println!("decode   {d:>8.1} tok/s  ({} tokens at depth {})", a.generate, a.depth);
            println!(
                "bytes    {:>8} a token ({} weights, {} cache): {:.0}% of the {:.1} GB/s that memory gives {threads} threads",
                show_bytes(b.token_bytes),
                show_bytes(b.weights_bytes),
                show_bytes(b.kv_bytes),
                100.0 * f,
                ceiling / 1e9
            );
        }
    });
    Ok(ExitCode::SUCCESS)
}
