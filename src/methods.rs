//! `methods`: what is registered.

use std::process::ExitCode;

use serde_json::json;

use crate::cli::Global;
use crate::{common, recipes};

/// Runs the verb.
pub fn run(g: &Global) -> anyhow::Result<ExitCode> {
    let all = lacuna_methods::registry();
    let cards: Vec<_> = all.iter().map(|m| &m.card).collect();
    let out = json!({ "methods": cards, "recipes": recipes::names() });
    common::print(g, &out, || {
        for c in &cards {
            let mut needs = Vec::new();
            for (on, what) in
                [(c.needs.gram, "X'X"), (c.needs.squares, "channel norms"), (c.needs.similarity, "block similarity")]
            {
                if on {
                    needs.push(what);
                }
            }
            let needs =
                if needs.is_empty() { "no calibration".to_owned() } else { format!("needs {}", needs.join(", ")) };
            println!("{:<12} {:<9} {}", c.name, format!("{:?}", c.verb).to_lowercase(), c.summary);
            let arxiv = if c.arxiv.is_empty() { String::new() } else { format!(" (arXiv {})", c.arxiv) };
            println!("{:<22} {}{arxiv}; {needs}", "", c.paper);
        }
        println!("\nrecipes carried along: {}", recipes::names().join(", "));
    });
    Ok(ExitCode::SUCCESS)
}
