//! `inspect`: what a checkpoint is, and what is wrong with it.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use lacuna_base::units::show_bytes;
use lacuna_checkpoint::{Adapter, Checkpoint, Found, OpenError, Problem, Tokenizer, TokenizerError};
use lacuna_eval::Table;
use lacuna_format::Weights;
use lacuna_spec::{Mixer, Part, Place, Spec};
use serde_json::{Value, json};

use crate::cli::{Global, Inspect};
use crate::common::{self, Model};

#[derive(Default)]
struct Row {
    tensors: u64,
    parameters: u64,
    bytes: u64,
    /// By pattern, and as found in the values.
    stored_zeros: f64,
    zeros: u64,
    /// Matrices of which every one keeps at most 2 of 4, or 4 of 8.
    two_of_four: u64,
    four_of_eight: u64,
    codecs: BTreeMap<String, u64>,
}

impl Row {
    fn sparsity(&self, quick: bool) -> f64 {
        let zeros = if quick { self.stored_zeros } else { self.zeros as f64 };
        zeros / self.parameters.max(1) as f64
    }

    /// The pattern that holds in every matrix, the narrower first.
    fn pattern(&self) -> Option<&'static str> {
        let all = |n: u64| n == self.tensors;
        [("2:4", self.two_of_four), ("4:8", self.four_of_eight)].into_iter().find(|(_, n)| all(*n)).map(|(p, _)| p)
    }
}

/// Everything found by going through the tensors.
#[derive(Default)]
struct Walk {
    roles: BTreeMap<String, Row>,
    problems: Vec<Problem>,
    tensors: Vec<Value>,
}

impl Walk {
    fn over(c: &Checkpoint, a: &Inspect) -> Walk {
        let mut w = Walk::default();
        let places = c.spec().places();
        // Places that the opening went around have been told of already.
        let known = c.problems().iter().any(|p| p.broken);
        let bar = common::bar(places.len() as u64, "reading");
        for place in places {
            w.place(c, a, &place, known);
            c.release(&place);
            bar.inc(1);
        }
        bar.finish_and_clear();
        w
    }

    fn place(&mut self, c: &Checkpoint, a: &Inspect, place: &Place, known: bool) {
        let mut broken = |what: String| self.problems.push(Problem::broken(what, None));
        let s = match c.get(place) {
            Ok(Some(s)) => s,
            Ok(None) if known => return,
            Ok(None) => return broken(format!("{place} is missing")),
            Err(e) => return broken(e.to_string()),
        };
        if let Err(e) = s.check() {
            return broken(format!("{place}: {e}"));
        }
        let n = s.rows as u64 * s.cols as u64;
        let found = if a.quick { Found::default() } else { Found::of(&s) };
        if let Some((r, col)) = found.first {
            let what =
                format!("{place}: {} values are not finite, the first in row {r}, column {col}", found.not_finite);
            broken(what);
        }
        if let Some(what) = c.quantized().and_then(|q| q.contradiction(&s)) {
            self.problems.push(Problem::odd(format!("{place}: {what}"), None));
        }
        let role = if place.part == Part::Bias { "biases".to_owned() } else { place.role.name().to_owned() };
        let row = self.roles.entry(role).or_default();
        row.tensors += 1;
        row.parameters += n;
        row.bytes += s.bytes();
        row.stored_zeros += s.sparsity() * n as f64;
        row.zeros += found.zeros;
        row.two_of_four += u64::from(found.two_of_four);
        row.four_of_eight += u64::from(found.four_of_eight);
        *row.codecs.entry(s.codec_name()).or_default() += 1;
        if a.tensors {
            let sparsity = if a.quick { s.sparsity() } else { found.zeros as f64 / n.max(1) as f64 };
            self.tensors.push(json!({
                "place": place, "shape": [s.rows, s.cols], "bytes": s.bytes(), "codec": s.codec_name(), "sparsity": sparsity,
            }));
        }
    }
}

/// A tokenizer that cannot be read or is doubtful, and tokens that the embedding has no row for. To have none at all is
/// no fault.
fn tokenizer_problem(m: &Model) -> Option<Problem> {
    let tokenizer = match Tokenizer::open(&m.checkpoint) {
        Ok(t) => t,
        Err(TokenizerError::Missing(_)) => return None,
        Err(e) => {
            return Some(Problem::odd(format!("the tokenizer cannot be read, so that no text can be run: {e}"), None));
        }
    };
    let (tokens, rows) = (tokenizer.vocab_size(), m.checkpoint.spec().vocab);
    if tokens > rows {
        let what =
            format!("the tokenizer knows {tokens} tokens, the embedding has {rows} rows: the others cannot be run");
        return Some(Problem::odd(what, Some("put the tokenizer files of the model's own release beside it")));
    }
    let help = "convert the model again from its own release with a converter of today";
    Some(Problem::odd(Tokenizer::doubt(m.checkpoint.metadata()?)?, Some(help)))
}

/// What can be said of a model that does not open at all: whether `repair` mends it.
fn closed(g: &Global, a: &Inspect, path: &Path, e: OpenError) -> anyhow::Result<ExitCode> {
    let faults = lacuna_checkpoint::diagnose(path).unwrap_or_default();
    if faults.is_empty() {
        return Err(e.into());
    }
    // Recommended only where it works; otherwise why it does not says what is left to do.
    let help = match lacuna_checkpoint::mendable(path) {
        Ok(_) => format!("lacuna repair {} -o OUT", a.model),
        Err(why) => format!("repair does not mend that: {why}"),
    };
    let broken: Vec<&str> = faults.iter().map(|f| f.what.as_str()).collect();
    let problems: Vec<_> = broken.iter().map(|b| json!({"what": b, "help": help, "broken": true})).collect();
    let out = json!({"model": a.model, "path": path, "broken": broken, "problems": problems, "error": e.to_string()});
    common::print(g, &out, || {
        let broken: String = broken.iter().map(|b| format!("broken: {b}\n  what helps: {help}\n")).collect();
        format!("does not open: {e}\n{broken}")
    })?;
    Ok(ExitCode::FAILURE)
}

/// Runs the verb.
/// What else makes the network what it is: latents, mixers, experts.
fn beyond(spec: &Spec) -> String {
    let mut page = String::new();
    if let Some(m) = spec.layers.iter().find_map(|l| l.attn.as_ref()?.latent.as_ref()) {
        page += &format!(" over a latent of {}", m.rank);
    }
    let mixers: Vec<&str> = (spec.layers.iter().filter_map(|l| l.mixer.as_ref()))
        .map(|m| match m {
            Mixer::ShortConv(_) => "short convolutions",
            Mixer::Ssd(_) => "Mamba-2 mixers",
            Mixer::Mamba(_) => "Mamba mixers",
            Mixer::Delta(_) => "gated delta rules",
        })
        .collect();
    if let Some(name) = mixers.first() {
        let attention = spec.layers.iter().filter(|l| l.attn.is_some()).count();
        page += &format!(", {name} in {} layers and attention in {attention}", mixers.len());
    }
    let experts: Vec<_> = spec.layers.iter().filter_map(|l| l.ffn.as_ref()?.experts).collect();
    if let Some(e) = experts.first() {
        let shared = if e.shared.is_some() { " beside a shared one" } else { "" };
        page += &format!(", {} experts in {} layers, a token uses {}{shared}", e.count, experts.len(), e.used);
    }
    page
}

pub fn run(g: &Global, a: &Inspect) -> anyhow::Result<ExitCode> {
    let (path, adapter) = common::find(g, &a.model)?;
    let examined = match &g.read_as {
        Some(family) => lacuna_checkpoint::open_like(&path, family),
        None => lacuna_checkpoint::examine(&path),
    };
    let mut checkpoint = match examined {
        Ok(c) => c,
        Err(e) => return closed(g, a, &path, e),
    };
    if let Some(dir) = &adapter {
        checkpoint = checkpoint.with_adapter(Adapter::open(dir)?, g.merge)?;
    }
    let m = Model { name: a.model.clone(), path, checkpoint };
    let spec = m.checkpoint.spec();
    let walk = Walk::over(&m.checkpoint, a);
    let roles = &walk.roles;
    let unused: Vec<_> = m.checkpoint.unused().iter().map(|t| t.name.clone()).collect();
    let mut problems = [m.checkpoint.problems(), &walk.problems].concat();
    problems.extend(tokenizer_problem(&m));
    let parameters: u64 = roles.values().map(|r| r.parameters).sum();
    let bytes: u64 = roles.values().map(|r| r.bytes).sum();
    let bits = 8.0 * bytes as f64 / parameters.max(1) as f64;
    let packed = m.checkpoint.packed();
    let by_role: serde_json::Map<String, Value> = roles
        .iter()
        .map(|(k, r)| {
            let row = json!({
                "tensors": r.tensors, "parameters": r.parameters, "bytes": r.bytes, "sparsity": r.sparsity(a.quick),
                "pattern": r.pattern(), "codecs": r.codecs,
            });
            (k.clone(), row)
        })
        .collect();
    let broken: Vec<_> = problems.iter().filter(|p| p.broken).map(|p| p.what.clone()).collect();
    let listed: Vec<_> =
        problems.iter().map(|p| json!({ "what": p.what, "help": p.help, "broken": p.broken })).collect();
    let quantized = m.checkpoint.quantized();
    let producer = quantized.map(|q| {
        json!({ "producer": q.producer, "format": q.format, "scheme": q.describe(), "sparsity_format": q.sparsity_format, "notes": q.notes })
    });
    let out = json!({
        "model": a.model, "path": m.path, "kind": format!("{:?}", m.checkpoint.kind()), "spec": spec, "parameters": parameters,
        "bytes": bytes, "file_bytes": m.checkpoint.source_bytes(), "bits_per_weight": bits, "roles": by_role, "unused": unused,
        "broken": broken, "problems": listed, "quantized": producer, "adapter": m.checkpoint.adapter().map(|x| x.0),
        "remarks": m.checkpoint.remarks(), "recipe": packed.map(|p| &p.recipe),
        "approximations": packed.map(|p| &p.approximations), "tensors": walk.tensors,
    });
    common::print(g, &out, || {
        let one = spec.layers.iter().find_map(|l| l.attn.as_ref());
        let heads = one.map_or_else(String::new, |x| format!(", {}/{} heads of {}", x.heads, x.kv_heads, x.head_dim));
        let heads = heads + &beyond(spec);
        let mut page = format!(
            "{} ({:?}): {} layers, hidden {}{heads}, vocabulary {}, context {}{}\n",
            spec.arch,
            m.checkpoint.kind(),
            spec.layers.len(),
            spec.hidden,
            spec.vocab,
            spec.context,
            if spec.tied { ", tied embeddings" } else { "" }
        );
        page += &format!("{parameters} parameters in {}, {bits:.2} bits each\n", show_bytes(bytes));
        if let Some(q) = quantized {
            page += &format!("written by {}\n", q.describe());
        }
        page.extend(m.checkpoint.remarks().iter().map(|r| format!("{r}\n")));
        let mut t = Table::new(["role", "tensors", "parameters", "bytes", "zeros", "stored as"]);
        for (k, r) in roles {
            let codecs: Vec<_> = r.codecs.iter().map(|(c, n)| format!("{c} x{n}")).collect();
            let pattern = r.pattern().map_or_else(String::new, |p| format!(" ({p})"));
            t.row([
                k.clone(),
                r.tensors.to_string(),
                r.parameters.to_string(),
                show_bytes(r.bytes),
                format!("{:.1}%{pattern}", 100.0 * r.sparsity(a.quick)),
                codecs.join(", "),
            ]);
        }
        page += &format!("\n{}", t.text());
        if let Some(p) = packed {
            page += &format!("\ncompressed: {}\n", p.approximations.join("; "));
        }
        if a.tensors {
            page.push('\n');
            page.extend(walk.tensors.iter().map(|t| format!("{t}\n")));
        }
        if !unused.is_empty() {
            page += &format!("\nin the file but not part of the network: {}\n", unused.join(", "));
        }
        for p in &problems {
            page += &format!("{}: {}\n", if p.broken { "broken" } else { "odd" }, p.what);
            page.extend(p.help.iter().map(|h| format!("  what helps: {}\n", h.replace("MODEL", &a.model))));
        }
        page
    })?;
    Ok(if broken.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
