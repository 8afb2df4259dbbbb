#!/usr/bin/env python3
"""What transformers assumes where a config.json says nothing: of every class that Lacuna reads, the values behind the keys that it
reads, and the network that `{"model_type": ...}` alone describes.

    python make_defaults.py OUT.json [NAME ...]

NAME: these classes alone are asked anew, the others stay as they are.

writes `values` of its own major version (`v4` or `v5`) and keeps the other's: run it once with each. They are the configuration with
every default written out, derived ones too (head_dim of Llama). `network` is read off the modules that transformers builds wherever
a module knows: widths, heads and biases from the matrices, scales from the attention. Both versions must build the same.
"""

import json
import os
import sys
import tempfile

import torch
import transformers as tf

from common import number, write_json

MAJOR = f"v{tf.__version__.split('.')[0]}"

ROPE = ["rope_parameters"] if MAJOR == "v5" else ["rope_theta", "rope_scaling"]
LLAMA = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", *ROPE]
SLIDES = ["use_sliding_window", "sliding_window", "max_window_layers", "layer_types"]
GEMMA = [*(k for k in LLAMA if k != "hidden_act"), "hidden_activation", "head_dim", "query_pre_attn_scalar", "attention_bias",
         "sliding_window", "layer_types", "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"]

# model_type -> the keys that Lacuna reads
READ = {
    "llama": [*LLAMA, "head_dim", "attention_bias", "mlp_bias"],
    "mistral": [*LLAMA, "head_dim", "sliding_window"],
    "mixtral": [*LLAMA, "head_dim", "sliding_window", "num_local_experts", "num_experts_per_tok"],
    "qwen2": [*LLAMA, *SLIDES],
    "qwen3": [*LLAMA, *SLIDES, "head_dim", "attention_bias"],
    "qwen3_moe": [*LLAMA, "attention_bias", "use_sliding_window", "sliding_window", "num_experts", "num_local_experts",
                  "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"],
    "qwen2_moe": [*LLAMA, "use_sliding_window", "layer_types", "qkv_bias", "num_experts", "num_experts_per_tok",
                  "moe_intermediate_size", "shared_expert_intermediate_size", "norm_topk_prob", "decoder_sparse_step",
                  "mlp_only_layers"],
    "gpt_oss": [*LLAMA, "head_dim", "attention_bias", "sliding_window", "layer_types", "num_local_experts",
                "num_experts_per_tok", *(["swiglu_alpha", "swiglu_limit"] if MAJOR == "v5" else [])],
    "ernie4_5_moe": [*LLAMA, "head_dim", "use_bias", "moe_intermediate_size", "moe_k", "moe_num_experts",
                     "moe_num_shared_experts", "moe_layer_start_index", "moe_layer_interval"],
    "gemma2": GEMMA,
    "gemma3_text": [*GEMMA, "rope_local_base_freq"],
    "gemma3": ["text_config", "tie_word_embeddings"],
    "phi3": [*LLAMA, "sliding_window", "original_max_position_embeddings", "partial_rotary_factor"],
    "gpt2": ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "layer_norm_epsilon",
             "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention", "tie_word_embeddings"],
    "opt": ["vocab_size", "hidden_size", "num_hidden_layers", "ffn_dim", "max_position_embeddings", "num_attention_heads",
            "word_embed_proj_dim", "do_layer_norm_before", "layer_norm_elementwise_affine", "enable_bias", "activation_function",
            "_remove_final_layer_norm", "tie_word_embeddings"],
}

ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh",
               "NewGELUActivation": "gelu_tanh", "ReLU": "relu", "GELUActivation": "gelu"}


def runs(items):
    """Equal neighbours once, with their count."""
    out = []
    for item in items:
        if out and out[-1][1] == item:
            out[-1][0] += 1
        else:
            out.append([1, item])
    return out


def read(config):
    """As from_pretrained reads a directory."""
    with tempfile.TemporaryDirectory() as d:
        with open(os.path.join(d, "config.json"), "w") as f:
            json.dump(config, f)
        return tf.AutoConfig.from_pretrained(d)


def linear(matrix, conv1d=False):
    """Rows of a matrix, and whether it has a bias."""
    return (matrix.nf if conv1d else matrix.out_features), matrix.bias is not None


def gpt2(config, model):
    body = model.transformer
    attn, mlp = body.h[0].attn, body.h[0].mlp
    scale = attn.head_dim**-0.5 if attn.scale_attn_weights else 1.0
    return body.h, dict(
        embed=list(body.wte.weight.shape), positions=body.wpe.weight.shape[0], norm=["layer", number(body.ln_f.eps)],
        final_norm=True, heads=attn.num_heads, kv_heads=attn.num_heads, head_dim=attn.head_dim, scale=number(scale),
        qkv_bias=linear(attn.c_attn, True)[1], o_bias=linear(attn.c_proj, True)[1], qk_norm=False, softcap=None,
        act=ACTIVATIONS[type(mlp.act).__name__], ffn_bias=linear(mlp.c_fc, True)[1],
        windows=[[len(body.h), None]], ffn=runs([linear(h.mlp.c_fc, True)[0], None] for h in body.h))


def opt(config, model):
    body = model.model.decoder
    layer = body.layers[0]
    attn = layer.self_attn
    rows, bias = linear(attn.q_proj)
    return body.layers, dict(
        embed=list(body.embed_tokens.weight.shape), positions=body.embed_positions.weight.shape[0],
        norm=["layer", number(body.final_layer_norm.eps)], final_norm=body.final_layer_norm is not None,
        heads=attn.num_heads, kv_heads=attn.num_heads, head_dim=rows // attn.num_heads, scale=number(attn.scaling),
        qkv_bias=bias, o_bias=linear(attn.out_proj)[1], qk_norm=False, softcap=None,
        act=ACTIVATIONS[type(layer.activation_fn).__name__], ffn_bias=linear(layer.fc1)[1],
        windows=[[len(body.layers), None]], ffn=runs([linear(x.fc1)[0], None] for x in body.layers))


def experts(layer, config):
    """Of a mixture [experts, used, whether their weights are made to sum to 1], and the width of one; else the width alone."""
    mlp = getattr(layer, "mlp", None) or layer.block_sparse_moe
    inner = getattr(mlp, "experts", None)
    if inner is None:
        both = getattr(mlp, "gate_up_proj", None)
        return [linear(both)[0] // 2 if both is not None else linear(mlp.gate_proj)[0], None]
    router = getattr(mlp, "gate", None) or mlp.router
    count = router.weight.shape[0]
    if isinstance(inner, torch.nn.ModuleList):
        one = inner[0]
        width = linear(getattr(one, "w1", None) or one.gate_proj)[0]
    else:
        # GPT-OSS keeps [experts, inputs, outputs].
        width = inner.gate_up_proj.shape[2 if config.model_type == "gpt_oss" else 1] // 2
    # Mixtral, GPT-OSS and ERNIE always normalize; their classes have no word for it.
    return [width, [count, config.num_experts_per_tok, getattr(config, "norm_topk_prob", True)]]


def llama(config, model):
    body = model.model
    body = getattr(body, "language_model", body)
    config = config.get_text_config()
    gemma = type(body).__name__[:6] if "Gemma" in type(body).__name__ else None
    layer = body.layers[0]
    attn, mlp = layer.self_attn, getattr(layer, "mlp", None) or layer.block_sparse_moe
    d = attn.head_dim
    if hasattr(attn, "qkv_proj"):
        rows, bias = linear(attn.qkv_proj)
        heads = linear(attn.o_proj)[0] and attn.o_proj.in_features // d
        kv = (rows // d - heads) // 2
    else:
        (rows, bias), kv = linear(attn.q_proj), linear(attn.k_proj)[0] // d
        heads = rows // d
    act = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    if act is None and config.model_type == "gpt_oss":
        act = "swiglu_oai"
    if act is None:
        act = mlp.experts[0].act_fn if isinstance(mlp.experts, torch.nn.ModuleList) else mlp.experts.act_fn
    types = getattr(config, "layer_types", None)
    slides = lambda l: types is None or type(body).__name__ in WHOLE or types[l] == "sliding_attention"
    window = lambda l: getattr(config, "sliding_window", None) if slides(l) else None
    norm = body.norm
    out = dict(
        embed=list(body.embed_tokens.weight.shape), positions=None,
        norm=["rms", number(getattr(norm, "variance_epsilon", None) or norm.eps)], final_norm=True,
        heads=heads, kv_heads=kv, head_dim=d, scale=number(getattr(attn, "scaling", d**-0.5)), qkv_bias=bias,
        o_bias=linear(attn.o_proj)[1], qk_norm=getattr(attn, "q_norm", None) is not None,
        # Gemma 3 keeps the value and never uses it.
        softcap=attn.attn_logit_softcapping if gemma == "Gemma2" else None,
        act=act if isinstance(act, str) else ACTIVATIONS[type(act).__name__],
        ffn_bias=hasattr(getattr(mlp, "experts", None), "gate_up_proj_bias")
        or getattr(mlp, "gate_proj", None) is not None and linear(mlp.gate_proj)[1],
        windows=runs(window(l) for l in range(len(body.layers))), ffn=runs(experts(x, config) for x in body.layers))
    kinds = {l: "sliding_attention" if window(l) else "full_attention" for l in range(len(body.layers))}
    out["rope"] = {kind: rope(config, kind, type(body.rotary_emb)) for kind in sorted(set(kinds.values()))}
    if gemma:
        out["embed_scale"] = number(config.hidden_size**0.5)
        out["logit_softcap"] = config.final_logit_softcapping if type(model).__name__.endswith("ForCausalLM") else None
    return body.layers, out


# Their classes ask for a window, never for types of layers.
WHOLE = ("MistralModel", "MixtralModel", "Phi3Model", "Qwen3MoeModel")


def rope(config, kind, rotary):
    """[base, channels that turn, type] of RoPE in layers of one kind."""
    both = MAJOR == "v5" and rotary.__name__.startswith("Gemma3")
    if MAJOR == "v5":
        said = config.rope_parameters[kind] if both else config.rope_parameters
        freqs = getattr(rotary(config), f"{kind}_inv_freq" if both else "inv_freq")
        return [number(said["rope_theta"]), 2 * len(freqs), said["rope_type"]]
    theta = config.rope_theta
    if rotary.__name__.startswith("Gemma3") and kind == "sliding_attention":
        theta = config.rope_local_base_freq
    return [number(theta), 2 * len(rotary(config).inv_freq), rotary(config).rope_type]


def network(config, model):
    layers, out = {"gpt2": gpt2, "opt": opt}.get(config.model_type, llama)(config, model)
    head, embed = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    # The positions' rows are more than the context in OPT; RoPE has none.
    return dict(layers=len(layers), tied=head is embed, context=config.get_text_config().max_position_embeddings, **out)


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    path, names, whole = sys.argv[1], sys.argv[2:], {}
    if os.path.exists(path):
        with open(path) as f:
            whole = json.load(f)
    made_with = {**whole.get("made_with", {}), MAJOR: tf.__version__}
    out = {"made_with": {k: made_with[k] for k in sorted(made_with)}}
    for name, keys in READ.items():
        if names and name not in names:
            out[name] = whole[name]
            continue
        config = read({"model_type": name})
        with torch.device("meta"):
            model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        said = config.to_dict()
        values = {"model_type": name, **{k: said[k] for k in keys if k in said}}
        if name == "gemma3":
            values["text_config"] = {k: said["text_config"][k] for k in READ["gemma3_text"] if k in said["text_config"]}
        had, built = whole.get(name, {}), network(config, model)
        assert had.get("network", built) == json.loads(json.dumps(built)), f"{name}: v4 and v5 build different networks"
        out[name] = {**{k: had[k] for k in ("v4", "v5") if k in had}, MAJOR: values, "network": built}
    write_json(path, out)


if __name__ == "__main__":
    main()
