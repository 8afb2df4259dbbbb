//! `cargo xtask evidence`: every row of `bench/evidence.toml` run with the release binary and recorded.
//!
//! A row is one JSON file under `RECORD/evidence/`, with its commands and what they printed; a row that is there is not
//! run again, so a broken run goes on where it stopped. `RECORD/evidence.md` is written from all of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::tree::Tree;

/// The list of rows.
pub const LIST: &str = "bench/evidence.toml";

/// `bench/evidence.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct List {
    version: u32,
    text: String,
    calibration: String,
    ctx: usize,
    windows: usize,
    #[serde(rename = "row")]
    pub rows: Vec<Row>,
}

/// One model, as it is or compressed by a recipe, and what an independent program got for it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    pub name: String,
    pub model: String,
    pub recipe: Option<String>,
    #[serde(default)]
    bos: bool,
    pub reference: Option<f64>,
    #[serde(default)]
    within: f64,
    #[serde(default)]
    magnitude: bool,
    pub beside: Option<String>,
    /// Calibration sequences, where not the recipe's.
    samples: Option<usize>,
    /// Of a stacked model as much as these bytes hold is evaluated.
    pub load_bytes: Option<u64>,
    /// Of nested codes so many bits are evaluated.
    load_bits: Option<u8>,
    /// How activations meet matrices in the evaluation, where not exactly: what `eval --activations` takes.
    activations: Option<String>,
    /// Overrides of the recipe.
    #[serde(default)]
    set: Vec<String>,
    /// Whether the claim is a lower perplexity than the row beside it.
    #[serde(default)]
    pub below: bool,
}

impl Row {
    /// Whether a perplexity lands where the reference is.
    fn holds(&self, ppl: f64) -> bool {
        match self.reference {
            None => true,
            Some(reference) if self.magnitude => (ppl / reference).log10().abs() <= 1.0,
            Some(reference) => (ppl / reference - 1.0).abs() <= self.within,
        }
    }

    /// How far from the reference, in words.
    fn off(&self, ppl: f64) -> String {
        self.reference.map_or_else(String::new, |r| format!("{:+.2}%", 100.0 * (ppl / r - 1.0)))
    }
}

/// Reads and checks the list.
pub fn list(tree: &Tree) -> Result<List> {
    let list: List = toml::from_str(&tree.read(LIST)?).with_context(|| LIST.to_owned())?;
    ensure!(list.version == 1, "{LIST}: version {} is not known", list.version);
    for row in &list.rows {
        let told = row.reference.is_none_or(|r| r > 0.0 && (row.magnitude || row.within > 0.0));
        ensure!(told, "{LIST}: {} has no tolerance", row.name);
        let alone = row.reference.is_none() && row.beside.is_none();
        ensure!(!alone, "{LIST}: {} has neither a reference nor a row beside it", row.name);
        ensure!(!row.below || row.beside.is_some(), "{LIST}: {} is below no row", row.name);
        if let Some(beside) = &row.beside {
            ensure!(list.rows.iter().any(|r| r.name == *beside), "{LIST}: {} stands beside no row {beside}", row.name);
        }
        if let Some(recipe) = &row.recipe {
            ensure!(tree.has(&format!("recipes/{recipe}.toml")), "{LIST}: {} has no recipe {recipe}", row.name);
        }
    }
    Ok(list)
}

/// The recorded rows by name, with the folder of the record: of several, the one in the last folder by name.
pub fn recorded(tree: &Tree) -> Result<BTreeMap<String, (String, Value)>> {
    let mut out = BTreeMap::new();
    let mut files: Vec<&str> =
        tree.files().filter(|f| f.starts_with("bench/record/") && f.ends_with(".json")).collect();
    files.sort_unstable();
    for file in files {
        let Some((folder, name)) = file.trim_end_matches(".json").rsplit_once("/evidence/") else { continue };
        let value = serde_json::from_str(&tree.read(file)?).with_context(|| file.to_owned())?;
        out.insert(name.to_owned(), (folder.to_owned(), value));
    }
    Ok(out)
}

/// What the command line asks for.
struct Args {
    data: PathBuf,
    record: PathBuf,
    only: Vec<String>,
    lacuna: PathBuf,
}

fn arguments(tree: &Tree, args: &[&str]) -> Result<Args> {
    let (mut data, mut record, mut only, mut lacuna) = (None, None, vec![], tree.root().join("target/release/lacuna"));
    let mut rest = args.iter();
    while let Some(&flag) = rest.next() {
        let value = rest.next().with_context(|| format!("{flag} needs a value"))?;
        match flag {
            "--data" => data = Some(PathBuf::from(value)),
            "--record" => record = Some(PathBuf::from(value)),
            "--lacuna" => lacuna = PathBuf::from(value),
            "--only" => only.push((*value).to_owned()),
            _ => bail!("'{flag}' is no flag of evidence"),
        }
    }
    let data = data.context("--data DIR: the folder with the texts that bench/evidence.toml names")?;
    let record = record.context("--record DIR: where to write, as bench/record/MACHINE")?;
    ensure!(lacuna.is_file(), "{} is not there; run `cargo build --release` first", lacuna.display());
    Ok(Args { data, record, only, lacuna })
}

/// Runs what is not recorded yet.
pub fn run(tree: &Tree, args: &[&str]) -> Result<()> {
    let list = list(tree)?;
    let a = arguments(tree, args)?;
    if let Some(unknown) = a.only.iter().find(|n| !list.rows.iter().any(|r| r.name == **n)) {
        bail!("'{unknown}' is no row of {LIST}");
    }
    let folder = a.record.join("evidence");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut missed = vec![];
    for row in list.rows.iter().filter(|r| a.only.is_empty() || a.only.contains(&r.name)) {
        let file = folder.join(format!("{}.json", row.name));
        let value = if file.is_file() {
            serde_json::from_str(&std::fs::read_to_string(&file)?).with_context(|| file.display().to_string())?
        } else {
            let value = measure(tree, &list, row, &a)?;
            std::fs::write(&file, format!("{value:#}\n"))
                .with_context(|| format!("cannot write {}", file.display()))?;
            value
        };
        let ppl = value["eval"]["ppl"].as_f64().with_context(|| format!("{}: no perplexity", file.display()))?;
        println!("{:18} {:>12.4}   {}", row.name, ppl, row.off(ppl));
        if !row.holds(ppl) {
            missed.push(row.name.as_str());
        }
    }
    let page = a.record.join("evidence.md");
    std::fs::write(&page, table(&list, &folder)?).with_context(|| format!("cannot write {}", page.display()))?;
    ensure!(missed.is_empty(), "too far from the reference: {}", missed.join(", "));
    Ok(())
}

/// One row: compressed where it has a recipe, then evaluated. Commands are recorded with the folders' names left out.
fn measure(tree: &Tree, list: &List, row: &Row, a: &Args) -> Result<Value> {
    let out = std::env::temp_dir().join(format!("lacuna-evidence-{}", std::process::id()));
    let (text, calibration) = (a.data.join(&list.text), a.data.join(&list.calibration));
    let plain = |p: &Path| p.to_string_lossy().into_owned();
    let shown = |args: &[String]| {
        let short = |s: &String| s.replace(&plain(&a.data), "DATA").replace(&plain(&out), "OUT");
        args.iter().map(short).collect::<Vec<_>>().join(" ")
    };
    let (mut commands, mut compressed) = (vec![], Value::Null);
    let mut subject = row.model.clone();
    if let Some(recipe) = &row.recipe {
        let recipe = tree.root().join(format!("recipes/{recipe}.toml"));
        let mut args =
            vec!["compress".into(), row.model.clone(), "--recipe".into(), plain(&recipe), "--calibration".into()];
        args.extend([plain(&calibration), "--gate".into(), "off".into(), "--overwrite".into(), "--json".into()]);
        args.extend(["-o".into(), plain(&out)]);
        if let Some(n) = row.samples {
            args.extend(["--samples".into(), n.to_string()]);
        }
        row.set.iter().for_each(|set| args.extend(["--set".into(), set.clone()]));
        compressed = json_of(&a.lacuna, &args)?;
        // A line for every tensor is for the saved model's own report.
        compressed
            .as_object_mut()
            .context("compress printed no object")?
            .retain(|k, _| k != "tensors" && k != "out" && k != "recipe");
        commands.push(format!("lacuna {}", shown(&args).replace(&format!("{}/", plain(tree.root())), "")));
        subject = plain(&out);
    }
    let mut args = vec!["eval".into(), subject, "--text".into(), plain(&text), "--ctx".into(), list.ctx.to_string()];
    args.extend(["--windows".into(), list.windows.to_string(), "--json".into()]);
    if row.bos {
        args.push("--bos".into());
    }
    if let Some(bytes) = row.load_bytes {
        args.extend(["--load-bytes".into(), bytes.to_string()]);
    }
    if let Some(bits) = row.load_bits {
        args.extend(["--load-bits".into(), bits.to_string()]);
    }
    if let Some(activations) = &row.activations {
        args.extend(["--activations".into(), activations.clone()]);
    }
    let mut eval = json_of(&a.lacuna, &args)?;
    eval.as_object_mut().context("eval printed no object")?.remove("model");
    commands.push(format!("lacuna {}", shown(&args)));
    if out.exists() {
        std::fs::remove_dir_all(&out).with_context(|| format!("cannot remove {}", out.display()))?;
    }
    Ok(json!({
        "name": row.name, "model": row.model, "recipe": row.recipe, "commands": commands, "reference": row.reference,
        "compress": compressed, "eval": eval,
    }))
}

fn json_of(lacuna: &Path, args: &[String]) -> Result<Value> {
    eprintln!("lacuna {}", args.join(" "));
    let done = Command::new(lacuna)
        .args(args)
        .stderr(std::process::Stdio::inherit())
        .output()
        .context("lacuna did not start")?;
    ensure!(done.status.success(), "lacuna {} failed: {}", args[0], done.status);
    serde_json::from_slice(&done.stdout).context("lacuna printed no JSON")
}

/// The page of a record.
fn table(list: &List, folder: &Path) -> Result<String> {
    let mut out = format!(
        "# Evidence\n\nWritten by `cargo xtask evidence` from the files in `evidence/`, which hold the commands. \
         Perplexity on {} (first {} windows\n\
         of {} tokens); `reference` is an independent PyTorch program's.\n\n",
        list.text, list.windows, list.ctx
    );
    out += "| row | perplexity | reference | difference | allowed | bytes | compress s | eval s \
     |\n|---|---|---|---|---|---|---|---|\n";
    for row in &list.rows {
        let file = folder.join(format!("{}.json", row.name));
        let Ok(text) = std::fs::read_to_string(&file) else { continue };
        let v: Value = serde_json::from_str(&text).with_context(|| file.display().to_string())?;
        let ppl = v["eval"]["ppl"].as_f64().unwrap_or(f64::NAN);
        let number = |v: &Value, digits: usize| v.as_f64().map_or_else(String::new, |x| format!("{x:.digits$}"));
        let allowed = match row.reference {
            None => String::new(),
            Some(_) if row.magnitude => "order of magnitude".into(),
            Some(_) => format!("{:.1}%", 100.0 * row.within),
        };
        out += &format!(
            "| {} | {} | {} | {} | {allowed} | {} | {} | {} |\n",
            row.name,
            show(ppl),
            row.reference.map_or_else(String::new, show),
            row.off(ppl),
            number(&v["compress"]["bytes_after"], 0),
            number(&v["compress"]["seconds"], 0),
            number(&v["eval"]["seconds"], 0),
        );
    }
    Ok(out)
}

/// A perplexity with four figures.
pub fn show(ppl: f64) -> String {
    if ppl < 1e5 { format!("{ppl:.2}") } else { format!("{ppl:.1e}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_sound_and_a_row_knows_its_tolerance() {
        let list = list(&Tree::open().unwrap()).unwrap();
        let dense = list.rows.iter().find(|r| r.name == "dense").unwrap();
        assert!(dense.holds(24.03) && !dense.holds(24.04));
        let svd = list.rows.iter().find(|r| r.name == "svd").unwrap();
        assert!(svd.holds(1e7) && svd.holds(5e8) && !svd.holds(1e6) && !svd.holds(1e9));
    }
}
