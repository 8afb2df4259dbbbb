//! `methods`: what is registered, and what was measured of it.

use std::process::ExitCode;

use lacuna_contract::Card;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::cli::{self, Global};
use crate::common::{self, Usage};
use crate::recipes;

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

/// Columns before descriptions.
const INDENT: usize = 22;

/// A method that asks for no statistics: the verb may still gather some for all of its methods.
const NO_NEEDS: &str = "no statistics of its own";

/// The widest that lines get, and the narrowest that is kept to.
const WIDTHS: [usize; 2] = [100, 40];

/// Columns of lines: those of the terminal, where it is one and says so.
fn width() -> usize {
    let said = terminal_size::terminal_size().map(|(width, _)| usize::from(width.0));
    said.map_or(WIDTHS[0], |n| n.clamp(WIDTHS[1], WIDTHS[0]))
}

/// Words in lines of `width` columns, the first behind `first`, the others `indent` columns in.
fn wrapped(first: &str, text: &str, indent: usize, width: usize) -> String {
    let (mut page, mut line) = (String::new(), format!("{first:<indent$}"));
    // A name that is longer than its column has a line of its own.
    if first.chars().count() >= indent {
        page = format!("{first}\n");
        line = " ".repeat(indent);
    }
    let mut empty = true;
    for word in text.split_whitespace() {
        if !empty && line.chars().count() + 1 + word.chars().count() > width {
            page += &format!("{line}\n");
            (line, empty) = (" ".repeat(indent), true);
        }
        if !empty {
            line.push(' ');
        }
        line += word;
        empty = false;
    }
    page + line.trim_end() + "\n"
}

/// Whether a method is one that was asked for.
fn asked(a: &cli::Methods, c: &Card) -> bool {
    let all = [c.name, c.verb, c.paper, c.arxiv, c.summary].join(" ").to_lowercase();
    a.family.as_ref().is_none_or(|f| f == c.verb) && a.words.iter().all(|w| all.contains(&w.to_lowercase()))
}

/// Runs the verb.
pub fn run(g: &Global, a: &cli::Methods) -> anyhow::Result<ExitCode> {
    let all = lacuna_methods::registry();
    let cards: Vec<_> = all.methods.iter().map(|m| &m.card).chain(all.running.iter().map(|m| &m.card)).collect();
    let mut families: Vec<&str> = cards.iter().map(|c| c.verb).collect();
    families.sort_unstable();
    families.dedup();
    if let Some(family) = a.family.as_ref().filter(|f| !families.contains(&f.as_str())) {
        return Err(Usage(format!("--family {family}: there are {}", families.join(", "))).into());
    }
    let filtered = a.family.is_some() || !a.words.is_empty();
    let shown: Vec<_> = cards.iter().copied().filter(|c| asked(a, c)).collect();
    if shown.is_empty() {
        let words = a.words.join(" ");
        return Err(Usage(format!("no method of these has '{words}' about it; `lacuna methods` lists all")).into());
    }
    let runs: Vec<Measured> = serde_json::from_str(MEASURED)?;
    let names: Vec<&str> = cards.iter().map(|c| c.name).collect();
    let of = |name: &str| -> Vec<&Measured> {
        runs.iter().filter(|r| r.recipe.as_deref().is_some_and(|recipe| own(recipe, name, &names))).collect()
    };
    let mut listed = Vec::new();
    for c in &shown {
        let mut card = serde_json::to_value(c)?;
        card["family"] = json!(c.verb);
        card["evidence"] = serde_json::to_value(of(c.name))?;
        listed.push(card);
    }
    let out = json!({ "methods": listed, "recipes": recipes::names(), "measured": runs });
    common::print(g, &out, || {
        let mut page = String::new();
        let width = width();
        for c in shown.iter().filter(|_| !filtered) {
            page += &wrapped(c.name, &format!("{}: {}", c.verb, c.summary), INDENT, width);
        }
        for c in shown.iter().filter(|_| filtered) {
            let needs: Vec<&str> = c.needs.iter().map(|ask| ask.describe()).collect();
            let needs = if needs.is_empty() { NO_NEEDS.to_owned() } else { format!("needs {}", needs.join(", ")) };
            page += &wrapped(c.name, &format!("{}: {}", c.verb, c.summary), INDENT, width);
            let arxiv = if c.arxiv.is_empty() { String::new() } else { format!(" (arXiv {})", c.arxiv) };
            let paper = if c.paper.is_empty() { String::new() } else { format!("{}{arxiv}; ", c.paper) };
            page += &wrapped("", &format!("{paper}{needs}"), INDENT, width);
            for r in of(c.name) {
                let beside = r.beside.as_ref().map_or_else(String::new, |(b, ppl)| format!(" ({b}: {})", show(*ppl)));
                let (name, model, ppl) = (&r.name, &r.model, show(r.perplexity));
                let measured = format!("measured: {name} on {model}: perplexity {ppl}{beside}");
                page += &wrapped("", &measured, INDENT, width);
            }
        }
        if filtered {
            return page;
        }
        let all = recipes::names().join(", ");
        page += &format!("\n{}", wrapped("", &format!("recipes carried along: {all}"), 0, width));
        page + &wrapped("", "`lacuna methods WORD` tells all of a method, `--family NAME` of a family", 0, width)
    })?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_as_wide_as_they_may_be() {
        let page = wrapped("name", "a few words that stand in several lines", 6, 16);
        assert_eq!(page, "name  a few\n      words that\n      stand in\n      several\n      lines\n");
        assert_eq!(wrapped("longer-name", "x", 6, 16), "longer-name\n      x\n");
        assert_eq!(wrapped("", "unbreakable-and-long x", 2, 10), "  unbreakable-and-long\n  x\n");
        let all = lacuna_methods::registry();
        for c in all.methods.iter().map(|m| &m.card) {
            let page = wrapped(c.name, c.summary, INDENT, 100);
            assert!(page.lines().all(|l| l.chars().count() <= 100), "{page}");
        }
    }

    #[test]
    fn recorded_runs_are_read_and_belong_to_their_methods() {
        let all = ["svd", "svd-llm"];
        assert!(own("svd-llm", "svd-llm", &all) && !own("svd-llm", "svd", &all) && own("svd-int8", "svd", &all));
        let runs: Vec<Measured> = serde_json::from_str(MEASURED).unwrap();
        assert!(runs.iter().any(|r| r.recipe.as_deref() == Some("gptq") && r.beside.is_some()));
        assert!(runs.iter().all(|r| !r.commands.is_empty()));
    }
}
