//! Random models of any family with a real tokenizer, and what a decoder says about them.

// Each of the test programs that share this file uses its own part of it.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use lacuna_arch as arch;
use lacuna_base::Rng;
use lacuna_checkpoint::open;
use lacuna_format::Weights;
use lacuna_kernels::Activations;
use lacuna_model::{Batch, ContiguousKv, Decoder, LoadOptions, NoTap};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

/// A golden folder.
pub fn golden(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(folder)
}

/// Configurations whose networks llama.cpp computes, too. Dimensions are such that blocks of 256 fit, but for one.
pub fn families() -> Vec<(&'static str, Value)> {
    let with = |more: Value| {
        let mut c = json!({
            "vocab_size": 603, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2,
        });
        more.as_object().unwrap().iter().for_each(|(k, v)| c[k] = v.clone());
        c
    };
    let gemma = json!({
        "model_type": "gemma3_text", "num_hidden_layers": 7, "tie_word_embeddings": true, "query_pre_attn_scalar": 64, "sliding_window": 16,
        "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "hidden_activation": "gelu_pytorch_tanh",
    });
    let gemma2 = json!({
        "model_type": "gemma2", "tie_word_embeddings": true, "query_pre_attn_scalar": 64, "sliding_window": 64,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh",
    });
    // Families whose files name other keys.
    let other = |drop: &[&str], more: Value| {
        let mut c = with(more);
        drop.iter().for_each(|key| _ = c.as_object_mut().unwrap().remove(*key));
        c
    };
    let behind = |key: &str, more: Value| {
        let mut c = other(&["rms_norm_eps"], more);
        c[key] = json!(1e-5);
        c
    };
    let (full, sliding) = ("full_attention", "sliding_attention");
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64});
    vec![
        ("llama", with(json!({"model_type": "llama"}))),
        (
            "llama3",
            with(
                json!({"model_type": "llama", "tie_word_embeddings": true, "rope_theta": 500000.0, "rope_scaling": llama3}),
            ),
        ),
        (
            "llama_odd",
            with(json!({"model_type": "llama", "hidden_size": 288, "num_attention_heads": 3, "num_key_value_heads": 1,
            "head_dim": 96, "intermediate_size": 512})),
        ),
        ("mistral", with(json!({"model_type": "mistral", "sliding_window": null}))),
        ("mixtral", with(json!({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}))),
        ("qwen2", with(json!({"model_type": "qwen2"}))),
        ("qwen3", with(json!({"model_type": "qwen3"}))),
        ("gemma2", with(gemma2)),
        ("gemma3", with(gemma)),
        (
            "gemma4",
            with(
                json!({"model_type": "gemma4_text", "num_hidden_layers": 6, "tie_word_embeddings": true, "sliding_window": 16,
            "global_head_dim": 128, "num_kv_shared_layers": 2, "use_double_wide_mlp": true, "hidden_size_per_layer_input": 64,
            "vocab_size_per_layer_input": 603, "layer_types": [sliding, sliding, full, sliding, sliding, full]}),
            ),
        ),
        (
            "gemma4_moe",
            with(
                json!({"model_type": "gemma4_text", "num_hidden_layers": 3, "tie_word_embeddings": true, "sliding_window": 16,
            "global_head_dim": 128, "hidden_size_per_layer_input": 0, "attention_k_eq_v": true,
            "num_global_key_value_heads": 1, "enable_moe_block": true, "num_experts": 4, "top_k_experts": 2,
            "moe_intermediate_size": 256, "layer_types": [sliding, sliding, full]}),
            ),
        ),
        (
            "gemma3n",
            with(
                json!({"model_type": "gemma3n_text", "num_hidden_layers": 5, "tie_word_embeddings": true, "sliding_window": 16,
            "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 603,
            "activation_sparsity_pattern": [0.95, 0.95, 0.95, 0.95, 0.95]}),
            ),
        ),
        (
            "llama4",
            with(json!({"model_type": "llama4_text", "num_hidden_layers": 4, "intermediate_size": 256,
            "intermediate_size_mlp": 512, "num_local_experts": 4, "interleave_moe_layer_step": 2})),
        ),
        ("phi3", with(json!({"model_type": "phi3", "pad_token_id": 0}))),
        (
            "gpt2",
            json!({"model_type": "gpt2", "vocab_size": 603, "n_positions": 512, "n_embd": 256, "n_layer": 2, "n_head": 4,
            "n_inner": 512, "bos_token_id": 0, "eos_token_id": 0}),
        ),
        ("olmo", other(&["rms_norm_eps"], json!({"model_type": "olmo", "clip_qkv": 1.5}))),
        ("olmo2", with(json!({"model_type": "olmo2"}))),
        (
            "olmo3",
            with(json!({"model_type": "olmo3", "num_hidden_layers": 5, "sliding_window": 16, "rope_theta": 500000.0,
            "layer_types": [sliding, sliding, sliding, full, sliding]})),
        ),
        ("smollm3", with(json!({"model_type": "smollm3", "num_hidden_layers": 5}))),
        ("glm", with(json!({"model_type": "glm", "partial_rotary_factor": 0.5}))),
        ("glm4", with(json!({"model_type": "glm4", "partial_rotary_factor": 0.5, "num_hidden_layers": 2}))),
        (
            "granite",
            with(json!({"model_type": "granite", "embedding_multiplier": 6.0, "residual_multiplier": 0.4,
            "attention_multiplier": 0.0625, "logits_scaling": 2.0})),
        ),
        (
            "cohere",
            behind("layer_norm_eps", json!({"model_type": "cohere", "tie_word_embeddings": true, "logit_scale": 0.5})),
        ),
        (
            "cohere2",
            behind(
                "layer_norm_eps",
                json!({"model_type": "cohere2", "tie_word_embeddings": true, "logit_scale": 0.5,
            "num_hidden_layers": 5, "sliding_window": 16}),
            ),
        ),
        ("exaone4", with(json!({"model_type": "exaone4", "sliding_window": null, "layer_types": [full, full, full]}))),
        ("seed_oss", with(json!({"model_type": "seed_oss", "attention_bias": true}))),
        (
            "ministral3",
            with(json!({"model_type": "ministral3", "rope_parameters": {"rope_type": "yarn",
            "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32.0, "beta_slow": 1.0,
            "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}})),
        ),
        ("ernie4_5", with(json!({"model_type": "ernie4_5", "tie_word_embeddings": true}))),
        ("hunyuan", with(json!({"model_type": "hunyuan_v1_dense"}))),
        ("phi", behind("layer_norm_eps", json!({"model_type": "phi", "partial_rotary_factor": 0.5}))),
        ("starcoder2", behind("norm_epsilon", json!({"model_type": "starcoder2"}))),
        ("stablelm", behind("layer_norm_eps", json!({"model_type": "stablelm", "use_qkv_bias": true}))),
        (
            "stablelm_parallel",
            behind("layer_norm_eps", json!({"model_type": "stablelm", "use_parallel_residual": true})),
        ),
        ("nemotron", behind("norm_eps", json!({"model_type": "nemotron"}))),
        ("gemma", with(json!({"model_type": "gemma", "tie_word_embeddings": true}))),
        ("gpt_neox", behind("layer_norm_eps", json!({"model_type": "gpt_neox", "rotary_pct": 0.25}))),
        (
            "falcon",
            behind(
                "layer_norm_epsilon",
                json!({"model_type": "falcon", "ffn_hidden_size": 512, "tie_word_embeddings": true}),
            ),
        ),
        (
            "falcon_new",
            behind(
                "layer_norm_epsilon",
                json!({"model_type": "falcon", "ffn_hidden_size": 512,
            "new_decoder_architecture": true, "num_kv_heads": 2}),
            ),
        ),
        (
            "bloom",
            json!({"model_type": "bloom", "vocab_size": 603, "hidden_size": 256, "n_layer": 2, "n_head": 4, "seq_length": 512,
            "bos_token_id": 1, "eos_token_id": 2}),
        ),
        (
            "lfm2",
            with(json!({"model_type": "lfm2", "norm_eps": 1e-5, "layer_types": ["conv", "full_attention", "conv"],
            "conv_L_cache": 3, "block_auto_adjust_ff_dim": false})),
        ),
        (
            "qwen3_5",
            with(
                json!({"model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
            "partial_rotary_factor": 0.25}),
            ),
        ),
        (
            "qwen3_next",
            with(
                json!({"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
            "partial_rotary_factor": 0.25, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 256}),
            ),
        ),
        (
            "qwen3_5_moe",
            with(
                json!({"model_type": "qwen3_5_moe_text", "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
            "partial_rotary_factor": 0.25, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 256}),
            ),
        ),
        (
            "bamba",
            with(json!({"model_type": "bamba", "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 64,
            "mamba_n_groups": 2, "mamba_d_state": 64, "mamba_expand": 2})),
        ),
        (
            "granitemoehybrid",
            with(json!({"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention", "mamba"],
            "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_n_groups": 2, "mamba_d_state": 64, "mamba_expand": 2,
            "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 256, "shared_intermediate_size": 256,
            "embedding_multiplier": 6.0, "residual_multiplier": 0.4, "attention_multiplier": 0.0625,
            "logits_scaling": 2.0})),
        ),
        (
            "falcon_h1",
            with(json!({"model_type": "falcon_h1", "mamba_d_ssm": 512, "mamba_n_heads": 8, "mamba_d_head": 64,
            "mamba_n_groups": 2, "mamba_d_state": 64, "mamba_rms_norm": true, "mamba_norm_before_gate": false,
            "lm_head_multiplier": 0.5, "embedding_multiplier": 2.0, "mlp_multipliers": [0.8, 1.25], "key_multiplier": 0.7,
            "attention_out_multiplier": 0.9, "ssm_multipliers": [0.7, 1.1, 0.9, 1.2, 0.8], "ssm_in_multiplier": 1.25,
            "ssm_out_multiplier": 0.75})),
        ),
        (
            "jamba",
            with(json!({"model_type": "jamba", "num_hidden_layers": 4, "attn_layer_period": 3, "attn_layer_offset": 1,
            "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2,
            "mamba_d_state": 16, "mamba_dt_rank": 256, "mamba_expand": 2})),
        ),
        (
            "mpt",
            json!({"model_type": "mpt", "vocab_size": 603, "d_model": 256, "n_layers": 2, "n_heads": 4, "max_seq_len": 512,
            "attn_config": {"clip_qkv": 4.0}, "bos_token_id": 1, "eos_token_id": 2}),
        ),
        (
            "mamba2",
            json!({"model_type": "mamba2", "vocab_size": 603, "hidden_size": 256, "num_hidden_layers": 3, "num_heads": 8,
            "head_dim": 64, "expand": 2, "n_groups": 2, "state_size": 64, "layer_norm_epsilon": 1e-5, "bos_token_id": 1,
            "eos_token_id": 2, "tie_word_embeddings": false}),
        ),
    ]
}

/// A model of random weights in the Hugging Face layout, with the golden byte-level tokenizer.
pub fn make(dir: &Path, config: &Value) {
    std::fs::create_dir_all(dir).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
        std::fs::copy(golden("tokenizers/bytelevel").join(file), dir.join(file)).unwrap();
    }
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let spec = arch::from_config(config).unwrap();
    let mut rng = Rng::new(11);
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for t in arch::hf_targets(&spec).unwrap() {
        let n: usize = t.shape.iter().product();
        let norm = t.shape.len() == 1 && !t.name.ends_with(".bias");
        // A norm's scale lies around one, whatever of it the layout keeps; matrices keep the size of what they
        // multiply.
        let (mean, spread) = match (norm, t.name.contains("embed") || t.name.contains("wte")) {
            (true, _) => (1.0 - spec.norm.offset, 0.2),
            (false, true) => (0.0, 2.0 / (spec.hidden as f32).sqrt()),
            (false, false) if t.shape.len() == 1 => (0.0, 0.2),
            (false, false) => (0.0, 1.3 / (t.shape[t.shape.len() - 1] as f32).sqrt()),
        };
        let values = (0..n).flat_map(|_| (mean + spread * rng.normal()).to_le_bytes()).collect();
        tensors.push((t.name, t.shape, values));
    }
    let views = tensors.iter().map(|(n, s, b)| (n.clone(), TensorView::new(Dtype::F32, s.clone(), b).unwrap()));
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    safetensors::serialize_to_file(views, Some(metadata), &dir.join("model.safetensors")).unwrap();
}

/// Logits of every position.
pub fn logits(weights: &dyn Weights, ids: &[u32]) -> Vec<Vec<f32>> {
    logits_with(weights, ids, Activations::Exact)
}

/// The same with activations as asked for.
pub fn logits_with(weights: &dyn Weights, ids: &[u32], activations: Activations) -> Vec<Vec<f32>> {
    let decoder = Decoder::load(weights, &LoadOptions { activations, ..LoadOptions::default() }).unwrap();
    let mut kv = ContiguousKv::new(&decoder.spec, 1);
    let hidden = decoder.forward(ids, &Batch::one(0, 0..ids.len()), &mut kv, &mut NoTap).unwrap();
    (0..ids.len()).map(|r| decoder.logits(hidden.view().rows_range(r, r + 1)).row(0).to_vec()).collect()
}

/// Logits of every position of the model at `path`.
pub fn logits_of(path: &Path, ids: &[u32]) -> Vec<Vec<f32>> {
    logits(&open(path).unwrap(), ids)
}

/// The likeliest token.
pub fn best(row: &[f32]) -> usize {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap()
}

/// `n` tokens, always the likeliest.
pub fn greedy(path: &Path, prompt: &[u32], n: usize) -> Vec<u32> {
    let checkpoint = open(path).unwrap();
    let decoder = Decoder::load(&checkpoint, &LoadOptions::default()).unwrap();
    let mut kv = ContiguousKv::new(&decoder.spec, 1);
    let (mut at, mut next, mut out) = (0, prompt.to_vec(), Vec::new());
    for _ in 0..n {
        let hidden = decoder.forward(&next, &Batch::one(0, at..at + next.len()), &mut kv, &mut NoTap).unwrap();
        at += next.len();
        let last = next.len() - 1;
        next = vec![best(decoder.logits(hidden.view().rows_range(last, last + 1)).row(0)) as u32];
        out.push(next[0]);
    }
    out
}

/// Furthest that two tables of logits lie apart.
pub fn apart(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!((a.len(), a[0].len()), (b.len(), b[0].len()), "tables of two shapes");
    a.iter().flatten().zip(b.iter().flatten()).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

/// Mean KL(p || q) and the share of equal first choices.
pub fn compare(p: &[Vec<f32>], q: &[Vec<f32>]) -> (f64, f64) {
    let log = |row: &[f32]| -> Vec<f64> {
        let top = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = row.iter().map(|x| (f64::from(*x) - top).exp()).sum();
        row.iter().map(|x| f64::from(*x) - top - sum.ln()).collect()
    };
    let kl = |a: &[f32], b: &[f32]| log(a).iter().zip(log(b)).map(|(x, y)| x.exp() * (x - y)).sum::<f64>();
    let n = p.len() as f64;
    let agree = p.iter().zip(q).filter(|(a, b)| best(a) == best(b)).count() as f64;
    (p.iter().zip(q).map(|(a, b)| kl(a, b)).sum::<f64>() / n, agree / n)
}

/// Ids below `vocab` for `n` positions.
pub fn ids(n: usize, vocab: usize) -> Vec<u32> {
    let mut rng = Rng::new(5);
    (0..n).map(|_| rng.below(vocab) as u32).collect()
}
