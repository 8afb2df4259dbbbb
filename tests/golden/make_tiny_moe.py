#!/usr/bin/env python3
"""Tiny mixtures of experts and latent attention: as make_tiny.py, by transformers 5, which has every class.

    python make_tiny_moe.py TINY [NAME ...]

writes TINY/NAME/{config.json, model.safetensors, golden.json}; golden.json also has `nll`, the mean loss of each
sequence, and `greedy`, a prompt and the 64 likeliest tokens after it, without a cache. Experts are saved one by one, as
transformers 4 names them, where the class has such names; NAME_stacked is smaller and saved as the class of transformers
5 holds them, all experts of a layer in a tensor of three axes. gpt_oss_mxfp4 has its experts in MXFP4 blocks and scales.
"""

import argparse
import json
import os
import shutil
import zlib

import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from common import numbers, versions, write_json
from make_tiny import VOCAB, base, randomise, sequences

torch.set_num_threads(1)
tf.logging.set_verbosity_error()

TOKENS, LEAD = 64, 1e-4


def moe(**changes):
    """transformers 5 keeps the base of RoPE in rope_parameters."""
    fields = base(**changes)
    theta = fields.pop("rope_theta")
    fields.setdefault("rope_parameters", {"rope_type": "default"})
    fields["rope_parameters"] = {"rope_theta": theta, **fields["rope_parameters"]}
    return fields


def gemma4(**changes):
    """Two sets of RoPE, one for each type of layer: of heads of layers that see everything the first pairs turn. Bases of
    which every frequency is a power of 2: f32 holds it, and what is left is the rounding of arithmetic."""
    fields = base(**{"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
                     "head_dim": 8, "global_head_dim": 16, "sliding_window": 7, "tie_word_embeddings": True,
                     "hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0, **changes})
    del fields["rope_theta"]
    fields["rope_parameters"] = {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 256.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 4096.0}}
    return fields


def gemma3n(**changes):
    fields = gemma4(**changes)
    del fields["global_head_dim"]
    for kind, theta in (("full_attention", 256.0), ("sliding_attention", 16.0)):
        fields["rope_parameters"][kind] = {"rope_type": "default", "rope_theta": theta}
    return fields


FULL, SLIDING = "full_attention", "sliding_attention"
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0, "original_max_position_embeddings": 32}

MODELS = {
    # A shared expert behind a gate of its own; the first layer is dense.
    "qwen2_moe": (tf.Qwen2MoeConfig, tf.Qwen2MoeForCausalLM, moe(
        intermediate_size=40, moe_intermediate_size=16, shared_expert_intermediate_size=20, num_experts=4,
        num_experts_per_tok=2, mlp_only_layers=[0])),
    # Sinks, windows on every other layer, biases on router and experts, the clamped SwiGLU, unrounded YaRN.
    "gpt_oss": (tf.GptOssConfig, tf.GptOssForCausalLM, moe(
        head_dim=16, intermediate_size=14, num_local_experts=4, num_experts_per_tok=2, sliding_window=10,
        rope_parameters={**YARN, "truncate": False})),
    # Sigmoid routing within groups by biased scores, weights scaled; half of each head turns.
    "glm4_moe": (tf.Glm4MoeConfig, tf.Glm4MoeForCausalLM, moe(
        head_dim=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=40, moe_intermediate_size=12,
        n_routed_experts=6, num_experts_per_tok=2, n_shared_experts=2, n_group=3, topk_group=2,
        routed_scaling_factor=1.7, first_k_dense_replace=1, norm_topk_prob=True, use_qk_norm=True,
        attention_bias=True, partial_rotary_factor=0.5, rope_parameters={"rope_type": "default",
                                                                        "partial_rotary_factor": 0.5})),
    # Latent attention with a full query matrix, groups by their best expert, YaRN that scales scores.
    "deepseek_v2": (tf.DeepseekV2Config, tf.DeepseekV2ForCausalLM, moe(
        num_key_value_heads=4, intermediate_size=36, moe_intermediate_size=12, n_routed_experts=6,
        num_experts_per_tok=2, n_shared_experts=2, n_group=3, topk_group=2, topk_method="group_limited_greedy",
        routed_scaling_factor=1.5, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=14, qk_rope_head_dim=8,
        qk_nope_head_dim=12, v_head_dim=10,
        rope_parameters={**YARN, "mscale": 0.707, "mscale_all_dim": 0.9})),
    "deepseek_v3": (tf.DeepseekV3Config, tf.DeepseekV3ForCausalLM, moe(
        num_key_value_heads=4, intermediate_size=40, moe_intermediate_size=12, n_routed_experts=6,
        num_experts_per_tok=2, n_shared_experts=1, n_group=3, topk_group=2, routed_scaling_factor=2.5,
        first_k_dense_replace=1, norm_topk_prob=True, q_lora_rank=14, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=12, v_head_dim=10, num_nextn_predict_layers=0,
        rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0})),
    # One norm over all heads of the queries, one over all keys.
    "olmoe": (tf.OlmoeConfig, tf.OlmoeForCausalLM, moe(
        intermediate_size=16, num_experts=4, num_experts_per_tok=2, norm_topk_prob=False)),
    "granitemoe": (tf.GraniteMoeConfig, tf.GraniteMoeForCausalLM, moe(
        intermediate_size=16, num_local_experts=4, num_experts_per_tok=2, embedding_multiplier=1.7,
        logits_scaling=1.3, residual_multiplier=0.8, attention_multiplier=0.3)),
    "ernie4_5_moe": (tf.Ernie4_5_MoeConfig, tf.Ernie4_5_MoeForCausalLM, moe(
        intermediate_size=40, moe_intermediate_size=12, moe_num_experts=4, moe_k=2, moe_num_shared_experts=2,
        moe_layer_start_index=1, use_bias=False)),
    # Norms on queries and keys after RoPE.
    "hunyuan_v1_moe": (tf.HunYuanMoEV1Config, tf.HunYuanMoEV1ForCausalLM, moe(
        head_dim=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16, num_experts=4, moe_topk=2)),
    "minicpm3": (tf.MiniCPM3Config, tf.MiniCPM3ForCausalLM, moe(
        num_key_value_heads=4, q_lora_rank=14, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=10,
        scale_emb=1.7, scale_depth=1.1, dim_model_base=24)),
    # Chunks shorter than both sequences, a layer without positions whose queries grow, a dense layer, one expert a token.
    "llama4": (tf.Llama4TextConfig, tf.Llama4ForCausalLM, moe(
        vocab_size=80, num_hidden_layers=3, head_dim=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=14,
        intermediate_size_mlp=40, num_local_experts=4, num_experts_per_tok=1, moe_layers=[1, 2],
        no_rope_layers=[1, 0, 1], attention_chunk_size=10, floor_scale=6, attn_scale=0.3)),
    # As llama.cpp's files say it: what is known by the name alone is as published; every second layer dense.
    "llama4_plain": (tf.Llama4TextConfig, tf.Llama4ForCausalLM, moe(
        vocab_size=64, hidden_size=16, num_hidden_layers=4, head_dim=8, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=10, intermediate_size_mlp=24, num_local_experts=4, num_experts_per_tok=2,
        interleave_moe_layer_step=2, rope_parameters={
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32})),
    # Inputs of single layers, heads of two widths, last layers that read keys and values of earlier ones and are wider.
    "gemma4": (tf.Gemma4TextConfig, tf.Gemma4ForCausalLM, gemma4(
        vocab_size=80, num_hidden_layers=5, layer_types=[SLIDING, FULL, SLIDING, SLIDING, FULL], num_kv_shared_layers=2,
        use_double_wide_mlp=True, hidden_size_per_layer_input=6, vocab_size_per_layer_input=80,
        final_logit_softcapping=6.0)),
    # Values that are keys on layers that see everything; experts beside the dense part, each behind norms of its own.
    "gemma4_moe": (tf.Gemma4TextConfig, tf.Gemma4ForCausalLM, gemma4(
        num_hidden_layers=3, layer_types=[SLIDING, FULL, FULL], num_attention_heads=4, num_key_value_heads=2,
        attention_k_eq_v=True, num_global_key_value_heads=1, hidden_size_per_layer_input=0, enable_moe_block=True,
        num_experts=4, top_k_experts=2, moe_intermediate_size=12)),
    # Three streams, of which the second is computed on; layers of several widths, some cut off; more tokens than rows of
    # the table of inputs; two layers that read the keys of earlier ones.
    "gemma3n": (tf.Gemma3nTextConfig, tf.Gemma3nForCausalLM, gemma3n(
        num_hidden_layers=5, layer_types=[SLIDING, FULL, SLIDING, SLIDING, FULL], num_kv_shared_layers=2,
        intermediate_size=[32, 28, 32, 28, 24], hidden_size_per_layer_input=6, vocab_size_per_layer_input=VOCAB - 6,
        final_logit_softcapping=6.0, altup_num_inputs=3, altup_active_idx=1, laurel_rank=6,
        activation_sparsity_pattern=[0.7, 0.0, 0.4, 0.0, 0.0])),
}

# Smaller, for files with stacked experts and for MXFP4, whose blocks have 32 columns.
SMALL = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2)
# What llama.cpp's files say alike: no dense layer in one, one epsilon for all norms, groups by their best two, and no
# factor on cos and sin.
SAID = {
    "qwen2_moe": dict(mlp_only_layers=[]),
    "deepseek_v2": dict(rms_norm_eps=1e-6, topk_method="greedy", q_lora_rank=12, rope_parameters={
        "rope_theta": 500.0, **YARN, "mscale": 0.707, "mscale_all_dim": 0.707}),
    "deepseek_v3": dict(rms_norm_eps=1e-6),
}
STACKED = ("qwen2_moe", "glm4_moe", "deepseek_v2", "deepseek_v3", "olmoe", "ernie4_5_moe", "hunyuan_v1_moe")


def shake(model, seed):
    """Buffers of corrections and scalars, sinks and vectors too: all that make_tiny.randomise does not know."""
    g = torch.Generator().manual_seed(seed)
    randomise(model, g)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(p.shape, generator=g)
            if name.endswith("e_score_correction_bias"):
                # Choices move, and stay positive: transformers 4 masks groups with zeros.
                p.copy_(0.4 + 0.3 * torch.rand(p.shape, generator=g))
            elif name.endswith("sinks"):
                p.copy_(noise)
            elif name.endswith("gate_up_proj_bias"):
                # Beyond the clamps on both sides.
                p.copy_(5.0 * noise)
            elif name.endswith("down_proj_bias"):
                p.copy_(0.3 * noise)
            elif name.endswith("layer_scalar"):
                p.copy_(0.7 + 0.6 * torch.rand(p.shape, generator=g))
            elif name.endswith(("router.scale", "router.per_expert_scale", "correct_output_scale")):
                p.copy_(1.0 + 0.3 * noise)
            elif name.endswith(("altup.prediction_coefs.weight", "altup.correction_coefs.weight")):
                # Streams neither grow nor cancel beyond what f32 holds.
                p.copy_(0.2 * noise)
            elif name.endswith("altup.modality_router.weight"):
                # What it reads is divided by the width.
                p.copy_(noise * p.shape[-1] ** 0.5)
            elif name.endswith("embed_tokens_per_layer.weight"):
                p.copy_(0.5 * noise)
            elif type(model).__name__.startswith(("Gemma4", "Gemma3n")) and "norm" in name:
                # Here the scale itself is kept; scores are not divided by the root of a head's width.
                p.copy_((1.0 + 0.3 * noise) * (0.5 if "q_norm" in name else 1.0))
            elif type(model).__name__.startswith("Llama4") and name.endswith(("gate_up_proj", "down_proj")):
                # [experts, inputs, outputs]
                p.copy_(noise * (1.3 / p.shape[1] ** 0.5))
            elif type(model).__name__.startswith("GptOss") and name.endswith(("gate_up_proj", "down_proj")):
                # [experts, inputs, outputs]
                p.copy_(noise * (1.3 / p.shape[1] ** 0.5) * (3.0 if "gate_up" in name else 0.5))


def read(directory, model_class, **options):
    model, info = model_class.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
        output_loading_info=True, **options)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], f"{directory}: {kind}: {info[kind]}"
    return model.eval()


def logits(model, ids):
    with torch.no_grad():
        return [model(input_ids=i, use_cache=False).logits[0] for i in ids]


def greedy(model, ids):
    for at in range(len(ids) - 8 + 1):
        prompt = ids[at:at + 8]
        said, lead = list(prompt), 1.0
        with torch.no_grad():
            for _ in range(TOKENS):
                top = model(input_ids=torch.tensor([said]), use_cache=False).logits[0, -1].topk(2)
                lead = min(lead, float(top.values[0] - top.values[1]))
                said.append(int(top.indices[0]))
        if lead >= LEAD:
            return [prompt, said[8:]]
    raise SystemExit("no prompt will do")


def golden(name, directory, model_class, ids, model=None, **more):
    model = model or read(directory, model_class)
    single = logits(model, ids)
    said = greedy(model, ids[0][0].tolist())
    double = logits(model.to(torch.float64), ids)
    apart = max(float((s.double() - d).abs().max()) for s, d in zip(single, double))
    spread = torch.cat(single).std()
    assert 0.8 < spread < 4.5 and apart < 1e-3, (name, spread, apart)
    nll = [torch.nn.functional.cross_entropy(s[:-1].double(), i[0, 1:]) for s, i in zip(single, ids)]
    write_json(os.path.join(directory, "golden.json"), {
        "made_with": versions(),
        "model": model_class.__name__,
        **more,
        "f32_against_f64_max_abs": float(f"{apart:.3g}"),
        "input_ids": [i[0].tolist() for i in ids],
        "nll": [round(x.item(), 8) for x in nll],
        "greedy": said,
        "logits": [numbers(s) for s in single],
    })
    size = sum(os.path.getsize(os.path.join(directory, f)) for f in os.listdir(directory))
    print(f"{name}: logits std {spread:.2f}, f32 vs f64 {apart:.1e}, {size / 1000:.0f} kB", flush=True)
    assert size < 200_000, f"{name}: {size} bytes"


def made(name, out, fields, config_class, model_class, **options):
    directory = os.path.join(out, name)
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)
    config = config_class(**fields)
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    shake(model, zlib.crc32(name.encode()))
    model.save_pretrained(directory, **options)
    for extra in ("generation_config.json",):
        if os.path.exists(os.path.join(directory, extra)):
            os.remove(os.path.join(directory, extra))
    return directory


def save(name, out):
    config_class, model_class, fields = MODELS[name]
    directory = made(name, out, fields, config_class, model_class)
    golden(name, directory, model_class, [ids % fields["vocab_size"] for ids in sequences(name)])


def stacked(name, out):
    config_class, model_class, fields = MODELS[name]
    fields = {**fields, **SMALL, **SAID.get(name, {})}
    name = name + "_stacked"
    directory = made(name, out, fields, config_class, model_class, save_original_format=False)
    seed = zlib.crc32(name.encode())
    ids = [torch.randint(0, 32, (1, 24), generator=torch.Generator().manual_seed(seed))]
    golden(name, directory, model_class, ids)


def mxfp4(out):
    """The experts' matrices as published files have them: `blocks` [experts, outputs, inputs / 32, 16] of two codes a
    byte, low one first, and `scales` [experts, outputs, inputs / 32], exponents with a bias of 127."""
    name = "gpt_oss_mxfp4"
    config_class, model_class, fields = MODELS["gpt_oss"]
    fields = {**fields, "vocab_size": 32, "intermediate_size": 32, "num_local_experts": 2, "num_experts_per_tok": 1,
              "head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 64}
    directory = made(name, os.path.join(out, os.pardir, "foreign"), fields, config_class, model_class)
    path = os.path.join(directory, "model.safetensors")
    tensors, g = load_file(path), torch.Generator().manual_seed(zlib.crc32(name.encode()))
    stored, plain = {}, {}
    for key, value in tensors.items():
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            e, inputs, outputs = value.shape
            blocks = torch.randint(0, 256, (e, outputs, inputs // 32, 16), generator=g, dtype=torch.uint8)
            scales = torch.randint(122, 126, (e, outputs, inputs // 32), generator=g, dtype=torch.uint8)
            stored[key + "_blocks"], stored[key + "_scales"] = blocks, scales
            plain[key] = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.float32)
            assert plain[key].shape == value.shape
        else:
            stored[key] = plain[key] = value
    save_file({k: v.contiguous() for k, v in plain.items()}, path, metadata={"format": "pt"})
    model = read(directory, model_class)
    save_file({k: v.contiguous() for k, v in stored.items()}, path, metadata={"format": "pt"})
    config = os.path.join(directory, "config.json")
    with open(config) as f:
        written = json.load(f)
    written["quantization_config"] = {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                                   "lm_head"], "quant_method": "mxfp4"}
    with open(config, "w") as f:
        json.dump(written, f, indent=2, sort_keys=True)
        f.write("\n")
    ids = [torch.randint(0, 32, (1, 24), generator=g)]
    golden(name, directory, model_class, ids, model, dtype="float32")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("names", nargs="*", help="default: all")
    arguments = parser.parse_args()
    for name in arguments.names or MODELS:
        if name in MODELS:
            save(name, arguments.out)
        if name in STACKED:
            stacked(name, arguments.out)
        if name == "gpt_oss":
            mxfp4(arguments.out)


if __name__ == "__main__":
    main()
