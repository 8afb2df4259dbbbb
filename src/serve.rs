//! `serve`: a model behind OpenAI's interface; and `completions`, the shells' own.

use std::net::{IpAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::CommandFactory;
use lacuna_base::units::show_bytes;
use lacuna_kernels::KvFormat;
use lacuna_run::{BLOCK_TOKENS, BlockStore, Pooling};
use lacuna_serve::{Keys, Options, Origins, Served, Stop};
use serde_json::{Value, json};

use crate::cli::{self, Cli, Global, LogFormat};
use crate::common::{self, Model, Usage};
use crate::counted::Counted;
use crate::signals;

/// Where a compressed model keeps what was measured when it was made.
pub const REPORT: &str = "report.json";

/// Room for keys and values where the machine does not tell how much memory it has.
const UNKNOWN_MEMORY: u64 = 4 << 30;

/// Runs the verb.
pub fn run(g: &Global, a: &cli::Serve) -> anyhow::Result<ExitCode> {
    logging(g.verbose, a.log_format);
    let keys = a.api_key_file.as_deref().map(keys).transpose()?;
    let origins = Origins::parse(&a.cors).map_err(|e| Usage(format!("--cors {e}")))?;
    if keys.is_none() && a.cors.iter().any(|o| o == "*") {
        common::say("any page that a browser shows may use this model: --api-key-file asks for a key");
    }
    // The address first: a port that is taken should not cost the time of loading.
    let listener = listen(a)?;
    let address = listener.local_addr()?;
    let m = common::open(g, &a.model)?;
    let tokenizer = m.tokenizer()?;
    let template = match m.template() {
        Ok(_) => Some(m.template_with(&a.template)?),
        Err(e) if !a.template.args.is_empty() => return Err(e),
        Err(_) => None,
    };
    if template.is_none() {
        common::say(format!(
            "{} has no chat template: /v1/chat/completions will refuse, /v1/completions works",
            m.name
        ));
    }
    let spec = lacuna_format::Weights::spec(&m.checkpoint).clone();
    let most = spec.context;
    let context = a.ctx.unwrap_or(most);
    if context < 2 || context > most {
        return Err(Usage(format!("--ctx {context}: this model takes 2 to {most}")).into());
    }
    let kv = KvFormat::from(a.running.kv);
    // A text that evicts entries needs another block to move them.
    let held = common::run_plan(&a.running.plan)?.slots(context);
    let held = if held < context { held + BLOCK_TOKENS } else { held };
    let kv_bytes = kv_bytes(a, &BlockStore::new(&spec, kv, 0), context, held)?;
    let name = a.served_name.clone().unwrap_or_else(|| short_name(&m));
    if name.is_empty() || name.len() > 256 {
        return Err(Usage("--served-name: give 1 to 256 bytes".into()).into());
    }
    let weights = Counted::new(&m.checkpoint);
    let engine = common::engine(&weights, &a.running)?.with_context(context);
    let mut card = card(&m, a, &name, context, template.is_some());
    let bytes = weights.bytes();
    card["bytes"] = bytes.into();
    card["bits_per_weight"] = (8.0 * bytes as f64 / spec.parameters().max(1) as f64).into();
    card["run"] = engine.plan().to_json();
    let fingerprint = format!("lacuna-{}-{}", env!("CARGO_PKG_VERSION"), a.running.activations.name());
    let served = Served { name: name.clone(), fingerprint, engine, tokenizer, template, card };
    let seconds = |s: f64| Duration::try_from_secs_f64(s).map_err(|e| Usage(format!("a time of {s} s: {e}")));
    let options = Options {
        batch: a.max_batch,
        queue: a.max_queue,
        prefill_rows: a.chunk,
        kv_bytes,
        tokens: a.max_tokens.unwrap_or(usize::MAX),
        pooling: match a.pooling {
            cli::Pooling::Mean => Pooling::Mean,
            cli::Pooling::Last => Pooling::Last,
        },
        hosts: hosts(a, address.ip(), keys.is_some()),
        keys,
        origins,
        ollama: a.ollama,
        body_bytes: common::size(Some(&a.max_body))?.map_or(usize::MAX, |n| n as usize),
        connections: a.max_connections,
        head_timeout: seconds(a.client_timeout)?,
        body_timeout: seconds(a.client_timeout)?,
        write_timeout: seconds(a.client_timeout)?,
        answer_timeout: seconds(a.request_timeout)?,
        drain_timeout: seconds(a.drain_timeout)?,
    };
    let stop = Stop::default();
    signals::hand_over();
    stop.on_signals().context("signals")?;
    let url = format!("http://{address}");
    let out = json!({
        "address": url, "host": address.ip(), "port": address.port(), "model": name, "context": context, "kv_bytes": kv_bytes,
        "max_batch": a.max_batch, "max_queue": a.max_queue,
    });
    common::print(g, &out, || {
        format!(
            "{name} at {url}: the page at {url}/, the interface at {url}/v1\n{} for keys and values; ctrl-c stops\n",
            show_bytes(kv_bytes as u64)
        )
    })?;
    let cut = lacuna_serve::serve(served, options, listener, &stop)?;
    if cut > 0 {
        common::say(format!("{cut} connections were cut: their answers were not complete after {} s", a.drain_timeout));
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints the completions of a shell.
pub fn completions(g: &Global, a: &cli::Completions) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(a.shell, &mut Cli::command(), "lacuna", &mut script);
    let script = String::from_utf8(script).context("the completions")?;
    common::print(g, &json!({ "shell": a.shell.to_string(), "script": script }), || script.clone())?;
    Ok(ExitCode::SUCCESS)
}

fn logging(verbose: u8, format: LogFormat) {
    let level = if verbose == 0 { "info" } else { "debug" };
    let filter =
        tracing_subscriber::EnvFilter::new(format!("warn,lacuna={level},lacuna_serve={level},lacuna_run={level}"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let log = log.with_target(false).log_internal_errors(false);
    // Whoever set up a log before keeps it.
    let _ = match format {
        LogFormat::Text => log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
}

fn keys(path: &Path) -> anyhow::Result<Keys> {
    let text = std::fs::read_to_string(path).with_context(|| format!("the keys of {}", path.display()))?;
    Keys::parse(&text).map_err(|e| Usage(format!("--api-key-file {}: {e}", path.display())).into())
}

fn listen(a: &cli::Serve) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind((a.host.as_str(), a.port));
    let listener = listener.with_context(|| format!("cannot listen at {}:{}", a.host, a.port))?;
    let ip = listener.local_addr()?.ip();
    if !ip.is_loopback() && a.api_key_file.is_none() {
        common::say(format!("anybody who reaches {ip} may use this model: --api-key-file asks for a key"));
    }
    Ok(listener)
}

/// Without a key, pages of other sites that a browser here shows could reach this machine's server by a name of their
/// own that leads to it. So a server of this machine alone answers to this machine's names only.
fn hosts(a: &cli::Serve, ip: IpAddr, keyed: bool) -> Vec<String> {
    if keyed || !ip.is_loopback() {
        return Vec::new();
    }
    let own = ["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned(), ip.to_string()];
    own.into_iter().chain(a.allow_host.iter().map(|h| h.to_ascii_lowercase())).collect()
}

/// Room for keys and values: as asked, or for a full batch of full texts, but no more than a quarter of the machine's
/// memory. A text of the whole context holds `held` cached entries at once.
fn kv_bytes(a: &cli::Serve, store: &BlockStore, context: usize, held: usize) -> anyhow::Result<usize> {
    let blocks = held.div_ceil(BLOCK_TOKENS).saturating_add(store.state_blocks_of(held));
    let text = blocks.saturating_mul(store.unit_bytes()).max(1);
    let bytes = match common::size(a.kv_memory.as_deref())? {
        Some(asked) => asked,
        None => {
            let quarter = memory_total().unwrap_or(UNKNOWN_MEMORY) / 4;
            (text as u64).saturating_mul(a.max_batch as u64).min(quarter)
        }
    };
    let least = ((2 + store.state_blocks()) * store.unit_bytes()) as u64;
    if bytes < least {
        return Err(Usage(format!(
            "--kv-memory {}: two blocks of this model, and the state of a text where it has one, take {}",
            show_bytes(bytes),
            show_bytes(least)
        ))
        .into());
    }
    if bytes < text as u64 {
        common::say(format!(
            "{} for keys and values hold less than one text of {context} tokens ({}): longer ones are refused",
            show_bytes(bytes),
            show_bytes(text as u64)
        ));
    }
    Ok(usize::try_from(bytes)?)
}

fn memory_total() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("MemTotal:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// The last part of how the model was named.
fn short_name(m: &Model) -> String {
    let path = Path::new(m.name.trim_end_matches('/'));
    let last = path.file_name().map_or(m.name.clone(), |n| n.to_string_lossy().into_owned());
    last.strip_suffix(".gguf").unwrap_or(&last).chars().take(128).collect()
}

/// What the model is, and what was left out of it.
fn card(m: &Model, a: &cli::Serve, name: &str, context: usize, chat: bool) -> Value {
    let c = &m.checkpoint;
    let spec = lacuna_format::Weights::spec(c);
    let parameters = spec.parameters();
    let packed = c.packed();
    let report: PathBuf = c.dir().join(REPORT);
    // A report that cannot be read is none: the card says so.
    let report = packed.and_then(|_| serde_json::from_slice::<Value>(&std::fs::read(report).ok()?).ok());
    let steps: Vec<String> = packed
        .and_then(|p| p.recipe["step"].as_array().or(p.recipe["steps"].as_array()).cloned())
        .unwrap_or_default()
        .iter()
        .map(|s| {
            let rest: Vec<String> = s
                .as_object()
                .into_iter()
                .flatten()
                .filter(|(k, v)| !matches!(k.as_str(), "name" | "method") && !v.is_null())
                .map(|(k, v)| format!("{k} {v}"))
                .collect();
            format!("{}: {}", s["method"].as_str().unwrap_or("?"), rest.join(", "))
        })
        .collect();
    json!({
        "model": name, "architecture": spec.arch, "format": format!("{:?}", c.kind()), "packed": packed.is_some(),
        "parameters": parameters, "file_bytes": c.source_bytes(), "layers": spec.layers.len(),
        "context": context, "activations": a.running.activations.name(), "kv": format!("{:?}", a.running.kv).to_lowercase(),
        "chat": chat, "approximations": packed.map(|p| &p.approximations), "recipe": packed.map(|p| &p.recipe), "steps": steps,
        "source": packed.map(|p| &p.source), "report": report,
    })
}
