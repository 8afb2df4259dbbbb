//! What a search came to: for programs, in words, and as a model's card.

use lacuna_base::units::show_bytes;
use lacuna_eval::Table as Columns;
use lacuna_judge::fit::Point;
use serde_json::{Value, json};

use super::Fitted;
use crate::{cli, compress};

/// A point's KL on those windows that every point of the front was measured on.
fn alike(f: &Fitted, p: &Point) -> f64 {
    let n = f.front.iter().map(|(_, p)| p.kl.len()).min().unwrap_or(0).max(1);
    let seen = &p.kl[..n.min(p.kl.len())];
    seen.iter().sum::<f64>() / seen.len().max(1) as f64
}

/// Points of the front for a plot of bytes against loss: name, bytes, KL on the text of the search.
pub fn marks(f: &Fitted) -> Vec<(String, u64, f64)> {
    f.front.iter().map(|(name, p)| (name.clone(), p.bytes, alike(f, p))).collect()
}

/// The flags that a recipe's numbers came of, beside the recipe; `imatrix`: whether it reads one.
pub fn flags(a: &cli::Fit, imatrix: bool) -> String {
    let mut flags = String::new();
    for text in &a.calibration {
        flags += &format!(" --calibration {}", text.path.display());
        if a.calibration.len() > 1 {
            flags += &format!("={}", text.weight);
        }
    }
    if let Some(file) = a.imatrix.as_ref().filter(|_| imatrix) {
        flags += &format!(" --imatrix {}", file.display());
    }
    flags
}

/// What came, for programs.
pub fn to_json(a: &cli::Fit, f: &Fitted) -> Value {
    let front: Vec<Value> = f
        .front
        .iter()
        .map(|(name, p)| {
            let tok_s = f.done.as_ref().filter(|_| *p == f.found.chosen);
            let tok_s = tok_s.and_then(|d| d.measured.as_ref()?.speed).map(|s| s.median);
            json!({ "name": name, "bytes": p.bytes, "kl_mean": alike(f, p), "decode_tok_s": tok_s, "by": p.by })
        })
        .collect();
    let mut json = match &f.done {
        Some(d) => compress::json_of(&a.model, &f.recipe.display().to_string(), d),
        None => json!({ "model": a.model }),
    };
    if let Some(fields) = json.as_object_mut() {
        fields.insert("front".into(), front.into());
        fields.insert("trials".into(), f.found.trials.into());
        fields.insert("slopes".into(), json!(f.found.slopes));
        fields.insert("kl_search".into(), json!(f.found.chosen.mean()));
        fields.insert("kl_knapsack".into(), json!(f.found.knapsack.mean()));
        fields.insert("run".into(), Value::Null);
        if let Some(path) = &f.written {
            fields.insert("out".into(), json!(path));
        }
    }
    json
}

/// The front as a table.
fn front(f: &Fitted) -> Columns {
    let mut t = Columns::new(["front", "size", "KL of the search", ""]);
    for (name, p) in &f.front {
        let mark = if p.assignment == f.found.chosen.assignment { "chosen" } else { "" };
        t.row([name.clone(), show_bytes(p.bytes), format!("{:.4}", alike(f, p)), mark.to_owned()]);
    }
    t
}

/// What came, in words.
pub fn words(a: &cli::Fit, f: &Fitted) -> String {
    let mut text = format!("Searched for {} in {} trials.\n\n", f.wanted, f.found.trials);
    text += &front(f).text();
    match &f.done {
        None => text += "\nA dry run: nothing was written.\n",
        Some(d) => {
            text += "\n";
            text += &compress::words(d);
            text += &format!("recipe: {}\n", f.recipe.display());
            if let Some(path) = &f.written {
                let whole = std::fs::metadata(path).ok().filter(|m| m.is_file());
                let whole = whole
                    .map_or_else(String::new, |m| format!(", {} with tokenizer and metadata", show_bytes(m.len())));
                text += &format!("for {}: {}{whole}\n", a.reader.name(), path.display());
            }
        }
    }
    text
}

/// The model card.
pub fn card(a: &cli::Fit, f: &Fitted, d: &compress::Done) -> String {
    use std::fmt::Write;
    let mut c = String::new();
    let _ = writeln!(c, "# {}\n", a.out.file_name().unwrap_or_default().to_string_lossy());
    let _ = writeln!(c, "Made by `lacuna fit` from {} for {}: {}.\n", a.model, a.reader.name(), f.wanted);
    let chosen = f.front.iter().find(|(_, p)| p.assignment == f.found.chosen.assignment);
    if let Some((name, _)) = chosen {
        let _ = writeln!(c, "What became of the matrices: {name}.\n");
    }
    let _ = writeln!(c, "| | |\n|---|---|");
    let _ = writeln!(c, "| size | {} (source {}) |", show_bytes(d.outcomes.bytes), show_bytes(d.source_bytes));
    let _ = writeln!(c, "| bits a weight | {:.2} |", d.bits(d.outcomes.bytes));
    if let Some(x) = d.judged.as_ref().and_then(|j| j.against.as_ref()) {
        let j = d.judged.as_ref().map_or((0, 0, f64::NAN), |j| (j.windows, j.ctx, j.ppl));
        let _ =
            writeln!(c, "| held-out perplexity | {:.3} (source {:.3}), {} windows of {} |", j.2, x.ppl_dense, j.0, j.1);
        let _ = writeln!(c, "| KL from the source | {:.4} nats a token (99 of 100 below {:.3}) |", x.kl_mean, x.kl_p99);
        let _ = writeln!(c, "| another first choice | {:.2}% |", 100.0 * (1.0 - x.top1_agree));
    }
    if let Some(v) = &d.verdict {
        let _ = writeln!(c, "| verdict | {} |", if v.pays { "pays" } else { "does not pay" });
    }
    let _ = writeln!(
        c,
        "\n{} {} (sha256 of the tokens {}). Made again by `lacuna compress {} --recipe {}{} --out DIR`, Lacuna {}.",
        match d.outcomes.calibration {
            (0, _) => "No step of the recipe reads calibration text; levels were chosen on".to_owned(),
            (n, len) => format!("Calibrated on {n} sequences of {len} tokens of"),
        },
        match &a.calibration[..] {
            [] => "the text that Lacuna carries".to_owned(),
            texts => texts.iter().map(|t| t.path.display().to_string()).collect::<Vec<_>>().join(", "),
        },
        f.text,
        a.model,
        f.recipe.file_name().unwrap_or_default().to_string_lossy(),
        f.flags,
        env!("CARGO_PKG_VERSION")
    );
    if !d.domains.is_empty() {
        let _ = writeln!(
            c,
            "\n## Other texts\n\n| text | perplexity | source | KL | 99 of 100 below |\n|---|---|---|---|---|"
        );
        for (name, j) in &d.domains {
            let Some(x) = &j.against else { continue };
            let (ppl, dense) = (j.ppl, x.ppl_dense);
            let _ = writeln!(c, "| {name} | {ppl:.3} | {dense:.3} | {:.4} | {:.3} |", x.kl_mean, x.kl_p99);
        }
    }
    let _ = writeln!(c, "\n## The front\n\n| | size | KL of the search |\n|---|---|---|");
    for (name, p) in &f.front {
        let _ = writeln!(c, "| {name} | {} | {:.4} |", show_bytes(p.bytes), alike(f, p));
    }
    c
}
