//! Drafts on tiny checkpoints: whatever is drafted, the answer is the one without a draft, token by token, alone and in
//! company, drawn and greedy, under stops and grammars, where room is short and where texts are read again.

mod common;

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use common::tokenizer;
use lacuna_base::Rng;
use lacuna_contract::{Card, Draft, Drafting, MadeRunning, MethodError, Registry, RunMethod, StepSeconds, TopK, Tree};
use lacuna_run::{
    Engine, Event, Generation, Grammar, Job, Limits, Request, RunError, RunPlan, Sampling, Scheduler, Session, Stop,
};
use serde_json::{Value, json};

const MODELS: [&str; 5] = ["llama", "gemma3", "gpt2", "llama_rope_longrope", "qwen3_moe"];

/// Knows whole texts, and says what follows, with mistakes and rivals.
struct Oracle {
    texts: Vec<Vec<u32>>,
    /// Of 100 nodes how many are wrong.
    wrong: usize,
    seed: u64,
}

struct Saying {
    texts: Vec<Vec<u32>>,
    wrong: usize,
    rng: Rng,
    seen: Vec<u32>,
    vocab: usize,
}

impl Draft for Oracle {
    fn top(&self) -> usize {
        3
    }

    fn bytes(&self, _: usize, _: usize) -> u64 {
        0
    }

    fn begin(&self, vocab: usize) -> Box<dyn Drafting> {
        let (texts, rng) = (self.texts.clone(), Rng::new(self.seed));
        Box::new(Saying { texts, wrong: self.wrong, rng, seen: Vec::new(), vocab })
    }
}

impl Drafting for Saying {
    fn observe(&mut self, committed: &[u32], top: Option<TopK<'_>>) {
        self.seen.extend(committed);
        if let Some(top) = top {
            assert!(!top.tokens.is_empty() && top.ids.len() == top.k * top.tokens.len() && top.k == 3);
        }
    }

    fn propose(&mut self, text: &[u32], most: usize) -> Tree {
        assert_eq!(self.seen, text, "it was told the whole text, once");
        let mut tree = Tree::default();
        let Some(known) = self.texts.iter().find(|t| t.starts_with(text)) else { return tree };
        let mut at = None;
        for &right in known[text.len()..].iter().take(2 + self.rng.below(9)) {
            let wrong = (right + 1 + self.rng.below(self.vocab - 1) as u32) % self.vocab as u32;
            let slip = self.rng.below(100) < self.wrong;
            if self.rng.below(2) == 0 {
                tree.push(if slip { right } else { wrong }, at);
            }
            at = Some(tree.push(if slip { wrong } else { right }, at));
        }
        tree.truncate(most);
        tree
    }
}

fn oracle() -> RunMethod {
    RunMethod {
        card: Card {
            name: "oracle",
            paper: "a test",
            arxiv: "",
            summary: "",
            system: None,
            verb: "draft",
            needs: &[],
            abilities: &[],
        },
        keys: || &["texts", "wrong"],
        make: |keys, seed| {
            let bad = |e: serde_json::Error| MethodError::new(e.to_string());
            let texts = serde_json::from_value(keys["texts"].clone()).map_err(bad)?;
            let wrong = serde_json::from_value(keys["wrong"].clone()).map_err(bad)?;
            Ok(MadeRunning::Draft(Box::new(Oracle { texts, wrong, seed })))
        },
    }
}

fn engine(name: &str) -> Engine {
    let e = common::engine(name);
    if name == "gpt2" { e } else { e.with_context(256) }
}

fn plan(method: &str, keys: Value) -> RunPlan {
    let mut registry = lacuna_methods::registry();
    registry.running.push(oracle());
    let registry: Registry = registry;
    let mut text = format!("version = 1\n[draft]\nmethod = \"{method}\"\n");
    for (key, value) in keys.as_object().into_iter().flatten() {
        text += &format!("{key} = {value}\n");
    }
    RunPlan::parse(&text, &registry).unwrap()
}

/// Rows that cost nothing beside the first.
fn free() -> StepSeconds {
    StepSeconds::new(vec![(1, 1.0), (64, 1.0)]).unwrap()
}

fn limits(batch: usize, prefill_rows: usize) -> Limits {
    Limits { batch, prefill_rows, kv_bytes: 64 << 20, reuse: true }
}

#[derive(Default, Debug, PartialEq)]
struct Answer {
    text: String,
    ids: Vec<u32>,
    stop: Option<Stop>,
    probabilities: Vec<(u32, f32)>,
}

fn drain(s: &mut Scheduler) -> BTreeMap<u64, Answer> {
    let mut answers: BTreeMap<u64, Answer> = BTreeMap::new();
    for _ in 0..20_000 {
        if s.is_idle() {
            return answers;
        }
        s.step(&mut |id, event| {
            let a = answers.entry(id).or_default();
            match event {
                Event::Text { text, tokens } => {
                    a.text += &text;
                    a.probabilities.extend(tokens.iter().filter_map(|t| Some((t.id, t.probability.as_ref()?.logprob))));
                }
                Event::Finished(f) => (a.ids, a.stop) = (f.ids, Some(f.stop)),
                other => panic!("text {id}: {other:?}"),
            }
        });
    }
    panic!("the scheduler does not come to an end: {:?}", s.gauges());
}

/// Texts that share beginnings, greedy and drawn, some with stops.
fn requests(name: &str, n: usize, seed: u64) -> Vec<Generation> {
    let mut rng = Rng::new(seed);
    let room = engine(name).context().min(160) - 60;
    let root: Vec<u32> = (0..room).map(|_| 3 + rng.below(90) as u32).collect();
    (0..n)
        .map(|i| {
            let mut prompt = root[..rng.below(room)].to_vec();
            prompt.extend((0..1 + rng.below(30)).map(|_| 3 + rng.below(90) as u32));
            let drawn = Sampling {
                temperature: 1.0,
                top_p: 0.95,
                presence_penalty: 0.3,
                seed: i as u64,
                ..Sampling::default()
            };
            let sampling = if i % 3 == 0 { drawn } else { Sampling::default() };
            let stop = if i % 4 == 1 { vec!["a".to_owned(), "7".to_owned()] } else { Vec::new() };
            let max_tokens = 1 + rng.below(40);
            Generation { prompt, max_tokens, sampling, stop, ignore_end: i % 2 == 0 }
        })
        .collect()
}

fn ask(g: &Generation) -> Request {
    let job = Job::Generate { generation: g.clone(), logprobs: Some(2), grammar: None, special: false };
    Request::new(g.prompt.clone(), job)
}

fn plain(name: &str, all: &[Generation]) -> Vec<Answer> {
    all.iter()
        .map(|g| {
            let mut s = Scheduler::new(engine(name), tokenizer(), Limits { reuse: false, ..limits(1, 512) });
            s.submit(0, ask(g)).unwrap();
            drain(&mut s).remove(&0).unwrap()
        })
        .collect()
}

/// The whole texts that plain decoding gives, and a little beyond.
fn whole(all: &[Generation], answers: &[Answer]) -> Vec<Vec<u32>> {
    let beyond = |g: &Generation, a: &Answer| [&g.prompt[..], &a.ids, &[5, 6, 7, 8]].concat();
    all.iter().zip(answers).map(|(g, a)| beyond(g, a)).collect()
}

#[test]
fn no_draft_changes_a_token() {
    for name in MODELS {
        let all = requests(name, 12, 5);
        let expected = plain(name, &all);
        let texts = json!(whole(&all, &expected));
        let oracle = |wrong: usize| plan("oracle", json!({ "texts": texts, "wrong": wrong }));
        let plans: [(&str, &dyn Fn() -> RunPlan); 5] = [
            ("an oracle", &|| oracle(0)),
            ("one that errs", &|| oracle(30)),
            ("one that is always wrong", &|| oracle(100)),
            ("token-recycling", &|| plan("token-recycling", json!({}))),
            ("copyspec", &|| plan("copyspec", json!({}))),
        ];
        for (who, made) in plans {
            for (batch, rows, blocks) in [(1, 512, 999), (8, 33, 999), (4, 16, 14)] {
                let e = engine(name).with_plan(made());
                let one = lacuna_run::BlockStore::new(&e.model().spec, e.kv_format(), usize::MAX).block_bytes();
                let mut s = Scheduler::new(e, tokenizer(), Limits { kv_bytes: blocks * one, ..limits(batch, rows) });
                s.set_prices(free());
                for round in 0..2 {
                    for (i, g) in all.iter().enumerate() {
                        s.submit(i as u64, ask(g)).unwrap();
                    }
                    let got = drain(&mut s);
                    for (i, x) in expected.iter().enumerate() {
                        assert_eq!(&got[&(i as u64)], x, "{name}, {who}: text {i} of {batch} x {rows}, round {round}");
                    }
                    let g = s.gauges();
                    assert_eq!((g.running, g.waiting, g.blocks.used, g.blocks.shared), (0, 0, 0, 0));
                    assert_eq!(g.blocks.free + g.blocks.cached, g.blocks.total);
                }
                let g = s.gauges();
                match who {
                    "an oracle" => assert!(g.accepted > 100 && g.accepted <= g.drafted, "{name}: {g:?}"),
                    "one that is always wrong" => assert!(g.drafted > 0 && g.accepted < g.drafted / 4, "{name}: {g:?}"),
                    _ => {}
                }
            }
            let mut session = Session::new(engine(name).with_plan(made()), tokenizer());
            session.set_prices(free());
            for (g, x) in all.iter().zip(&expected) {
                let out = session.generate(g, &mut |_| ControlFlow::Continue(())).unwrap();
                assert_eq!((&out.tokens, &out.text), (&x.ids, &x.text), "{name}, {who}: a session");
                assert!(out.stats.accepted_tokens <= out.stats.drafted_tokens);
            }
        }
    }
}

/// Odd and even ids in turn, seven tokens in all.
#[derive(Default)]
struct Turns {
    taken: usize,
    bits: Vec<u32>,
}

impl Grammar for Turns {
    fn allowed(&mut self) -> Result<&[u32], RunError> {
        self.bits = vec![if self.taken.is_multiple_of(2) { 0xAAAA_AAA8 } else { 0x5555_5550 }; 3];
        Ok(&self.bits)
    }

    fn accept(&mut self, token: u32) -> Result<bool, RunError> {
        assert_eq!(token % 2, (self.taken as u32 + 1) % 2, "what is accepted was allowed");
        self.taken += 1;
        Ok(self.taken == 7)
    }
}

#[test]
fn grammars_hold_under_drafts() {
    let generation = Generation { prompt: (3..40).collect(), max_tokens: 30, ..Generation::default() };
    let mut answers = Vec::new();
    for drafting in [false, true] {
        let mut e = engine("llama");
        if drafting {
            let texts: Vec<Vec<u32>> =
                answers.iter().map(|a: &Answer| [&generation.prompt[..], &a.ids].concat()).collect();
            e = e.with_plan(plan("oracle", json!({ "texts": texts, "wrong": 20 })));
        }
        let mut s = Scheduler::new(e, tokenizer(), limits(1, 512));
        s.set_prices(free());
        let grammar: Option<Box<dyn Grammar>> = Some(Box::new(Turns::default()));
        let job = Job::Generate { generation: generation.clone(), logprobs: None, grammar, special: false };
        s.submit(0, Request::new(generation.prompt.clone(), job)).unwrap();
        answers.push(drain(&mut s).remove(&0).unwrap());
        assert_eq!(s.gauges().accepted > 0, drafting);
    }
    assert_eq!(answers[0], answers[1]);
    assert_eq!((answers[0].ids.len(), &answers[0].stop), (7, &Some(Stop::Grammar)));
}

/// Where rows are dear nothing is verified, whatever is drafted; and prices are taken from the model itself where nobody
/// says them.
#[test]
fn what_does_not_pay_is_not_verified() {
    let g = Generation { prompt: (3..60).collect(), max_tokens: 60, ignore_end: true, ..Generation::default() };
    let expected = plain("llama", std::slice::from_ref(&g));
    let texts = json!(whole(std::slice::from_ref(&g), &expected));
    let mut s = Scheduler::new(
        engine("llama").with_plan(plan("oracle", json!({ "texts": texts, "wrong": 0 }))),
        tokenizer(),
        limits(1, 512),
    );
    s.set_prices(StepSeconds::new(vec![(1, 1.0), (2, 9.0)]).unwrap());
    s.submit(0, ask(&g)).unwrap();
    assert_eq!(drain(&mut s)[&0], expected[0]);
    assert_eq!(s.gauges().drafted, 0);
    assert!(s.gauges().draft_cost <= 1.03, "{:?}", s.gauges());
    let timed = engine("llama").with_plan(plan("oracle", json!({ "texts": texts, "wrong": 0 })));
    let out = Session::new(timed, tokenizer()).generate(&g, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(out.tokens, expected[0].ids);
}

/// A refused token cannot be taken back from a state.
#[test]
fn networks_with_a_state_refuse_drafts() {
    for (name, layer) in [("lfm2", 0), ("qwen3_5", 0), ("mamba2", 0)] {
        let e = engine(name).with_plan(plan("oracle", json!({ "texts": [[3, 4]], "wrong": 0 })));
        let said = e.check_plan().unwrap_err().to_string();
        assert!(said.contains("draft") && said.contains(&format!("layer {layer}")), "{said}");
        let mut s = Scheduler::new(e, tokenizer(), limits(1, 512));
        let g = Generation { prompt: vec![5], ..Generation::default() };
        assert!(s.submit(0, ask(&g)).is_err());
    }
}

#[test]
fn flags_take_the_place_of_what_a_file_says_and_say_what_is_wrong() {
    let registry = lacuna_methods::registry();
    let file = "version = 1\nseed = 3\n[draft]\nmethod = \"copyspec\"\ngamma = 4\n";
    let mut plan = RunPlan::parse(file, &registry).unwrap();
    assert_eq!(
        (plan.names(), plan.is_lossless(), plan.hash()),
        (vec![["draft", "copyspec", "gamma=4"].map(String::from)], true, 0)
    );
    plan.flag("draft", "token-recycling:k=4", &registry).unwrap();
    plan.flag("keep", "h2o:budget=64", &registry).unwrap();
    assert_eq!(plan.names(), [["draft", "token-recycling", "k=4"], ["keep", "h2o", "budget=64"]]);
    assert!(!plan.is_lossless() && plan.hash() != 0);
    plan.flag("draft", "none", &registry).unwrap();
    assert_eq!(plan.names(), [["keep", "h2o", "budget=64"]]);
    let mut refused = |said: &str| plan.flag("draft", said, &registry).unwrap_err().what;
    assert!(refused("copyspec:gamma").contains("'gamma' is not KEY=VALUE"));
    assert!(refused("copyspec:gamma=3,gamma=4").contains("gamma is given twice"));
    assert!(refused("copyspec:gama=3").contains("did you mean 'gamma'"));
    assert!(refused("nothing").contains("no method 'nothing'"));
    for wrong in ["version = 2", "[gates]\nmethod = \"wina\"", "[draft]\ngamma = 3", "seed = -1", "x = ["] {
        assert!(RunPlan::parse(wrong, &registry).is_err(), "{wrong}");
    }
}
