#!/usr/bin/env python3
"""Gradients of the tiny models' loss, by autograd in f64.

    python make_gradients.py TINY OUT.json [later [NAME ...] | recurrent]    with transformers 5

For each TINY/NAME and each of its two sequences alone: the mean next-token loss, and of its gradient with respect to every matrix, norm
and bias of the blocks, the last norm and the head its 2-norm and four entries: those at `(7919 i + 5) mod n` of the n values, row by
row, of the tensor as Lacuna names and cuts it (`layers.0.attn.q`; matrices `[outputs, inputs]`). `residual`: the gradient of what
goes into the first block. `later`: of the models that make_tiny_v5.py and make_tiny_moe.py made (with names these alone, put to what OUT.json
has); `recurrent`: of some that make_tiny_recurrent.py made; else of the others. A tied head is untied first: its gradient is that of the head
alone. A tensor that no token reached is null.
"""

import json
import os
import re
import sys

import torch
import transformers as tf

from common import number, numbers, versions, write_json

torch.set_num_threads(1)
tf.logging.set_verbosity_error()

ENTRIES = 4

# What follows `layers.N.` in a name, and the role it has. Gemma 2 and 3 have norms on both sides of each part.
ROLES = {
    "self_attn.q_proj": "attn.q", "self_attn.k_proj": "attn.k", "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o", "self_attn.out_proj": "attn.o", "self_attn.q_norm": "attn.q_norm",
    "self_attn.k_norm": "attn.k_norm", "mlp.gate_proj": "ffn.gate", "mlp.up_proj": "ffn.up", "mlp.down_proj": "ffn.down",
    "input_layernorm": "attn.norm", "post_attention_layernorm": "ffn.norm", "self_attn_layer_norm": "attn.norm",
    "final_layer_norm": "ffn.norm", "fc1": "ffn.up", "fc2": "ffn.down", "ln_1": "attn.norm", "ln_2": "ffn.norm",
    "attn.c_proj": "attn.o", "mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.down", "mlp.gate": "ffn.router",
    "block_sparse_moe.gate": "ffn.router", "mlp.router": "ffn.router", "self_attn.sinks": "attn.sinks",
    "mlp.shared_expert_gate": "ffn.shared.router", "self_attn.q_a_proj": "attn.q_down",
    "self_attn.q_a_layernorm": "attn.q_down_norm", "self_attn.q_b_proj": "attn.q",
    "self_attn.kv_a_proj_with_mqa": "attn.kv_down", "self_attn.kv_a_layernorm": "attn.kv_down_norm",
    **{f"mlp.{shared}.{role}_proj": f"ffn.shared.{role}" for shared in ("shared_expert", "shared_experts", "shared_mlp")
       for role in ("gate", "up", "down")},
    "self_attn.dense": "attn.o", "self_attn.q_layernorm": "attn.q_norm", "self_attn.k_layernorm": "attn.k_norm",
    "self_attn.query_layernorm": "attn.q_norm", "self_attn.key_layernorm": "attn.k_norm", "mlp.fc1": "ffn.up",
    "mlp.fc2": "ffn.down", "mlp.c_proj": "ffn.down", "post_self_attn_layernorm": "attn.post_norm",
    "post_mlp_layernorm": "ffn.post_norm", "attention_layernorm": "attn.norm", "feedforward_layernorm": "ffn.norm",
    "mlp.act_fn.alpha_p": "ffn.act_above", "mlp.act_fn.alpha_n": "ffn.act_below", "attention.dense": "attn.o",
    "self_attention.dense": "attn.o", "mlp.dense_h_to_4h": "ffn.up", "mlp.dense_4h_to_h": "ffn.down", "ln_attn": "attn.norm",
    "ln_mlp": "ffn.norm", "attn.q_proj": "attn.q", "attn.k_proj": "attn.k", "attn.v_proj": "attn.v", "attn.out_proj": "attn.o",
    "mlp.fc_in": "ffn.up", "mlp.fc_out": "ffn.down", "feed_forward.router": "ffn.router",
    **{f"feed_forward.{role}_proj": f"ffn.{role}" for role in ("gate", "up", "down")},
    **{f"feed_forward.shared_expert.{role}_proj": f"ffn.shared.{role}" for role in ("gate", "up", "down")},
    "per_layer_input_gate": "ffn.input.gate", "per_layer_projection": "ffn.input.out", "post_per_layer_input_norm": "ffn.input.norm",
    "router.proj": "ffn.router", "router.scale": "ffn.router_norm", "pre_feedforward_layernorm_2": "ffn.experts_norm",
    "altup.correct_output_scale": "altup.scale", "altup.correction_coefs": "altup.correct",
    "altup.prediction_coefs": "altup.predict", "altup.modality_router": "altup.router", "altup.router_norm": "altup.router_norm",
    "laurel.linear_left": "attn.laurel.in", "laurel.linear_right": "attn.laurel.out", "laurel.post_laurel_norm": "attn.laurel.norm",
    "post_feedforward_layernorm_1": "ffn.shared.post_norm", "post_feedforward_layernorm_2": "ffn.experts_post_norm",
}
# Of make_tiny_recurrent.py; what no other model there has. Not qwen3_5_moe, which computes as qwen3_next does: autograd in
# f32 lies 3e-5 from its f64 there (one entry by 5e-4 of itself), further than the test of 32-bit gradients allows.
RECURRENT = ["falcon_h1", "granitemoehybrid", "jamba", "mpt", "qwen3_next"]
RECURRENT_ROLES = {
    "A_log": "mixer.a", "D": "mixer.d", "dt_bias": "mixer.dt.bias", "conv1d": "mixer.conv", "norm": "mixer.out_norm",
    "out_proj": "mixer.out", "dt_proj": "mixer.dt", "dt_layernorm": "mixer.dt_norm", "b_layernorm": "mixer.b_norm",
    "c_layernorm": "mixer.c_norm", "in_proj_qkv": "mixer.in", "in_proj_z": "mixer.z", "in_proj_a": "mixer.dt",
    "in_proj_b": "mixer.beta",
}
# Norms behind the parts only.
BEHIND = {"post_attention_layernorm": "attn.post_norm", "post_feedforward_layernorm": "ffn.post_norm"}
SANDWICH = {
    "post_attention_layernorm": "attn.post_norm", "pre_feedforward_layernorm": "ffn.norm",
    "post_feedforward_layernorm": "ffn.post_norm",
}


def places(name, gradient, config):
    """The places of a parameter with their parts of its gradient."""
    if name.endswith(("e_score_correction_bias", "router.per_expert_scale")):
        # The one chooses and weighs nothing; of the other nobody asks.
        return
    if ("embed" in name and "unembed" not in name) or re.search(r"\bwte\b|\bwpe\b", name):
        return
    if name in ("lm_head.weight", "lm_head.bias"):
        yield "head" + name.removeprefix("lm_head").replace(".weight", ""), gradient
        return
    found = re.search(r"\b(?:layers|h)\.(\d+)\.(.*)$", name)
    bias = ".bias" if name.endswith(".bias") else ""
    if not found and ("per_layer" in name or "altup_projections" in name):
        # What makes the inputs of all layers, or all streams, stands before the blocks.
        return
    if not found and (stream := re.search(r"altup_unembed_projections\.(\d+)", name)):
        yield f"altup.streams.{int(stream[1]) + 1}.out", gradient
        return
    if not found:
        assert re.search(r"norm|ln_f", name), name
        yield "norm" + bias, gradient
        return
    layer, rest = f"layers.{found[1]}.", found[2]
    stem = re.sub(r"\.(weight|bias)$", "", rest)
    if config.model_type == "gpt2" and gradient.ndim == 2:
        gradient = gradient.T
    if config.model_type == "gpt_oss" and ".experts." in f".{stem}":
        # [experts, inputs, outputs]; gate and up take turns.
        for e, one in enumerate(gradient):
            bias = ".bias" if one.ndim == 1 else ""
            one = one if bias else one.T
            parts = [("gate", one[::2]), ("up", one[1::2])] if "gate_up" in stem else [("down", one)]
            for role, part in parts:
                yield f"{layer}ffn.experts.{e}.{role}{bias}", part
    elif config.model_type == "llama4_text" and ".experts." in stem:
        # [experts, inputs, outputs], gates before ups.
        for e, one in enumerate(gradient):
            parts = zip(("gate", "up"), one.T.chunk(2)) if "gate_up" in stem else [("down", one.T)]
            for role, part in parts:
                yield f"{layer}ffn.experts.{e}.{role}", part
    elif stem.endswith("self_attn.kv_b_proj"):
        # A head's rows that make keys, the other way round, and those that make values.
        cuts = [config.qk_nope_head_dim, config.v_head_dim]
        for h, both in enumerate(gradient.split(sum(cuts))):
            k, v = both.split(cuts)
            yield f"{layer}attn.heads.{h}.k_up", k.T
            yield f"{layer}attn.heads.{h}.v_up", v
    elif f".{stem}".endswith(".experts.gate_up_proj"):
        for e, both in enumerate(gradient):
            for role, part in zip(("gate", "up"), both.chunk(2)):
                yield f"{layer}ffn.experts.{e}.{role}", part
    elif f".{stem}".endswith(".experts.down_proj"):
        for e, part in enumerate(gradient):
            yield f"{layer}ffn.experts.{e}.down", part
    elif stem.endswith("gate_up_proj"):
        for role, part in zip(("gate", "up"), gradient.chunk(2)):
            yield f"{layer}ffn.{role}{bias}", part
    elif stem.endswith("query_key_value"):
        heads = config.num_attention_heads
        dim = config.hidden_size // heads
        groups = heads
        if config.model_type == "falcon":
            groups = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else heads
        rows = gradient.reshape(groups, heads // groups + 2, dim, *gradient.shape[1:])
        for role, part in zip("qkv", (rows[:, :-2], rows[:, -2:-1], rows[:, -1:])):
            yield f"{layer}attn.{role}{bias}", part.reshape(-1, *gradient.shape[1:])
    elif stem.endswith(("qkv_proj", "c_attn")):
        if config.model_type == "gpt2":
            cuts = [config.n_embd] * 3
        else:
            dim = config.hidden_size // config.num_attention_heads
            cuts = [n * dim for n in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)]
        for role, part in zip("qkv", gradient.split(cuts)):
            yield f"{layer}attn.{role}{bias}", part
    else:
        sandwich = config.model_type in ("gemma2", "gemma3", "gemma3_text", "gemma3n_text", "gemma4_text") and SANDWICH.get(stem)
        if config.model_type == "gemma4_text" and config.enable_moe_block and stem.startswith("mlp."):
            sandwich = f"ffn.shared.{stem[4:].removesuffix('_proj')}"
        if config.model_type in ("olmo2", "olmo3", "exaone4"):
            sandwich = BEHIND.get(stem)
        yield layer + (sandwich or ROLES[stem]) + bias, gradient


def recurrent(name, gradient, config):
    """The same of networks with recurrent mixers, and of MPT."""
    found = re.search(r"\b(?:layers|blocks)\.(\d+)\.(.*)$", name)
    if not found:
        yield from places(name, gradient, config)
        return
    layer, rest = f"layers.{found[1]}.", found[2]
    stem = re.sub(r"\.(weight|bias)$", "", rest)
    bias = ".bias" if rest.endswith(".bias") else ""
    mixes = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    mixes = mixes and mixes[int(found[1])] not in ("attention", "full_attention")
    module, _, inner = stem.partition(".")
    cut = lambda roles, sizes, of=gradient: zip(roles, of.split(sizes))
    if module in ("mamba", "linear_attn"):
        if inner == "in_proj" and config.model_type == "jamba":
            parts = cut(("in", "z"), [gradient.shape[0] // 2] * 2)
        elif inner == "in_proj":
            wide, heads = config.mamba_n_heads * config.mamba_d_head, config.mamba_n_heads
            inside = wide + 2 * config.mamba_n_groups * config.mamba_d_state
            parts = cut(("z", "in", "dt"), [wide, inside, heads])
        elif inner == "x_proj":
            parts = cut(("dt_down", "b", "c"), [config.mamba_dt_rank, config.mamba_d_state, config.mamba_d_state])
        elif inner in ("in_proj_qkvz", "in_proj_ba"):
            heads, each = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
            values, keys = each * config.linear_value_head_dim, config.linear_key_head_dim
            by_head = gradient.reshape(heads, -1, gradient.shape[-1])
            flat = lambda x: x.reshape(-1, gradient.shape[-1])
            if inner == "in_proj_ba":
                parts = [(r, flat(p)) for r, p in zip(("beta", "dt"), by_head.split([each, each], 1))]
            else:
                q, k, v, z = map(flat, by_head.split([keys, keys, values, values], 1))
                parts = [("in", torch.cat([q, k, v])), ("z", z)]
        else:
            yield layer + RECURRENT_ROLES[inner] + bias, gradient
            return
        for role, part in parts:
            yield f"{layer}mixer.{role}", part
    elif stem == "input_layernorm" and mixes:
        yield layer + "mixer.norm" + bias, gradient
    elif stem in ("pre_ff_layernorm", "norm_2"):
        yield layer + "ffn.norm" + bias, gradient
    elif stem == "norm_1":
        yield layer + "attn.norm" + bias, gradient
    elif stem == "self_attn.q_proj" and config.model_type.startswith("qwen3"):
        by_head = gradient.reshape(config.num_attention_heads, 2, config.head_dim, -1)
        for i, role in enumerate(("q", "gate")):
            yield f"{layer}attn.{role}", by_head[:, i].reshape(-1, gradient.shape[-1])
    elif stem == "attn.out_proj":
        yield layer + "attn.o", gradient
    elif stem == "attn.Wqkv":
        for role, part in zip("qkv", gradient.chunk(3)):
            yield f"{layer}attn.{role}", part
    elif stem in ("block_sparse_moe.router", "feed_forward.router"):
        yield layer + "ffn.router", gradient
    elif stem == "shared_mlp.input_linear":
        for role, part in zip(("gate", "up"), gradient.chunk(2)):
            yield f"{layer}ffn.shared.{role}", part
    elif stem == "shared_mlp.output_linear":
        yield layer + "ffn.shared.down", gradient
    elif re.fullmatch(r"(feed_forward|ffn)\.\w+_proj", stem):
        yield f"{layer}ffn.{stem.split('.')[1].removesuffix('_proj')}", gradient
    else:
        yield from places(name, gradient, config)


def sample(gradient):
    flat = gradient.reshape(-1)
    if not bool(flat.any()):
        return None
    return [number(flat.norm()), *numbers(flat[[(7919 * i + 5) % len(flat) for i in range(ENTRIES)]])]


def side_by_side(residual):
    return residual.permute(1, 2, 0, 3) if residual.ndim == 4 else residual


def of_model(directory, places=places):
    with open(os.path.join(directory, "golden.json")) as f:
        ids = json.load(f)["input_ids"]
    experts = {} if directory.endswith("mpt") else {"experts_implementation": "eager"}
    model = tf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager",
                                                    **experts)
    model = model.to(torch.float64).eval()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    kept = {}

    def keep(_, args, kwargs):
        # A copy: what else is made of the embedding has gradients of its own.
        given = (args[0] if args else kwargs["hidden_states"]) * 1.0
        # Of several streams all, side by side, as they lie: [streams, 1, tokens, hidden].
        given.retain_grad()
        kept["residual"] = given
        return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})

    inner = model.model.decoder if hasattr(model.model if hasattr(model, "model") else model, "decoder") else (
        model.model if hasattr(model, "model") else getattr(model, "transformer", None) or model.gpt_neox)
    blocks = next(getattr(inner, name) for name in ("layers", "h", "blocks") if hasattr(inner, name))
    blocks[0].register_forward_pre_hook(keep, with_kwargs=True)
    out = []
    for sequence in ids:
        model.zero_grad(set_to_none=True)
        tokens = torch.tensor([sequence])
        scores = model(input_ids=tokens, use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(scores[:-1], tokens[0, 1:])
        loss.backward()
        found = {"residual": sample(side_by_side(kept["residual"].grad))}
        for name, p in model.named_parameters():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            for place, part in places(name, gradient, model.config):
                assert place not in found, place
                found[place] = sample(part)
        out.append({"loss": number(loss.detach()), "gradients": found})
    return out


def main():
    (tiny, path), later, names = sys.argv[1:3], sys.argv[3:4] == ["later"], sys.argv[4:]
    models = {}
    if sys.argv[3:] == ["recurrent"]:
        models = {name: of_model(os.path.join(tiny, name), recurrent) for name in RECURRENT}
    if names:
        with open(path) as f:
            models = json.load(f)
        del models["made_with"]
    for name in [] if sys.argv[3:] == ["recurrent"] else sorted(os.listdir(tiny)):
        if not os.path.exists(golden := os.path.join(tiny, name, "golden.json")):
            continue
        with open(golden) as f:
            made_later = "greedy" in json.load(f)
        if made_later == later and (not names or name in names):
            models[name] = of_model(os.path.join(tiny, name))
            print(name, [len(s["gradients"]) for s in models[name]], [s["loss"] for s in models[name]])
    write_json(path, {"made_with": versions(), **{name: models[name] for name in sorted(models)}})
    size = os.path.getsize(path)
    print(f"{size / 1000:.0f} kB")
    assert size < 500_000


if __name__ == "__main__":
    main()
