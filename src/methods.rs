//! `methods`: what is registered, and what was measured of it.

use std::process::ExitCode;

use serde::Serialize;
use serde_json::json;

use crate::cli::Global;
use crate::{common, recipes};

/// The generated page whose second table holds the recorded runs.
const PAGE: &str = include_str!("../METHODS.md");

/// A recorded run of a recipe.
#[derive(Debug, PartialEq, Serialize)]
struct Measured<'a> {
    recipe: &'a str,
    model: &'a str,
    perplexity: &'a str,
    beside: &'a str,
    record: &'a str,
}

/// The rows of the page's second table.
fn measured(page: &str) -> Vec<Measured<'_>> {
    fn link(cell: &str) -> &str {
        cell.trim_start_matches('[').split(']').next().unwrap_or(cell)
    }
    let rows = page.split("## Measured").nth(1).unwrap_or("").lines().filter(|l| l.starts_with("| ["));
    rows.filter_map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [recipe, model, perplexity, beside, _, record] = cells[..] else { return None };
        Some(Measured { recipe: link(recipe), model, perplexity, beside, record: link(record) })
    })
    .collect()
}

/// Whether a recipe is one of a method's own: named after it, perhaps with more behind a hyphen, and not after a longer-named one.
fn own(recipe: &str, name: &str, all: &[&str]) -> bool {
    let named = |n: &str| recipe == n || recipe.strip_prefix(n).is_some_and(|rest| rest.starts_with('-'));
    named(name) && !all.iter().any(|other| other.len() > name.len() && named(other))
}

/// Runs the verb.
pub fn run(g: &Global) -> anyhow::Result<ExitCode> {
    let all = lacuna_methods::registry();
    let cards: Vec<_> = all.methods.iter().map(|m| &m.card).collect();
    let (runs, names) = (measured(PAGE), cards.iter().map(|c| c.name).collect::<Vec<_>>());
    let out = json!({ "methods": cards, "recipes": recipes::names(), "measured": runs });
    common::print(g, &out, || {
        let mut page = String::new();
        for c in &cards {
            let needs: Vec<&str> = c.needs.iter().map(|ask| ask.describe()).collect();
            let needs =
                if needs.is_empty() { "no calibration".to_owned() } else { format!("needs {}", needs.join(", ")) };
            page += &format!("{:<12} {:<9} {}\n", c.name, c.verb, c.summary);
            let arxiv = if c.arxiv.is_empty() { String::new() } else { format!(" (arXiv {})", c.arxiv) };
            page += &format!("{:<22} {}{arxiv}; {needs}\n", "", c.paper);
            for r in runs.iter().filter(|r| own(r.recipe, c.name, &names)) {
                let beside = if r.beside == "-" { String::new() } else { format!(" ({})", r.beside) };
                page +=
                    &format!("{:<22} measured: {} on {}: perplexity {}{beside}\n", "", r.recipe, r.model, r.perplexity);
            }
        }
        page + &format!("\nrecipes carried along: {}\n", recipes::names().join(", "))
    })?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recorded_runs_are_read_from_the_page() {
        let page = "| [x](y) | no |\n## Measured\n| a | b |\n| [svd-llm](r) | m | 128.08 | svd: 6e7 | 12 | [day](p) |\n| none | m | 1 | - | - | [d](p) |\n";
        let want = Measured { recipe: "svd-llm", model: "m", perplexity: "128.08", beside: "svd: 6e7", record: "day" };
        assert_eq!(measured(page), [want]);
        let all = ["svd", "svd-llm"];
        assert!(own("svd-llm", "svd-llm", &all) && !own("svd-llm", "svd", &all) && own("svd-int8", "svd", &all));
        assert!(!measured(PAGE).is_empty(), "the page has lost its records");
    }
}
