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
    let threads = lacuna_kernels::threads();
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
        let yes: Vec<_> = features.iter().filter(|f| f.1).map(|f| f.0).collect();
        let no: Vec<_> = features.iter().filter(|f| !f.1).map(|f| f.0).collect();
        let no = if no.is_empty() { String::new() } else { format!("  (not: {})", no.join(" ")) };
        let isa = Isa::best().name();
        let kernels: String = ops.iter().map(|(op, codecs)| format!("  {op:<12} {}\n", codecs.join(", "))).collect();
        let cached = match (cache, from_cache) {
            (Some(bytes), Some(rate)) => {
                let bytes = show_bytes(bytes as u64);
                format!(
                    "cache        {bytes} in the last level, half of it read at {:.1} GB/s by all threads\n",
                    rate / 1e9
                )
            }
            _ => String::new(),
        };
        [
            format!("processor    {} {}\n", std::env::consts::OS, std::env::consts::ARCH),
            format!("features     {}{no}\n", yes.join(" ")),
            format!("kernels      {isa}: the widest instruction set that this processor has\n"),
            kernels,
            format!("threads      {threads}\n"),
            format!(
                "memory       {:.1} GB/s read by all threads (best of 7 streams over {} MB)\n",
                bandwidth / 1e9,
                stream >> 20
            ),
            cached,
            format!(
                "arithmetic   {:.0} G multiply-adds/s on f32, {:.0} on 8-bit codes, by all threads out of registers\n",
                floats / 1e9,
                bytes / 1e9
            ),
            "gpu          not used by this version\n".to_owned(),
        ]
        .concat()
    })?;
    Ok(ExitCode::SUCCESS)
}
