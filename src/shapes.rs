//! Shapes of published models, for clocks without their weights.

use lacuna_arch as arch;
use lacuna_spec::Spec;
use serde_json::{Value, json};

use crate::common::Usage;

/// Names and the configurations' numbers, as published.
fn all() -> [(&'static str, Value); 6] {
    let llama = |hidden: u32,
                 width: u32,
                 layers: u32,
                 heads: [u32; 2],
                 head_dim: u32,
                 vocab: u32,
                 tied: bool,
                 theta: f64| {
        json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": width,
            "num_hidden_layers": layers, "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": head_dim,
            "vocab_size": vocab, "tie_word_embeddings": tied, "rope_theta": theta, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192, "hidden_act": "silu",
        })
    };
    let mut qwen = llama(1024, 3072, 28, [16, 8], 128, 151_936, true, 1e6);
    qwen["model_type"] = json!("qwen3");
    qwen["architectures"] = json!(["Qwen3ForCausalLM"]);
    [
        ("llama-3.2-1b", llama(2048, 8192, 16, [32, 8], 64, 128_256, true, 5e5)),
        ("llama-3.2-3b", llama(3072, 8192, 28, [24, 8], 128, 128_256, true, 5e5)),
        ("llama-3.1-8b", llama(4096, 14_336, 32, [32, 8], 128, 128_256, false, 5e5)),
        ("qwen3-0.6b", qwen),
        ("smollm2-135m", llama(576, 1536, 30, [9, 3], 64, 49_152, true, 1e5)),
        ("smollm2-360m", llama(960, 2560, 32, [15, 5], 64, 49_152, true, 1e5)),
    ]
}

/// The network of that name.
pub fn spec(name: &str) -> anyhow::Result<Spec> {
    let all = all();
    match all.iter().find(|(n, _)| *n == name) {
        Some((_, config)) => Ok(arch::from_config(config)?),
        None => {
            let names: Vec<_> = all.iter().map(|(n, _)| *n).collect();
            Err(Usage(format!("no shape is called '{name}'; there are {}", names.join(", "))).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_is_a_network_of_its_size() {
        for (name, _) in all() {
            let spec = spec(name).unwrap();
            let weights: f64 =
                spec.places().iter().filter_map(|p| spec.shape(p)).map(|(r, c)| r as f64 * c as f64).sum();
            let said: f64 = name.rsplit('-').next().unwrap().trim_end_matches(['b', 'm']).parse().unwrap();
            let said = if name.ends_with('m') { said * 1e6 } else { said * 1e9 };
            assert!((weights / said - 1.0).abs() < 0.3, "{name}: {weights}");
        }
        assert!(spec("llama-9").unwrap_err().to_string().contains("llama-3.2-1b"));
    }
}
