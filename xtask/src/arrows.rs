//! Crates depend only along the arrows that ARCHITECTURE.md draws.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};
use cargo_metadata::{DependencyKind, MetadataCommand};

use crate::finding::Finding;
use crate::tree::Tree;

/// Where the table stands: a fenced block that starts with "```arrows".
const TABLE: &str = "ARCHITECTURE.md";

/// What each room may see, its targets' targets included.
#[derive(Debug, PartialEq)]
struct Arrows(BTreeMap<String, BTreeSet<String>>);

/// A dependency between two crates of the workspace, dev-dependencies apart.
#[derive(Debug)]
struct Edge {
    from: String,
    to: String,
    manifest: String,
}

/// Compares the workspace with the table.
pub fn check(tree: &Tree) -> Result<Vec<Finding>> {
    let arrows = Arrows::parse(&tree.read(TABLE)?)?;
    let metadata = MetadataCommand::new()
        .manifest_path(tree.root().join("Cargo.toml"))
        .no_deps()
        .exec()
        .context("cargo metadata failed")?;
    let crates: BTreeSet<String> = metadata.packages.iter().map(|p| p.name.to_string()).collect();
    let mut edges = vec![];
    for package in &metadata.packages {
        let manifest = package.manifest_path.strip_prefix(&metadata.workspace_root).unwrap_or(&package.manifest_path);
        for dep in &package.dependencies {
            if dep.kind != DependencyKind::Development && crates.contains(dep.name.as_str()) {
                let (from, to) = (room(&package.name).to_owned(), room(&dep.name).to_owned());
                edges.push(Edge { from, to, manifest: manifest.to_string() });
            }
        }
    }
    let rooms: BTreeSet<String> = crates.iter().map(|c| room(c).to_owned()).collect();
    let mut found = arrows.strangers(&rooms);
    for edge in edges.iter().filter(|e| !arrows.allow(&e.from, &e.to)) {
        let line = tree.read(&edge.manifest)?.lines().position(|l| l.starts_with(&format!("lacuna-{}", edge.to)));
        let cure =
            format!("move the code to a room that both may see, or change the arrows in {TABLE} and say why there");
        let what = format!("{} may not depend on {}", edge.from, edge.to);
        found.push(Finding::new(&edge.manifest, line.map_or(0, |l| l + 1), "arrows", what, cure));
    }
    Ok(found)
}

/// The room's name of a crate; the root package is the binary.
fn room(name: &str) -> &str {
    if name == "lacuna" { "binary" } else { name.strip_prefix("lacuna-").unwrap_or(name) }
}

impl Arrows {
    /// Reads lines `room <- room, room` (nothing behind the arrow: sees none; `everything`: sees all).
    fn parse(page: &str) -> Result<Arrows> {
        let mut lines = page.lines().enumerate().skip_while(|(_, l)| l.trim() != "```arrows").skip(1);
        let mut direct: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let mut closed = false;
        for (i, line) in lines.by_ref() {
            if line.trim() == "```" {
                closed = true;
                break;
            }
            let Some((from, to)) = line.split_once("<-") else {
                bail!("{TABLE}:{}: write `room <- room, room`, not '{line}'", i + 1);
            };
            let to = to.split(',').map(str::trim).filter(|t| !t.is_empty()).map(str::to_owned).collect();
            if direct.insert(from.trim().to_owned(), to).is_some() {
                bail!("{TABLE}:{}: {} has two rows", i + 1, from.trim());
            }
        }
        if !closed {
            bail!("{TABLE} has no fenced block that starts with ```arrows and ends with ```");
        }
        let all: BTreeSet<String> = direct.keys().cloned().collect();
        let mut closure = BTreeMap::new();
        for from in &all {
            let mut seen = BTreeSet::new();
            let mut open: Vec<&String> = direct[from].iter().collect();
            while let Some(to) = open.pop() {
                if to == "everything" {
                    seen.extend(all.iter().cloned());
                } else if !all.contains(to) {
                    bail!("{TABLE}: {from} points at {to}, which has no row");
                } else if seen.insert(to.clone()) {
                    open.extend(&direct[to]);
                }
            }
            closure.insert(from.clone(), seen);
        }
        Ok(Arrows(closure))
    }

    fn allow(&self, from: &str, to: &str) -> bool {
        self.0.get(from).is_some_and(|seen| seen.contains(to))
    }

    /// Crates without a row and rows without a crate.
    fn strangers(&self, rooms: &BTreeSet<String>) -> Vec<Finding> {
        let missing = rooms.iter().filter(|r| !self.0.contains_key(*r)).map(|r| {
            Finding::new(
                TABLE,
                0,
                "arrows",
                format!("the crate {r} has no row"),
                format!("add `{r} <- ...` to the table"),
            )
        });
        let gone = self.0.keys().filter(|r| !rooms.contains(*r));
        missing
            .chain(gone.map(|r| {
                Finding::new(TABLE, 0, "arrows", format!("there is no crate {r}"), "take its row out of the table")
            }))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "# House\n\n```arrows\nbase <-\nspec <- base\nmodel <- spec\nbinary <- everything\n```\nMore.\n";

    #[test]
    fn an_arrow_includes_what_its_target_includes() {
        let arrows = Arrows::parse(PAGE).unwrap();
        assert!(arrows.allow("spec", "base") && arrows.allow("model", "base") && arrows.allow("binary", "model"));
        assert!(!arrows.allow("base", "spec") && !arrows.allow("spec", "model") && !arrows.allow("nobody", "base"));
    }

    #[test]
    fn tables_that_make_no_sense_are_refused() {
        let refused = |page: &str| Arrows::parse(page).unwrap_err().to_string();
        assert!(refused("no table").contains("no fenced block"));
        assert!(refused("```arrows\nbase <-\n").contains("no fenced block"));
        assert!(refused("```arrows\nspec <- base\n```").contains("has no row"));
        assert!(refused("```arrows\nbase\n```").contains("ARCHITECTURE.md:2"));
        assert!(refused("```arrows\nbase <-\nbase <-\n```").contains("two rows"));
    }

    #[test]
    fn every_crate_has_a_row_and_every_row_a_crate() {
        let rooms = ["base", "spec", "binary", "cellar"].map(str::to_owned).into();
        let found = Arrows::parse(PAGE).unwrap().strangers(&rooms);
        let what: Vec<&str> = found.iter().map(|f| f.brief().1).collect();
        assert_eq!(what, ["the crate cellar has no row", "there is no crate model"]);
    }

    #[test]
    fn rooms_are_named_without_the_project() {
        assert_eq!((room("lacuna"), room("lacuna-base"), room("xtask")), ("binary", "base", "xtask"));
    }
}
