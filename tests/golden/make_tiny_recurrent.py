#!/usr/bin/env python3
"""Tiny random checkpoints of networks with recurrent mixers, and the logits transformers 5 computes from them.

    python make_tiny_recurrent.py OUT [NAME ...]
    python make_tiny_recurrent.py --defaults FILE

As make_tiny.py, in the environment of transformers 5, whose classes these are; without their CUDA kernels, in PyTorch.
Beside the logits: 64 greedy tokens after the first 20 of the first sequence, each by a pass over the whole text, and the
mean loss of each sequence.
"""

import argparse
import json
import os
import shutil
import zlib

import torch
import transformers as tf

import make_tiny
from common import numbers, versions, write_json

torch.set_num_threads(1)

BASE = {**make_tiny.BASE, "hidden_size": 32}


def base(**changes):
    fields = {**BASE, **changes}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta"),
                                 **fields.pop("rope", {})}
    return fields


def lfm2(**changes):
    fields = base(
        norm_eps=1e-4, layer_types=["conv", "full_attention", "conv"], num_hidden_layers=3, pad_token_id=0, **changes)
    del fields["rms_norm_eps"]
    return fields


DELTA = dict(
    linear_conv_kernel_dim=4, linear_key_head_dim=8, linear_value_head_dim=12, linear_num_key_heads=2,
    linear_num_value_heads=4, head_dim=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=3,
    layer_types=["linear_attention", "full_attention", "linear_attention"], rope=dict(partial_rotary_factor=0.5))

MAMBA = dict(
    mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=6, mamba_d_conv=4, mamba_expand=2,
    mamba_chunk_size=8)

MIXTURE = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, shared_expert_intermediate_size=20)

# name -> (config class, model class, configuration). A note says what the entry is there to catch.
MODELS = {
    # The width is not adjusted; a head of its own.
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", lfm2(
        block_auto_adjust_ff_dim=False, tie_word_embeddings=False)),
    # The width is made of three keys; biases; a kernel of 4; tied.
    "lfm2_bias": ("Lfm2Config", "Lfm2ForCausalLM", lfm2(
        intermediate_size=60, block_multiple_of=16, block_ffn_dim_multiplier=1.1, conv_bias=True, conv_L_cache=4,
        tie_word_embeddings=True)),
    # Two value heads for each key head; a gate on attention; half of each head turns; no experts.
    "qwen3_next_dense": ("Qwen3NextConfig", "Qwen3NextForCausalLM", base(
        num_experts=0, mlp_only_layers=[0, 1, 2], **DELTA)),
    # The first layer is dense; weights of experts as they are; a shared one behind a gate of its own.
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", base(**MIXTURE, norm_topk_prob=False,
        mlp_only_layers=[0], intermediate_size=28, **DELTA)),
    # Saved as published ones are: all experts of a layer in two tensors.
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", base(**MIXTURE, **DELTA)),
    # Keys as wide as values, as llama.cpp wants them.
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", base(**{**DELTA, "linear_value_head_dim": 8})),
    # As many value heads as key heads, of the same width: a tied head.
    "qwen3_5_even": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", base(
        **{**DELTA, "linear_num_value_heads": 2, "linear_value_head_dim": 8}, tie_word_embeddings=True)),
    # Nothing but mixers; the norm before the output is over each of two groups.
    "mamba2": ("Mamba2Config", "Mamba2ForCausalLM", dict(
        vocab_size=96, hidden_size=32, num_hidden_layers=3, num_heads=8, head_dim=8, expand=2, n_groups=2,
        state_size=6, conv_kernel=4, chunk_size=8, layer_norm_epsilon=1e-4, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, tie_word_embeddings=False, time_step_limit=(0.05, 1.5))),
    # A tied head, one group, no bias on the convolution.
    "mamba2_plain": ("Mamba2Config", "Mamba2ForCausalLM", dict(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, expand=2, n_groups=1,
        state_size=8, conv_kernel=3, chunk_size=8, layer_norm_epsilon=1e-4, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, tie_word_embeddings=True, use_conv_bias=False)),
    "bamba": ("BambaConfig", "BambaForCausalLM", base(
        num_hidden_layers=3, attn_layer_indices=[1], **MAMBA)),
    # Experts and one beside them, no positions; every multiplier is something else than 1.
    "granitemoehybrid": ("GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM", base(
        num_hidden_layers=3, layer_types=["mamba", "attention", "mamba"], num_local_experts=4, num_experts_per_tok=2,
        intermediate_size=12, shared_intermediate_size=20, position_embedding_type=None, embedding_multiplier=3.0,
        logits_scaling=0.5, residual_multiplier=0.7, attention_multiplier=0.2, **MAMBA)),
    # What is shared alone; attention turns.
    "granitemoehybrid_dense": ("GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM", base(
        num_hidden_layers=3, layer_types=["mamba", "attention", "mamba"], num_local_experts=0,
        num_experts_per_tok=0, shared_intermediate_size=48, position_embedding_type="rope", embedding_multiplier=3.0,
        logits_scaling=2.0, residual_multiplier=0.7, attention_multiplier=0.2, **MAMBA)),
    # Attention and mixer side by side; every multiplier is something else than 1.
    "falcon_h1": ("FalconH1Config", "FalconH1ForCausalLM", base(
        num_hidden_layers=2, mamba_d_ssm=64, **MAMBA, mamba_rms_norm=True, mamba_norm_before_gate=False,
        lm_head_multiplier=0.6, embedding_multiplier=1.7, mlp_multipliers=[0.8, 1.3], key_multiplier=0.7,
        attention_out_multiplier=1.2, attention_in_multiplier=0.9, ssm_multipliers=[0.7, 1.1, 0.9, 1.2, 0.8],
        ssm_in_multiplier=1.25, ssm_out_multiplier=0.75)),
    # As the published ones: a gate and no norm.
    "falcon_h1_plain": ("FalconH1Config", "FalconH1ForCausalLM", base(
        num_hidden_layers=2, mamba_d_ssm=48, **{**MAMBA, "mamba_n_heads": 6, "mamba_n_groups": 1},
        mamba_rms_norm=False)),
    # A mixer with and without experts behind it, attention with; weights of experts do not sum to 1.
    "jamba": ("JambaConfig", "JambaForCausalLM", base(
        num_hidden_layers=4, attn_layer_period=3, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        num_experts=4, num_experts_per_tok=2, intermediate_size=16, mamba_d_state=6, mamba_d_conv=3, mamba_expand=2,
        mamba_dt_rank=5, tie_word_embeddings=False)),
    # Not recurrent, but by transformers 5, too: slopes of heads that are no power of 2, a clip that cuts, a scale.
    "mpt": ("MptConfig", "MptForCausalLM", dict(
        vocab_size=96, d_model=36, n_heads=6, n_layers=2, max_seq_len=128, layer_norm_epsilon=1e-4, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, attn_config=dict(clip_qkv=1.5, softmax_scale=0.3))),
}
# Saved as the classes of transformers 5 hold their tensors.
AS_HELD = ["qwen3_5_moe"]


def randomise(model, generator):
    make_tiny.randomise(model, generator)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("A_log"):
                p.copy_(0.5 * noise)
            elif name.endswith(".D"):
                p.copy_(1.0 + 0.3 * noise)
            elif name.endswith(("dt_bias", "dt_proj.bias")):
                p.copy_(0.5 * noise - 0.5)
            elif name.endswith("linear_attn.norm.weight"):
                # This norm's scale is stored whole, those of the stream less one.
                p.copy_(1.0 + 0.3 * noise)
            elif "linear_attn" not in name and name.endswith("norm.weight") and "Qwen3" in type(model).__name__:
                p.copy_(0.3 * noise)


def greedy(model, ids):
    text = ids[:, :20]
    with torch.no_grad():
        for _ in range(64):
            last = model(input_ids=text, use_cache=False).logits[0, -1]
            top = torch.topk(last, 2).values
            assert top[0] - top[1] > 1e-4, "two tokens are equally likely"
            text = torch.cat([text, last.argmax().view(1, 1)], dim=1)
    return text[0].tolist()


def classes(name):
    config_name, model_name, _ = MODELS[name]
    config_class, model_class = getattr(tf, config_name, None), getattr(tf, model_name, None)
    if config_class is None or model_class is None:
        import importlib
        module = name.split("_even")[0].split("_dense")[0].split("_plain")[0].split("_bias")[0]
        config_class = getattr(importlib.import_module(f"transformers.models.{module}.configuration_{module}"),
                               config_name)
        model_class = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), model_name)
    return config_class, model_class


def read(directory, model_class):
    """Loads the saved files anew: what is tested is the checkpoint, not the model in memory."""
    experts = {} if model_class.__name__ == "MptForCausalLM" else {"experts_implementation": "eager"}
    model, info = model_class.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **experts)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], f"{directory}: {kind}: {info[kind]}"
    return model.eval()


def logits(directory, model_class, ids, dtype):
    model = read(directory, model_class).to(dtype)
    with torch.no_grad():
        return [model(input_ids=i, use_cache=False).logits[0] for i in ids]


def save(name, out):
    fields = MODELS[name][2]
    config_class, model_class = classes(name)
    directory = os.path.join(out, name)
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)
    config = config_class(**fields)
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    randomise(model, torch.Generator().manual_seed(zlib.crc32(name.encode())))
    model.save_pretrained(directory, save_original_format=name not in AS_HELD)
    generation = os.path.join(directory, "generation_config.json")
    if os.path.exists(generation):
        os.remove(generation)
    ids = make_tiny.sequences(name)
    single, double = (logits(directory, model_class, ids, dtype) for dtype in (torch.float32, torch.float64))
    apart = max(float((s.double() - d).abs().max()) for s, d in zip(single, double))
    spread = torch.cat(single).std()
    assert 0.6 < spread < 5.5 and apart < 1e-3, (name, spread, apart)
    loaded = read(directory, model_class)
    losses = [float(torch.nn.functional.cross_entropy(d[:-1], i[0, 1:])) for d, i in zip(double, ids)]
    write_json(os.path.join(directory, "golden.json"), {
        "made_with": versions(),
        "model": model_class.__name__,
        # How far these f32 logits lie from the same model in f64: no tolerance can be tighter.
        "f32_against_f64_max_abs": float(f"{apart:.3g}"),
        "input_ids": [i[0].tolist() for i in ids],
        "logits": [numbers(s) for s in single],
        "losses": numbers(losses),
        "greedy": greedy(loaded, ids[0]),
    })
    size = sum(os.path.getsize(os.path.join(directory, f)) for f in os.listdir(directory))
    print(f"{name}: logits std {spread:.2f}, f32 vs f64 {apart:.1e}, {size / 1000:.0f} kB")
    assert size < 300_000, f"{name}: {size} bytes"


def defaults(path):
    """What each class writes when it is told nothing."""
    out = {"made_with": versions()}
    for name, (config_name, _, _) in MODELS.items():
        config = classes(name)[0]()
        if "_" not in name or name in ("qwen3_5", "qwen3_5_moe", "qwen3_next", "falcon_h1"):
            out[config.model_type] = json.loads(config.to_json_string(use_diff=False))
    write_json(path, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("names", nargs="*", help="default: all")
    parser.add_argument("--defaults", action="store_true", help="OUT is a file: the classes' defaults")
    arguments = parser.parse_args()
    if arguments.defaults:
        return defaults(arguments.out)
    for name in arguments.names or MODELS:
        save(name, arguments.out)


if __name__ == "__main__":
    main()
