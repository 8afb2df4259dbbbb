//! `inspect`: what a checkpoint is, and what is wrong with it.

use std::collections::BTreeMap;
use std::process::ExitCode;

use lacuna_base::units::show_bytes;
use lacuna_eval::Table;
use lacuna_format::Weights;
use lacuna_spec::Part;
use serde_json::{Value, json};

use crate::cli::{Global, Inspect};
use crate::common;

#[derive(Default)]
struct Row {
    tensors: u64,
    parameters: u64,
    bytes: u64,
    zeros: f64,
    codecs: BTreeMap<String, u64>,
}

/// Runs the verb.
pub fn run(g: &Global, a: &Inspect) -> anyhow::Result<ExitCode> {
    let faults = lacuna_checkpoint::diagnose(&common::pull(g, &a.model)?.path)?;
    let m = match common::open(g, &a.model) {
        Ok(m) => m,
        // Nothing more can be said about what does not open, but what is wrong and that it can be mended.
        Err(e) if !faults.is_empty() => return Ok(mendable(g, a, &faults, &e)),
        Err(e) => return Err(e),
    };
    let (spec, mut roles, mut broken) = (m.checkpoint.spec().clone(), BTreeMap::<String, Row>::new(), Vec::new());
    let mut tensors = Vec::new();
    for place in spec.places() {
        let s = match m.checkpoint.get(&place) {
            Ok(Some(s)) => s,
            Ok(None) => {
                broken.push(format!("{place} is missing"));
                continue;
            }
            Err(e) => {
                broken.push(e.to_string());
                continue;
            }
        };
        if let Err(e) = s.check() {
            broken.push(format!("{place}: {e}"));
            continue;
        }
        let n = s.rows as u64 * s.cols as u64;
        let role = if place.part == Part::Bias { "biases".to_owned() } else { place.role.name().to_owned() };
        let row = roles.entry(role).or_default();
        row.tensors += 1;
        row.parameters += n;
        row.bytes += s.bytes();
        row.zeros += s.sparsity() * n as f64;
        *row.codecs.entry(s.codec_name()).or_default() += 1;
        if a.tensors {
            tensors.push(json!({
                "place": place, "shape": [s.rows, s.cols], "bytes": s.bytes(), "codec": s.codec_name(), "sparsity": s.sparsity(),
            }));
        }
        m.checkpoint.release(&place);
    }
    broken.extend(faults.iter().map(|f| f.what.clone()));
    let unused: Vec<_> = m.checkpoint.unused().iter().map(|t| t.name.clone()).collect();
    let parameters: u64 = roles.values().map(|r| r.parameters).sum();
    let bytes: u64 = roles.values().map(|r| r.bytes).sum();
    let bits = 8.0 * bytes as f64 / parameters.max(1) as f64;
    let packed = m.checkpoint.packed();
    let by_role: serde_json::Map<String, Value> = roles
        .iter()
        .map(|(k, r)| {
            let sparsity = r.zeros / r.parameters.max(1) as f64;
            (k.clone(), json!({ "tensors": r.tensors, "parameters": r.parameters, "bytes": r.bytes, "sparsity": sparsity, "codecs": r.codecs }))
        })
        .collect();
    let out = json!({
        "model": a.model, "path": m.path, "kind": format!("{:?}", m.checkpoint.kind()), "spec": spec, "parameters": parameters,
        "bytes": bytes, "file_bytes": m.checkpoint.source_bytes(), "bits_per_weight": bits, "roles": by_role, "unused": unused,
        "broken": broken, "recipe": packed.map(|p| &p.recipe), "approximations": packed.map(|p| &p.approximations), "tensors": tensors,
    });
    common::print(g, &out, || {
        let one = spec.layers.iter().find_map(|l| l.attn.as_ref());
        let heads = one.map_or_else(String::new, |x| format!(", {}/{} heads of {}", x.heads, x.kv_heads, x.head_dim));
        println!(
            "{} ({:?}): {} layers, hidden {}{heads}, vocabulary {}, context {}{}",
            spec.arch,
            m.checkpoint.kind(),
            spec.layers.len(),
            spec.hidden,
            spec.vocab,
            spec.context,
            if spec.tied { ", tied embeddings" } else { "" }
        );
        println!("{parameters} parameters in {}, {bits:.2} bits each\n", show_bytes(bytes));
        let mut t = Table::new(["role", "tensors", "parameters", "bytes", "zeros", "stored as"]);
        for (k, r) in &roles {
            let codecs: Vec<_> = r.codecs.iter().map(|(c, n)| format!("{c} x{n}")).collect();
            t.row([
                k.clone(),
                r.tensors.to_string(),
                r.parameters.to_string(),
                show_bytes(r.bytes),
                format!("{:.1}%", 100.0 * r.zeros / r.parameters.max(1) as f64),
                codecs.join(", "),
            ]);
        }
        print!("{}", t.text());
        if let Some(p) = packed {
            println!("\ncompressed: {}", p.approximations.join("; "));
        }
        if a.tensors {
            println!();
            for t in &tensors {
                println!("{t}");
            }
        }
        if !unused.is_empty() {
            println!("\nin the file but not part of the network: {}", unused.join(", "));
        }
        for b in &broken {
            println!("broken: {b}");
        }
    });
    Ok(if broken.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What is wrong with a checkpoint that does not open and that `repair` mends.
fn mendable(g: &Global, a: &Inspect, faults: &[lacuna_checkpoint::Fault], e: &anyhow::Error) -> ExitCode {
    let broken: Vec<&str> = faults.iter().map(|f| f.what.as_str()).collect();
    let out = json!({"model": a.model, "broken": broken, "opens": false, "error": format!("{e:#}"), "repair": true});
    common::print(g, &out, || {
        for b in &broken {
            println!("broken: {b}");
        }
        println!("lacuna repair {} -o OUT mends it", a.model);
    });
    ExitCode::FAILURE
}
