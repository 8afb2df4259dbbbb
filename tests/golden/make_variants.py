#!/usr/bin/env python3
"""The tiny models again, each under configurations that say something in another way, in another place, or not at all,
and what transformers makes of them: which keys are read, ignored or win, and where null is not the same as absent.

    python make_variants.py TINY OUT.json    first with transformers 5, then with transformers 4

Every variant takes the weights and ids of TINY/MODEL. `set` and `drop` change its config.json; `wrap` puts it into the
text_config of a Gemma 3 that also sees images, beside these keys. `logits`: the last position of each sequence, the
first four words of the vocabulary. `nll`: the mean loss of each sequence, in nats. `greedy`: the prompt and the 64
likeliest tokens after it, two hexadecimal digits a token. `refused`: transformers 5 cannot load or run it, and says why;
`v4_logits` beside it: transformers 4 could. Where both run and differ, the newer counts: the second run prints those.

The prompt is the beginning of the first sequence, unless somewhere two words are nearly as likely as each other, which
two correct programs may settle otherwise: then it begins a token later, and so on, which is printed.
"""

import json
import os
import shutil
import sys
import tempfile

import torch
import transformers as tf

from common import versions, write_json
from make_defaults import READ

torch.set_num_threads(1)
tf.logging.set_verbosity_error()

WORDS = 4
TOKENS = 64
# By how much the likeliest word leads everywhere in a continuation: ten times what two f32 programs differ by.
LEAD = 1e-4
ROPE = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "phi3"]
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 2.0, "beta_fast": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 2.0, 3.5, 4.0]}
HALF = {"partial_rotary_factor": 0.5}
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
              patch_size=14)
INNER = {"original_max_position_embeddings": 32}


def variants():
    out = []

    def add(model, drop=(), wrap=None, **set_):
        out.append({"model": model, **({"set": set_} if set_ else {}), **({"drop": list(drop)} if drop else {}),
                    **({"wrap": wrap} if wrap is not None else {})})

    old = ["rope_theta", "rope_scaling"]
    # Where a part of each head turns.
    for model in ROPE:
        add(model, partial_rotary_factor=0.5, **({"rope_scaling": None} if model == "phi3" else {}))
        add(model, old, rope_parameters={"rope_type": "default", "rope_theta": 500.0, **HALF})
        add(model, rope_scaling={"rope_type": "default", **HALF})
        add(model, rope_scaling={**LINEAR, **HALF})
        add(model, rope_scaling=LINEAR, partial_rotary_factor=0.5)
        add(model, old, rope_parameters={**LINEAR, "rope_theta": 500.0, **HALF})
        add(model, old, rope_parameters={**LINEAR, "rope_theta": 500.0})
        add(model, rope_scaling={**LINEAR, "partial_rotary_factor": 1.0})
    short = {"short_factor": [1.0, 1.3], "long_factor": [1.0, 3.5]}
    for kind in (LLAMA3, YARN, {**LONG, **short}, {"rope_type": "dynamic", "factor": 2.0}):
        add("llama", rope_scaling={**kind, **HALF})
    for more in ({"partial_rotary_factor": 0.5}, {}):
        add("phi3", rope_scaling={"type": "longrope", **short, **({} if more else HALF)}, **more)
    add("phi3", old, rope_parameters={"rope_type": "longrope", "rope_theta": 500.0, **short, **HALF})
    add("phi3", old, partial_rotary_factor=0.25,
        rope_parameters={"rope_type": "longrope", "rope_theta": 500.0, **short, **HALF})
    add("phi3", rope_scaling=None, partial_rotary_factor=None)

    # Which base wins.
    for model in ROPE:
        add(model, ["rope_theta"])
        add(model, ["rope_scaling"], rope_theta=70.0, rope_parameters={"rope_type": "default"})
        add(model, ["rope_scaling"], rope_theta=70.0, rope_parameters={"rope_type": "default", "rope_theta": 90.0})
        add(model, rope_parameters={**LINEAR, "rope_theta": 90.0}, rope_scaling={"rope_type": "linear", "factor": 3.0})
        add(model, rope_parameters={**LINEAR, "rope_theta": 90.0}, rope_scaling={})
        add(model, rope_scaling={"type": "linear", "factor": 2.0})
        add(model, rope_scaling={"rope_type": "default", "type": "linear", "factor": 2.0})
        add(model, rope_scaling={"factor": 2.0})
        add(model, rope_scaling={"rope_type": "default", "rope_theta": 90.0})
        add(model, old, rope_parameters={"full_attention": LINEAR, "sliding_attention": {"rope_type": "default"}})

    # Other keys of the longer-context rules.
    for kind in (LLAMA3, YARN, LONG):
        add("llama", rope_scaling=kind)
        add("llama", rope_scaling={**kind, **INNER})
        add("llama", rope_scaling=kind, original_max_position_embeddings=32)
        add("llama", rope_scaling={**kind, **INNER}, original_max_position_embeddings=16)
        add("llama", old, rope_parameters={**kind, "rope_theta": 500.0, **INNER}, original_max_position_embeddings=16)
    for more in ({"attention_factor": 0.7}, {"mscale": 0.5, "mscale_all_dim": 0.8}, {"mscale": 0.5},
                 {"mscale": 0, "mscale_all_dim": 0.8}, {"truncate": False}, {"truncate": None}, {"beta_fast": 0},
                 {"beta_slow": 0.5}, {"factor": None}, {"attention_factor": None},
                 {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 2.0, 3.5, 4.0]}):
        add("llama", rope_scaling={**YARN, **INNER, **more})
    add("llama", rope_scaling={"rope_type": "yarn", **INNER})
    for more in ({"factor": 2.0}, {"attention_factor": 0.7}, {"factor": 2.0, "attention_factor": 0.7}, {"factor": 0.5}):
        add("llama", rope_scaling={**LONG, **INNER, **more})
        add("llama", rope_scaling={**LONG, **more}, original_max_position_embeddings=32)
    add("llama", rope_scaling={**LONG, "rope_type": "su"})
    add("llama", rope_scaling={**LINEAR, "attention_factor": 0.7, **INNER}, original_max_position_embeddings=16)
    add("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    add("llama", rope_scaling={"rope_type": "linear"})
    add("llama", rope_theta=None)
    lists = {k: LONG[k] for k in ("short_factor", "long_factor")}
    for kind in ("su", "yarn", "longrope"):
        add("phi3", rope_scaling={"type": kind, **lists})
        add("phi3", rope_scaling={"rope_type": kind, **lists})
    for more in (INNER, {"original_max_position_embeddings": 16}, {"factor": 2.0}, {"attention_factor": 0.7}):
        add("phi3", old, rope_parameters={"rope_type": "longrope", "rope_theta": 500.0, **lists, **more})
        add("phi3", ["original_max_position_embeddings"], rope_scaling={"type": "longrope", **lists, **more})
    add("phi3", rope_scaling={**LLAMA3, **INNER})
    add("phi3", rope_scaling={**YARN, **INNER})
    add("phi3", head_dim=8)

    # RoPE by type of layer.
    full = {"rope_type": "linear", "factor": 2.0, "rope_theta": 90.0}
    local = {"rope_type": "default", "rope_theta": 30.0}
    rope3 = [*old, "rope_local_base_freq"]
    for given in ({"full_attention": full, "sliding_attention": local}, {"full_attention": full},
                  {"sliding_attention": local}, {"full_attention": full, "sliding_attention": None},
                  {"full_attention": {"rope_type": "default"}},
                  {"full_attention": full, "sliding_attention": {"rope_type": "linear", "factor": 3.0}},
                  {"full_attention": {**full, **HALF}, "sliding_attention": local},
                  {"full_attention": {**YARN, **INNER, "truncate": False}},
                  {"full_attention": {**YARN, **INNER}, "truncate": False},
                  {"full_attention": {"rope_type": "default", **HALF}}):
        add("gemma3", rope3, rope_parameters=given)
        add("gemma3", ["rope_scaling"], rope_parameters=given, rope_theta=70.0, rope_local_base_freq=20.0)
    add("gemma3", rope3, rope_parameters={"full_attention": {"rope_type": "default"}}, rope_scaling=LINEAR)
    add("gemma3", rope3, rope_parameters={"sliding_attention": local}, rope_scaling=LINEAR)
    add("gemma3", rope3, rope_parameters={"full_attention": YARN}, original_max_position_embeddings=32)
    add("gemma3", rope_scaling={**YARN, **INNER, "truncate": False})
    add("gemma3", ["rope_local_base_freq"])
    add("gemma2", old, rope_parameters={"full_attention": full, "sliding_attention": full})

    # Windows, and what asks for types of layers.
    both = ["full_attention", "sliding_attention"]
    for model in ("mistral", "mixtral", "phi3", "qwen3_moe", "llama"):
        add(model, sliding_window=10)
        add(model, sliding_window=10, layer_types=both)
        add(model, sliding_window=10, use_sliding_window=True)
        add(model, sliding_window=10, use_sliding_window=False)
    for model in ("qwen2", "qwen3"):
        add(model, sliding_window=10)
        add(model, ["layer_types"], sliding_window=10, use_sliding_window=True, max_window_layers=1)
        add(model, ["layer_types"], sliding_window=10, use_sliding_window=True)
        add(model, ["layer_types"], sliding_window=None, use_sliding_window=True, max_window_layers=0)
        add(model, sliding_window=10, use_sliding_window=True, layer_types=both)
        add(model, sliding_window=10, layer_types=both)
        add(model, layer_types=["attention", "attention"])
    for model in ("gemma2", "gemma3"):
        add(model, sliding_window=None)
        add(model, ["sliding_window"])
        add(model, ["layer_types"])
    add("gemma3", ["layer_types"], sliding_window_pattern=2)
    add("gemma3", ["layer_types", "sliding_window_pattern"], _sliding_window_pattern=2)
    add("mistral", ["sliding_window"])
    add("mistral", layer_types=None)
    for kinds in (both, None):
        add("mistral", model_type="ministral", layer_types=kinds)

    # Caps, activations, factors.
    for model in ("gemma2", "gemma3"):
        add(model, attn_logit_softcapping=3.0)
        add(model, final_logit_softcapping=4.0)
        add(model, ["attn_logit_softcapping", "final_logit_softcapping"])
        add(model, hidden_act="relu")
        add(model, ["hidden_activation"], hidden_act="relu")
    add("gemma3", wrap={})
    add("gemma3", wrap={"final_logit_softcapping": 4.0, "rope_theta": 7.0, "is_causal": True})
    add("gemma3", wrap={}, final_logit_softcapping=4.0)
    add("gemma3", wrap={"tie_word_embeddings": True}, tie_word_embeddings=False)
    for kind in ("swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python", "gelu_python_tanh",
                 "gelu_accurate", "relu", "quick_gelu"):
        add("llama", hidden_act=kind)
    for model in ("qwen3_moe", "mixtral", "phi3"):
        add(model, hidden_act="gelu")

    # Other names for the same.
    add("qwen3_moe", ["num_experts"], num_local_experts=4)
    add("qwen3_moe", num_experts=3, num_local_experts=4)
    add("qwen3_moe", num_experts=4, num_local_experts=3)
    add("mixtral", ["num_local_experts"], num_experts=4)
    add("mixtral", num_local_experts=3, num_experts=4)
    add("mixtral", num_local_experts=4, num_experts=3)
    for name, other, value in (("n_embd", "hidden_size", 32), ("n_positions", "max_position_embeddings", 64),
                               ("n_head", "num_attention_heads", 4), ("n_layer", "num_hidden_layers", 2)):
        add("gpt2", [name], **{other: value})
        add("gpt2", **{other: value, name: 3 * value})

    # Keys of other classes, which these do not ask for.
    for model in ("mistral", "mixtral", "qwen2", "phi3"):
        add(model, attention_bias=True)
    for model in ("mistral", "qwen2", "qwen3", "phi3"):
        add(model, mlp_bias=True)
    add("llama", is_causal=True)

    # As many key heads as query heads fit gemma2's tensors alone.
    add("gemma2", num_key_value_heads=None, num_attention_heads=2)
    # Null, and nothing, for each key.
    for model in [*ROPE, "gpt2", "opt"]:
        for key in READ["gemma3_text" if model == "gemma3" else model]:
            add(model, **{key: None})
            add(model, [key])
    seen = set()
    return [v for v in out if not (json.dumps(v, sort_keys=True) in seen or seen.add(json.dumps(v, sort_keys=True)))]


def run(tiny, v):
    source = os.path.join(tiny, v["model"])
    with open(os.path.join(source, "config.json")) as f:
        config = json.load(f)
    for key in v.get("drop", []):
        config.pop(key, None)
    config.update(v.get("set", {}))
    with open(os.path.join(source, "golden.json")) as f:
        ids = json.load(f)["input_ids"]
    with tempfile.TemporaryDirectory() as d:
        if "wrap" in v:
            config = {"model_type": "gemma3", "text_config": config, "vision_config": VISION, "mm_tokens_per_image": 1,
                      **v["wrap"]}
        with open(os.path.join(d, "config.json"), "w") as f:
            json.dump(config, f)
        shutil.copy(os.path.join(source, "model.safetensors"), d)
        options = dict(dtype=torch.float32, attn_implementation="eager")
        if "wrap" in v:
            model = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.from_pretrained(d), **options)
            text = tf.Gemma3ForCausalLM.from_pretrained(source, **options)
            model.model.language_model.load_state_dict(text.model.state_dict())
            model.tie_weights()
        else:
            model, info = tf.AutoModelForCausalLM.from_pretrained(d, output_loading_info=True, **options)
            lost = [k for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for k in info[kind]]
            if lost:
                raise ValueError(f"tensors do not fit: {sorted(map(str, lost))[0]}")
        model.eval()
        with torch.no_grad():
            rows = [model(input_ids=torch.tensor([i]), use_cache=False).logits[0] for i in ids]
            if not all(torch.isfinite(r[-1, :WORDS]).all() for r in rows):
                raise ValueError("not a number")
            # Five decimals: a twentieth of the tolerance.
            out = {"logits": [[round(x, 5) for x in r[-1, :WORDS].tolist()] for r in rows]}
            if tf.__version__[0] == "4":
                return out
            nll = [torch.nn.functional.cross_entropy(r[:-1].double(), torch.tensor(i[1:])) for r, i in zip(rows, ids)]
            return {**out, "nll": [round(x.item(), 7) for x in nll], **greedy(v, model, ids[0])}


def greedy(v, model, ids):
    """What the model goes on to say: `generate` without a cache and, wherever that works, with one. Where they differ,
    the cache is wrong: that of LongRoPE keeps the keys of the other list (but for Phi-3's), and others forget what a
    window would, though the model has none.
    """
    model.config.get_text_config().eos_token_id = model.config.eos_token_id = None
    model.generation_config = tf.GenerationConfig(do_sample=False, pad_token_id=0, max_new_tokens=TOKENS)
    # Learned positions end at 64: the last of the answer is never read.
    length = 1 if v["model"] in ("gpt2", "opt") else 8
    for at in range(len(ids) - length + 1):
        prompt = torch.tensor([ids[at:at + length]])
        # A mask of our own: the one that generate makes hides the token that pads.
        options = dict(attention_mask=torch.ones_like(prompt), return_dict_in_generate=True, output_logits=True)
        said = model.generate(prompt, use_cache=False, **options)
        top = torch.stack([step[0] for step in said.logits]).topk(2).values
        lead = (top[:, 0] - top[:, 1]).min().item()
        if lead < LEAD:
            print(named(v), f"leads by {lead:.1e} after token {at}")
            continue
        try:
            cached = model.generate(prompt, use_cache=True, **options).sequences
            if not torch.equal(cached, said.sequences):
                first = (cached == said.sequences)[0].long().argmin() - length
                print(named(v), f"with a cache: other tokens after {first}")
        except (RuntimeError, TypeError) as e:
            print(named(v), f"with a cache: {e}"[:60])
        tokens = said.sequences[0, length:].tolist()
        assert len(tokens) == TOKENS
        return {"greedy": [bytes(prompt[0].tolist()).hex(), bytes(tokens).hex()]}
    raise SystemExit("no prompt will do")


def named(v):
    return {k: v[k] for k in ("model", "set", "drop", "wrap") if k in v}


def attempt(tiny, v):
    try:
        return run(tiny, v)
    except Exception as e:  # whatever it is, it is what a user meets
        return {"refused": f"{type(e).__name__}: {e}".splitlines()[0][:60]}


def main():
    if len(sys.argv) != 3 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    tiny, path = sys.argv[1:]
    out = []
    if tf.__version__[0] == "4":
        with open(path) as f:
            had = json.load(f)
        for v in had["variants"]:
            said = {k: v[k] for k in ("logits", "nll", "greedy", "refused") if k in v}
            old = attempt(tiny, named(v))
            if "refused" in said and "logits" in old:
                v["v4_logits"] = old["logits"]
            if "logits" in said and ("refused" in old or max(
                    abs(a - b) for x, y in zip(said["logits"], old["logits"]) for a, b in zip(x, y)) > 1e-4):
                print(named(v), "transformers 4:", old.get("refused", "other logits"))
            out.append(v)
        made_with = {**had["made_with"], "transformers 4": tf.__version__}
    else:
        for v in variants():
            result = attempt(tiny, v)
            # Without a key that shapes tensors, the tiny weights cannot fit: nothing is learned there.
            shapes = "ignore_mismatched_sizes" in result.get("refused", "")
            if "set" not in v and "refused" in result or shapes and None in v["set"].values():
                continue
            out.append({**v, **result})
        made_with = versions()
    write_lines(path, made_with, out)
    print(f"{len(out)} variants, {sum('refused' in v for v in out)} refused, {os.path.getsize(path) / 1000:.0f} kB")


def write_lines(path, made_with, variants):
    """A variant a line."""
    write_json(path, {"made_with": made_with})
    with open(path) as f:
        head = f.read().removesuffix("\n}\n")
    lines = ",\n".join(json.dumps(v, separators=(",", ":")) for v in variants)
    with open(path, "w", newline="\n") as f:
        f.write(f'{head},\n"variants": [\n{lines}\n]\n}}\n')


if __name__ == "__main__":
    main()
