//! `doctor`: this machine.

use std::collections::BTreeMap;
use std::process::ExitCode;

use lacuna_kernels::{Isa, table};
use serde_json::json;

use crate::cli::Global;
use crate::common;

/// Bytes streamed to measure bandwidth: far beyond any cache.
const STREAM_BYTES: usize = 512 << 20;

/// Runs the verb.
pub fn run(g: &Global) -> anyhow::Result<ExitCode> {
    let features = table::features();
    let threads = rayon::current_num_threads();
    let bandwidth = lacuna_kernels::ceiling::bandwidth(STREAM_BYTES);
    let (floats, bytes) = lacuna_kernels::ceiling::arithmetic();
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
        "threads": threads, "read_bytes_per_second": bandwidth, "f32_multiply_adds_per_second": floats, "int8_multiply_adds_per_second": bytes, "kernels": ops, "gpu": null,
    });
    common::print(g, &out, || {
        let yes: Vec<_> = features.iter().filter(|f| f.1).map(|f| f.0).collect();
        let no: Vec<_> = features.iter().filter(|f| !f.1).map(|f| f.0).collect();
        let no = if no.is_empty() { String::new() } else { format!("  (not: {})", no.join(" ")) };
        let isa = Isa::best().name();
        let kernels: String = ops.iter().map(|(op, codecs)| format!("  {op:<12} {}\n", codecs.join(", "))).collect();
        [
            format!("processor    {} {}\n", std::env::consts::OS, std::env::consts::ARCH),
            format!("features     {}{no}\n", yes.join(" ")),
            format!("kernels      {isa}: the widest instruction set that this processor has\n"),
            kernels,
            format!("threads      {threads}\n"),
            format!(
                "memory       {:.1} GB/s read by all threads (best of 7 streams over {} MB)\n",
                bandwidth / 1e9,
                STREAM_BYTES >> 20
            ),
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
