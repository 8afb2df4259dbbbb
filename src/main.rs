//! The Lacuna binary: one thin file a verb, and the one place where methods meet the rest.

// What is printed goes through `out`, which knows what to do where nobody reads or the disk is full.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod across;
mod activations;
mod bench;
mod chat;
mod cli;
mod common;
mod compress;
mod convert;
mod counted;
mod doctor;
mod eval;
mod fit;
mod generate;
mod inspect;
mod methods;
mod out;
mod pull;
mod quickstart;
mod recipes;
mod repair;
mod report;
mod serve;
mod shapes;
mod signals;
mod texts;
mod told;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Verb};
use out::Closed;

fn main() -> ExitCode {
    let told = signals::watch().map_err(|e| anyhow::Error::new(e).context("signals"));
    match told.and_then(|()| command()) {
        Ok(code) => code,
        Err(e) if e.downcast_ref::<Closed>().is_some_and(Closed::nobody_reads) => ExitCode::SUCCESS,
        Err(e) => {
            common::say(format!("error: {}", out::told(&e)));
            ExitCode::from(if e.is::<common::Usage>() { 2 } else { 1 })
        }
    }
}

/// What the command line asks for, or says about itself.
fn command() -> anyhow::Result<ExitCode> {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) if e.use_stderr() => {
            let _ = e.print();
            return Ok(ExitCode::from(2));
        }
        Err(e) => {
            e.print().and_then(|()| std::io::stdout().flush()).map_err(Closed::from)?;
            return Ok(ExitCode::SUCCESS);
        }
    };
    if !matches!(cli.verb, Verb::Serve(_)) {
        common::logging(cli.global.verbose);
    }
    run(&cli)
}

fn run(cli: &Cli) -> anyhow::Result<ExitCode> {
    common::threads(cli.global.threads)?;
    let g = &cli.global;
    let takes_none = match &cli.verb {
        Verb::Pull(_) | Verb::Methods(_) | Verb::Doctor => true,
        Verb::Bench(a) => a.model.is_none(),
        _ => false,
    };
    if takes_none && (g.adapter.is_some() || g.merge) {
        return Err(common::Usage("--adapter and --merge: there is no model here to put an adapter on".into()).into());
    }
    if takes_none && (g.load_bytes.is_some() || g.load_bits.is_some()) {
        return Err(common::Usage("--load-bytes and --load-bits: there is no model here to load".into()).into());
    }
    match &cli.verb {
        Verb::Quickstart(a) => quickstart::run(g, a),
        Verb::Pull(a) => pull::run(g, a),
        Verb::Inspect(a) => inspect::run(g, a),
        Verb::Methods(a) => methods::run(g, a),
        Verb::Compress(a) => compress::run(g, a),
        Verb::Fit(a) => fit::run(g, a),
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
