//! Texts that get longer than LongRoPE's original context, token by token against transformers
//! (tests/golden/longrope.json).

mod common;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use common::{after, engine, tokenizer};
use lacuna_kernels::KvFormat;
use lacuna_run::{BenchOptions, Event, Generated, Generation, Request, Scheduler, Session, bench};

const MODELS: [&str; 2] = ["phi3", "llama_rope_longrope"];

/// The longest text that is short.
const ORIGINAL: usize = 32;

struct Case {
    prompt: Vec<u32>,
    tokens: Vec<u32>,
}

fn cases(name: &str) -> Vec<Case> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/longrope.json");
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(golden["original"], ORIGINAL);
    let ids = |v: &serde_json::Value| v.as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as u32).collect();
    let all = golden[name].as_array().unwrap();
    all.iter().map(|c| Case { prompt: ids(&c["prompt"]), tokens: ids(&c["tokens"]) }).collect()
}

impl Case {
    /// The first `n` tokens, where `known` of them are part of the prompt already.
    fn ask(&self, known: usize, n: usize) -> Generation {
        let prompt = [&self.prompt[..], &self.tokens[..known]].concat();
        Generation { prompt, max_tokens: n - known, ignore_end: true, ..Generation::default() }
    }

    /// Numbers of tokens: all, one, and those around where the text gets long.
    fn counts(&self) -> Vec<usize> {
        let crossing = (ORIGINAL + 1).saturating_sub(self.prompt.len());
        [1, crossing.saturating_sub(1), crossing, crossing + 1, self.tokens.len()]
            .into_iter()
            .filter(|&n| n > 0)
            .collect()
    }
}

fn go(s: &mut Session, g: &Generation) -> Generated {
    s.generate(g, &mut |_| ControlFlow::Continue(())).unwrap()
}

#[test]
fn a_session_says_what_transformers_says_for_any_number_of_tokens() {
    for name in MODELS {
        let e = Arc::new(engine(name));
        for chunk in [1, 7, 512] {
            for c in cases(name) {
                for n in c.counts() {
                    let mut s = Session::with_chunk(Arc::clone(&e), tokenizer(), chunk);
                    let (got, at) = (go(&mut s, &c.ask(0, n)), c.prompt.len());
                    assert_eq!(got.tokens, c.tokens[..n], "{name}: {n} tokens after {at} in chunks of {chunk}");
                }
            }
        }
    }
}

#[test]
fn a_session_keeps_the_keys_of_its_class_only() {
    for name in MODELS {
        let mut s = Session::new(engine(name), tokenizer());
        for c in cases(name) {
            // On from where it stood, back to the beginning, a little, and on across the original context.
            let mut read: Vec<u32> = Vec::new();
            for (known, n) in [(0, 30), (30, 40), (40, 64), (0, 1), (1, 2), (0, 64), (20, 50)] {
                let g = c.ask(known, n);
                let got = go(&mut s, &g);
                assert_eq!(got.tokens, c.tokens[known..n], "{name}: {known}..{n} after {}", c.prompt.len());
                let same = read.iter().zip(&g.prompt).take_while(|(a, b)| a == b).count().min(g.prompt.len() - 1);
                let alike = (read.len() > ORIGINAL) == (g.prompt.len() > ORIGINAL);
                // Keys of the other class may have stayed from before.
                let reused = got.stats.reused_tokens;
                assert!(reused < g.prompt.len() && (!alike || reused >= same), "{name}: {known}..{n}: {reused} {same}");
                read = [&g.prompt[..], &got.tokens[..got.tokens.len() - 1]].concat();
            }
        }
    }
}

#[test]
fn a_text_read_token_by_token_has_the_bits_of_one_read_at_once() {
    for (name, format) in MODELS.into_iter().flat_map(|m| [(m, KvFormat::F32), (m, KvFormat::Q8)]) {
        let e = Arc::new(engine(name).with_kv(format));
        let text = &cases(name)[5].prompt;
        let mut fresh = common::scheduler(Arc::clone(&e), 1, 512, 16, false);
        let mut s = common::scheduler(Arc::clone(&e), 1, 512, 16, true);
        for n in 1..=text.len() {
            let whole = after(&mut fresh, &text[..n]).unwrap().0;
            // Where the text gets long it is read again.
            let known = if n == ORIGINAL + 1 { 0 } else { n - 1 };
            assert_eq!(after(&mut s, &text[..n]).unwrap(), (whole, known), "{name}: {n} tokens");
        }
        // Cut back below the original context, and on; the keys of both kinds are there.
        for n in [10, text.len(), ORIGINAL] {
            let whole = after(&mut fresh, &text[..n]).unwrap().0;
            assert_eq!(after(&mut s, &text[..n]).unwrap(), (whole, n - 1), "{name}: {n} tokens again");
        }
    }
}

fn scheduler(name: &str, batch: usize, prefill_rows: usize, blocks: usize, reuse: bool) -> Scheduler {
    common::scheduler(engine(name), batch, prefill_rows, blocks, reuse)
}

/// The answers to requests made at once, and the prompt rows that they took.
fn answers(s: &mut Scheduler, all: &[Generation]) -> (Vec<Vec<u32>>, usize) {
    all.iter().enumerate().for_each(|(i, g)| s.submit(i as u64, Request::generate(g.clone())).unwrap());
    let (mut got, mut rows) = (BTreeMap::<u64, Vec<u32>>::new(), 0);
    for _ in 0..20_000 {
        if s.is_idle() {
            assert_eq!(s.gauges().blocks.used, 0);
            return (got.into_values().collect(), rows);
        }
        let step = s.step(&mut |id, event| match event {
            Event::Text { tokens, .. } => got.entry(id).or_default().extend(tokens.iter().map(|t| t.id)),
            Event::Failed(e) => panic!("text {id}: {e}"),
            _ => {}
        });
        rows += step.prefill_rows;
    }
    panic!("the scheduler does not come to an end: {:?}", s.gauges());
}

#[test]
fn the_scheduler_says_what_transformers_says_for_a_text_alone() {
    for name in MODELS {
        for c in cases(name) {
            for n in c.counts() {
                for rows in [1, 7, 512] {
                    let (got, _) = answers(&mut scheduler(name, 1, rows, 16, false), &[c.ask(0, n)]);
                    assert_eq!(got, [&c.tokens[..n]], "{name}: {n} after {}, {rows} rows", c.prompt.len());
                }
            }
        }
    }
}

#[test]
fn the_scheduler_says_it_in_company() {
    for name in MODELS {
        // Each text with several numbers of tokens, and from several places on: beginnings are shared on both sides of
        // the original context.
        let cases = cases(name);
        let mut asked: Vec<(Generation, &[u32])> = Vec::new();
        for c in &cases {
            let from_its_prompt = c.counts().into_iter().map(|n| (0, n));
            let spans = from_its_prompt.chain([(4, 64), (24, 64), (40, 50)]);
            asked.extend(spans.map(|(known, n)| (c.ask(known, n), &c.tokens[known..n])));
        }
        let mixed = (0..5).flat_map(|first| asked.iter().skip(first).step_by(5).cloned());
        let (all, expected): (Vec<_>, Vec<_>) = mixed.unzip();
        for (batch, rows, blocks) in [(48, 1, 999), (48, 33, 999), (5, 100, 999), (16, 512, 999), (3, 16, 8), (2, 7, 5)]
        {
            let mut s = scheduler(name, batch, rows, blocks, true);
            for round in 0..2 {
                let (got, _) = answers(&mut s, &all);
                for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                    assert_eq!(got, expected, "{name}: text {i} in {batch} x {rows}, {blocks} blocks, round {round}");
                }
            }
            // Three texts of three blocks do not fit eight, nor do two fit five.
            assert_eq!(s.gauges().preempted > 0, blocks < 9, "{name}: {:?}", s.gauges());
        }
    }
}

#[test]
fn a_text_is_read_again_once() {
    let c = &cases("phi3")[1];
    let mut s = scheduler("phi3", 2, 512, 16, true);
    let long = c.ask(0, 64);
    // 20 tokens, and all of them with those generated when they are more than the original context.
    assert_eq!(answers(&mut s, std::slice::from_ref(&long)).1, 20 + ORIGINAL + 1);
    assert_eq!(s.gauges().preempted, 0);
    // Both the short text's tokens and the long one's are known by then.
    assert_eq!(answers(&mut s, std::slice::from_ref(&long)).1, 0);
    // A store that just holds the text does it, too: the short keys go before the long ones come. So do two texts that
    // share all of their keys.
    for (batch, blocks) in [(1, 3), (2, 3)] {
        let mut s = scheduler("phi3", batch, 512, blocks, true);
        assert_eq!(answers(&mut s, &[long.clone(), long.clone()]).0, [&c.tokens[..], &c.tokens[..]]);
    }
}

#[test]
fn a_bench_crosses_the_original_context() {
    let o = BenchOptions { prompt_tokens: 40, gen_tokens: 30, depth: 20, reps: 2, seed: 0, profile: true };
    let b = bench(engine("phi3"), &o, &mut |_, _| ()).unwrap();
    assert_eq!((b.prefill_all_tok_s.len(), b.decode_all_tok_s.len()), (2, 2));
}
