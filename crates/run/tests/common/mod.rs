//! Tiny checkpoints and their tokenizer.

use std::path::Path;

use lacuna_checkpoint::{TokenKind, Tokenizer, Vocabulary};
use lacuna_model::{Decoder, LoadOptions};
use lacuna_run::Engine;

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
