//! The Lacuna binary: one thin file a verb, and the one place where methods meet the rest.

mod bench;
mod chat;
mod cli;
mod common;
mod compress;
mod convert;
mod doctor;
mod eval;
mod generate;
mod inspect;
mod methods;
mod pull;
mod quickstart;
mod recipes;
mod repair;
mod report;
mod serve;
mod shapes;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Verb};

/// A reader that has seen enough and went away (`lacuna methods | head`) is no failure: standard output's panic ends the program in silence.
fn leave_quietly_when_nobody_reads() {
    let other = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let what = info.payload().downcast_ref::<String>();
        if what.is_some_and(|w| w.starts_with("failed printing to stdout") && w.contains("Broken pipe")) {
            std::process::exit(0);
        }
        other(info);
    }));
}

fn main() -> ExitCode {
    leave_quietly_when_nobody_reads();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() { 2 } else { 0 });
        }
    };
    if !matches!(cli.verb, Verb::Serve(_)) {
        common::logging(cli.global.verbose);
    }
    match run(&cli) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::from(if e.is::<common::Usage>() { 2 } else { 1 })
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<ExitCode> {
    common::threads(cli.global.threads)?;
    let g = &cli.global;
    let takes_none = match &cli.verb {
        Verb::Pull(_) | Verb::Methods | Verb::Doctor => true,
        Verb::Bench(a) => a.model.is_none(),
        _ => false,
    };
    if takes_none && (g.adapter.is_some() || g.merge) {
        return Err(common::Usage("--adapter and --merge: there is no model here to put an adapter on".into()).into());
    }
    match &cli.verb {
        Verb::Quickstart(a) => quickstart::run(g, a),
        Verb::Pull(a) => pull::run(g, a),
        Verb::Inspect(a) => inspect::run(g, a),
        Verb::Methods => methods::run(g),
        Verb::Compress(a) => compress::run(g, a),
        Verb::Eval(a) => eval::run(g, a),
        Verb::Convert(a) => convert::run(g, a),
        Verb::Repair(a) => repair::run(g, a),
        Verb::Generate(a) => generate::run(g, a),
        Verb::Chat(a) => chat::run(g, a),
        Verb::Bench(a) => bench::run(g, a),
        Verb::Serve(a) => serve::run(g, a),
        Verb::Completions(a) => serve::completions(g, a),
        Verb::Doctor => doctor::run(g),
    }
}
