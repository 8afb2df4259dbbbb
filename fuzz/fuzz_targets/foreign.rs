//! Checkpoints of other tools: any quantization_config with any safetensors gives a model whose every tensor decodes,
//! or an error.
//!
//! Four bytes say how long the quantization_config is; it follows, and the rest is model.safetensors. The network
//! around it is that of the golden checkpoints. What names no method is MLX's `quantization`.
#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;

use lacuna_checkpoint::{Found, examine, open};
use lacuna_format::Weights;
use libfuzzer_sys::fuzz_target;

/// Larger matrices are opened and checked, not decoded: a header of a few bytes may name many zeros.
const MOST_VALUES: usize = 1 << 16;

/// The two networks of the golden checkpoints.
const CONFIGS: [&str; 2] = [
    r#"{"model_type":"llama","vocab_size":64,"hidden_size":32,"intermediate_size":64,"num_hidden_layers":1,"num_attention_heads":2,
"num_key_value_heads":1,"head_dim":16,"max_position_embeddings":64,"tie_word_embeddings":true,"quantization_config":"#,
    r#"{"model_type":"llama","vocab_size":64,"hidden_size":64,"intermediate_size":384,"num_hidden_layers":1,"num_attention_heads":4,
"num_key_value_heads":4,"head_dim":16,"max_position_embeddings":64,"tie_word_embeddings":true,"quantization_config":"#,
];

fuzz_target!(|data: &[u8]| {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    let dir = DIR.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("lacuna-fuzz-foreign-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a scratch folder");
        dir
    });
    let Some((length, rest)) = data.split_first_chunk::<4>() else { return };
    let Some((config, tensors)) = rest.split_at_checked(u32::from_le_bytes(*length) as usize) else { return };
    std::fs::write(dir.join("model.safetensors"), tensors).expect("written");
    let named = |word: &[u8]| config.windows(word.len()).any(|w| w == word);
    let mlx = !named(b"quant_method") && named(b"group_size");
    for network in CONFIGS {
        let network = if mlx { network.replace("quantization_config", "quantization") } else { network.to_owned() };
        std::fs::write(dir.join("config.json"), [network.as_bytes(), config, b"}"].concat()).expect("written");
        let _ = examine(dir);
        let Ok(model) = open(dir) else { continue };
        for place in model.spec().places() {
            if let Ok(Some(stored)) = model.get(&place)
                && stored.rows.saturating_mul(stored.cols) <= MOST_VALUES
            {
                let _ = (stored.to_mat(), stored.bytes(), Found::of(&stored));
            }
        }
    }
});
