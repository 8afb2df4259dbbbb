//! Tiny checkpoints and their tokenizer.

// Each test program uses its own part.
#![allow(dead_code)]

use std::path::Path;
use std::sync::Arc;

use lacuna_checkpoint::{TokenKind, Tokenizer, Vocabulary};
use lacuna_model::{Decoder, LoadOptions};
use lacuna_run::{BlockStore, Engine, Event, Generation, Job, Limits, Request, Scheduler};

pub fn engine(name: &str) -> Engine {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny").join(name);
    let checkpoint = lacuna_checkpoint::open(dir).unwrap();
    Engine::new(Decoder::load(&checkpoint, &LoadOptions::default()).unwrap())
}

/// 96 tokens, one for each id of the tiny models: three special ones, a line's end, and printable characters.
pub fn tokenizer() -> Tokenizer {
    let mut tokens: Vec<String> = ["<|begin|>", "<|im_start|>", "<|im_end|>", "Ċ", "Ġ"].map(String::from).to_vec();
    tokens.extend(('!'..='~').map(String::from).take(91));
    let kinds = (0..96).map(|id| if id < 3 { TokenKind::Control } else { TokenKind::Normal }).collect();
    let v = Vocabulary {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        tokens,
        kinds,
        bos: Some(0),
        eos: Some(2),
        ..Vocabulary::default()
    };
    Tokenizer::from_vocabulary(v).unwrap()
}

/// A scheduler with room for `blocks` blocks.
pub fn scheduler(
    e: impl Into<Arc<Engine>>,
    batch: usize,
    prefill_rows: usize,
    blocks: usize,
    reuse: bool,
) -> Scheduler {
    let e = e.into();
    let kv_bytes = blocks * BlockStore::new(&e.model().spec, e.kv_format(), usize::MAX).block_bytes();
    Scheduler::new(e, tokenizer(), Limits { batch, prefill_rows, kv_bytes, reuse })
}

/// What follows a text: every token's log probability, by id; and how many of the text's tokens were reused.
pub fn after(s: &mut Scheduler, text: &[u32]) -> Result<(Vec<(u32, f32)>, usize), String> {
    let vocab = s.engine().model().spec.vocab;
    let generation = Generation { max_tokens: 1, ignore_end: true, ..Generation::default() };
    let job = Job::Generate { generation, logprobs: Some(vocab), grammar: None, special: false };
    s.submit(0, Request::new(text.to_vec(), job)).map_err(|e| e.to_string())?;
    let (mut all, mut reused) = (Vec::new(), 0);
    while !s.is_idle() {
        let mut failed = None;
        s.step(&mut |_, event| match event {
            Event::Text { tokens, .. } => all.extend(tokens.into_iter().filter_map(|t| t.probability)),
            Event::Finished(f) => reused = f.reused_tokens,
            other => failed = Some(format!("{other:?}")),
        });
        failed.map_or(Ok(()), Err)?;
    }
    let mut top = all.pop().ok_or("no token")?.top;
    top.sort_unstable_by_key(|t| t.0);
    assert_eq!(top.len(), vocab);
    Ok((top, reused))
}
