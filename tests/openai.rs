//! The official `openai` client against `lacuna serve` with a real model: `tests/serve/openai_suite.py`, a test for
//! each of its tests.
//!
//! Where the package or the model is missing, each is reported ignored, with the reason. `--python PATH` names the
//! interpreter that has the package (otherwise `python3`); with `--require-openai` what is missing is a failure.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex};

use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;

const MODEL: &str = "smollm2-135m-instruct";

fn main() -> ExitCode {
    let mut given: Vec<String> = std::env::args().collect();
    let required = given.iter().any(|a| a == "--require-openai");
    given.retain(|a| a != "--require-openai");
    let mut python = "python3".to_owned();
    if let Some(at) = given.iter().position(|a| a == "--python").filter(|at| at + 1 < given.len()) {
        python = given.remove(at + 1);
        given.remove(at);
    }
    let args = Arguments::from_iter(given);
    let suite = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/serve/openai_suite.py");
    let names = names(&suite);
    let found = if args.list { Err("not looked for".to_owned()) } else { ready(&python) };
    let server = match found {
        Ok(()) => Server::start(),
        Err(why) => Err(why),
    };
    let (trials, server) = match server {
        Ok(server) => {
            let server = Arc::new(server);
            let run = |name: String| {
                let (server, python, suite) = (Arc::clone(&server), python.clone(), suite.clone());
                let what = name.clone();
                Trial::test(name, move || server.run(&python, &suite, &what))
            };
            (names.into_iter().map(run).collect(), Some(server))
        }
        Err(why) if required => {
            let fail = |name| {
                let why = why.clone();
                Trial::test(name, move || Err(Failed::from(why)))
            };
            (names.into_iter().map(fail).collect::<Vec<Trial>>(), None)
        }
        Err(why) => {
            let ignore = |name| Trial::test(name, || Ok(())).with_ignored_flag(true).with_kind(why.clone());
            (names.into_iter().map(ignore).collect(), None)
        }
    };
    let conclusion = libtest_mimic::run(&args, trials);
    drop(server);
    conclusion.exit_code()
}

/// The functions marked as tests, read off the suite's own text: naming them needs no interpreter.
fn names(suite: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(suite).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let marked = lines.windows(2).filter(|w| w[0] == "@test");
    marked.filter_map(|w| Some(w[1].strip_prefix("def ")?.split('(').next()?.to_owned())).collect()
}

fn ready(python: &str) -> Result<(), String> {
    let found = Command::new(python).args(["-c", "import openai"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    match found {
        Ok(status) if status.success() => Ok(()),
        _ => Err(format!("{python} has no package openai; tests/serve/requirements.txt names it")),
    }
}

struct Server {
    child: Mutex<Child>,
    url: String,
    /// The client's tests count what is at work: one at a time.
    turn: Mutex<()>,
}

impl Server {
    fn start() -> Result<Server, String> {
        let lacuna = PathBuf::from(env!("CARGO_BIN_EXE_lacuna"));
        let mut child = Command::new(lacuna)
            .args(["serve", MODEL, "--port", "0", "--json", "--offline"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| e.to_string())?;
        let mut line = String::new();
        let out = child.stdout.take().ok_or("no output")?;
        BufReader::new(out).read_line(&mut line).map_err(|e| e.to_string())?;
        let told: Option<Value> = serde_json::from_str(&line).ok();
        match told.as_ref().and_then(|v| v["address"].as_str()) {
            Some(at) => Ok(Server { url: format!("{at}/v1"), child: Mutex::new(child), turn: Mutex::new(()) }),
            None => {
                let _ = child.kill();
                let _ = child.wait();
                Err(format!("{MODEL} is not in the cache; `lacuna pull {MODEL}` brings it there"))
            }
        }
    }

    fn run(&self, python: &str, suite: &Path, name: &str) -> Result<(), Failed> {
        let _turn = self.turn.lock();
        let out = Command::new(python)
            .arg(suite)
            .args(["--base-url", &self.url, "--only", name])
            .output()
            .map_err(|e| Failed::from(e.to_string()))?;
        let said = String::from_utf8_lossy(&out.stdout);
        if out.status.success() && said.contains(&format!("ok      {name}")) {
            return Ok(());
        }
        Err(Failed::from(format!("{said}{}", String::from_utf8_lossy(&out.stderr))))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Ok(mut child) = self.child.lock() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
