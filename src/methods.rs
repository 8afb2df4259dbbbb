//! `methods`: what is registered, and what was measured of it.

use std::process::ExitCode;

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::cli::Global;
use crate::{common, recipes};

/// The recorded figures.
const MEASURED: &str = include_str!("../bench/measured.json");

/// A recorded run of a recipe.
#[derive(Debug, Deserialize, Serialize)]
struct Measured {
    name: String,
    model: String,
    recipe: Option<String>,
    perplexity: f64,
    beside: Option<(String, f64)>,
    bytes: Option<u64>,
    record: String,
    commands: Vec<String>,
}

/// Whether a recipe is one of a method's own: named after it, perhaps with more behind a hyphen, and not after a
/// longer-named one.
fn own(recipe: &str, name: &str, all: &[&str]) -> bool {
    let named = |n: &str| recipe == n || recipe.strip_prefix(n).is_some_and(|rest| rest.starts_with('-'));
    named(name) && !all.iter().any(|other| other.len() > name.len() && named(other))
}

fn show(ppl: f64) -> String {
    if ppl < 1e5 { format!("{ppl:.2}") } else { format!("{ppl:.1e}") }
}

/// A method that asks for no statistics: the verb may still gather some for all of its methods.
const NO_NEEDS: &str = "no statistics of its own";

/// Runs the verb.
pub fn run(g: &Global) -> anyhow::Result<ExitCode> {
    let all = lacuna_methods::registry();
    let cards: Vec<_> = all.methods.iter().map(|m| &m.card).chain(all.running.iter().map(|m| &m.card)).collect();
    let runs: Vec<Measured> = serde_json::from_str(MEASURED)?;
    let names: Vec<&str> = cards.iter().map(|c| c.name).collect();
    let of = |name: &str| -> Vec<&Measured> {
        runs.iter().filter(|r| r.recipe.as_deref().is_some_and(|recipe| own(recipe, name, &names))).collect()
    };
    let mut listed = Vec::new();
    for c in &cards {
        let mut card = serde_json::to_value(c)?;
        card["family"] = json!(c.verb);
        card["evidence"] = serde_json::to_value(of(c.name))?;
        listed.push(card);
    }
    let out = json!({ "methods": listed, "recipes": recipes::names(), "measured": runs });
    common::print(g, &out, || {
        let mut page = String::new();
        for c in &cards {
            let needs: Vec<&str> = c.needs.iter().map(|ask| ask.describe()).collect();
            let needs = if needs.is_empty() { NO_NEEDS.to_owned() } else { format!("needs {}", needs.join(", ")) };
            page += &format!("{:<12} {:<9} {}\n", c.name, c.verb, c.summary);
            let arxiv = if c.arxiv.is_empty() { String::new() } else { format!(" (arXiv {})", c.arxiv) };
            let paper = if c.paper.is_empty() { String::new() } else { format!("{}{arxiv}; ", c.paper) };
            page += &format!("{:<22} {paper}{needs}\n", "");
            for r in of(c.name) {
                let beside = r.beside.as_ref().map_or_else(String::new, |(b, ppl)| format!(" ({b}: {})", show(*ppl)));
                let (name, model, ppl) = (&r.name, &r.model, show(r.perplexity));
                page += &format!("{:<22} measured: {name} on {model}: perplexity {ppl}{beside}\n", "");
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
    fn recorded_runs_are_read_and_belong_to_their_methods() {
        let all = ["svd", "svd-llm"];
        assert!(own("svd-llm", "svd-llm", &all) && !own("svd-llm", "svd", &all) && own("svd-int8", "svd", &all));
        let runs: Vec<Measured> = serde_json::from_str(MEASURED).unwrap();
        assert!(runs.iter().any(|r| r.recipe.as_deref() == Some("gptq") && r.beside.is_some()));
        assert!(runs.iter().all(|r| !r.commands.is_empty()));
    }
}
