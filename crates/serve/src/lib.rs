//! A model behind OpenAI's interface, and others': HTTP, streaming, limits, metrics, a web page.
//!
//! One thread runs the model ([`lacuna_run::Scheduler`]), another talks with everybody; they share channels. A request
//! takes a place in the queue first, is held against the published OpenAPI document, becomes tokens and a grammar, and
//! waits its turn; when its client leaves, so does it.

mod api;
mod app;
mod channels;
mod connection;
mod cors;
mod error;
mod exact;
mod grammar;
mod metrics;
mod page;
mod reasoning;
mod schema;
mod tools;
mod worker;

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Context;
use lacuna_checkpoint::{ChatTemplate, Tokenizer};
use lacuna_run::{Engine, Limits, Pooling, Scheduler};
use serde_json::Value;
use tokio::sync::watch;

pub use app::Keys;
pub use cors::Origins;

/// A model to serve.
pub struct Served {
    /// The name by which requests call it.
    pub name: String,
    /// What identifies its files and this program.
    pub fingerprint: String,
    /// The engine that runs it.
    pub engine: Engine,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template, if it was trained to chat.
    pub template: Option<ChatTemplate>,
    /// What it is, for the web page.
    pub card: Value,
}

/// How it is served.
pub struct Options {
    /// Texts worked on at once.
    pub batch: usize,
    /// Answers that may wait beyond those.
    pub queue: usize,
    /// Rows of prompts in a step.
    pub prefill_rows: usize,
    /// Bytes of keys and values.
    pub kv_bytes: usize,
    /// Tokens of an answer, at most.
    pub tokens: usize,
    /// How vectors are made unless a request says.
    pub pooling: Pooling,
    /// Keys of which a request must show one.
    pub keys: Option<Keys>,
    /// Names by which a request may call this server; any where there are none.
    pub hosts: Vec<String>,
    /// Origins whose pages may use this server.
    pub origins: Origins,
    /// Whether Ollama's interface is there, too.
    pub ollama: bool,
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// Connections at once.
    pub connections: usize,
    /// Time for the head of a request to come, and for an idle connection to live.
    pub head_timeout: Duration,
    /// Time for the body of a request to come.
    pub body_timeout: Duration,
    /// Time in which a client must take something of what is sent to it.
    pub write_timeout: Duration,
    /// Time for an answer to be complete.
    pub answer_timeout: Duration,
    /// Time for what is at work to end once the server is told to stop.
    pub drain_timeout: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            batch: 16,
            queue: 256,
            prefill_rows: 256,
            kv_bytes: 1 << 30,
            tokens: usize::MAX,
            pooling: Pooling::Mean,
            keys: None,
            hosts: Vec::new(),
            origins: Origins::default(),
            ollama: false,
            body_bytes: 4 << 20,
            connections: 1024,
            head_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            answer_timeout: Duration::from_secs(600),
            drain_timeout: Duration::from_secs(30),
        }
    }
}

/// Tells a server to stop, from anywhere.
#[derive(Clone, Debug)]
pub struct Stop(Arc<watch::Sender<bool>>);

impl Default for Stop {
    fn default() -> Stop {
        Stop(Arc::new(watch::Sender::new(false)))
    }
}

impl Stop {
    /// From now on nothing new is taken; what is at work may end.
    pub fn trigger(&self) {
        self.0.send_replace(true);
    }

    /// Triggers on SIGTERM and ctrl-c; a second one ends the process at once.
    pub fn on_signals(&self) -> std::io::Result<()> {
        let stop = self.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            runtime.block_on(async {
                for again in [false, true] {
                    if signal().await.is_err() {
                        return;
                    }
                    if again {
                        std::process::exit(130);
                    }
                    tracing::info!("told to stop");
                    stop.trigger();
                }
            });
        })?;
        Ok(())
    }
}

#[cfg(unix)]
async fn signal() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        done = tokio::signal::ctrl_c() => done,
    }
}

#[cfg(not(unix))]
async fn signal() -> std::io::Result<()> {
    tokio::signal::ctrl_c().await
}

/// Serves a model on `listener` until `stop` is triggered and what was at work has ended. Returns how many connections
/// had to be cut.
pub fn serve(served: Served, options: Options, listener: TcpListener, stop: &Stop) -> anyhow::Result<usize> {
    let Served { name, fingerprint, engine, tokenizer, template, card } = served;
    let limits = Limits {
        batch: options.batch.max(1),
        prefill_rows: options.prefill_rows,
        kv_bytes: options.kv_bytes,
        reuse: true,
    };
    let (vocab, width) = (engine.model().spec.vocab, engine.model().spec.hidden);
    let (run, methods) = (engine.plan().to_json(), engine.plan().names());
    let scheduler = Scheduler::new(engine, tokenizer.clone(), limits);
    let context = scheduler.most_tokens();
    anyhow::ensure!(context > 1, "the room for keys and values holds no text: give more of it");
    let metrics = Arc::new(metrics::Metrics::of(methods));
    let (worker, thread) = worker::Worker::start(scheduler, limits.batch, options.queue, Arc::clone(&metrics))
        .context("the engine's thread")?;
    let app = Arc::new(app::App {
        schema: schema::Schema::new(&name, width, options.ollama),
        grammars: grammar::Grammars::new(&tokenizer).map_err(|e| e.to_string()),
        limits: app::Bounds {
            body_bytes: options.body_bytes,
            tokens: options.tokens,
            body: options.body_timeout,
            answer: options.answer_timeout,
        },
        created: std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        name,
        fingerprint,
        tokenizer,
        template,
        vocab,
        context,
        pooling: options.pooling,
        keys: options.keys,
        hosts: options.hosts,
        origins: options.origins,
        ollama: options.ollama,
        width,
        card,
        run,
        metrics,
        worker,
        draining: AtomicBool::new(false),
    });
    let patience = connection::Patience {
        connections: options.connections,
        head: options.head_timeout,
        write: options.write_timeout,
        drain: options.drain_timeout,
    };
    // One thread talks; what takes time without waiting (templates, tokens, grammars) has a few of its own.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .build()
        .context("the thread that talks")?;
    listener.set_nonblocking(true)?;
    let watching = stop.0.subscribe();
    let cut = runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let router = app::router(Arc::clone(&app));
        anyhow::Ok(connection::accept(listener, router, Arc::clone(&app), patience, watching).await)
    })?;
    app.worker.stop();
    drop(runtime);
    thread.join().map_err(|_| anyhow::anyhow!("the engine's thread panicked"))?;
    Ok(cut)
}
