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
        "mixtral" | "gpt_oss" => &[("num_local_experts", "num_experts")],
        "glm4_moe" | "deepseek_v3" => &[("n_routed_experts", "num_local_experts")],
        "deepseek_v2" => &[("n_routed_experts", "num_experts")],
        "gptj" => &[
            ("n_embd", "hidden_size"),
            ("n_positions", "max_position_embeddings"),
            ("n_head", "num_attention_heads"),
            ("n_layer", "num_hidden_layers"),
        ],
        "jamba" => &[("num_experts", "num_local_experts")],
        "mpt" => &[("d_model", "hidden_size"), ("n_heads", "num_attention_heads"), ("n_layers", "num_hidden_layers")],
        "bloom" => &[("n_head", "num_attention_heads"), ("n_layer", "num_hidden_layers")],
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
        "qwen2_moe" => json!({
            "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
            "num_attention_heads": 16, "num_key_value_heads": 16, "hidden_act": "silu",
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "rope_theta": 1e4,
            "use_sliding_window": false, "layer_types": null, "qkv_bias": true, "num_experts": 60,
            "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
            "norm_topk_prob": false, "decoder_sparse_step": 1, "mlp_only_layers": null,
        }),
        "gpt_oss" => json!({
            "vocab_size": 201_088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "hidden_act": "silu",
            "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
            "rope_theta": 150_000.0, "attention_bias": true, "sliding_window": 128, "layer_types": null,
            "num_local_experts": 128, "num_experts_per_tok": 4, "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
        }),
        "glm4_moe" => json!({
            "vocab_size": 151_552, "hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46,
            "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": null, "hidden_act": "silu",
            "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "tie_word_embeddings": false, "rope_theta": 1e4,
            "partial_rotary_factor": 0.5, "attention_bias": false, "use_qk_norm": false, "moe_intermediate_size": 1408,
            "num_experts_per_tok": 8, "n_shared_experts": 1, "n_routed_experts": 128, "routed_scaling_factor": 1.0,
            "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": true,
        }),
        "deepseek_v2" => json!({
            "vocab_size": 102_400, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": null, "hidden_act": "silu",
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "rope_theta": 1e4,
            "attention_bias": false, "mlp_bias": false, "first_k_dense_replace": 0, "kv_lora_rank": 512,
            "q_lora_rank": 1536, "n_group": null, "n_routed_experts": 64, "n_shared_experts": 2,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "routed_scaling_factor": 1.0, "topk_group": null,
            "topk_method": "greedy", "norm_topk_prob": false, "v_head_dim": 128, "moe_intermediate_size": 1407,
        }),
        "deepseek_v3" => json!({
            "vocab_size": 129_280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
            "num_attention_heads": 128, "num_key_value_heads": 128, "hidden_act": "silu",
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "rope_theta": 1e4,
            "attention_bias": false, "moe_intermediate_size": 2048, "n_shared_experts": 1, "n_routed_experts": 256,
            "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
            "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
            "first_k_dense_replace": 3, "norm_topk_prob": true, "rope_interleave": true,
        }),
        "ernie4_5_moe" => json!({
            "vocab_size": 103_424, "hidden_size": 2560, "intermediate_size": 12288, "num_hidden_layers": 28,
            "num_attention_heads": 20, "num_key_value_heads": 4, "head_dim": null, "hidden_act": "silu",
            "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
            "rope_theta": 500_000.0, "use_bias": false, "moe_intermediate_size": 1536, "moe_k": 6,
            "moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": -1,
            "moe_layer_interval": 1,
        }),
        "olmoe" => json!({
            "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16,
            "num_attention_heads": 16, "num_key_value_heads": null, "hidden_act": "silu",
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": false, "rope_theta": 1e4,
            "attention_bias": false, "clip_qkv": null, "num_experts_per_tok": 8, "num_experts": 64,
            "norm_topk_prob": false,
        }),
        "granitemoe" => json!({
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": null, "hidden_act": "silu",
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "rope_theta": 1e4,
            "attention_bias": false, "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0,
            "attention_multiplier": 1.0, "num_local_experts": 8, "num_experts_per_tok": 2,
        }),
        "hunyuan_v1_moe" => json!({
            "vocab_size": 290_943, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": null, "head_dim": null, "hidden_act": "silu",
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": false, "rope_theta": 1e4,
            "attention_bias": false, "num_experts": 1, "moe_topk": 1,
        }),
        "minicpm3" => json!({
            "vocab_size": 73448, "hidden_size": 2560, "intermediate_size": 6400, "num_hidden_layers": 62,
            "num_attention_heads": 40, "num_key_value_heads": null, "hidden_act": "silu",
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "rope_theta": 1e4,
            "attention_bias": false, "mlp_bias": false, "kv_lora_rank": 256, "q_lora_rank": 768,
            "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": null, "scale_emb": 12, "scale_depth": 1.4,
            "dim_model_base": 256,
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
        "olmo" => json!({
            "vocab_size": 50304, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": null, "hidden_act": "silu",
            "max_position_embeddings": 2048, "tie_word_embeddings": false, "rope_theta": 1e4,
            "attention_bias": false, "clip_qkv": null,
        }),
        "olmo2" => json!({
            "vocab_size": 50304, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": null, "hidden_act": "silu",
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": false, "rope_theta": 1e4,
            "attention_bias": false,
        }),
        "olmo3" => json!({
            "vocab_size": 50304, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": null, "hidden_act": "silu",
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": false, "rope_theta": 5e5,
            "attention_bias": false, "sliding_window": 4096, "layer_types": null,
        }),
        "smollm3" => json!({
            "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_act": "silu",
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": true, "rope_theta": 2e6,
            "use_sliding_window": false, "sliding_window": null, "no_rope_layers": null, "no_rope_layer_interval": 4,
            "layer_types": null, "attention_bias": false, "mlp_bias": false,
        }),
        "glm" | "glm4" => json!({
            "vocab_size": 151_552, "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40,
            "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "hidden_act": "silu",
            "max_position_embeddings": 131_072, "rms_norm_eps": 1.5625e-7, "tie_word_embeddings": false,
            "rope_theta": 1e4, "partial_rotary_factor": 0.5, "attention_bias": true,
        }),
        "granite" => json!({
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": null, "hidden_act": "silu",
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "rope_theta": 1e4,
            "attention_bias": false, "mlp_bias": false, "embedding_multiplier": 1.0, "logits_scaling": 1.0,
            "residual_multiplier": 1.0, "attention_multiplier": 1.0,
        }),
        "cohere" => json!({
            "vocab_size": 256_000, "hidden_size": 8192, "intermediate_size": 22528, "num_hidden_layers": 40,
            "num_attention_heads": 64, "num_key_value_heads": null, "hidden_act": "silu",
            "max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "tie_word_embeddings": true, "rope_theta": 5e5,
            "attention_bias": false, "use_qk_norm": false, "logit_scale": 0.0625,
        }),
        "cohere2" => json!({
            "vocab_size": 256_000, "hidden_size": 8192, "intermediate_size": 22528, "num_hidden_layers": 40,
            "num_attention_heads": 64, "num_key_value_heads": null, "hidden_act": "silu",
            "max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "tie_word_embeddings": true, "rope_theta": 1e4,
            "attention_bias": false, "logit_scale": 0.0625, "sliding_window": 4096, "layer_types": null,
            "sliding_window_pattern": 4,
        }),
        "exaone4" => json!({
            "vocab_size": 102_400, "hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu",
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": false, "rope_theta": 1e4,
            "sliding_window": 4096, "sliding_window_pattern": 4, "layer_types": null,
        }),
        "seed_oss" => json!({
            "vocab_size": 155_136, "hidden_size": 4096, "intermediate_size": 27648, "num_hidden_layers": 64,
            "num_attention_heads": 80, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu",
            "max_position_embeddings": 524_288, "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "rope_theta": 1e4,
            "attention_bias": true, "attention_out_bias": false, "mlp_bias": false,
        }),
        "ministral3" => json!({
            "vocab_size": 131_072, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 34,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu",
            "max_position_embeddings": 262_144, "rms_norm_eps": 1e-5, "tie_word_embeddings": false, "rope_theta": 1e4,
            "sliding_window": null,
        }),
        "ernie4_5" => json!({
            "vocab_size": 103_424, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 18,
            "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128, "hidden_act": "silu",
            "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "rope_theta": 5e5,
            "use_bias": false,
        }),
        "hunyuan_v1_dense" => json!({
            "vocab_size": 290_943, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": null, "head_dim": null, "hidden_act": "silu",
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": false, "rope_theta": 1e4,
            "attention_bias": false,
        }),
        "phi" => json!({
            "vocab_size": 51200, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
            "num_attention_heads": 32, "num_key_value_heads": null, "hidden_act": "gelu_new",
            "max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "tie_word_embeddings": false, "rope_theta": 1e4,
            "partial_rotary_factor": 0.5, "qk_layernorm": false,
        }),
        "starcoder2" => json!({
            "vocab_size": 49152, "hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 30,
            "num_attention_heads": 24, "num_key_value_heads": 2, "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 4096, "norm_epsilon": 1e-5, "tie_word_embeddings": true, "rope_theta": 1e4,
            "sliding_window": null, "use_bias": true,
        }),
        "stablelm" => json!({
            "vocab_size": 50304, "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu",
            "max_position_embeddings": 4096, "layer_norm_eps": 1e-5, "tie_word_embeddings": false, "rope_theta": 1e4,
            "partial_rotary_factor": 0.25, "use_qkv_bias": false, "qk_layernorm": false,
            "use_parallel_residual": false,
        }),
        "nemotron" => json!({
            "vocab_size": 256_000, "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 32,
            "num_attention_heads": 48, "num_key_value_heads": null, "head_dim": null, "hidden_act": "relu2",
            "max_position_embeddings": 4096, "norm_eps": 1e-5, "tie_word_embeddings": false, "rope_theta": 1e4,
            "partial_rotary_factor": 0.5, "attention_bias": false, "mlp_bias": false,
        }),
        "gemma" => json!({
            "vocab_size": 256_000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "tie_word_embeddings": true, "rope_theta": 1e4,
            "attention_bias": false, "use_bidirectional_attention": null,
        }),
        "gpt_neox" => json!({
            "vocab_size": 50432, "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44,
            "num_attention_heads": 64, "hidden_act": "gelu", "max_position_embeddings": 2048, "layer_norm_eps": 1e-5,
            "tie_word_embeddings": false, "rotary_emb_base": 1e4, "rotary_pct": 0.25, "use_parallel_residual": true,
            "attention_bias": true,
        }),
        "falcon" => json!({
            "vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
            "num_ln_in_parallel_attn": null, "layer_norm_epsilon": 1e-5, "num_kv_heads": null, "alibi": false,
            "new_decoder_architecture": false, "multi_query": true, "parallel_attn": true, "bias": false,
            "max_position_embeddings": 2048, "rope_theta": 1e4, "ffn_hidden_size": null, "activation": "gelu",
            "tie_word_embeddings": true, "n_embed": null,
        }),
        "helium" => json!({
            "vocab_size": 48000, "hidden_size": 2560, "intermediate_size": 7040, "num_hidden_layers": 24,
            "num_attention_heads": 20, "num_key_value_heads": 20, "head_dim": 128, "hidden_act": "silu",
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-8, "tie_word_embeddings": false, "rope_theta": 1e5,
            "attention_bias": false, "mlp_bias": false,
        }),
        "apertus" => json!({
            "vocab_size": 131_072, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": null, "hidden_act": "xielu",
            "max_position_embeddings": 65536, "rms_norm_eps": 1e-5, "tie_word_embeddings": false, "rope_theta": 12e6,
            "attention_bias": false,
        }),
        "gptj" => json!({
            "vocab_size": 50400, "n_positions": 2048, "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64,
            "n_inner": null, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": false,
        }),
        "bloom" => json!({
            "vocab_size": 250_880, "hidden_size": 64, "n_embed": null, "n_layer": 2, "n_head": 8, "seq_length": 2048,
            "layer_norm_epsilon": 1e-5, "apply_residual_connection_post_layernorm": false,
            "tie_word_embeddings": true,
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
        "qwen3_5_moe" => json!({
            "vocab_size": 248_320, "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16,
            "num_key_value_heads": 2, "head_dim": 256, "hidden_act": "silu", "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "rope_theta": 1e4, "partial_rotary_factor": 0.25,
            "attention_bias": false, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
            "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
            "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_experts_per_tok": 8,
            "num_experts": 256, "layer_types": null,
        }),
        "llama4" => json!({
            "vocab_size": 202_048, "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
            "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
            "hidden_act": "silu", "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": false, "rope_theta": 5e5, "num_experts_per_tok": 1, "num_local_experts": 16,
            "moe_layers": null, "interleave_moe_layer_step": 1, "use_qk_norm": true, "no_rope_layers": null,
            "no_rope_layer_interval": 4, "attention_chunk_size": 8192, "layer_types": null,
            "attn_temperature_tuning": true, "floor_scale": 8192, "attn_scale": 0.1, "attention_bias": false,
        }),
        "gemma3n" => json!({
            "vocab_size": 262_400, "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 35,
            "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": true, "attention_bias": false, "sliding_window": 512, "layer_types": null,
            "final_logit_softcapping": 30.0, "vocab_size_per_layer_input": 262_144,
            "hidden_size_per_layer_input": 256, "altup_active_idx": 0, "altup_correct_scale": true,
            "altup_num_inputs": 4, "num_kv_shared_layers": 15, "laurel_rank": 64,
            "activation_sparsity_pattern": null, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        }),
        "gemma4" => json!({
            "vocab_size": 262_144, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 30,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": true, "attention_bias": false, "sliding_window": 512, "layer_types": null,
            "final_logit_softcapping": null, "use_bidirectional_attention": null,
            "vocab_size_per_layer_input": 262_144, "hidden_size_per_layer_input": 256, "attention_k_eq_v": false,
            "num_kv_shared_layers": 0, "enable_moe_block": false, "use_double_wide_mlp": false, "num_experts": null,
            "top_k_experts": null, "moe_intermediate_size": null, "rope_local_base_freq": 1e4,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
            },
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
        "granitemoehybrid" => json!({
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": null, "hidden_act": "silu",
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "rope_theta": 1e4,
            "attention_bias": false, "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0,
            "attention_multiplier": 1.0, "num_local_experts": 8, "num_experts_per_tok": 2,
            "shared_intermediate_size": 1024, "position_embedding_type": null, "layer_types": null,
            "mamba_n_heads": 128, "mamba_d_head": "auto", "mamba_n_groups": 1, "mamba_d_state": 256,
            "mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": true, "mamba_proj_bias": false,
        }),
        "falcon_h1" => json!({
            "vocab_size": 128_000, "tie_word_embeddings": false, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu",
            "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "rope_theta": 1e4, "mamba_d_ssm": 1024,
            "mamba_n_heads": 128, "mamba_d_head": "auto", "mamba_n_groups": 1, "mamba_d_state": 256,
            "mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": true, "mamba_proj_bias": false,
            "mamba_norm_before_gate": true, "mamba_rms_norm": false, "projectors_bias": false,
            "lm_head_multiplier": 1.0, "embedding_multiplier": 1.0, "mlp_multipliers": null, "key_multiplier": 1.0,
            "attention_out_multiplier": 1.0, "attention_in_multiplier": 1.0, "ssm_multipliers": null,
            "ssm_in_multiplier": 1.0, "ssm_out_multiplier": 1.0, "attention_bias": false, "mlp_bias": false,
        }),
        "jamba" => json!({
            "vocab_size": 65536, "tie_word_embeddings": false, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu",
            "rms_norm_eps": 1e-6, "max_position_embeddings": 262_144, "rope_theta": 1e4, "num_experts_per_tok": 2,
            "num_experts": 16, "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 8,
            "attn_layer_offset": 4, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": "auto",
            "mamba_conv_bias": true, "mamba_proj_bias": false,
        }),
        "mpt" => json!({
            "vocab_size": 50368, "d_model": 2048, "n_layers": 24, "n_heads": 16, "expansion_ratio": 4,
            "max_seq_len": 2048, "layer_norm_epsilon": 1e-5, "no_bias": true, "logit_scale": null,
            "attn_config": null, "tie_word_embeddings": true,
        }),
        _ => Value::Null,
    }
}
