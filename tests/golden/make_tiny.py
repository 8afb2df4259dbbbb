#!/usr/bin/env python3
"""Tiny random checkpoints in the Hugging Face layout, and the logits transformers computes from them.

    python make_tiny.py OUT [NAME ...]

writes OUT/NAME/{config.json, *.safetensors, golden.json}. Weights, norms and biases are all random
(no vector of ones that would hide a forgotten norm) and scaled so that the logits spread over a few units.
"""

import argparse
import json
import os
import shutil
import zlib

import torch
import transformers as tf

from common import numbers, versions, write_json

torch.set_num_threads(1)

VOCAB = 96
LENGTHS = (24, 36)

# What every Llama-like entry starts from. An epsilon that no model has as its default, and large enough to be seen.
BASE = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-4, rope_theta=500.0,
    bos_token_id=1, eos_token_id=2, pad_token_id=None, tie_word_embeddings=False,
)


def base(**changes):
    return {**BASE, **changes}


# name -> (config class, model class, configuration). A note says what the entry is there to catch.
MODELS = {
    # Grouped-query attention, untied head.
    "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, base()),
    # Bias on every linear of attention and of the feed-forward part.
    "llama_bias": (tf.LlamaConfig, tf.LlamaForCausalLM, base(attention_bias=True, mlp_bias=True)),
    # Tied head; frequencies fall in all three bands of the llama3 rule (kept, blended, divided).
    "llama_rope_llama3": (tf.LlamaConfig, tf.LlamaForCausalLM, base(
        tie_word_embeddings=True,
        rope_scaling=dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                          original_max_position_embeddings=32))),
    "llama_rope_linear": (tf.LlamaConfig, tf.LlamaForCausalLM, base(
        rope_scaling=dict(rope_type="linear", factor=2.5))),
    # The ramp of YaRN covers frequencies 0..3 of 8, and the attention factor is not 1.
    "llama_rope_yarn": (tf.LlamaConfig, tf.LlamaForCausalLM, base(
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, rope_theta=10000.0,
        rope_scaling=dict(rope_type="yarn", factor=2.0, beta_fast=4.0, beta_slow=1.0,
                          original_max_position_embeddings=64))),
    # The first sequence is shorter than the original context, the second longer: both factor lists are used.
    "llama_rope_longrope": (tf.LlamaConfig, tf.LlamaForCausalLM, base(
        original_max_position_embeddings=32,
        rope_scaling=dict(rope_type="longrope", short_factor=[1.0, 1.1, 1.3, 1.6],
                          long_factor=[1.0, 2.0, 3.5, 4.0], factor=4.0,
                          original_max_position_embeddings=32))),
    # The window (10 keys, the query's own included) is shorter than both sequences.
    "mistral": (tf.MistralConfig, tf.MistralForCausalLM, base(sliding_window=10, head_dim=16)),
    "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM, base(tie_word_embeddings=True)),
    # Norms on queries and keys; heads * head_dim is not hidden.
    "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM, base(head_dim=16)),
    "gemma2": (tf.Gemma2Config, tf.Gemma2ForCausalLM, base(
        head_dim=16, num_key_value_heads=2, num_attention_heads=2, tie_word_embeddings=True, sliding_window=10,
        query_pre_attn_scalar=12, attn_logit_softcapping=3.0, final_logit_softcapping=4.0,
        hidden_activation="gelu_pytorch_tanh", pad_token_id=0)),
    # Four norms a layer, norms on queries and keys, local and global layers with their own RoPE base.
    "gemma3": (tf.Gemma3TextConfig, tf.Gemma3ForCausalLM, base(
        num_hidden_layers=3, head_dim=16, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        sliding_window=10, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_theta=20000.0, rope_local_base_freq=100.0, query_pre_attn_scalar=12,
        hidden_activation="gelu_pytorch_tanh", pad_token_id=0)),
    # As the 4B model and larger: linear scaling on the global layers alone; its configuration
    # states the pattern as a number only, as the first published files do.
    "gemma3_linear": (tf.Gemma3TextConfig, tf.Gemma3ForCausalLM, base(
        num_hidden_layers=3, head_dim=16, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        sliding_window=10, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window_pattern=2, rope_theta=20000.0, rope_local_base_freq=100.0, query_pre_attn_scalar=16,
        rope_scaling=dict(rope_type="linear", factor=8.0),
        hidden_activation="gelu_pytorch_tanh", pad_token_id=0)),
    # Fused query-key-value and gate-up matrices, longrope on both sides of the original context.
    "phi3": (tf.Phi3Config, tf.Phi3ForCausalLM, base(
        original_max_position_embeddings=32, pad_token_id=0,
        rope_scaling=dict(type="longrope", short_factor=[1.0, 1.1, 1.3, 1.6], long_factor=[1.0, 2.0, 3.5, 4.0]))),
    # LayerNorm, learned positions, Conv1D matrices stored [in, out], fused c_attn.
    "gpt2": (tf.GPT2Config, tf.GPT2LMHeadModel, dict(
        vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=48, layer_norm_epsilon=1e-4,
        bos_token_id=0, eos_token_id=0)),
    # ReLU, learned positions that start at 2.
    "opt": (tf.OPTConfig, tf.OPTForCausalLM, dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, ffn_dim=48, max_position_embeddings=64,
        num_attention_heads=4, word_embed_proj_dim=32, do_layer_norm_before=True, activation_function="relu",
        bos_token_id=2, eos_token_id=2, pad_token_id=1)),
    "mixtral": (tf.MixtralConfig, tf.MixtralForCausalLM, base(
        intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": (tf.Qwen3MoeConfig, tf.Qwen3MoeForCausalLM, base(
        head_dim=16, num_attention_heads=2, num_key_value_heads=1, moe_intermediate_size=24, num_experts=4,
        num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[])),
}

# name -> (the entry it repeats, dtype of the stored weights, largest shard in bytes)
VARIANTS = {
    "llama_sharded": ("llama", torch.float32, 40_000),
    "llama_f16": ("llama", torch.float16, None),
    "llama_bf16": ("llama", torch.bfloat16, None),
}


def randomise(model, generator):
    """Overwrites every parameter. The gains make queries, gates and logits vary by a unit or two."""
    gemma = type(model).__name__.startswith("Gemma")
    tied = model.config.tie_word_embeddings
    hidden = model.config.hidden_size
    conv1d = {id(m.weight) for m in model.modules() if type(m).__name__ == "Conv1D"}
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                # A norm's scale lies around one (Gemma stores its distance from one), a bias around zero.
                scale = name.endswith("weight") and ("norm" in name or ".ln_" in name)
                p.copy_(0.3 * noise + (1.0 if scale and not gemma else 0.0))
            elif "embed_positions" in name or "wpe" in name:
                p.copy_(0.4 * noise)
            elif "embed_tokens" in name or "wte" in name:
                # Tied matrices must serve as a head too: 2 / sqrt(hidden) there.
                p.copy_(noise * (2.0 / hidden**0.5 if tied else 1.0))
            elif "lm_head" in name:
                p.copy_(noise * (2.0 / hidden**0.5))
            else:
                fan_in = p.shape[0] if id(p) in conv1d else p.shape[-1]
                p.copy_(noise * (1.3 / fan_in**0.5))


def sequences(name):
    g = torch.Generator().manual_seed(zlib.crc32(b"ids " + name.encode()))
    return [torch.randint(0, VOCAB, (1, n), generator=g) for n in LENGTHS]


def logits(directory, model_class, ids, dtype):
    """Loads the saved files anew: what is tested is the checkpoint, not the model in memory."""
    model, info = model_class.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], f"{directory}: {kind}: {info[kind]}"
    model = model.to(dtype).eval()
    with torch.no_grad():
        return [model(input_ids=i, use_cache=False).logits[0] for i in ids]


def save(name, out):
    source, dtype, shard = VARIANTS.get(name, (name, torch.float32, None))
    config_class, model_class, fields = MODELS[source]
    directory = os.path.join(out, name)
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)
    config = config_class(**fields)
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    randomise(model, torch.Generator().manual_seed(zlib.crc32(source.encode())))
    model.to(dtype).save_pretrained(directory, max_shard_size=shard or 10_000_000)
    os.remove(os.path.join(directory, "generation_config.json"))
    if name == "gemma3_linear":
        path = os.path.join(directory, "config.json")
        with open(path) as f:
            written = json.load(f)
        types = written.pop("layer_types")
        written.pop("_sliding_window_pattern", None)
        written["sliding_window_pattern"] = fields["sliding_window_pattern"]
        with open(path, "w") as f:
            json.dump(written, f, indent=2, sort_keys=True)
            f.write("\n")
        assert config_class.from_pretrained(directory).layer_types == types

    ids = sequences(source)
    single = logits(directory, model_class, ids, torch.float32)
    double = logits(directory, model_class, ids, torch.float64)
    apart = max(float((s.double() - d).abs().max()) for s, d in zip(single, double))
    spread = torch.cat(single).std()
    assert 0.8 < spread < 4.5 and apart < 1e-3, (name, spread, apart)
    write_json(os.path.join(directory, "golden.json"), {
        "made_with": versions(),
        "model": model_class.__name__,
        # How far these f32 logits lie from the same model in f64: no tolerance can be tighter.
        "f32_against_f64_max_abs": float(f"{apart:.3g}"),
        "input_ids": [i[0].tolist() for i in ids],
        "logits": [numbers(s) for s in single],
    })
    size = sum(os.path.getsize(os.path.join(directory, f)) for f in os.listdir(directory))
    print(f"{name}: logits std {spread:.2f}, f32 vs f64 {apart:.1e}, {size / 1000:.0f} kB")
    assert size < 200_000, f"{name}: {size} bytes"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("names", nargs="*", help="default: all")
    arguments = parser.parse_args()
    for name in arguments.names or [*MODELS, *VARIANTS]:
        save(name, arguments.out)


if __name__ == "__main__":
    main()
