//! Probabilities of a prompt's own tokens: each is what the model says behind the tokens before it, in any chunks, in
//! company, after a text gave its blocks up, under plans, and however much of an answer is asked for.

mod common;

use std::collections::BTreeMap;

use common::{after, engine, scheduler};
use lacuna_base::Rng;
use lacuna_run::{Event, Generation, Job, Picked, Request, RunPlan, Scheduler};

fn text(n: usize, seed: u64) -> Vec<u32> {
    let mut rng = Rng::new(seed);
    (0..n).map(|_| 3 + rng.below(90) as u32).collect()
}

#[derive(Default)]
struct Told {
    read: Vec<Picked>,
    answer: Vec<u32>,
    over: bool,
}

/// Everything that is told of each text. Nothing of a prompt comes behind an answer.
fn drain(s: &mut Scheduler) -> BTreeMap<u64, Told> {
    let mut all: BTreeMap<u64, Told> = BTreeMap::new();
    while !s.is_idle() {
        s.step(&mut |id, event| {
            let told = all.entry(id).or_default();
            assert!(!told.over, "text {id} is over");
            match event {
                Event::Read(tokens) => {
                    assert!(told.answer.is_empty() && !tokens.is_empty());
                    told.read.extend(tokens);
                }
                Event::Text { tokens, .. } => told.answer.extend(tokens.iter().map(|t| t.id)),
                Event::Finished(f) => {
                    assert_eq!(f.ids, told.answer);
                    told.over = true;
                }
                other => panic!("text {id}: {other:?}"),
            }
        });
    }
    all
}

fn generate(text: &[u32], max_tokens: usize) -> Request {
    let generation = Generation { max_tokens, ignore_end: true, ..Generation::default() };
    Request::new(text.to_vec(), Job::Generate { generation, logprobs: None, grammar: None, special: false })
}

#[test]
fn a_token_is_as_probable_as_behind_what_stands_before_it() {
    for name in ["llama", "gemma3", "qwen3_moe", "gpt2"] {
        let text = text(50, 1);
        let mut s = scheduler(engine(name), 2, 7, 64, true);
        s.submit(0, generate(&text, 2).scored(3)).unwrap();
        let told = drain(&mut s).remove(&0).unwrap();
        assert_eq!(told.read.iter().map(|t| t.id).collect::<Vec<_>>(), text[1..], "{name}");
        assert_eq!(told.answer.len(), 2);
        let mut one = scheduler(engine(name), 1, 512, 64, false);
        for at in [1, 2, 7, 8, 31, 32, 33, 49] {
            let (mut all, _) = after(&mut one, &text[..at]).unwrap();
            let found = told.read[at - 1].probability.as_ref().unwrap();
            assert_eq!(found.logprob, all[text[at] as usize].1, "{name} at {at}");
            all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            assert_eq!(found.top, all[..3], "{name} at {at}");
        }
    }
}

#[test]
fn company_chunks_and_short_memory_change_nothing() {
    let texts: Vec<Vec<u32>> = (0..5).map(|i| text([31, 31, 31, 31, 100][i], 2 + i as u64)).collect();
    let run = |batch, rows, blocks, reuse| {
        let mut s = scheduler(engine("llama"), batch, rows, blocks, reuse);
        for (id, t) in texts.iter().enumerate() {
            s.submit(id as u64, generate(t, 20).scored(1)).unwrap();
        }
        let told = drain(&mut s);
        (told.into_values().map(|t| (t.read, t.answer)).collect::<Vec<_>>(), s.gauges().preempted)
    };
    let (alone, _) = run(1, 512, 64, false);
    for ((read, _), text) in alone.iter().zip(&texts) {
        assert_eq!(read.iter().map(|t| t.id).collect::<Vec<_>>(), text[1..]);
    }
    assert!(run(5, 13, 64, true).0 == alone);
    let (squeezed, preempted) = run(5, 64, 7, true);
    assert!(squeezed == alone && preempted > 0, "{preempted} gave way");
}

#[test]
fn whoever_asks_for_no_answer_gets_none() {
    let mut s = scheduler(engine("llama"), 2, 16, 64, true);
    let (short, long) = (text(1, 4), text(60, 5));
    s.submit(0, generate(&short, 0).scored(0)).unwrap();
    s.submit(1, generate(&long, 0).scored(0)).unwrap();
    s.submit(2, generate(&long, 0)).unwrap();
    let told = drain(&mut s);
    assert!(told.values().all(|t| t.over && t.answer.is_empty()));
    assert!(told[&0].read.is_empty() && told[&1].read.len() == 59 && told[&2].read.is_empty());
    let scored = lacuna_run::score(engine("llama"), &[long.clone(), text(33, 6)], &mut |_, _| {}).unwrap();
    let losses = told[&1].read.iter().map(|t| -f64::from(t.probability.as_ref().unwrap().logprob));
    assert_eq!(scored[0], losses.collect::<Vec<_>>());
    assert_eq!(scored[1].len(), 32);
}

#[test]
fn a_plan_tells_in_the_loss() {
    let text = text(200, 7);
    let loss = |flag: Option<(&str, &str)>| {
        let mut plan = RunPlan::none();
        if let Some((question, said)) = flag {
            plan.flag(question, said, &lacuna_methods::registry()).unwrap();
        }
        let e = engine("llama").with_context(256).with_plan(plan);
        lacuna_run::score(e, std::slice::from_ref(&text), &mut |_, _| {}).unwrap().remove(0)
    };
    let plain = loss(None);
    assert_eq!(loss(Some(("keep", "streaming-llm:budget=4096"))), plain);
    assert_eq!(loss(Some(("draft", "copyspec"))), plain);
    for lossy in [("keep", "streaming-llm:budget=40"), ("select", "pooled-blocks:budget=32,dense_layers=0")] {
        let found = loss(Some(lossy));
        // Within the budget nothing is left out; beyond it something is.
        assert!(found[..39] == plain[..39] && found[100..] != plain[100..], "{lossy:?}");
    }
}
