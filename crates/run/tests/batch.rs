//! Many texts at once on tiny checkpoints: nobody's answer may depend on the company, on shared beginnings, chunks,
//! preemption or the budget.

mod common;

use std::collections::BTreeMap;

use common::tokenizer;
use lacuna_base::Rng;
use lacuna_kernels::KvFormat;
use lacuna_run::{
    BLOCK_TOKENS, Engine, Event, Finished, Generation, Grammar, Job, Limits, Picked, Pooling, Request, RunError,
    Sampling, Scheduler, Session, Stop,
};

const MODELS: [&str; 12] = [
    "llama",
    "gemma3",
    "gpt2",
    "llama_rope_longrope",
    "qwen3_moe",
    "lfm2",
    "qwen3_5",
    "mamba2",
    "jamba",
    "llama4",
    "gemma4",
    "gemma3n",
];

/// Beyond what the tiny models were made for, but for learned positions, of which there are no more.
fn engine(name: &str) -> Engine {
    let e = common::engine(name);
    if name == "gpt2" { e } else { e.with_context(256) }
}

fn limits(batch: usize, prefill_rows: usize) -> Limits {
    Limits { batch, prefill_rows, kv_bytes: 64 << 20, reuse: true }
}

fn scheduler(name: &str, limits: Limits) -> Scheduler {
    Scheduler::new(engine(name), tokenizer(), limits)
}

/// As `scheduler`, with room for `blocks` blocks.
fn cramped(name: &str, batch: usize, blocks: usize) -> Scheduler {
    let e = engine(name);
    let one = lacuna_run::BlockStore::new(&e.model().spec, KvFormat::F32, usize::MAX).block_bytes();
    Scheduler::new(e, tokenizer(), Limits { kv_bytes: blocks * one, ..limits(batch, 16) })
}

#[derive(Default, Debug)]
struct Answer {
    text: String,
    tokens: Vec<Picked>,
    done: Option<Finished>,
    vector: Vec<f32>,
    failed: Option<String>,
}

impl Answer {
    fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|t| t.id).collect()
    }
}

fn gather(answers: &mut BTreeMap<u64, Answer>, id: u64, event: Event) {
    let a = answers.entry(id).or_default();
    assert!(a.done.is_none() && a.failed.is_none() && a.vector.is_empty(), "nothing comes after the end");
    match event {
        Event::Text { text, tokens } => {
            a.text += &text;
            a.tokens.extend(tokens);
        }
        Event::Finished(f) => a.done = Some(f),
        Event::Read(_) | Event::Rows { .. } => panic!("nobody asked"),
        Event::Embedding { vector, .. } => a.vector = vector,
        Event::Failed(e) => a.failed = Some(e.to_string()),
    }
}

fn drain(s: &mut Scheduler) -> BTreeMap<u64, Answer> {
    let mut answers = BTreeMap::new();
    for _ in 0..20_000 {
        if s.is_idle() {
            return answers;
        }
        s.step(&mut |id, event| gather(&mut answers, id, event));
    }
    panic!("the scheduler does not come to an end: {:?}", s.gauges());
}

fn alone(name: &str, request: &Generation) -> Answer {
    let mut s = scheduler(name, Limits { reuse: false, ..limits(1, 512) });
    s.submit(0, Request::generate(request.clone())).unwrap();
    drain(&mut s).remove(&0).unwrap()
}

/// Texts that share beginnings of several lengths, greedy and drawn, which fit the context of `name`.
fn requests(name: &str, n: usize, seed: u64) -> Vec<Generation> {
    let mut rng = Rng::new(seed);
    let room = engine(name).context().min(160) - 60;
    let vocab = engine(name).model().spec.vocab as u32;
    let root: Vec<u32> = (0..room).map(|_| (3 + rng.below(90) as u32) % vocab).collect();
    (0..n)
        .map(|i| {
            let mut prompt = root[..rng.below(room)].to_vec();
            prompt.extend((0..1 + rng.below(30)).map(|_| (3 + rng.below(90) as u32) % vocab));
            let drawn = Sampling {
                temperature: 1.0,
                top_p: 0.95,
                presence_penalty: 0.3,
                seed: i as u64,
                ..Sampling::default()
            };
            let sampling = if i % 3 == 0 { drawn } else { Sampling::default() };
            Generation { prompt, max_tokens: 1 + rng.below(30), sampling, ignore_end: true, ..Generation::default() }
        })
        .collect()
}

#[test]
fn company_chunks_and_shared_beginnings_change_nothing() {
    for name in MODELS {
        let all = requests(name, 14, 5);
        let expected: Vec<Answer> = all.iter().map(|g| alone(name, g)).collect();
        // A session, which goes on from what texts have in common, says the same.
        let mut session = Session::new(engine(name), tokenizer());
        for (g, x) in all.iter().zip(&expected) {
            let out = session.generate(g, &mut |_| std::ops::ControlFlow::Continue(())).unwrap();
            assert_eq!((out.tokens, out.text), (x.ids(), x.text.clone()), "{name}: a session agrees");
        }
        for (batch, rows) in [(1, 7), (4, 512), (14, 1), (14, 33), (16, 100)] {
            let mut s = scheduler(name, limits(batch, rows));
            for round in 0..2 {
                for (i, g) in all.iter().enumerate() {
                    s.submit(i as u64, Request::generate(g.clone())).unwrap();
                }
                let got = drain(&mut s);
                for (i, x) in expected.iter().enumerate() {
                    let a = &got[&(i as u64)];
                    assert_eq!(a.ids(), x.ids(), "{name}: text {i} in {batch} x {rows}, round {round}");
                    assert_eq!(a.text, x.text);
                    // The whole prompt short of the last token is known in the second round; with a state, what lies
                    // before the last snapshot.
                    let (reused, prompt) = (a.done.as_ref().unwrap().reused_tokens, all[i].prompt.len());
                    let all_of_it = ["lfm2", "qwen3_5", "mamba2", "jamba"].contains(&name) || reused + 1 == prompt;
                    assert!(reused < prompt && (round == 0 || all_of_it), "{name} {i}");
                }
                let g = s.gauges();
                assert_eq!((g.running, g.waiting, g.blocks.used, g.blocks.shared), (0, 0, 0, 0));
                assert_eq!(g.blocks.free + g.blocks.cached, g.blocks.total);
            }
        }
    }
}

#[test]
fn every_cache_format_keeps_the_law() {
    for format in [KvFormat::F16, KvFormat::Q8] {
        let all = requests("llama", 6, 9);
        let run = |batch, rows, reuse| {
            let e = engine("llama").with_kv(format);
            let mut s = Scheduler::new(e, tokenizer(), Limits { reuse, ..limits(batch, rows) });
            all.iter().enumerate().for_each(|(i, g)| s.submit(i as u64, Request::generate(g.clone())).unwrap());
            drain(&mut s).into_values().map(|a| a.ids()).collect::<Vec<_>>()
        };
        assert_eq!(run(1, 512, false), run(6, 19, true), "{format:?}");
    }
}

#[test]
fn texts_that_begin_alike_are_computed_once() {
    let mut s = scheduler("llama", limits(8, 256));
    let prompt: Vec<u32> = (0..130).map(|i| 3 + i * 7 % 90).collect();
    let g = Generation { prompt, max_tokens: 4, ignore_end: true, ..Generation::default() };
    for i in 0..8 {
        s.submit(i, Request::generate(g.clone())).unwrap();
    }
    let (mut rows, mut shared, mut answers) = (0, 0, BTreeMap::new());
    while !s.is_idle() {
        let step = s.step(&mut |id, event| gather(&mut answers, id, event));
        rows += step.prefill_rows;
        shared = shared.max(s.gauges().blocks.shared);
    }
    // Four whole blocks once, and what is left of the prompt eight times.
    assert_eq!((rows, shared), (4 * BLOCK_TOKENS + 8 * 2, 4));
    assert!(answers.values().all(|a| a.ids() == answers[&0].ids()));
}

#[test]
fn long_rope_texts_share_with_their_own_kind_only() {
    let mut s = scheduler("llama_rope_longrope", limits(4, 64));
    // The original context is 32: the same beginning once in a long text, which cannot serve a short one; there is no
    // shorter block.
    let prompt: Vec<u32> = (0..40).map(|i| 3 + i).collect();
    let long = Generation { prompt, max_tokens: 10, ignore_end: true, ..Generation::default() };
    s.submit(0, Request::generate(long.clone())).unwrap();
    let first = drain(&mut s);
    s.submit(1, Request::generate(long.clone())).unwrap();
    let second = drain(&mut s);
    assert_eq!(second[&1].done.as_ref().unwrap().reused_tokens, 39);
    assert_eq!(first[&0].ids(), second[&1].ids());
    let e = engine("llama_rope_longrope");
    assert_ne!(e.class(32), e.class(33));
    let mut store = lacuna_run::BlockStore::new(&e.model().spec, KvFormat::F32, 1 << 20);
    let slot = store.open(e.class(33));
    assert!(store.reserve(slot, 32));
    store.publish(slot, &long.prompt[..32]);
    assert_eq!((store.known(e.class(33), &long.prompt), store.known(e.class(32), &long.prompt)), (32, 0));
}

#[test]
fn blocks_that_run_out_change_no_answer() {
    for name in ["llama", "gemma3"] {
        let all = requests(name, 10, 31);
        let expected: Vec<Vec<u32>> = all.iter().map(|g| alone(name, g).ids()).collect();
        let mut s = cramped(name, 8, 8);
        all.iter().enumerate().for_each(|(i, g)| s.submit(i as u64, Request::generate(g.clone())).unwrap());
        let got = drain(&mut s);
        for (i, x) in expected.iter().enumerate() {
            assert_eq!(&got[&(i as u64)].ids(), x, "{name}: text {i}");
        }
        let g = s.gauges();
        assert!(g.blocks.evicted > 0, "{g:?}");
        assert_eq!(g.blocks.free + g.blocks.cached, 8);
    }
    // Three texts that fit together at first and grow: the last one must give way.
    let mut s = cramped("llama", 3, 7);
    let grow = |i: u32| Generation {
        prompt: (0..30).map(|k| 3 + (k * 5 + i * 11) % 90).collect(),
        max_tokens: 90,
        ignore_end: true,
        ..Generation::default()
    };
    let expected: Vec<Vec<u32>> = (0..3).map(|i| alone("llama", &grow(i)).ids()).collect();
    (0..3).for_each(|i| s.submit(u64::from(i), Request::generate(grow(i))).unwrap());
    let got = drain(&mut s);
    assert!(s.gauges().preempted > 0);
    (0..3).for_each(|i| assert_eq!(got[&(i as u64)].ids(), expected[i]));
}

#[test]
fn what_can_never_fit_is_refused_at_once() {
    let mut s = cramped("llama", 2, 3);
    assert_eq!(s.most_tokens(), 96);
    let long = |n: u32| Generation { prompt: (0..n).map(|i| i % 90).collect(), ..Generation::default() };
    let submit = |s: &mut Scheduler, g: Generation| s.submit(9, Request::generate(g));
    assert!(matches!(submit(&mut s, long(96)), Err(RunError::Context { tokens: 96, context: 96, .. })));
    assert!(matches!(submit(&mut s, long(0)), Err(RunError::Empty)));
    let foreign = Generation { prompt: vec![4000], ..Generation::default() };
    assert!(matches!(submit(&mut s, foreign), Err(RunError::Request(_))));
    let hot = Generation { sampling: Sampling { temperature: -1.0, ..Sampling::default() }, ..long(3) };
    assert!(matches!(submit(&mut s, hot), Err(RunError::Setting { .. })));
    assert!(s.is_idle());
    // To the brim: the prompt, and as many tokens as there is room for.
    submit(&mut s, Generation { max_tokens: 500, ignore_end: true, ..long(40) }).unwrap();
    let done = drain(&mut s).remove(&9).unwrap().done.unwrap();
    assert_eq!((done.stop, done.tokens), (Stop::Context, 56));
    submit(&mut s, Generation { max_tokens: 0, ..long(40) }).unwrap();
    let done = drain(&mut s).remove(&9).unwrap().done.unwrap();
    assert_eq!((done.stop, done.tokens), (Stop::MaxTokens, 0));
}

#[test]
fn who_leaves_frees_room_at_once() {
    let mut s = scheduler("llama", limits(2, 64));
    let g = |i: u32| Generation {
        prompt: (0..40).map(|k| 3 + (k + i * 13) % 90).collect(),
        max_tokens: 50,
        ignore_end: true,
        ..Generation::default()
    };
    (0..4).for_each(|i| s.submit(u64::from(i), Request::generate(g(i))).unwrap());
    let mut answers = BTreeMap::new();
    (0..5).for_each(|_| {
        s.step(&mut |id, e| gather(&mut answers, id, e));
    });
    assert_eq!((s.gauges().running, s.gauges().waiting), (2, 2));
    let known = [0, 3, 3, 77].map(|id| s.cancel(id).is_some());
    assert_eq!(known, [true, true, false, false]);
    assert_eq!((s.gauges().running, s.gauges().waiting), (1, 1));
    s.step(&mut |id, e| gather(&mut answers, id, e));
    assert_eq!((s.gauges().running, s.gauges().waiting), (2, 0));
    while !s.is_idle() {
        s.step(&mut |id, e| gather(&mut answers, id, e));
    }
    assert!(answers[&0].done.is_none() && !answers.contains_key(&3));
    for i in [1, 2] {
        assert_eq!(answers[&i].ids(), alone("llama", &g(i as u32)).ids());
    }
    assert_eq!(s.gauges().blocks.used, 0);
}

#[test]
fn a_long_prompt_does_not_hold_up_short_ones() {
    let mut s = scheduler("llama", limits(4, 32));
    let long = Generation { prompt: (0..200).map(|i| 3 + i % 90).collect(), max_tokens: 1, ..Generation::default() };
    let short = Generation { prompt: (0..8).map(|i| 50 + i).collect(), max_tokens: 1, ..Generation::default() };
    s.submit(0, Request::generate(long)).unwrap();
    s.submit(1, Request::generate(short)).unwrap();
    let mut order = Vec::new();
    let mut widest = 0;
    while !s.is_idle() {
        let step = s.step(&mut |id, e| {
            if let Event::Finished(_) = e {
                order.push(id);
            }
        });
        widest = widest.max(step.prefill_rows);
    }
    assert_eq!(order, [1, 0]);
    assert!(widest <= 32);
}

#[test]
fn probabilities_come_with_their_tokens() {
    let g = Generation {
        prompt: (5..45).collect(),
        max_tokens: 12,
        ignore_end: true,
        stop: vec![],
        ..Generation::default()
    };
    let ask = |stop: Vec<String>| {
        let mut s = scheduler("llama", limits(1, 64));
        let generation = Generation { stop, ..g.clone() };
        let job = Job::Generate { generation, logprobs: Some(3), grammar: None, special: false };
        s.submit(0, Request::new(g.prompt.clone(), job)).unwrap();
        drain(&mut s).remove(&0).unwrap()
    };
    let all = ask(vec![]);
    assert_eq!(all.tokens.len(), 12);
    for t in &all.tokens {
        let p = t.probability.as_ref().unwrap();
        assert_eq!((p.top.len(), p.top[0].0, p.top[0].1), (3, t.id, p.logprob), "greedy takes the most probable");
        assert!(p.logprob < 0.0 && p.top[1].1 >= p.top[2].1);
    }
    // Cut by a stop text: the tokens told are those of the text told.
    let stop: String = all.text.chars().skip(5).take(3).collect();
    let cut = ask(vec![stop.clone()]);
    assert_eq!(cut.text, all.text[..all.text.find(&stop).unwrap()]);
    assert_eq!(cut.done.as_ref().unwrap().stop, Stop::StopText(stop));
    assert_eq!(tokenizer().decode(&cut.ids()), cut.text);
}

/// Only even ids, then only `last`, then nothing.
struct Even {
    made: usize,
    bits: Vec<u32>,
}

impl Grammar for Even {
    fn allowed(&mut self) -> Result<&[u32], RunError> {
        self.bits = if self.made < 4 { vec![0x5555_5555; 3] } else { vec![0, 1 << 10] };
        Ok(&self.bits)
    }
    fn accept(&mut self, _: u32) -> Result<bool, RunError> {
        self.made += 1;
        Ok(self.made == 5)
    }
}

#[test]
fn a_grammar_is_followed_and_ends_the_answer() {
    let mut s = scheduler("llama", limits(2, 64));
    let generation = Generation { max_tokens: 50, ignore_end: true, ..Generation::default() };
    let grammar: Option<Box<dyn Grammar>> = Some(Box::new(Even { made: 0, bits: vec![] }));
    let job = Job::Generate { generation, logprobs: None, grammar, special: false };
    s.submit(0, Request::new(vec![5, 6, 7], job)).unwrap();
    let a = drain(&mut s).remove(&0).unwrap();
    assert_eq!((a.tokens.len(), a.done.as_ref().unwrap().stop.clone()), (5, Stop::Grammar));
    assert!(a.ids().iter().all(|id| id % 2 == 0) && a.ids()[4] == 42);
}

#[test]
fn vectors_do_not_depend_on_company_or_chunks() {
    for name in ["llama", "gemma3"] {
        for pooling in [Pooling::Mean, Pooling::Last] {
            let texts: Vec<Vec<u32>> = requests(name, 6, 77).into_iter().map(|g| g.prompt).collect();
            let run = |batch, rows, n: usize| {
                let mut s = scheduler(name, limits(batch, rows));
                for round in 0..n {
                    for (i, t) in texts.iter().enumerate() {
                        let request = Request::new(t.clone(), Job::Embed(pooling));
                        s.submit((100 * round + i) as u64, request).unwrap();
                    }
                }
                drain(&mut s).into_values().map(|a| a.vector).collect::<Vec<_>>()
            };
            let expected = run(1, 512, 1);
            for v in &expected {
                let length: f32 = v.iter().map(|x| x * x).sum();
                assert!((length - 1.0).abs() < 1e-5);
            }
            let twice = run(6, 9, 2);
            assert_eq!((&twice[..6], &twice[6..]), (&expected[..], &expected[..]), "{name} {pooling:?}");
        }
    }
}

#[test]
fn leftovers_of_other_texts_are_never_read() {
    // A store whose every page was once full of NaN.
    use lacuna_base::Mat;
    use lacuna_model::{Backend, Batch, Cpu, KvStore, NoTap, Tables};
    let e = engine("gemma3");
    let spec = &e.model().spec;
    let tokens: Vec<u32> = (0..75).map(|i| 3 + i % 90).collect();
    let run = |store: &mut lacuna_run::BlockStore| {
        let slot = store.open(0);
        assert!(store.reserve(slot, 75));
        let hidden = e.model().forward(&tokens, &Batch::one(slot, 0..75), store, &mut NoTap).unwrap();
        store.close(slot);
        hidden.data().iter().map(|x| x.to_bits()).collect::<Vec<u32>>()
    };
    let bytes = 4 * lacuna_run::BlockStore::new(spec, KvFormat::F32, 1).block_bytes();
    let clean = run(&mut lacuna_run::BlockStore::new(spec, KvFormat::F32, bytes));
    let mut store = lacuna_run::BlockStore::new(spec, KvFormat::F32, bytes);
    let slot = store.open(0);
    assert!(store.reserve(slot, 128));
    for layer in 0..spec.layers.len() {
        let a = spec.layers[layer].attn.as_ref().unwrap();
        let bad = Mat::from_fn(128, a.kv_heads * a.head_dim, |_, _| f32::NAN);
        let batch = Batch::one(slot, 0..128);
        KvStore::<Cpu>::prepare(&mut store, layer, &batch).unwrap();
        let mut tables = Tables::default();
        tables.push(layer, [KvStore::<Cpu>::table(&store, layer, slot)]).unwrap();
        let (step, bad) = (Cpu.begin(&batch, tables), Cpu.upload(bad.view()));
        Cpu.write(store.pages(layer).unwrap(), layer, &step, &bad, &bad);
    }
    store.close(slot);
    assert_eq!(run(&mut store), clean);
}
