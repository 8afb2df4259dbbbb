//! What a config.json means by what it leaves out: the defaults of transformers' configuration classes, class by class,
//! and the second names that they answer to. `tests/golden/defaults.json` holds what the classes themselves say.

use serde_json::{Value, json};

use super::config::bad;
use lacuna_spec::SpecError;

/// The configuration with every key that is read and absent at its class's default. An explicit null stays: it is a
/// value of its own.
///
/// A null here: absent means derived from other keys (`num_key_value_heads` of Llama), or none.
pub(super) fn filled(config: &Value, class: &str) -> Result<Value, SpecError> {
    let mut out = match config {
        Value::Object(o) => o.clone(),
        other => return bad(format!("{other} is no object")),
    };
    for (name, other) in second_names(class) {
        if let Some(v) = out.remove(*other) {
            // Told here, by the name that the file has.
            if !(v.is_u64() || v.is_null()) {
                return bad(format!("{other} is {v}, not a whole number"));
            }
            out.insert((*name).into(), v);
        }
    }
    if let Value::Object(defaults) = defaults(class) {
        for (key, v) in defaults {
            out.entry(key).or_insert(v);
        }
    }
    Ok(Value::Object(out))
}

/// A class's key and its second name, which wins where both stand.
fn second_names(class: &str) -> &'static [(&'static str, &'static str)] {
    match class {
        // transformers 5 writes this class's experts under Mixtral's name, and nothing under its own.
        "qwen3_moe" => &[("num_experts", "num_local_experts")],
        "mixtral" => &[("num_local_experts", "num_experts")],
        "gpt2" => &[
            ("n_embd", "hidden_size"),
            ("n_positions", "max_position_embeddings"),
            ("n_head", "num_attention_heads"),
            ("n_layer", "num_hidden_layers"),
        ],
        _ => &[],
    }
}

fn defaults(class: &str) -> Value {
    match class {
        "llama" => json!({
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": null, "head_dim": null, "hidden_act": "silu",
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "rope_theta": 1e4,
            "attention_bias": false, "mlp_bias": false,
        }),
        "mistral" => json!({
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": null, "hidden_act": "silu",
            "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "rope_theta": 1e4,
            "sliding_window": 4096,
        }),
        "mixtral" => json!({
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": null, "hidden_act": "silu",
            "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "tie_word_embeddings": false, "rope_theta": 1e6,
            "sliding_window": null, "num_local_experts": 8, "num_experts_per_tok": 2,
        }),
        "qwen2" => json!({
            "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu",
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "rope_theta": 1e4,
            "use_sliding_window": false, "sliding_window": 4096, "max_window_layers": 28, "layer_types": null,
        }),
        "qwen3" => json!({
            "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "hidden_act": "silu",
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "rope_theta": 1e4,
            "use_sliding_window": false, "sliding_window": 4096, "max_window_layers": 28, "layer_types": null,
            "attention_bias": false,
        }),
        "qwen3_moe" => json!({
            "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
            "num_attention_heads": 32, "num_key_value_heads": 4, "hidden_act": "silu",
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "rope_theta": 1e4,
            "use_sliding_window": false, "sliding_window": 4096, "attention_bias": false, "num_experts": 128,
            "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": false, "decoder_sparse_step": 1,
            "mlp_only_layers": null,
        }),
        "gemma2" => json!({
            "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": true, "rope_theta": 1e4, "attention_bias": false, "query_pre_attn_scalar": 256,
            "sliding_window": 4096, "layer_types": null, "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        }),
        "gemma3" => json!({
            "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": true, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "attention_bias": false,
            "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 6, "layer_types": null,
            "final_logit_softcapping": null,
        }),
        "phi3" => json!({
            "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": null, "hidden_act": "silu",
            "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": false, "rope_theta": 1e4, "partial_rotary_factor": 1.0, "sliding_window": null,
        }),
        "gpt2" => json!({
            "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": null,
            "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": true,
            "scale_attn_by_inverse_layer_idx": false, "add_cross_attention": false, "tie_word_embeddings": true,
        }),
        "opt" => json!({
            "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072,
            "max_position_embeddings": 2048, "num_attention_heads": 12, "word_embed_proj_dim": null,
            "do_layer_norm_before": true, "layer_norm_elementwise_affine": true, "enable_bias": true,
            "activation_function": "relu", "_remove_final_layer_norm": false, "tie_word_embeddings": true,
        }),
        "lfm2" => json!({
            "vocab_size": 65536, "hidden_size": 2560, "intermediate_size": 12288, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 128_000, "norm_eps": 1e-5,
            "tie_word_embeddings": true, "rope_theta": 1e6, "conv_bias": false, "conv_L_cache": 3,
            "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": true,
            "full_attn_idxs": null, "layer_types": null,
        }),
        "qwen3_next" => json!({
            "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 48,
            "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "hidden_act": "silu",
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "rope_theta": 1e4,
            "partial_rotary_factor": 0.25, "attention_bias": false, "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
            "linear_num_value_heads": 32, "decoder_sparse_step": 1, "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512, "num_experts_per_tok": 10, "num_experts": 512,
            "norm_topk_prob": true, "mlp_only_layers": null, "layer_types": null,
        }),
        "qwen3_5" => json!({
            "vocab_size": 248_320, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
            "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "hidden_act": "silu",
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "rope_theta": 1e4,
            "partial_rotary_factor": 0.25, "attention_bias": false, "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
            "linear_num_value_heads": 32, "layer_types": null,
        }),
        "mamba2" => json!({
            "num_heads": 128, "head_dim": 64, "vocab_size": 32768, "hidden_size": 4096, "state_size": 128,
            "num_hidden_layers": 64, "layer_norm_epsilon": 1e-5, "expand": 2, "conv_kernel": 4, "n_groups": 8,
            "use_bias": false, "use_conv_bias": true, "hidden_act": "silu", "tie_word_embeddings": false,
        }),
        "bamba" => json!({
            "vocab_size": 128_000, "tie_word_embeddings": false, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu",
            "rms_norm_eps": 1e-5, "max_position_embeddings": 262_144, "attn_layer_indices": null, "rope_theta": 1e4,
            "mamba_n_heads": 128, "mamba_d_head": "auto", "mamba_n_groups": 1, "mamba_d_state": 256,
            "mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": true, "mamba_proj_bias": false,
            "attention_bias": false, "mlp_bias": false,
        }),
        _ => Value::Null,
    }
}
