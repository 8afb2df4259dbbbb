//! METHODS.md and KERNELS.md: what is registered and compiled in, never what one machine has.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Context, Result};
use lacuna_contract::{Ask, Registry};
use lacuna_kernels::table::Row;

use crate::evidence;
use crate::finding::Finding;
use crate::tree::Tree;

const GENERATED: &str = "Written by `cargo xtask tables`; edit the source instead.";

/// Both files as they should be.
fn pages(tree: &Tree) -> Result<[(&'static str, String); 2]> {
    let methods = methods(&lacuna_methods::registry())? + &measured(tree)?;
    Ok([("METHODS.md", methods), ("KERNELS.md", kernels(&lacuna_kernels::table::rows()))])
}

/// Writes both files.
pub fn write(tree: &Tree) -> Result<()> {
    for (file, text) in pages(tree)? {
        std::fs::write(tree.root().join(file), text).with_context(|| format!("cannot write {file}"))?;
        println!("wrote {file}");
    }
    Ok(())
}

/// Compares both files with what they should be.
pub fn check(tree: &Tree) -> Result<Vec<Finding>> {
    let mut found = vec![];
    for (file, want) in pages(tree)? {
        let have = if tree.has(file) { tree.read(file)? } else { String::new() };
        found.extend(stale(file, &have, &want));
    }
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
        let paper = match card.arxiv {
            "" if card.paper.is_empty() => "none; the plain baseline".to_owned(),
            "" => card.paper.to_owned(),
            id => format!("{} ([arXiv {id}](https://arxiv.org/abs/{id}))", card.paper),
        };
        let (name, summary) = (card.name, card.summary);
        writeln!(out, "| [{name}](recipes/{name}.toml) | {made:?} | {summary} | {} | {paper} |", reads(card.needs))?;
    }
    Ok(out)
}

/// What was measured: rows of the last record of each, in the list's order, beside the row that each is compared with.
fn measured(tree: &Tree) -> Result<String> {
    let (list, recorded) = (evidence::list(tree)?, evidence::recorded(tree)?);
    let mut out = String::from(
        "\n## Measured\n\nPerplexity on WikiText-2 under the protocol of `bench/evidence.toml`, from recorded runs; size is of all tensors, embedding\n\
         and head included. These models have little to spare: the same omission costs a larger one less.\n\n",
    );
    out += "| recipe | model | perplexity | beside | bytes | record |\n|---|---|---|---|---|---|\n";
    for row in &list.rows {
        let Some((folder, value)) = recorded.get(&row.name) else { continue };
        let ppl = |v: &serde_json::Value| v["eval"]["ppl"].as_f64().map_or_else(|| "none".into(), evidence::show);
        let beside = row.beside.as_ref().and_then(|b| recorded.get(b).map(|(_, v)| format!("{b}: {}", ppl(v))));
        let name = match &row.recipe {
            Some(r) => format!("[{r}](recipes/{r}.toml)"),
            None => "none".into(),
        };
        let bytes = value["compress"]["bytes_after"].as_u64().map_or_else(|| "as it came".into(), |b| b.to_string());
        writeln!(
            out,
            "| {name} | {} | {} | {} | {bytes} | [{}]({folder}/evidence/{}.json) |",
            row.model,
            ppl(value),
            beside.unwrap_or_else(|| "-".into()),
            folder.trim_start_matches("bench/record/"),
            row.name
        )?;
    }
    Ok(out)
}

fn reads(needs: &[Ask]) -> String {
    let asked: Vec<&str> = needs.iter().map(|ask| ask.describe()).collect();
    if asked.is_empty() { "the weights alone".into() } else { asked.join(", ") }
}

fn kernels(rows: &[Row]) -> String {
    let mut grouped: BTreeMap<(&str, &str, &str), (Vec<&str>, f32)> = BTreeMap::new();
    for row in rows {
        let entry = grouped.entry((row.op, row.pattern, row.codec)).or_default();
        entry.0.push(row.isa.name());
        entry.1 = entry.1.max(row.tolerance);
    }
    let mut out = format!("# Kernels\n\n{GENERATED}\n\n");
    out += "The tolerance is what the conformance tests allow against f64 on every instruction set of the machine that runs them: relative to\n";
    out += "the sum of the products' magnitudes for products, absolute for the others. `lacuna doctor` says what a machine chooses.\n\n";
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
        let [(_, methods), (_, kernels)] = pages(&Tree::open().unwrap()).unwrap();
        for method in lacuna_methods::registry().methods {
            assert!(methods.contains(&format!("| [{0}](recipes/{0}.toml) |", method.card.name)));
        }
        for row in lacuna_kernels::table::rows() {
            assert!(kernels.contains(&format!("| {} | {} | {} |", row.op, row.pattern, row.codec)));
        }
        assert!(!methods.contains("| |") && !methods.contains("|  |"), "an empty cell:\n{methods}");
    }
}
