//! Networks with recurrent mixers: the same answers alone, in chunks, in company, and where a text goes on from a
//! snapshot of another one's state.

mod common;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use common::{after, scheduler, tokenizer};
use lacuna_run::{BlockStore, Engine, Generation, Job, Limits, Request, SNAPSHOT_TOKENS, Scheduler, Session};

/// Convolutions with attention; the delta rule with gated attention; mixers alone; Mamba-2 with attention, and side by
/// side with it; Mamba with experts.
const MODELS: [&str; 6] = ["lfm2", "qwen3_5", "mamba2", "bamba", "falcon_h1", "jamba"];

fn engine(name: &str) -> Arc<Engine> {
    Arc::new(common::engine(name).with_context(4096))
}

/// A text of `n` tokens, the same beginning for every `n`.
fn text(n: usize) -> Vec<u32> {
    (0..n).map(|i| 3 + (i * i * 7 + i * 5 + i / 90) as u32 % 90).collect()
}

/// A scheduler with room for `texts` texts of `tokens` tokens and their snapshots.
fn roomy(e: &Arc<Engine>, rows: usize, tokens: usize, reuse: bool) -> Scheduler {
    let store = BlockStore::new(&e.model().spec, e.kv_format(), usize::MAX);
    let blocks = tokens.div_ceil(lacuna_run::BLOCK_TOKENS) + 8 * store.state_blocks_of(tokens);
    let limits = Limits { batch: 8, prefill_rows: rows, kv_bytes: blocks * store.unit_bytes(), reuse };
    Scheduler::new(Arc::clone(e), tokenizer(), limits)
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny");
    let mut seen = 0;
    for entry in std::fs::read_dir(root).unwrap() {
        let dir = entry.unwrap().path();
        let Ok(golden) = std::fs::read(dir.join("golden.json")) else { continue };
        let golden: serde_json::Value = serde_json::from_slice(&golden).unwrap();
        // One list, or the prompt and what follows it.
        let Some(greedy) = golden["greedy"].as_array() else { continue };
        let flat = greedy.iter().flat_map(|t| t.as_array().cloned().unwrap_or_else(|| vec![t.clone()]));
        let greedy: Vec<u32> = flat.map(|t| t.as_u64().unwrap() as u32).collect();
        let name = dir.file_name().unwrap().to_str().unwrap().to_owned();
        let mut session = Session::with_chunk(Arc::new(common::engine(&name)), tokenizer(), 7);
        let at = greedy.len() - 64;
        let prompt = greedy[..at].to_vec();
        let request = Generation { prompt, max_tokens: 64, ignore_end: true, ..Generation::default() };
        let said = session.generate(&request, &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(said.tokens, greedy[at..], "{name}");
        seen += 1;
    }
    assert!(seen >= 8, "{seen} models");
}

#[test]
fn chunks_change_no_bit() {
    for name in MODELS {
        let e = engine(name);
        let prompt = text(140);
        let whole = after(&mut roomy(&e, 512, 256, false), &prompt).unwrap();
        assert_eq!(whole.1, 0);
        for rows in [1, 3, 7, 64, 139] {
            assert_eq!(after(&mut roomy(&e, rows, 256, false), &prompt).unwrap(), whole, "{name} in chunks of {rows}");
            assert_eq!(after(&mut roomy(&e, rows, 256, true), &prompt).unwrap(), whole, "{name}: with snapshots");
        }
    }
}

/// A text that begins like another one goes on from the last snapshot at or before what they have in common.
#[test]
fn a_text_goes_on_from_a_snapshot() {
    for name in MODELS {
        let e = engine(name);
        let long = text(1200);
        let mut fresh = roomy(&e, 512, 1300, false);
        // Snapshots stand at 512, at 1024, at the last whole block of the prompt, 1184, and behind the text.
        for (common, more, reused) in [
            (500, 40, 0),
            (512, 40, SNAPSHOT_TOKENS),
            (700, 3, SNAPSHOT_TOKENS),
            (1023, 40, SNAPSHOT_TOKENS),
            (1100, 33, 2 * SNAPSHOT_TOKENS),
            (1190, 33, 1184),
            (1200, 0, 1184),
            (1200, 5, 1200),
        ] {
            for rows in [100, 512] {
                let mut s = roomy(&e, rows, 1300, true);
                let first = after(&mut s, &long).unwrap();
                assert_eq!(first, after(&mut fresh, &long).unwrap(), "{name}");
                let mut other = long[..common].to_vec();
                other.extend((0..more).map(|i| 4 + i as u32 % 80));
                let want = (after(&mut fresh, &other).unwrap().0, reused);
                assert_eq!(after(&mut s, &other).unwrap(), want, "{name}: {common} of 1200 and {more}");
                // What was published for the first one is as it was.
                assert_eq!(after(&mut s, &long).unwrap().0, first.0, "{name}: after {common} and {more}");
                let blocks = s.gauges().blocks;
                assert_eq!((blocks.used, blocks.free + blocks.cached), (0, blocks.total), "{name}");
            }
        }
    }
}

/// Where room is short, snapshots are left out or thrown away, and answers are the same.
#[test]
fn little_room_changes_no_answer() {
    for name in MODELS {
        let e = engine(name);
        let store = BlockStore::new(&e.model().spec, e.kv_format(), usize::MAX);
        let prompts: Vec<Vec<u32>> = (0..6).map(|i| [text(40 * i + 3), vec![7 + i as u32; 90]].concat()).collect();
        let fresh: Vec<_> = prompts.iter().map(|p| after(&mut roomy(&e, 512, 512, false), p).unwrap().0).collect();
        for states in 1..5 {
            let blocks = 12 + states * store.state_blocks();
            let limits = Limits { batch: 3, prefill_rows: 50, kv_bytes: blocks * store.unit_bytes(), reuse: true };
            let mut s = Scheduler::new(Arc::clone(&e), tokenizer(), limits);
            for round in 0..2 {
                for (p, want) in prompts.iter().zip(&fresh) {
                    assert_eq!(after(&mut s, p).unwrap().0, *want, "{name} {states} {round}");
                }
            }
            let (bytes, total) = (s.gauges().kv_bytes, blocks * store.unit_bytes());
            assert!(bytes <= total, "{name}: {bytes} of {total}");
        }
        let limits = Limits { batch: 1, prefill_rows: 50, kv_bytes: store.unit_bytes(), reuse: true };
        let mut s = Scheduler::new(Arc::clone(&e), tokenizer(), limits);
        let refused = s.submit(1, Request::new(text(9), Job::Forced(vec![4])));
        assert!(refused.is_err(), "{name}: no room for a state");
    }
}

/// Eight texts that share beginnings, at once and one after the other.
#[test]
fn company_changes_nothing() {
    for name in MODELS {
        let e = engine(name);
        let prompts: Vec<Vec<u32>> =
            (0..8).map(|i| [text(60 * i + 1), vec![5 + i as u32; 3 * i + 1]].concat()).collect();
        let ask = |prompt: &Vec<u32>| {
            let prompt = prompt.clone();
            Request::generate(Generation { prompt, max_tokens: 12, ignore_end: true, ..Generation::default() })
        };
        let run = |s: &mut Scheduler, some: &[Vec<u32>]| {
            let mut said = vec![Vec::new(); some.len()];
            some.iter().enumerate().for_each(|(i, p)| s.submit(i as u64, ask(p)).unwrap());
            while !s.is_idle() {
                s.step(&mut |id, event| match event {
                    lacuna_run::Event::Finished(f) => said[id as usize] = f.ids,
                    lacuna_run::Event::Failed(e) => panic!("{e}"),
                    _ => {}
                });
            }
            said
        };
        let alone: Vec<Vec<u32>> =
            prompts.iter().map(|p| run(&mut roomy(&e, 512, 600, false), std::slice::from_ref(p)).remove(0)).collect();
        for rows in [5, 33, 512] {
            let mut s = roomy(&e, rows, 4000, true);
            assert_eq!(run(&mut s, &prompts), alone, "{name} in company, chunks of {rows}");
            assert_eq!(run(&mut s, &prompts), alone, "{name} once more");
        }
    }
}

#[test]
fn a_session_comes_back_to_a_conversation() {
    for name in MODELS {
        let e = engine(name);
        let go = |s: &mut Session, prompt: &[u32]| {
            let prompt = prompt.to_vec();
            let g = Generation { prompt, max_tokens: 9, ignore_end: true, ..Generation::default() };
            s.generate(&g, &mut |_| ControlFlow::Continue(())).unwrap()
        };
        let mut s = Session::new(Arc::clone(&e), tokenizer());
        let first = go(&mut s, &text(50));
        // Everything but the last token of the answer was read.
        let next = [text(50), first.tokens.clone(), vec![8, 9, 10]].concat();
        let second = go(&mut s, &next);
        assert_eq!(second.stats.reused_tokens, 58, "{name}");
        assert_eq!(second.tokens, go(&mut Session::new(Arc::clone(&e), tokenizer()), &next).tokens, "{name}");
        // Another beginning, and back.
        go(&mut s, &[4; 40]);
        assert_eq!(go(&mut s, &next).tokens, second.tokens, "{name}");
    }
}

#[test]
fn room_is_counted_with_states() {
    let e = engine("mamba2");
    let mut s = scheduler(Arc::clone(&e), 1, 16, 4, true);
    assert!(s.submit(1, Request::new(text(9), Job::Forced(vec![4]))).is_err(), "blocks of no bytes");
    assert_eq!(BlockStore::new(&e.model().spec, e.kv_format(), 1 << 20).total(), 256);
}
