//! What only a scheduler's inside can show.

use std::path::Path;

use lacuna_checkpoint::Vocabulary;
use lacuna_model::{Decoder, LoadOptions};

use super::*;
use crate::{Generation, Grammar, Picked, Sampling};

/// 20 texts on the tiny llama, drawn and greedy, with probabilities, penalties and a grammar among them.
fn run(choice_cost: usize) -> (Vec<Vec<Picked>>, Vec<Stop>) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny/llama");
    let model = Decoder::load(&lacuna_checkpoint::open(dir).unwrap(), &LoadOptions::default()).unwrap();
    let v = Vocabulary {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        tokens: (0..96u8).map(|id| char::from(b'!' + id % 94).to_string().repeat(1 + usize::from(id / 94))).collect(),
        eos: Some(2),
        ..Vocabulary::default()
    };
    let limits = Limits { batch: 20, prefill_rows: 64, kv_bytes: 1 << 24, reuse: true };
    let mut s = Scheduler::new(Engine::new(model), Tokenizer::from_vocabulary(v).unwrap(), limits);
    s.choice_cost = choice_cost;
    for id in 0..20u64 {
        let drawn = Sampling { temperature: 0.8, top_p: 0.9, frequency_penalty: 0.2, seed: id, ..Sampling::default() };
        let sampling = if id % 3 == 0 { Sampling::default() } else { drawn };
        let generation =
            Generation { max_tokens: 5 + id as usize, sampling, ignore_end: id % 2 == 0, ..Generation::default() };
        let grammar: Option<Box<dyn Grammar>> = if id % 5 == 4 { Some(Box::new(Odd)) } else { None };
        let job = Job::Generate { generation, logprobs: (id % 4 == 1).then_some(3), grammar, special: false };
        s.submit(id, Request::new((3..4 + 2 * id as u32).collect(), job)).unwrap();
    }
    let (mut tokens, mut stops) = (vec![Vec::new(); 20], vec![Stop::Caller; 20]);
    while !s.is_idle() {
        s.step(&mut |id, event| match event {
            Event::Text { tokens: some, .. } => tokens[id as usize].extend(some),
            Event::Finished(f) => stops[id as usize] = f.stop,
            other => panic!("{id}: {other:?}"),
        });
    }
    (tokens, stops)
}

struct Odd;

impl Grammar for Odd {
    fn allowed(&mut self) -> Result<&[u32], RunError> {
        Ok(&[0xaaaa_aaaa; 3])
    }
    fn accept(&mut self, _: u32) -> Result<bool, RunError> {
        Ok(false)
    }
}

#[test]
fn texts_choose_side_by_side_what_they_choose_one_after_the_other() {
    let (tokens, stops) = run(usize::MAX);
    assert!(tokens.iter().all(|t| !t.is_empty()) && !stops.contains(&Stop::Caller));
    assert!(tokens[4].iter().all(|t| t.id % 2 == 1) && tokens[1].iter().all(|t| t.probability.is_some()));
    assert_eq!(run(0), (tokens, stops));
}
