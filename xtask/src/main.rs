//! Development tasks: `cargo xtask check` holds the laws of the project, `cargo xtask tables` writes what is generated,
//! `cargo xtask new-method` starts a method.

mod arrows;
mod dependencies;
mod evidence;
mod family_laws;
mod finding;
mod method_laws;
mod new_method;
mod source;
mod tables;
mod text_laws;
mod tree;

use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use finding::Finding;
use tree::Tree;

const USAGE: &str = "\
cargo xtask check [LAW ...]           every law, or those named: arrows methods families tables unused length unsafe \
paths silenced fmt clippy
cargo xtask tables                    METHODS.md and KERNELS.md written anew
cargo xtask evidence --data DIR --record DIR [--only ROW]... [--lacuna BINARY]
                                      the rows of bench/evidence.toml that are not recorded in DIR yet, run and recorded
cargo xtask new-method QUESTION NAME  the file of a new method and its recipe (or: new-method family VERB), in the \
fixed order, with a test that fails until filled";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        ["check", ref laws @ ..] => check(laws),
        ["tables"] => Tree::open().and_then(|tree| tables::write(&tree)),
        ["evidence", ref rest @ ..] => Tree::open().and_then(|tree| evidence::run(&tree, rest)),
        ["new-method", family, name] => Tree::open().and_then(|tree| new_method::write(&tree, family, name)),
        _ => Err(anyhow::anyhow!("usage:\n{USAGE}")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A law by its name on the command line.
struct Law {
    name: &'static str,
    hold: fn(&Tree) -> Result<Vec<Finding>>,
}

const LAWS: [Law; 11] = [
    Law { name: "arrows", hold: arrows::check },
    Law { name: "methods", hold: method_laws::check },
    Law { name: "families", hold: family_laws::check },
    Law { name: "tables", hold: tables::check },
    Law { name: "unused", hold: dependencies::check },
    Law { name: "length", hold: text_laws::length },
    Law { name: "unsafe", hold: text_laws::unsafe_code },
    Law { name: "paths", hold: text_laws::machine_paths },
    Law { name: "silenced", hold: text_laws::silenced },
    Law { name: "fmt", hold: |tree| cargo(tree, "fmt", &["fmt", "--all", "--check"], "run `cargo fmt --all`") },
    Law {
        name: "clippy",
        hold: |tree| {
            let args = ["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"];
            cargo(tree, "clippy", &args, "mend what clippy says above; an `#[allow]` needs its reason beside it")
        },
    },
];

fn check(names: &[&str]) -> Result<()> {
    if let Some(unknown) = names.iter().find(|n| !LAWS.iter().any(|law| law.name == **n)) {
        bail!("'{unknown}' is no law\n{USAGE}");
    }
    let tree = Tree::open()?;
    let mut broken = 0;
    for law in LAWS.iter().filter(|law| names.is_empty() || names.contains(&law.name)) {
        let found = (law.hold)(&tree).with_context(|| format!("law '{}'", law.name))?;
        println!(
            "{:9} {}",
            law.name,
            if found.is_empty() { "holds".into() } else { format!("{} broken", found.len()) }
        );
        for f in &found {
            println!("{f}");
        }
        broken += found.len();
    }
    if broken > 0 {
        bail!("{broken} places break a law");
    }
    Ok(())
}

/// A law that is one of cargo's own commands, with its output passed through.
fn cargo(tree: &Tree, law: &'static str, args: &[&str], cure: &str) -> Result<Vec<Finding>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo).args(args).current_dir(tree.root()).status().context("cargo did not start")?;
    Ok(if status.success() {
        vec![]
    } else {
        vec![Finding::new("Cargo.toml", 0, law, format!("`cargo {}` failed", args.join(" ")), cure)]
    })
}
