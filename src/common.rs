//! What every verb shares: pulling, opening, printing, progress.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lacuna_base::units::show_bytes;
use lacuna_checkpoint::{Adapter, ChatTemplate, Checkpoint, Tokenizer};
use lacuna_format::Weights;
use lacuna_model::{Decoder, GateStore, LoadOptions, ModelError};
use lacuna_pull::ModelRef;
use lacuna_run::{Engine, RunPlan};
use serde_json::Value;

use crate::cli::Global;
use crate::out::{self, Closed};

/// A mistake on the command line: exit status 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Words on standard error, more of them with `-v`.
pub fn logging(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let _ = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(level))
        .with_writer(std::io::stderr)
        .log_internal_errors(false)
        .without_time()
        .try_init();
}

/// Sizes the pool of worker threads.
pub fn threads(n: Option<usize>) -> Result<()> {
    let Some(n) = n else {
        // Products only: what else runs on all cores shares its work by need.
        if let Some(fast) = lacuna_kernels::cpu::fast_cores() {
            lacuna_kernels::set_threads(fast);
        }
        return Ok(());
    };
    if n == 0 || n > 1024 {
        return Err(Usage(format!("--threads {n}: give 1 to 1024")).into());
    }
    rayon::ThreadPoolBuilder::new().num_threads(n).build_global().context("the pool of threads")
}

/// One JSON object where asked, else words.
pub fn print(g: &Global, json: &Value, words: impl FnOnce() -> String) -> Result<(), Closed> {
    if g.json { out::write(&format!("{json}\n")) } else { out::write(&words()) }
}

/// Says once what several parts of a command come upon.
pub fn say_once(text: impl AsRef<str>) {
    static SAID: std::sync::Mutex<Vec<String>> = std::sync::Mutex::new(Vec::new());
    let text = text.as_ref();
    let mut said = SAID.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if !said.iter().any(|s| s == text) {
        said.push(text.to_owned());
        say(text);
    }
}

/// Says something on standard error.
pub fn say(text: impl AsRef<str>) {
    out::say(&format!("{}\n", text.as_ref()));
}

/// The cache directory in force.
pub fn cache_dir(g: &Global) -> Result<PathBuf> {
    match &g.cache_dir {
        Some(d) => Ok(d.clone()),
        None => lacuna_pull::default_dir().context("no home directory is known; give --cache-dir"),
    }
}

/// Brings a model's files here.
pub fn pull(g: &Global, model: &str) -> Result<lacuna_pull::Pulled> {
    let reference = ModelRef::parse(model)?;
    let options = lacuna_pull::Options {
        cache_dir: g.cache_dir.clone(),
        offline: g.offline,
        token: None,
        progress: Arc::new(PullBar(Mutex::new(None))),
    };
    Ok(lacuna_pull::pull(&reference, &options)?)
}

/// A model opened for work.
pub struct Model {
    /// As the user named it.
    pub name: String,
    /// Its file or directory.
    pub path: PathBuf,
    /// Weights and network.
    pub checkpoint: Checkpoint,
}

impl Model {
    /// Its tokenizer, wherever the checkpoint keeps it.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let made = match self.checkpoint.metadata() {
            Some(m) => Tokenizer::from_gguf(m),
            None => Tokenizer::from_dir(self.checkpoint.dir()),
        };
        made.with_context(|| format!("the tokenizer of {}", self.name))
    }

    /// Its chat template.
    pub fn template(&self) -> Result<ChatTemplate> {
        ChatTemplate::open(&self.checkpoint).with_context(|| format!("the chat template of {}", self.name))
    }

    /// Its chat template with arguments from the command line.
    pub fn template_with(&self, args: &crate::cli::TemplateArgs) -> Result<ChatTemplate> {
        let template = self.template()?.with_args(args.args.iter().cloned().collect());
        template.map_err(|e| Usage(format!("--template-arg: {e}")).into())
    }

    /// The engine that runs it. What it rounds to be fast is said.
    pub fn engine(&self, running: &crate::cli::Running) -> Result<Engine> {
        engine(&self.checkpoint, running)
    }
}

/// An engine over weights, wherever they come from. What it rounds to be fast is said.
pub fn engine(weights: &dyn Weights, running: &crate::cli::Running) -> Result<Engine> {
    // A large model loads for minutes: too long for a misspelt key.
    let plan = run_plan(&running.plan)?;
    let bar = bar(0, "loading");
    let reads = std::cell::Cell::new(false);
    let progress = |done: usize, all: usize| {
        reads.set(true);
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    };
    let options = LoadOptions { progress: Some(&progress), activations: running.activations.into(), gate: plan.gate() };
    let decoder = Decoder::load(weights, &options).map_err(|e| match e {
        // What was typed, not what lies in the file: no weight was read yet.
        ModelError::Gate { .. } if !reads.get() => anyhow::Error::from(Usage(format!("the run plan: {e}"))),
        e => e.into(),
    })?;
    bar.finish_and_clear();
    if running.activations == crate::cli::Activations::Int8 && decoder.rounds_activations() {
        static SAID: Once = Once::new();
        SAID.call_once(|| {
            say("running with 8-bit activations where weights are integers; --activations exact keeps 32 bits");
        });
    }
    let engine = Engine::new(decoder).with_kv(running.kv.into()).with_plan(plan);
    engine.check_plan().map_err(|e| Usage(e.to_string()))?;
    engine.plan().words().iter().for_each(|line| say_once(format!("running with {line}")));
    let context = engine.context();
    if engine.plan().keep().is_some_and(|k| k.plan().budget >= context) {
        say_once(format!("keep: nothing is left out of the {context} positions that the model takes"));
    }
    let keyed = engine.model().spec.layers.iter().any(|l| l.attn.is_some());
    for question in engine.plan().names().iter().map(|n| &n[0]).filter(|q| ["keep", "select"].contains(&q.as_str())) {
        if !keyed {
            say_once(format!("{question}: nothing is left out: no layer of this model has attention"));
        }
    }
    if engine.plan().gate().is_some() {
        say_once(gate_words(engine.model().gate_store()));
    }
    Ok(engine)
}

/// A run plan's file, bytes at most.
const PLAN_BYTES: u64 = 1 << 16;

/// How the matrices that a gate stands at are kept.
fn gate_words(store: GateStore) -> String {
    let GateStore { matrices, by_columns, bytes } = store;
    let whole = match matrices - by_columns {
        0 => String::new(),
        n => format!("; {n} others have no columns, are read whole, and save nothing"),
    };
    format!("gate: {by_columns} of {matrices} matrices lie by columns as well ({}){whole}", show_bytes(bytes))
}

/// The run plan that a file and flags say.
pub fn run_plan(said: &crate::cli::Plan) -> Result<RunPlan> {
    let registry = lacuna_methods::registry();
    let mut plan = match &said.file {
        None => RunPlan::none(),
        Some(path) => {
            // A model in the place of a plan is not worth reading.
            if let Some(n) = std::fs::metadata(path).ok().map(|m| m.len()).filter(|n| *n > PLAN_BYTES) {
                let path = path.display();
                return Err(Usage(format!("--run {path}: {n} bytes; a run plan has at most {PLAN_BYTES}")).into());
            }
            let text =
                read_text(path).map_err(|e| Usage(format!("--run {}: {}", path.display(), crate::out::told(&e))))?;
            RunPlan::parse(&text, &registry).map_err(|e| Usage(format!("--run {}: {e}", path.display())))?
        }
    };
    let flags = [("draft", &said.draft), ("keep", &said.keep), ("select", &said.select), ("gate", &said.gate)];
    for (question, said) in flags {
        if let Some(said) = said {
            plan.flag(question, said, &registry).map_err(|e| Usage(format!("--{question} {said}: {e}")))?;
        }
    }
    Ok(plan)
}

/// Pulls if need be, and opens, with the adapter that was asked for. What makes the model differ from its source is
/// said.
pub fn open(g: &Global, model: &str) -> Result<Model> {
    let (path, adapter) = find(g, model)?;
    let mut checkpoint = match &g.read_as {
        Some(family) => lacuna_checkpoint::open_like(&path, family)?,
        None => lacuna_checkpoint::open(&path)?,
    };
    if let Some(dir) = &adapter {
        checkpoint = checkpoint.with_adapter(Adapter::open(dir)?, g.merge)?;
    }
    if let Some(bits) = g.load_bits {
        checkpoint = checkpoint.narrowed(bits)?;
    }
    if let Some(bytes) = size(g.load_bytes.as_deref())? {
        checkpoint = checkpoint.within(bytes)?;
    }
    let m = opened(model, path, checkpoint);
    let doubt = m.checkpoint.metadata().and_then(Tokenizer::doubt);
    m.checkpoint.remarks().iter().chain(&doubt).for_each(|r| say(format!("{model}: {r}")));
    Ok(m)
}

/// As [`open`], without any adapter: the model that another one is compared with.
pub fn open_alone(g: &Global, model: &str) -> Result<Model> {
    let pulled = pull(g, model)?;
    let checkpoint = lacuna_checkpoint::open(&pulled.path)?;
    Ok(opened(model, pulled.path, checkpoint))
}

/// Where the model's files are, and the adapter to put on it: one that was asked for, or MODEL itself on the base it
/// names.
pub fn find(g: &Global, model: &str) -> Result<(PathBuf, Option<PathBuf>)> {
    let path = pull(g, model)?.path;
    match &g.adapter {
        None if g.merge && !Adapter::is_at(&path) => Err(Usage("--merge: there is no adapter to merge".into()).into()),
        Some(_) if Adapter::is_at(&path) => {
            Err(Usage(format!("{model} is an adapter; give its base as MODEL beside --adapter")).into())
        }
        None if Adapter::is_at(&path) => Ok((base_of(g, model, &path)?, Some(path))),
        adapter => Ok((path, adapter.clone())),
    }
}

/// The base that an adapter names, where that is a directory or a pinned name.
fn base_of(g: &Global, model: &str, dir: &Path) -> Result<PathBuf> {
    let adapter = Adapter::open(dir)?;
    let base = adapter.base().filter(|b| !b.is_empty());
    let Some(base) = base else {
        return Err(Usage(format!("{model} is an adapter that names no base; give it: BASE --adapter {model}")).into());
    };
    for path in [PathBuf::from(base), dir.join(base)] {
        if path.is_dir() {
            return Ok(path);
        }
    }
    if matches!(ModelRef::parse(base), Ok(ModelRef::Pinned(_))) {
        return Ok(pull(g, base)?.path);
    }
    let what =
        format!("{model} is an adapter for \"{base}\", which is neither a directory here nor a pinned name; give it: ");
    Err(Usage(format!("{what}hf:{base} --adapter {model}")).into())
}

fn opened(model: &str, path: PathBuf, checkpoint: Checkpoint) -> Model {
    if let Some(p) = checkpoint.packed().filter(|p| !p.approximations.is_empty()) {
        say(format!("{model} differs from its source: {}", p.approximations.join("; ")));
    }
    Model { name: model.to_owned(), path, checkpoint }
}

/// A text file whole, its lines ended by LF alone, with an error that names it.
pub fn read_text(path: &Path) -> Result<String> {
    if path.is_dir() {
        anyhow::bail!("{}: a directory, where a text file is expected", path.display());
    }
    if std::fs::metadata(path).is_ok_and(|m| !m.is_file()) {
        anyhow::bail!("{}: no file, where a text file is expected", path.display());
    }
    let bytes = std::fs::read(path).with_context(|| format!("the file '{}'", path.display()))?;
    let text = String::from_utf8(bytes).with_context(|| format!("{}: this is no UTF-8 text", path.display()))?;
    // Line ends as everywhere else in this field: perplexities of a file must not depend on the system that wrote it.
    Ok(lacuna_eval::normal_lines(&text))
}

/// Why a default is cut down to a model's context.
pub const NO_FURTHER: &str = "the model sees no further";

/// A default that nobody typed, cut down to what there is of it, which is said.
pub fn fitting(what: &str, default: usize, most: usize, why: &str) -> usize {
    if most < default {
        say(format!("note: {most} {what} instead of {default}: {why}"));
    }
    default.min(most)
}

/// The tokens of a window: as typed, where a model of this context sees that far; else a default that fits both the
/// model and the text.
pub fn window(typed: Option<usize>, default: usize, context: usize, text_tokens: usize) -> Result<usize> {
    match typed {
        Some(n) if n < 2 || n > context => {
            Err(Usage(format!("--ctx {n}: give 2 to {context}, the model's context")).into())
        }
        Some(n) => Ok(n),
        None => {
            let n = fitting("tokens in a window", default, context, NO_FURTHER);
            Ok(fitting("tokens in a window", n, text_tokens, "the text has no more"))
        }
    }
}

/// A size as people write it, if given.
pub fn size(text: Option<&str>) -> Result<Option<u64>> {
    text.map(|t| lacuna_base::units::parse_bytes(t).map_err(|e| Usage(e).into())).transpose()
}

/// A bar on a terminal, nothing elsewhere.
pub fn bar(total: u64, name: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{prefix:<28} {wide_bar} {pos}/{len} {elapsed} {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_prefix(name.to_owned());
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

/// Draws what `pull` does.
struct PullBar(Mutex<Option<ProgressBar>>);

impl lacuna_pull::Progress for PullBar {
    fn started(&self, name: &str, total: Option<u64>) {
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
        let template = if total.is_some() {
            "{prefix:<28} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec}"
        } else {
            "{prefix:<28} {spinner} {bytes} {elapsed}"
        };
        bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_prefix(name.to_owned());
        bar.enable_steady_tick(Duration::from_millis(500));
        if let Ok(mut slot) = self.0.lock() {
            *slot = Some(bar);
        }
    }

    fn advanced(&self, bytes: u64) {
        if let Ok(slot) = self.0.lock()
            && let Some(bar) = slot.as_ref()
        {
            bar.inc(bytes);
        }
    }

    fn finished(&self) {
        if let Ok(mut slot) = self.0.lock()
            && let Some(bar) = slot.take()
        {
            bar.finish_and_clear();
        }
    }
}

/// Says how far long work is where no bar is drawn: every half minute, the first half of one in silence.
pub fn tell_slowly(name: &str, done: u64, total: Option<u64>, what: &str) {
    static LAST: Mutex<Option<Instant>> = Mutex::new(None);
    if std::io::stderr().is_terminal() {
        return;
    }
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if last.get_or_insert_with(Instant::now).elapsed() < Duration::from_secs(30) {
        return;
    }
    *last = Some(Instant::now());
    let of = total.map_or_else(String::new, |n| format!(" of {n}"));
    say(format!("{name}: {done}{of}{}{what}", if what.is_empty() { "" } else { ", " }));
}

/// Draws what a compression does.
#[derive(Default)]
pub struct CompressBar(Option<ProgressBar>);

impl lacuna_compress::Progress for CompressBar {
    fn phase(&mut self, name: &str, total: u64) {
        if let Some(b) = self.0.take() {
            b.finish_and_clear();
        }
        self.0 = Some(bar(total, name));
    }

    fn step(&mut self, done: u64, what: &str) {
        if let Some(b) = &self.0 {
            b.set_position(done);
            b.set_message(what.to_owned());
            tell_slowly(&b.prefix(), done, b.length(), what);
            if b.length() == Some(done) {
                b.finish_and_clear();
            }
        }
    }
}

/// The sampling that flags ask for.
pub fn sampling(s: &crate::cli::Sampling) -> lacuna_run::Sampling {
    lacuna_run::Sampling {
        temperature: s.temp,
        top_k: s.top_k,
        top_p: s.top_p,
        min_p: s.min_p,
        repetition_penalty: s.repeat_penalty,
        seed: s.seed,
        ..lacuna_run::Sampling::default()
    }
}
