//! METHODS.md, KERNELS.md and SYSTEMS.md: what is registered and compiled in, never what one machine has; and the
//! recorded figures as data, which those pages and the binary print.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Context, Result};
use lacuna_contract::{Ask, Card, Registry};
use lacuna_kernels::table::Row;
use serde::{Deserialize, Serialize};

use crate::evidence;
use crate::finding::Finding;
use crate::tree::Tree;

const GENERATED: &str = "Written by `cargo xtask tables`; edit the source instead.";

/// The recorded figures as data.
const MEASURED: &str = "bench/measured.json";

/// The claimed systems.
const SYSTEMS: &str = "systems.toml";

/// A recorded run, as pages and the binary print it.
#[derive(Debug, Serialize)]
struct Measured {
    /// The row of `bench/evidence.toml`.
    name: String,
    model: String,
    recipe: Option<String>,
    perplexity: f64,
    /// The row that it is compared with, and its perplexity.
    beside: Option<(String, f64)>,
    /// Of all tensors; absent for a model as it came.
    bytes: Option<u64>,
    /// The record's folder.
    record: String,
    /// The commands that made it.
    commands: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Systems {
    #[serde(rename = "system")]
    all: Vec<System>,
}

/// A published system that works here.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct System {
    id: u32,
    name: String,
    claim: String,
    /// Rows of perplexities.
    #[serde(default)]
    evidence: Vec<String>,
    /// What else was measured, and the folder of bench/record that holds it.
    shown: Option<String>,
    record: Option<String>,
}

/// The files as they should be.
fn pages(tree: &Tree) -> Result<[(&'static str, String); 4]> {
    let (registry, measured) = (lacuna_methods::registry(), measured(tree)?);
    let systems: Systems = toml::from_str(&tree.read(SYSTEMS)?).with_context(|| SYSTEMS.to_owned())?;
    Ok([
        ("METHODS.md", methods(&registry)? + &measured_table(&measured)?),
        ("KERNELS.md", kernels(&lacuna_kernels::table::rows())),
        ("SYSTEMS.md", systems_table(&registry, &systems.all, &measured)?),
        (MEASURED, serde_json::to_string_pretty(&measured)? + "\n"),
    ])
}

/// The law of claims: every card's system is claimed, and every claim has its recorded rows.
fn claims(
    registry: &Registry,
    systems: &[System],
    measured: &[Measured],
    recorded: impl Fn(&str) -> bool,
) -> Vec<Finding> {
    let cure = "run `cargo xtask evidence` for the row, or take the claim back until it is run";
    let mut found = vec![];
    for system in systems {
        let at = format!("system {} ({})", system.id, system.name);
        let folder = match (&system.shown, &system.record) {
            (Some(_), Some(folder)) => Some(folder),
            (None, None) => None,
            _ => {
                found.push(Finding::new(SYSTEMS, 0, "tables", format!("{at}: shown and record go together"), cure));
                None
            }
        };
        if let Some(folder) = folder.filter(|f| !recorded(f)) {
            found.push(Finding::new(SYSTEMS, 0, "tables", format!("{at}: there is no bench/record/{folder}"), cure));
        }
        if system.evidence.is_empty() && folder.is_none() {
            found.push(Finding::new(SYSTEMS, 0, "tables", format!("{at} names no evidence"), cure));
        }
        for name in system.evidence.iter().filter(|n| !measured.iter().any(|m| m.name == **n)) {
            found.push(Finding::new(SYSTEMS, 0, "tables", format!("{at}: no record of '{name}'"), cure));
        }
    }
    let running = registry.running.iter().map(|m| &m.card);
    for card in registry.methods.iter().map(|m| &m.card).chain(running) {
        let Some(id) = card.system else { continue };
        if !systems.iter().any(|s| s.id == id) {
            let what = format!("{} says it is system {id}, which is not claimed", card.name);
            found.push(Finding::new(SYSTEMS, 0, "tables", what, "add it with its evidence"));
        }
    }
    found
}

fn systems_table(registry: &Registry, systems: &[System], measured: &[Measured]) -> Result<String> {
    let mut out = format!(
        "# Systems\n\n{GENERATED} Published systems that work here, by their number in our list of the field, each \
         with its evidence: perplexity\n\
         on WikiText-2 under the protocol of `bench/evidence.toml`, beside the row that it has to beat.\n\
         What they show is a method beside its control, not that a result pays: this model was published in 4 bits, \
         and plain rounding to 4 bits\n\
         is the row `rtn` of METHODS.md.\n\n\
         | id | system | claim | method | evidence |\n|---|---|---|---|---|\n"
    );
    for system in systems {
        let of = registry.methods.iter().filter(|m| m.card.system == Some(system.id));
        let mut names: Vec<String> = of.map(|m| format!("[{0}](recipes/{0}.toml)", m.card.name)).collect();
        let of = registry.running.iter().filter(|m| m.card.system == Some(system.id));
        names.extend(of.map(|m| format!("[{}](docs/running.md)", m.card.name)));
        if names.is_empty() {
            // What is no method: a flag of `eval`.
            names.push("-".into());
        }
        let shown = system.evidence.iter().filter_map(|n| measured.iter().find(|m| m.name == *n));
        let mut shown: Vec<String> =
            shown.map(|m| format!("{}: {}{}", m.name, evidence::show(m.perplexity), m.versus())).collect();
        if let (Some(what), Some(record)) = (&system.shown, &system.record) {
            shown.push(format!("[{what}](bench/record/{record})"));
        }
        writeln!(
            out,
            "| {} | {} | {} | {} | {} |",
            system.id,
            system.name,
            system.claim,
            names.join(", "),
            shown.join("; ")
        )?;
    }
    Ok(out)
}

impl Measured {
    fn versus(&self) -> String {
        self.beside.as_ref().map_or_else(String::new, |(name, ppl)| format!(" ({name}: {})", evidence::show(*ppl)))
    }
}

/// Writes the files.
pub fn write(tree: &Tree) -> Result<()> {
    for (file, text) in pages(tree)? {
        std::fs::write(tree.root().join(file), text).with_context(|| format!("cannot write {file}"))?;
        println!("wrote {file}");
    }
    Ok(())
}

/// Compares the files with what they should be, and claims with their evidence.
pub fn check(tree: &Tree) -> Result<Vec<Finding>> {
    let mut found = vec![];
    for (file, want) in pages(tree)? {
        let have = if tree.has(file) { tree.read(file)? } else { String::new() };
        found.extend(stale(file, &have, &want));
    }
    let systems: Systems = toml::from_str(&tree.read(SYSTEMS)?).with_context(|| SYSTEMS.to_owned())?;
    let recorded = |folder: &str| tree.files().any(|f| f.starts_with(&format!("bench/record/{folder}/")));
    found.extend(claims(&lacuna_methods::registry(), &systems.all, &measured(tree)?, recorded));
    Ok(found)
}

fn stale(file: &str, have: &str, want: &str) -> Option<Finding> {
    let same = have.lines().zip(want.lines()).take_while(|(a, b)| a == b).count();
    (have != want).then(|| {
        Finding::new(
            file,
            same + 1,
            "tables",
            "differs from what is registered",
            "run `cargo xtask tables` and commit it",
        )
    })
}

fn methods(registry: &Registry) -> Result<String> {
    let mut out =
        format!("# Methods\n\n{GENERATED} One file each in `crates/methods/src`, one recipe each in `recipes`.\n\n");
    out += "| method | question | what it does | reads | paper |\n|---|---|---|---|---|\n";
    for method in &registry.methods {
        let card = &method.card;
        let made = (method.make)(Default::default()).with_context(|| format!("{} with its defaults", card.name))?;
        let paper = paper(card);
        let (name, summary) = (card.name, card.summary);
        writeln!(out, "| [{name}](recipes/{name}.toml) | {made:?} | {summary} | {} | {paper} |", reads(card.needs))?;
    }
    out += "\n## While a model runs\n\nNamed by a run plan or a flag ([running](docs/running.md)); \
            those that no flag of the binary names yet can be used from the library alone.\n\n";
    out += "| method | question | what it does | paper |\n|---|---|---|---|\n";
    for method in &registry.running {
        let card = &method.card;
        writeln!(out, "| {} | {} | {} | {} |", card.name, card.verb, card.summary, paper(card))?;
    }
    Ok(out)
}

fn paper(card: &Card) -> String {
    match card.arxiv {
        "" if card.paper.is_empty() => "none; the plain baseline".to_owned(),
        "" => card.paper.to_owned(),
        id => format!("{} ([arXiv {id}](https://arxiv.org/abs/{id}))", card.paper),
    }
}

/// What was measured: rows of the last record of each, in the list's order, beside the row that each is compared with.
fn measured(tree: &Tree) -> Result<Vec<Measured>> {
    let (list, recorded) = (evidence::list(tree)?, evidence::recorded(tree)?);
    let ppl = |v: &serde_json::Value| v["eval"]["ppl"].as_f64();
    let mut out = Vec::new();
    for row in &list.rows {
        let Some((folder, value)) = recorded.get(&row.name) else { continue };
        let beside = row.beside.as_ref().and_then(|b| Some((b.clone(), ppl(&recorded.get(b)?.1)?)));
        let commands = value["commands"].as_array().into_iter().flatten();
        out.push(Measured {
            name: row.name.clone(),
            model: row.model.clone(),
            recipe: row.recipe.clone(),
            perplexity: ppl(value).with_context(|| format!("{folder}: {} has no perplexity", row.name))?,
            beside,
            bytes: row.load_bytes.or_else(|| value["compress"]["bytes_after"].as_u64()),
            record: folder.clone(),
            commands: commands.filter_map(|c| c.as_str().map(str::to_owned)).collect(),
        });
    }
    Ok(out)
}

fn measured_table(all: &[Measured]) -> Result<String> {
    let mut out = String::from(
        "\n## Measured\n\nPerplexity on WikiText-2 under the protocol of `bench/evidence.toml`, from recorded runs; \
         size is of all tensors, embedding\n\
         and head included. These models have little to spare: the same omission costs a larger one less.\n\n",
    );
    out += "| row | model | perplexity | beside | bytes | record |\n|---|---|---|---|---|---|\n";
    for m in all {
        let name = match &m.recipe {
            Some(r) => format!("[{}](recipes/{r}.toml)", m.name),
            None => m.name.clone(),
        };
        let beside = m.beside.as_ref().map_or_else(|| "-".into(), |(b, ppl)| format!("{b}: {}", evidence::show(*ppl)));
        let bytes = m.bytes.map_or_else(|| "as it came".into(), |b| b.to_string());
        let (ppl, folder) = (evidence::show(m.perplexity), m.record.trim_start_matches("bench/record/"));
        writeln!(
            out,
            "| {name} | {} | {ppl} | {beside} | {bytes} | [{folder}]({}/evidence/{}.json) |",
            m.model, m.record, m.name
        )?;
    }
    Ok(out)
}

fn reads(needs: &[Ask]) -> String {
    let asked: Vec<&str> = needs.iter().map(|ask| ask.describe()).collect();
    if asked.is_empty() { "nothing of its own".into() } else { asked.join(", ") }
}

fn kernels(rows: &[Row]) -> String {
    let mut grouped: BTreeMap<(&str, &str, &str), (Vec<&str>, f32)> = BTreeMap::new();
    for row in rows {
        let entry = grouped.entry((row.op, row.pattern, row.codec)).or_default();
        entry.0.push(row.isa.name());
        entry.1 = entry.1.max(row.tolerance);
    }
    let mut out = format!("# Kernels\n\n{GENERATED}\n\n");
    out += "The tolerance is what the conformance tests allow against f64 on every instruction set of the machine that \
     runs them: relative to\n";
    out += "the sum of the products' magnitudes for products, absolute for the others. `lacuna doctor` says what a \
     machine chooses.\n\n";
    out += "| operation | pattern | codec | instruction sets | tolerance |\n|---|---|---|---|---|\n";
    for ((op, pattern, codec), (isas, tolerance)) in grouped {
        out += &format!("| {op} | {pattern} | {codec} | {} | {tolerance:e} |\n", isas.join(", "));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_page_is_found_at_its_first_stale_line() {
        assert_eq!(stale("METHODS.md", "a\nb\n", "a\nb\n"), None);
        assert_eq!(stale("METHODS.md", "a\nb\n", "a\nc\n").unwrap().brief().0, 2);
        assert_eq!(stale("METHODS.md", "", "a\n").unwrap().brief().0, 1);
        assert_eq!(stale("METHODS.md", "a\nb\n", "a\n").unwrap().brief().0, 2);
    }

    #[test]
    fn every_method_and_every_kernel_has_its_row() {
        let [(_, methods), (_, kernels), (_, systems), _] = pages(&Tree::open().unwrap()).unwrap();
        for method in lacuna_methods::registry().methods {
            assert!(methods.contains(&format!("| [{0}](recipes/{0}.toml) |", method.card.name)));
        }
        for row in lacuna_kernels::table::rows() {
            assert!(kernels.contains(&format!("| {} | {} | {} |", row.op, row.pattern, row.codec)));
        }
        for page in [methods, systems] {
            assert!(!page.contains("| |") && !page.contains("|  |"), "an empty cell:\n{page}");
        }
    }

    #[test]
    fn a_claim_without_a_record_is_found() {
        let registry = lacuna_methods::registry();
        let claim = |id, evidence: &[&str]| System {
            id,
            name: "x".into(),
            claim: "y".into(),
            evidence: evidence.iter().map(|e| (*e).to_owned()).collect(),
            shown: None,
            record: None,
        };
        let measured =
            |record: &str| System { shown: Some("2x".into()), record: Some(record.into()), ..claim(182, &[]) };
        let recorded = |folder: &str| folder == "here";
        let all = [claim(224, &["nothing"]), claim(314, &[]), measured("here"), measured("nowhere")];
        let found = claims(&registry, &all, &[], recorded);
        let said: Vec<&str> = found.iter().map(|f| f.brief().1).collect();
        assert!(said[0].contains("no record of 'nothing'") && said[1].contains("names no evidence"), "{said:?}");
        assert!(said[2].contains("no bench/record/nowhere"), "{said:?}");
        let none: Vec<Finding> = claims(&registry, &[], &[], recorded);
        assert!(none.iter().any(|f| f.brief().1.contains("system 224")));
    }
}
