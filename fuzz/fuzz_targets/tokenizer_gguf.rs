//! Tokenizers from GGUF metadata: any metadata give a tokenizer that encodes and decodes, or an error.
#![no_main]

use lacuna_checkpoint::{ChatTemplate, Tokenizer, gguf};
use libfuzzer_sys::fuzz_target;

const TEXT: &str = "Hello,  world! 12 caf\u{e9} \u{4f60}\u{597d} \u{1f600}\n\t<s> x_y";

// libFuzzer's hook ends the process at any panic; the reader catches those of the library beneath it and answers with
// an error. A panic that nobody catches still ends the process.
fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |data: &[u8]| {
    let Ok(file) = gguf::parse(data) else { return };
    let _ = ChatTemplate::from_gguf(&file.metadata);
    let Ok(tokenizer) = Tokenizer::from_gguf(&file.metadata) else { return };
    for special in [false, true] {
        if let Ok(ids) = tokenizer.encode(TEXT, special) {
            assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()), "{ids:?}");
            let _ = (tokenizer.decode(&ids), tokenizer.decode_with_special(&ids));
        }
    }
    // Ids that no text gave, one beyond the vocabulary among them.
    let mut decoder = tokenizer.decoder();
    for id in [0, 1, tokenizer.vocab_size() as u32, u32::MAX] {
        let _ = decoder.push(id);
    }
    let _ = decoder.finish();
});
