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

/// With recurrent mixers: convolutions, the delta rule, Mamba-2 alone, beside and side by side with attention, Mamba.
const RECURRENT: [&str; 7] = ["lfm2", "qwen3_5", "qwen3_next", "mamba2", "bamba", "falcon_h1", "jamba"];

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
        defaults: |_| serde_json::Map::new(),
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
    for name in MODELS.into_iter().chain(RECURRENT) {
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
                let store = lacuna_run::BlockStore::new(&e.model().spec, e.kv_format(), usize::MAX);
                // States of texts, of a draft, and of some snapshots.
                let kv_bytes = (blocks + (batch + 3) * store.state_blocks()) * store.unit_bytes();
                let mut s = Scheduler::new(e, tokenizer(), Limits { kv_bytes, ..limits(batch, rows) });
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
                    // Of a tree beside the wrong path a right token may stand, which a chain begins with.
                    "one that is always wrong" => {
                        let most = if RECURRENT.contains(&name) { g.drafted / 2 } else { g.drafted / 4 };
                        assert!(g.drafted > 0 && g.accepted < most, "{name}: {g:?}");
                    }
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

/// What is left of a state behind a draft is that of plain reading, bit by bit: a text goes on from it, and snapshots lie
/// where they lie without drafts.
#[test]
fn a_state_behind_a_draft_is_the_state() {
    for name in RECURRENT {
        let long = |e: Engine| e.with_context(2048);
        let start: Vec<u32> = (0..490).map(|i| 3 + (i * i * 7 + i * 5 + i / 90) % 90).collect();
        let g = Generation { prompt: start, max_tokens: 50, ignore_end: true, ..Generation::default() };
        let roomy = Limits { kv_bytes: 256 << 20, ..limits(2, 512) };
        let mut fresh = Scheduler::new(long(engine(name)), tokenizer(), Limits { reuse: false, ..roomy });
        fresh.submit(0, ask(&g)).unwrap();
        let said = drain(&mut fresh).remove(&0).unwrap();
        let whole = [&g.prompt[..], &said.ids].concat();
        for wrong in [0, 25, 60] {
            let beyond = vec![[&whole[..], &[5, 6, 7]].concat()];
            let drafting = plan("oracle", json!({ "texts": beyond, "wrong": wrong }));
            let mut s = Scheduler::new(long(engine(name)).with_plan(drafting), tokenizer(), roomy);
            s.set_prices(free());
            s.submit(0, ask(&g)).unwrap();
            assert_eq!(drain(&mut s).remove(&0).unwrap(), said, "{name}: {wrong} of 100 wrong");
            let gauges = s.gauges();
            assert!(gauges.accepted > 0 && (wrong == 0 || gauges.accepted < gauges.drafted), "{name}: {gauges:?}");
            // From the snapshot at 512, and from the end of the answer, or where its last draft began.
            for (common, least) in [(520, 512), (whole.len(), whole.len() - 12)] {
                let next = [&whole[..common], &[9, 8, 7]].concat();
                let (got, reused) = common::after(&mut s, &next).unwrap();
                assert!(reused >= least, "{name}, {wrong}: {reused} of {common}");
                assert_eq!(got, common::after(&mut fresh, &next).unwrap().0, "{name}: {wrong} of 100 wrong, {common}");
            }
            let blocks = s.gauges().blocks;
            assert_eq!((blocks.used, blocks.free + blocks.cached), (0, blocks.total), "{name}");
        }
        // Without room for a second state nothing is drafted, and nothing fails.
        let e = engine(name).with_plan(plan("oracle", json!({ "texts": [whole], "wrong": 0 })));
        let store = lacuna_run::BlockStore::new(&e.model().spec, e.kv_format(), usize::MAX);
        let kv_bytes = (8 + store.state_blocks()) * store.unit_bytes();
        let short = Generation { prompt: g.prompt[..20].to_vec(), max_tokens: 9, ..g.clone() };
        let mut s = Scheduler::new(e, tokenizer(), Limits { kv_bytes, ..limits(1, 512) });
        s.set_prices(free());
        s.submit(0, ask(&short)).unwrap();
        assert_eq!(drain(&mut s).remove(&0).unwrap(), plain(name, std::slice::from_ref(&short))[0], "{name}");
    }
}

/// What is computed once more has its price: with it a draft that is mostly refused is not verified.
#[test]
fn the_price_of_a_state_is_counted() {
    let g = Generation { prompt: (3..60).collect(), max_tokens: 80, ignore_end: true, ..Generation::default() };
    let expected = plain("mamba2", std::slice::from_ref(&g));
    let texts = json!(whole(std::slice::from_ref(&g), &expected));
    let run = |prices: Option<StepSeconds>| {
        let e = engine("mamba2").with_plan(plan("oracle", json!({ "texts": texts, "wrong": 10 })));
        let mut s = Scheduler::new(e, tokenizer(), limits(1, 512));
        prices.into_iter().for_each(|p| s.set_prices(p));
        s.submit(0, ask(&g)).unwrap();
        assert_eq!(drain(&mut s)[&0], expected[0]);
        let gauges = s.gauges();
        assert!(gauges.draft_cost <= 1.03, "{gauges:?}");
        gauges.drafted
    };
    let rows = || StepSeconds::new(vec![(1, 1.0), (64, 1.5)]).unwrap();
    assert!(run(Some(rows())) > 0);
    assert_eq!(run(Some(rows().with_state(9.0))), 0, "a copy that takes nine steps");
    // Timed on the model itself.
    run(None);
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
    assert_eq!(plan.words(), ["draft copyspec (gamma 4; by default block 10, latest false): lossless"]);
    plan.flag("draft", "token-recycling:k=4", &registry).unwrap();
    plan.flag("keep", "h2o:budget=64", &registry).unwrap();
    assert_eq!(plan.names(), [["draft", "token-recycling", "k=4"], ["keep", "h2o", "budget=64"]]);
    assert!(!plan.is_lossless() && plan.hash() != 0);
    plan.flag("draft", "none", &registry).unwrap();
    assert_eq!(plan.names(), [["keep", "h2o", "budget=64"]]);
    let words = |question: &str, said: &str| {
        let mut plan = RunPlan::none();
        plan.flag(question, said, &registry).unwrap();
        plan.words().remove(0)
    };
    assert_eq!(words("gate", "wina"), "gate wina (by default keep 0.5): an approximation");
    assert_eq!(words("gate", "wina:threshold=0.1"), "gate wina (threshold 0.1): an approximation");
    let told = words("select", "pooled-blocks");
    assert!(told.contains("by default") && told.contains("pool bounds, scope row"), "{told}");
    let mut refused = |said: &str| plan.flag("draft", said, &registry).unwrap_err().what;
    assert!(refused("copyspec:gamma").contains("'gamma' is not KEY=VALUE"));
    assert!(refused("copyspec:gamma=3,gamma=4").contains("gamma is given twice"));
    assert!(refused("copyspec:gama=3").contains("did you mean 'gamma'"));
    assert!(refused("nothing").contains("no method 'nothing'"));
    for wrong in ["version = 2", "[gates]\nmethod = \"wina\"", "[draft]\ngamma = 3", "seed = -1", "x = ["] {
        assert!(RunPlan::parse(wrong, &registry).is_err(), "{wrong}");
    }
}
