//! The run plan: what is drafted, and what is left out, while a model runs.

use std::sync::Arc;

use lacuna_contract::{Draft, Gate, Keep, MadeRunning, MethodError, Registry, Selector};
use serde_json::{Map, Value, json};

use crate::blocks::keep::slots;

/// One method of a run plan, with all that was said of it.
struct Entry {
    question: &'static str,
    method: &'static str,
    paper: &'static str,
    keys: Map<String, Value>,
    /// What the other parameters are.
    others: Map<String, Value>,
    made: MadeRunning,
}

/// What is drafted, and what is left out, while a model runs: at most one method of each question. Drafts never change
/// a token; everything else does, so that texts under different plans share no keys and values.
#[derive(Default)]
pub struct RunPlan {
    entries: Vec<Entry>,
    seed: u64,
}

/// The questions of run time, in the order in which plans list them.
pub const QUESTIONS: [&str; 4] = ["draft", "keep", "select", "gate"];

impl RunPlan {
    /// Nothing drafted, nothing left out.
    pub fn none() -> RunPlan {
        RunPlan::default()
    }

    /// Reads a plan: TOML of `version = 1`, a `seed` (0 where none is given) and a table for each question, in which
    /// `method` names one and the other keys are its parameters:
    ///
    /// ```toml
    /// version = 1
    /// [draft]
    /// method = "copyspec"
    /// ```
    pub fn parse(text: &str, registry: &Registry) -> Result<RunPlan, MethodError> {
        let table: toml::Table = text.parse().map_err(|e: toml::de::Error| {
            let line = e.span().map_or(1, |span| 1 + text.bytes().take(span.start).filter(|b| *b == b'\n').count());
            MethodError::new(format!("line {line}: {}", e.message()))
        })?;
        let mut plan = RunPlan::none();
        let mut found = Vec::new();
        for (key, value) in table {
            let value = serde_json::to_value(value).map_err(|e| MethodError::new(format!("{key}: {e}")))?;
            match (key.as_str(), value) {
                ("version", Value::Number(n)) if n.as_u64() == Some(1) => {}
                ("version", other) => return Err(MethodError::new(format!("version {other}: this reads version 1"))),
                ("seed", other) => {
                    let bad = || MethodError::new(format!("seed {other}: a number of 0 or more"));
                    plan.seed = other.as_u64().ok_or_else(bad)?;
                }
                (question, Value::Object(keys)) => found.push((question.to_owned(), keys)),
                (other, _) => return Err(unknown(other)),
            }
        }
        for (question, mut keys) in found {
            let method = match keys.remove("method") {
                Some(Value::String(method)) => method,
                _ => return Err(MethodError::new(format!("[{question}]: write method = \"NAME\""))),
            };
            plan.add(&question, &method, keys, registry)?;
        }
        Ok(plan)
    }

    /// Puts in what a short flag says, in the place of what the plan said of that question: `NAME`,
    /// `NAME:KEY=VALUE,KEY=VALUE`, or `none`.
    pub fn flag(&mut self, question: &str, said: &str, registry: &Registry) -> Result<(), MethodError> {
        let (method, rest) = said.split_once(':').unwrap_or((said, ""));
        self.entries.retain(|e| e.question != question);
        if method == "none" && rest.is_empty() {
            return Ok(());
        }
        let mut keys = Map::new();
        for pair in rest.split(',').filter(|p| !p.trim().is_empty()) {
            let bad = || MethodError::new(format!("'{pair}' is not KEY=VALUE"));
            let (key, value) = pair.split_once('=').ok_or_else(bad)?;
            let value = value.trim();
            // Numbers and booleans as they are, everything else a word.
            let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
            if keys.insert(key.trim().to_owned(), value).is_some() {
                return Err(MethodError::new(format!("{} is given twice", key.trim())));
            }
        }
        self.add(question, method, keys, registry)
    }

    fn add(
        &mut self,
        question: &str,
        method: &str,
        keys: Map<String, Value>,
        registry: &Registry,
    ) -> Result<(), MethodError> {
        let question = *QUESTIONS.iter().find(|q| **q == question).ok_or_else(|| unknown(question))?;
        let of_question = || registry.running.iter().filter(|m| m.card.verb == question);
        let Some(row) = of_question().find(|m| m.card.name == method) else {
            let names: Vec<&str> = of_question().map(|m| m.card.name).collect();
            return Err(MethodError::new(format!(
                "{question}: there is no method '{method}'; there are none, {}",
                names.join(", ")
            )));
        };
        let made = (row.make)(Value::Object(keys.clone()), self.seed)?;
        let others = (row.defaults)(&keys);
        self.entries.push(Entry { question, method: row.card.name, paper: row.card.paper, keys, others, made });
        self.entries.sort_by_key(|e| QUESTIONS.iter().position(|q| *q == e.question));
        Ok(())
    }

    /// Whether nothing is drafted and nothing left out.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether every token is the one that the model would choose without the plan.
    pub fn is_lossless(&self) -> bool {
        self.entries.iter().all(|e| e.question == "draft")
    }

    /// What drafts.
    pub fn draft(&self) -> Option<&dyn Draft> {
        self.entries.iter().find_map(|e| if let MadeRunning::Draft(d) = &e.made { Some(d.as_ref()) } else { None })
    }

    /// What decides which cached entries stay.
    pub fn keep(&self) -> Option<&dyn Keep> {
        self.entries.iter().find_map(|e| if let MadeRunning::Keep(k) = &e.made { Some(k.as_ref()) } else { None })
    }

    /// What decides which keys queries read.
    pub fn select(&self) -> Option<&Selector> {
        self.entries.iter().find_map(|e| if let MadeRunning::Select(s) = &e.made { Some(s) } else { None })
    }

    /// What decides which channels a row needs; the model is loaded with it ([`lacuna_model::LoadOptions::gate`]).
    pub fn gate(&self) -> Option<&Arc<dyn Gate>> {
        self.entries.iter().find_map(|e| if let MadeRunning::Gate(g) = &e.made { Some(g) } else { None })
    }

    /// Cached entries that a text of `tokens` tokens holds at once in each head, at most; a keeper holds them down.
    pub fn slots(&self, tokens: usize) -> usize {
        slots(self.keep().map(|keep| keep.plan()), tokens)
    }

    /// Question, method and keys (`budget=1024,sinks=4`) of each part.
    pub fn names(&self) -> Vec<[String; 3]> {
        let keys = |e: &Entry| e.keys.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(",");
        self.entries.iter().map(|e| [e.question.to_owned(), e.method.to_owned(), keys(e)]).collect()
    }

    /// A line for each method, for people: `draft copyspec (gamma 5; by default block 10, latest false): lossless`.
    pub fn words(&self) -> Vec<String> {
        let list = |keys: &Map<String, Value>| {
            keys.iter()
                .map(|(k, v)| format!("{k} {}", v.as_str().map_or_else(|| v.to_string(), str::to_owned)))
                .collect::<Vec<_>>()
                .join(", ")
        };
        let line = |e: &Entry| {
            let keys = match (e.keys.is_empty(), e.others.is_empty()) {
                (true, true) => String::new(),
                (true, false) => format!(" (by default {})", list(&e.others)),
                (false, true) => format!(" ({})", list(&e.keys)),
                (false, false) => format!(" ({}; by default {})", list(&e.keys), list(&e.others)),
            };
            let costs = if e.question == "draft" { "lossless" } else { "an approximation" };
            format!("{} {}{keys}: {costs}", e.question, e.method)
        };
        self.entries.iter().map(line).collect()
    }

    /// The same for programs; null where there is nothing.
    pub fn to_json(&self) -> Value {
        if self.is_empty() {
            return Value::Null;
        }
        let entry = |e: &Entry| {
            let lossless = e.question == "draft";
            json!({
                "question": e.question, "method": e.method, "paper": e.paper, "keys": e.keys, "defaults": e.others,
                "lossless": lossless,
            })
        };
        json!({
            "hash": (!self.is_lossless()).then(|| format!("{:016x}", self.hash())),
            "lossless": self.is_lossless(),
            "seed": self.seed,
            "methods": self.entries.iter().map(entry).collect::<Vec<_>>(),
        })
    }

    /// What texts must have in common to share keys and values: 0 where the plan changes no token, else a hash (FNV-1a)
    /// of all that is left out and how.
    pub fn hash(&self) -> u64 {
        if self.is_lossless() {
            return 0;
        }
        let lossy = self.entries.iter().filter(|e| e.question != "draft");
        let said: Vec<Value> = lossy.map(|e| json!([e.question, e.method, e.keys, self.seed])).collect();
        let fold = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3);
        json!(said).to_string().bytes().fold(0xcbf2_9ce4_8422_2325, fold)
    }
}

impl std::fmt::Debug for RunPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.words()).finish()
    }
}

fn unknown(question: &str) -> MethodError {
    MethodError::new(format!("a run plan has no '{question}'; there are version, seed, {}", QUESTIONS.join(", ")))
}
