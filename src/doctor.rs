//! `doctor`: this machine.

use std::collections::BTreeMap;
use std::process::ExitCode;

use lacuna_base::units::show_bytes;
use lacuna_kernels::{Isa, ceiling, cpu, table};
use serde_json::json;

use crate::cli::Global;
use crate::common;

/// Runs the verb.
pub fn run(g: &Global) -> anyhow::Result<ExitCode> {
    let features = table::features();
    let threads = rayon::current_num_threads();
    let (stream, cache) = (ceiling::beyond_caches(), cpu::last_level_cache());
    let bandwidth = ceiling::bandwidth(stream);
    // Half of it: the rest of what runs has its part of it, too.
    let from_cache = cache.map(|c| ceiling::bandwidth(c / 2));
    let (floats, bytes) = ceiling::arithmetic();
    let mut ops: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for r in table::chosen() {
        let codecs = ops.entry(r.op).or_default();
        if !codecs.contains(&r.codec) {
            codecs.push(r.codec);
        }
    }
    let has: BTreeMap<_, _> = features.iter().copied().collect();
    let out = json!({
        "os": std::env::consts::OS, "arch": std::env::consts::ARCH, "isa": Isa::best().name(), "features": has,
        "threads": threads, "read_bytes_per_second": bandwidth, "last_level_cache_bytes": cache,
        "cache_read_bytes_per_second": from_cache, "f32_multiply_adds_per_second": floats, "int8_multiply_adds_per_second": bytes, "kernels": ops, "gpu": null,
    });
    common::print(g, &out, || {
        println!("processor    {} {}", std::env::consts::OS, std::env::consts::ARCH);
        let yes: Vec<_> = features.iter().filter(|f| f.1).map(|f| f.0).collect();
        let no: Vec<_> = features.iter().filter(|f| !f.1).map(|f| f.0).collect();
        println!(
            "features     {}{}",
            yes.join(" "),
            if no.is_empty() { String::new() } else { format!("  (not: {})", no.join(" ")) }
        );
        println!("kernels      {}: the widest instruction set that this processor has", Isa::best().name());
        for (op, codecs) in &ops {
            println!("  {op:<12} {}", codecs.join(", "));
        }
        println!("threads      {threads}");
        println!(
            "memory       {:.1} GB/s read by all threads (best of 7 streams over {} MB)",
            bandwidth / 1e9,
            stream >> 20
        );
        if let (Some(bytes), Some(rate)) = (cache, from_cache) {
            println!(
                "cache        {} in the last level, half of it read at {:.1} GB/s by all threads",
                show_bytes(bytes as u64),
                rate / 1e9
            );
        }
        println!(
            "arithmetic   {:.0} G multiply-adds/s on f32, {:.0} on 8-bit codes, by all threads out of registers",
            floats / 1e9,
            bytes / 1e9
        );
        println!("gpu          not used by this version");
    });
    Ok(ExitCode::SUCCESS)
}
