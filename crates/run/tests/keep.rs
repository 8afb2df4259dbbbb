//! Keepers on tiny checkpoints: what they keep is what their definition says, with the same answer alone and in
//! company, in any chunks, where texts share beginnings, where room is short and under drafts; and evicted entries take
//! no memory.

mod common;
#[path = "common/masked.rs"]
mod masked;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use common::{after, tokenizer};
use lacuna_base::Rng;
use lacuna_contract::{Keep, KeepHead, KeepPlan, MadeRunning, MethodError, StepSeconds};
use lacuna_kernels::KvFormat;
use lacuna_model::{Batch, ContiguousKv, Decoder, LoadOptions, NoTap};
use lacuna_run::{
    BlockStore, Engine, Event, Generation, Job, Limits, Pooling, Request, RunError, RunPlan, Sampling, Scheduler,
    Session, Stop,
};
use masked::{By, Masked, Rule};

const MODELS: [&str; 5] = ["llama", "gemma3", "gpt2", "llama_rope_longrope", "qwen3_moe"];
const KEEPERS: [&str; 4] = [
    "streaming-llm:budget=24,sinks=2,every=8",
    "streaming-llm:budget=70,sinks=3,every=20",
    "h2o:budget=24,every=8",
    "h2o:budget=66,every=7,recent=0.3",
];

fn plan(flags: &[(&str, &str)]) -> RunPlan {
    let mut plan = RunPlan::none();
    for (question, said) in flags {
        plan.flag(question, said, &lacuna_methods::registry()).unwrap();
    }
    plan
}

fn engine(name: &str, flags: &[(&str, &str)]) -> Engine {
    let e = common::engine(name).with_plan(plan(flags));
    if name == "gpt2" { e } else { e.with_context(256) }
}

/// A scheduler with room for `blocks` blocks, in which rows cost nothing beside the first.
fn scheduler(e: Engine, batch: usize, prefill_rows: usize, blocks: usize, reuse: bool) -> Scheduler {
    let one = BlockStore::new(&e.model().spec, e.kv_format(), usize::MAX).block_bytes();
    let mut s = Scheduler::new(e, tokenizer(), Limits { batch, prefill_rows, kv_bytes: blocks * one, reuse });
    s.set_prices(StepSeconds::new(vec![(1, 1.0), (64, 1.0)]).unwrap());
    s
}

#[derive(Default, Debug, PartialEq)]
struct Answer {
    ids: Vec<u32>,
    stop: Option<Stop>,
    probabilities: Vec<(u32, f32)>,
}

/// All answers, and the most blocks that were in use after a step.
fn drain(s: &mut Scheduler) -> (BTreeMap<u64, Answer>, usize) {
    let (mut answers, mut used): (BTreeMap<u64, Answer>, usize) = Default::default();
    for _ in 0..20_000 {
        if s.is_idle() {
            return (answers, used);
        }
        s.step(&mut |id, event| {
            let a = answers.entry(id).or_default();
            match event {
                Event::Text { tokens, .. } => {
                    a.probabilities.extend(tokens.iter().filter_map(|t| Some((t.id, t.probability.as_ref()?.logprob))));
                }
                Event::Finished(f) => (a.ids, a.stop) = (f.ids, Some(f.stop)),
                other => panic!("text {id}: {other:?}"),
            }
        });
        used = used.max(s.gauges().blocks.used);
    }
    panic!("the scheduler does not come to an end: {:?}", s.gauges());
}

/// Texts that share beginnings, greedy and drawn.
fn requests(name: &str, n: usize, seed: u64) -> Vec<Generation> {
    let mut rng = Rng::new(seed);
    let room = engine(name, &[]).context().min(200) - 60;
    let root: Vec<u32> = (0..room).map(|_| 3 + rng.below(90) as u32).collect();
    (0..n)
        .map(|i| {
            let mut prompt = root[..rng.below(room)].to_vec();
            prompt.extend((0..1 + rng.below(20)).map(|_| 3 + rng.below(90) as u32));
            let drawn = Sampling { temperature: 1.0, top_p: 0.95, seed: i as u64, ..Sampling::default() };
            let sampling = if i % 3 == 0 { drawn } else { Sampling::default() };
            let max_tokens = 1 + rng.below(60);
            Generation { prompt, max_tokens, sampling, ignore_end: true, ..Generation::default() }
        })
        .collect()
}

fn ask(g: &Generation) -> Request {
    let job = Job::Generate { generation: g.clone(), logprobs: Some(2), grammar: None, special: false };
    Request::new(g.prompt.clone(), job)
}

fn alone(name: &str, flags: &[(&str, &str)], all: &[Generation]) -> Vec<Answer> {
    let one = |g: &Generation| {
        let mut s = scheduler(engine(name, flags), 1, 512, 99, false);
        s.submit(0, ask(g)).unwrap();
        drain(&mut s).0.remove(&0).unwrap()
    };
    all.iter().map(one).collect()
}

#[test]
fn a_budget_that_nothing_exceeds_changes_no_bit() {
    for name in MODELS {
        let all = requests(name, 6, 1);
        let dense = alone(name, &[], &all);
        for keeper in ["streaming-llm:budget=260", "h2o:budget=260", "h2o:budget=256,every=1"] {
            assert_eq!(alone(name, &[("keep", keeper)], &all), dense, "{name} {keeper}");
        }
        // And one that texts do exceed is an approximation.
        assert_ne!(alone(name, &[("keep", KEEPERS[0])], &all), dense, "{name}");
    }
}

#[test]
fn no_answer_depends_on_company() {
    for name in MODELS {
        let all = requests(name, 9, 2);
        let mut preempted = 0;
        for keeper in KEEPERS {
            let expected = alone(name, &[("keep", keeper)], &all);
            let (mut accepted, mut reused) = (0, false);
            for draft in ["none", "copyspec", "token-recycling"] {
                for (batch, rows, blocks, reuse) in [(1, 7, 99, true), (8, 33, 999, true), (4, 16, 5, true)] {
                    let flags = [("keep", keeper), ("draft", draft)];
                    let mut s = scheduler(engine(name, &flags), batch, rows, blocks, reuse);
                    for round in 0..2 {
                        for (i, g) in all.iter().enumerate() {
                            s.submit(i as u64, ask(g)).unwrap();
                        }
                        let (got, _) = drain(&mut s);
                        for (i, x) in expected.iter().enumerate() {
                            let what = format!("{name}, {keeper}, {draft}: text {i} of {batch} x {rows}, {round}");
                            assert_eq!(&got[&(i as u64)], x, "{what}");
                        }
                        let b = s.gauges().blocks;
                        assert_eq!((b.used, b.shared, b.free + b.cached), (0, 0, b.total));
                        reused |= b.cached > 0;
                    }
                    preempted += s.gauges().preempted;
                    accepted += s.gauges().accepted;
                }
            }
            // What is tested does happen; where attention is read, nothing is shared.
            assert_eq!(reused, keeper.starts_with("streaming"), "{name}, {keeper}");
            assert!(accepted > 0, "{name}, {keeper}");
        }
        assert!(preempted > 0, "{name}: {preempted}");
    }
}

#[test]
fn queries_see_exactly_what_was_kept() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny");
    for name in ["llama", "gemma3", "gpt2"] {
        let checkpoint = lacuna_checkpoint::open(root.join(name)).unwrap();
        let context = engine(name, &[]).context();
        let mut rng = Rng::new(7);
        let text: Vec<u32> = (0..context - 1).map(|_| 3 + rng.below(90) as u32).collect();
        let rules = [By::Sinks(2), By::Sinks(3), By::Mass { newest: 12 }, By::Mass { newest: 20 }];
        for (keeper, (by, (budget, every))) in
            KEEPERS.into_iter().zip(rules.into_iter().zip([(24, 8), (70, 20), (24, 8), (66, 7)]))
        {
            let by_rule = Masked(Rule { budget, every, by });
            let d = Decoder::load_on(&by_rule, &checkpoint, &LoadOptions::default()).unwrap();
            let mut kv = ContiguousKv::on(&by_rule, &d.spec, 1, KvFormat::F32);
            let hidden = d.forward(&text, &Batch::one(0, 0..text.len()), &mut kv, &mut NoTap).unwrap();
            let logits = d.head.project(&d.head.normed(&hidden));
            let mut s = scheduler(engine(name, &[("keep", keeper)]), 1, 13, 9, true);
            for n in [20, 25, 33, 56, 57, 64, 81, 97, text.len()].into_iter().filter(|n| *n <= text.len()) {
                let row = logits.row(n - 1);
                let all: f64 = row.iter().map(|x| x.exp()).sum();
                let (got, _) = after(&mut s, &text[..n]).unwrap();
                for (id, logprob) in got {
                    let want = row[id as usize] - all.ln();
                    assert!((f64::from(logprob) - want).abs() < 1e-4, "{name}, {keeper}, {n}: {logprob} {want}");
                }
            }
        }
    }
}

/// A text of 600 tokens in blocks for 80 slots and one to move them.
#[test]
fn evicted_entries_take_no_memory() {
    for (name, keeper) in [
        ("llama", "streaming-llm:budget=64,every=16"),
        ("gemma3", "h2o:budget=64,every=16"),
        ("llama", "h2o:budget=50,every=30"),
    ] {
        let engine = || common::engine(name).with_plan(plan(&[("keep", keeper)])).with_context(700);
        let mut rng = Rng::new(4);
        let prompt: Vec<u32> = (0..600).map(|_| 3 + rng.below(90) as u32).collect();
        let g = Generation { prompt, max_tokens: 200, ignore_end: true, ..Generation::default() };
        let mut s = scheduler(engine(), 1, 512, 4, true);
        assert_eq!(s.most_tokens(), 700);
        for round in 0..2 {
            s.submit(0, ask(&g)).unwrap();
            let (mut got, used) = drain(&mut s);
            let a = got.remove(&0).unwrap();
            assert_eq!((a.stop, a.ids.len()), (Some(Stop::Context), 100), "{name}, {keeper}, {round}");
            // 80 slots are 3 blocks.
            assert_eq!(used, 3, "{name}, {keeper}");
            assert_eq!(s.gauges().blocks.used, 0);
        }
        // A session makes room for itself, of no more than that.
        let mut session = Session::new(engine(), tokenizer());
        let out = session.generate(&g, &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(out.stats.tokens, 100);
        let block = BlockStore::new(&engine().model().spec, KvFormat::F32, 0).block_bytes();
        assert!(session.kv_bytes() <= 4 * block, "{} blocks", session.kv_bytes() / block);
        // With a block less, a text may be as long as it is before the first decision.
        let least = scheduler(engine(), 1, 512, 3, true).most_tokens();
        assert_eq!(least, if keeper.contains("50") { 60 } else { 80 });
        let mut s = scheduler(engine(), 1, 512, 3, true);
        s.submit(0, ask(&Generation { prompt: g.prompt[..40].to_vec(), ..g.clone() })).unwrap();
        assert_eq!(drain(&mut s).0[&0].ids.len(), least - 40);
        let said = s.submit(1, ask(&g)).unwrap_err();
        assert!(matches!(said, RunError::Context { tokens: 600, .. }), "{said}");
    }
}

/// Blocks before the first decision are shared; at it each text gets pages of its own, and leaves the shared ones as
/// they were.
#[test]
fn shared_beginnings_are_left_as_they_were() {
    let e = engine("llama", &[("keep", "streaming-llm:budget=64,sinks=4,every=16")]);
    let mut s = scheduler(e, 4, 512, 40, true);
    let root: Vec<u32> = (0..70).map(|i| 3 + i * 7 % 90).collect();
    let g = |i: u32| Generation {
        prompt: [&root[..], &[5 + i]].concat(),
        max_tokens: 60,
        ignore_end: true,
        ..Generation::default()
    };
    let first = {
        s.submit(0, ask(&g(0))).unwrap();
        drain(&mut s).0.remove(&0).unwrap()
    };
    // Its tail is gone with the cut; its whole blocks are there.
    assert_eq!((s.gauges().blocks.cached, s.gauges().blocks.used), (2, 0));
    (0..4).for_each(|i| s.submit(u64::from(i), ask(&g(i))).unwrap());
    s.step(&mut |_, _| {});
    assert_eq!(s.gauges().blocks.shared, 2);
    let mut most = 0;
    for _ in 0..20 {
        s.step(&mut |_, _| {});
        let b = s.gauges().blocks;
        most = most.max(b.used);
    }
    // Behind the decision nobody uses them, and each of the four has 3 blocks at most.
    let b = s.gauges().blocks;
    assert_eq!((b.shared, b.cached), (0, 2));
    assert!(b.used <= 12 && most <= 12, "{b:?} {most}");
    drain(&mut s);
    s.submit(7, ask(&g(0))).unwrap();
    assert_eq!(drain(&mut s).0[&7], first);
    assert_eq!(s.gauges().blocks.used, 0);
}

/// Vectors of whole texts, by the last row and by all.
#[test]
fn embeddings_are_under_the_plan_too() {
    let text: Vec<u32> = (0..150).map(|i| 3 + i * 11 % 90).collect();
    for pooling in [Pooling::Last, Pooling::Mean] {
        let vector = |flags: &[(&str, &str)], rows: usize| {
            let mut s = scheduler(engine("llama", flags), 1, rows, 20, true);
            s.submit(0, Request::new(text.clone(), Job::Embed(pooling))).unwrap();
            let mut out = None;
            while !s.is_idle() {
                s.step(&mut |_, event| match event {
                    Event::Embedding { vector, .. } => out = Some(vector),
                    other => panic!("{other:?}"),
                });
            }
            assert_eq!(s.gauges().blocks.used, 0);
            out.unwrap()
        };
        for keeper in KEEPERS {
            let flags = [("keep", keeper)];
            assert_eq!(vector(&flags, 512), vector(&flags, 5));
            assert_ne!(vector(&flags, 512), vector(&[], 512), "{keeper}");
        }
    }
}

/// Keeps a slot more than it may, in one head.
struct Greedy;

impl Keep for Greedy {
    fn plan(&self) -> KeepPlan {
        KeepPlan { mass: false, every: 8, budget: 20 }
    }

    fn keep(&self, heads: &[KeepHead<'_>], budget: usize) -> Result<Vec<Vec<usize>>, MethodError> {
        assert!(heads.iter().all(|h| h.positions.len() == 24 && h.mass.is_empty()));
        Ok((0..heads.len()).map(|i| (0..budget + usize::from(i == 1)).collect()).collect())
    }
}

#[test]
fn a_keeper_that_errs_ends_its_text_alone() {
    let mut registry = lacuna_methods::registry();
    let mut method = registry.running.iter().find(|m| m.card.name == "streaming-llm").unwrap().clone();
    method.card.name = "greedy";
    method.make = |_, _| Ok(MadeRunning::Keep(Box::new(Greedy)));
    registry.running.push(method);
    let mut plan = RunPlan::none();
    plan.flag("keep", "greedy", &registry).unwrap();
    let mut s = scheduler(common::engine("llama").with_plan(plan), 2, 512, 20, true);
    let g = |n: u32| Generation { prompt: (3..n).collect(), max_tokens: 10, ignore_end: true, ..Generation::default() };
    s.submit(0, ask(&g(40))).unwrap();
    s.submit(1, ask(&g(10))).unwrap();
    let mut told = BTreeMap::new();
    while !s.is_idle() {
        s.step(&mut |id, event| match event {
            Event::Failed(e) => drop(told.insert(id, e.to_string())),
            Event::Finished(f) => drop(told.insert(id, f.tokens.to_string())),
            _ => {}
        });
    }
    assert!(told[&0].contains("21 slots of layer 0, head 1"), "{told:?}");
    assert_eq!((told[&1].as_str(), s.gauges().blocks.used), ("10", 0));
}

#[test]
fn what_does_not_fit_the_model_is_refused_with_its_numbers() {
    let e = engine("gemma3", &[("keep", "h2o:budget=9")]);
    let said = e.check_plan().unwrap_err().to_string();
    for word in ["layer 0", "window of 10", "budget of 9"] {
        assert!(said.contains(word), "{said}");
    }
    let mut s = scheduler(e, 1, 512, 9, true);
    assert_eq!(s.submit(0, ask(&requests("gemma3", 1, 1)[0])).unwrap_err().to_string(), said);
    assert!(s.is_idle());
    // A window that no text outgrows is none, and texts that no budget cuts lose nothing.
    for (budget, context) in [(10, 256), (9, 9), (9, 10)] {
        let keeper = format!("streaming-llm:budget={budget}");
        let e = engine("gemma3", &[("keep", &keeper)]).with_context(context);
        assert!(e.check_plan().is_ok(), "{budget} {context}");
    }
    let said = plan(&[("keep", KEEPERS[2]), ("draft", "copyspec")]).words();
    assert!(said[0].ends_with("lossless") && said[1].ends_with("an approximation"), "{said:?}");
    let hash = |keeper: &str| plan(&[("keep", keeper)]).hash();
    assert!(hash(KEEPERS[0]) != hash(KEEPERS[1]) && hash(KEEPERS[0]) != 0);
}
