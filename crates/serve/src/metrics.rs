//! What the server counts, in Prometheus' text format and for the web page.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use lacuna_run::{Gauges, Step};
use serde_json::{Value, json};

/// Bounds of buckets of seconds.
const SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];
/// Bounds of buckets of rows.
const ROWS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];
/// Time over which the page's speeds are means.
const WINDOW: Duration = Duration::from_secs(5);

/// Counts of values by size.
struct Histogram {
    bounds: &'static [f64],
    counts: Vec<u64>,
    sum: f64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Mutex<Histogram> {
        Mutex::new(Histogram { bounds, counts: vec![0; bounds.len() + 1], sum: 0.0 })
    }

    fn add(&mut self, x: f64) {
        let at = self.bounds.iter().position(|b| x <= *b).unwrap_or(self.bounds.len());
        self.counts[at] += 1;
        self.sum += x;
    }

    fn write(&self, out: &mut String, name: &str, help: &str) {
        head(out, name, "histogram", help);
        let mut total = 0;
        for (bound, n) in self.bounds.iter().zip(&self.counts) {
            total += n;
            let _ = writeln!(out, "{name}_bucket{{le=\"{bound}\"}} {total}");
        }
        total += self.counts[self.bounds.len()];
        let _ = writeln!(out, "{name}_bucket{{le=\"+Inf\"}} {total}\n{name}_sum {}\n{name}_count {total}", self.sum);
    }
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// A lock that a panic elsewhere does not take away: the numbers behind it are still numbers.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// All that is counted.
pub struct Metrics {
    started: Instant,
    requests: Mutex<BTreeMap<(&'static str, u16), u64>>,
    first_token: Mutex<Histogram>,
    next_token: Mutex<Histogram>,
    whole: Mutex<Histogram>,
    batch: Mutex<Histogram>,
    gauges: Mutex<Gauges>,
    recent: Mutex<VecDeque<(Instant, Step)>>,
    /// Tokens of prompts, of these taken over, and tokens written.
    pub prompt_tokens: AtomicU64,
    /// Tokens of prompts whose keys and values were there already.
    pub cached_tokens: AtomicU64,
    /// Tokens written.
    pub generated_tokens: AtomicU64,
    /// Answers that their client gave up.
    pub cancelled: AtomicU64,
    /// Times that the engine panicked and began anew.
    pub panics: AtomicU64,
    /// Question, method and keys of each part of the run plan.
    plan: Vec<[String; 3]>,
    /// Open connections.
    pub connections: AtomicUsize,
    /// Connections for which there was no room.
    pub turned_away: AtomicU64,
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics {
            started: Instant::now(),
            requests: Mutex::default(),
            first_token: Histogram::new(SECONDS),
            next_token: Histogram::new(SECONDS),
            whole: Histogram::new(SECONDS),
            batch: Histogram::new(ROWS),
            gauges: Mutex::default(),
            recent: Mutex::default(),
            prompt_tokens: AtomicU64::new(0),
            cached_tokens: AtomicU64::new(0),
            generated_tokens: AtomicU64::new(0),
            cancelled: AtomicU64::new(0),
            panics: AtomicU64::new(0),
            plan: Vec::new(),
            connections: AtomicUsize::new(0),
            turned_away: AtomicU64::new(0),
        }
    }
}

impl Metrics {
    /// Of a model that runs under a plan: question, method and keys of each part.
    pub fn of(plan: Vec<[String; 3]>) -> Metrics {
        Metrics { plan, ..Metrics::default() }
    }

    /// A request to `endpoint` was answered with `status`.
    pub fn request(&self, endpoint: &'static str, status: u16) {
        *lock(&self.requests).entry((endpoint, status)).or_default() += 1;
    }

    /// The first token of an answer came after this time.
    pub fn first_token(&self, after: Duration) {
        lock(&self.first_token).add(after.as_secs_f64());
    }

    /// A further token came this long after the one before.
    pub fn next_token(&self, after: Duration) {
        lock(&self.next_token).add(after.as_secs_f64());
    }

    /// An answer was complete after this time.
    pub fn whole(&self, after: Duration) {
        lock(&self.whole).add(after.as_secs_f64());
    }

    /// A step was done.
    pub fn step(&self, step: Step, gauges: Gauges) {
        let rows = step.decode_rows + step.drafted_rows + step.prefill_rows;
        if rows > 0 {
            lock(&self.batch).add(rows as f64);
            let now = Instant::now();
            let mut recent = lock(&self.recent);
            recent.push_back((now, step));
            while recent.front().is_some_and(|(at, _)| now - *at > WINDOW) {
                recent.pop_front();
            }
        }
        *lock(&self.gauges) = gauges;
    }

    /// The last state told.
    pub fn gauges(&self) -> Gauges {
        *lock(&self.gauges)
    }

    /// For the page: what goes on now.
    pub fn live(&self) -> Value {
        let now = Instant::now();
        let (mut written, mut read) = (0, 0);
        for (at, step) in lock(&self.recent).iter() {
            if now - *at <= WINDOW {
                written += step.chosen;
                read += step.prefill_rows;
            }
        }
        let g = self.gauges();
        let seconds = WINDOW.min(self.started.elapsed()).as_secs_f64().max(0.1);
        json!({
            "tokens_per_second": written as f64 / seconds, "prompt_tokens_per_second": read as f64 / seconds,
            "running": g.running, "waiting": g.waiting,
            "kv": { "total": g.blocks.total, "free": g.blocks.free, "used": g.blocks.used, "shared": g.blocks.shared,
                    "cached": g.blocks.cached, "bytes": g.kv_bytes },
            "memory_bytes": resident(), "uptime_s": self.started.elapsed().as_secs(),
            "prompt_tokens": self.prompt_tokens.load(Ordering::Relaxed),
            "cached_tokens": self.cached_tokens.load(Ordering::Relaxed),
            "generated_tokens": self.generated_tokens.load(Ordering::Relaxed),
        })
    }

    /// Everything in Prometheus' text format.
    pub fn text(&self) -> String {
        let mut out = String::new();
        head(&mut out, "lacuna_requests_total", "counter", "Requests answered, by endpoint and status.");
        for ((endpoint, status), n) in lock(&self.requests).iter() {
            let _ = writeln!(out, "lacuna_requests_total{{endpoint=\"{endpoint}\",status=\"{status}\"}} {n}");
        }
        lock(&self.first_token).write(
            &mut out,
            "lacuna_time_to_first_token_seconds",
            "From a request's acceptance to its first token.",
        );
        lock(&self.next_token).write(&mut out, "lacuna_inter_token_seconds", "Between two tokens of one answer.");
        lock(&self.whole).write(
            &mut out,
            "lacuna_answer_seconds",
            "From a request's acceptance to the end of an answer.",
        );
        lock(&self.batch).write(&mut out, "lacuna_step_rows", "Rows computed together in a step.");
        let g = self.gauges();
        let mut one = |name: &str, kind: &str, help: &str, value: u64| {
            head(&mut out, name, kind, help);
            let _ = writeln!(out, "{name} {value}");
        };
        let count = |a: &AtomicU64| a.load(Ordering::Relaxed);
        one("lacuna_queue_length", "gauge", "Texts that wait.", g.waiting as u64);
        one("lacuna_running", "gauge", "Texts at work.", g.running as u64);
        one("lacuna_connections", "gauge", "Open connections.", self.connections.load(Ordering::Relaxed) as u64);
        one(
            "lacuna_connections_turned_away_total",
            "counter",
            "Connections for which there was no room.",
            count(&self.turned_away),
        );
        one("lacuna_preemptions_total", "counter", "Texts that gave up their blocks to others.", g.preempted);
        one("lacuna_cancelled_total", "counter", "Answers that their client gave up.", count(&self.cancelled));
        one("lacuna_engine_panics_total", "counter", "Times that the engine began anew.", count(&self.panics));
        one("lacuna_kv_bytes", "gauge", "Bytes of keys and values held.", g.kv_bytes as u64);
        one("lacuna_kv_evictions_total", "counter", "Cached blocks thrown away to make room.", g.blocks.evicted);
        one("process_resident_memory_bytes", "gauge", "Resident memory.", resident().unwrap_or(0));
        head(&mut out, "lacuna_kv_blocks", "gauge", "Blocks of keys and values, by state; shared ones are used ones.");
        let b = g.blocks;
        for (state, n) in
            [("total", b.total), ("free", b.free), ("used", b.used), ("shared", b.shared), ("cached", b.cached)]
        {
            let _ = writeln!(out, "lacuna_kv_blocks{{state=\"{state}\"}} {n}");
        }
        head(&mut out, "lacuna_run_plan_info", "gauge", "What is drafted and what is left out while the model runs.");
        for [question, method, keys] in &self.plan {
            let keys = keys.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ =
                writeln!(out, "lacuna_run_plan_info{{question=\"{question}\",method=\"{method}\",keys=\"{keys}\"}} 1");
        }
        let what = "Entries of heads, a position each, that a keeper has evicted.";
        head(&mut out, "lacuna_keep_evicted_total", "counter", what);
        let _ = writeln!(out, "lacuna_keep_evicted_total {}", g.evicted);
        head(
            &mut out,
            "lacuna_draft_tokens_total",
            "counter",
            "Drafted tokens that were verified, and those that came.",
        );
        for (kind, n) in [("verified", g.drafted), ("accepted", g.accepted)] {
            let _ = writeln!(out, "lacuna_draft_tokens_total{{kind=\"{kind}\"}} {n}");
        }
        let what =
            "Bytes of keys and values that rows read where a selector was asked, and would have read without it.";
        head(&mut out, "lacuna_select_bytes_total", "counter", what);
        for (kind, n) in [("read", g.reads.read), ("all", g.reads.all)] {
            let _ = writeln!(out, "lacuna_select_bytes_total{{kind=\"{kind}\"}} {n}");
        }
        let what = "Bytes of the matrices at which a gate stands that steps read, and would have read without it.";
        head(&mut out, "lacuna_gate_bytes_total", "counter", what);
        for (kind, n) in [("read", g.gate_reads.read), ("all", g.gate_reads.all)] {
            let _ = writeln!(out, "lacuna_gate_bytes_total{{kind=\"{kind}\"}} {n}");
        }
        head(
            &mut out,
            "lacuna_tokens_total",
            "counter",
            "Tokens of prompts, those taken over from the cache, tokens written.",
        );
        for (kind, n) in [
            ("prompt", count(&self.prompt_tokens)),
            ("cached", count(&self.cached_tokens)),
            ("generated", count(&self.generated_tokens)),
        ] {
            let _ = writeln!(out, "lacuna_tokens_total{{kind=\"{kind}\"}} {n}");
        }
        out
    }
}

/// Resident bytes of this process, where the system tells.
fn resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|l| l.starts_with("VmRSS:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_add_up() {
        let m = Metrics::default();
        for ms in [0, 3, 3, 700, 400_000] {
            m.first_token(Duration::from_millis(ms));
        }
        m.request("/v1/models", 200);
        m.request("/v1/models", 200);
        let text = m.text();
        assert!(text.contains("lacuna_time_to_first_token_seconds_bucket{le=\"0.001\"} 1\n"));
        assert!(text.contains("lacuna_time_to_first_token_seconds_bucket{le=\"0.005\"} 3\n"));
        assert!(text.contains("lacuna_time_to_first_token_seconds_bucket{le=\"1\"} 4\n"));
        assert!(text.contains("lacuna_time_to_first_token_seconds_bucket{le=\"+Inf\"} 5\n"));
        assert!(text.contains("lacuna_requests_total{endpoint=\"/v1/models\",status=\"200\"} 2\n"));
        let (step, drafted) = (Step { decode_rows: 4, chosen: 5, ..Step::default() }, 7);
        m.step(step, Gauges { running: 3, drafted, ..Gauges::default() });
        assert!(m.text().contains("lacuna_draft_tokens_total{kind=\"verified\"} 7\n"));
        assert!(m.live()["tokens_per_second"].as_f64().unwrap() > 0.0 && m.live()["running"] == 3);
    }
}
