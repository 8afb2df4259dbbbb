#!/usr/bin/env python3
"""Tiny random checkpoints of the architectures that came later, and what transformers 5 computes from them.

    python make_tiny_v5.py OUT [NAME ...]

writes OUT/NAME/{config.json, model.safetensors, golden.json}, as make_tiny.py does; golden.json also holds each sequence's mean loss
(`nll`) and the 64 likeliest tokens after a prompt (`greedy`: the prompt, and what follows), every one found by a pass over the whole
text without a cache.
"""

import argparse
import json
import os
import shutil
import zlib

import torch
import transformers as tf

from common import number, numbers, versions, write_json

torch.set_num_threads(1)
tf.logging.set_verbosity_error()

VOCAB = 64
LENGTHS = (16, 28)
PROMPT = 10

BASE = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, rms_norm_eps=1e-4, rope_parameters=dict(rope_type="default", rope_theta=500.0),
    bos_token_id=1, eos_token_id=2, pad_token_id=None, tie_word_embeddings=False,
)


def base(**changes):
    out = {**BASE, **changes}
    return {k: v for k, v in out.items() if v != "absent"}


def layer_norm(key, **changes):
    return base(rms_norm_eps="absent", **{key: 1e-4}, **changes)


def rope(**changes):
    return dict(rope_type="default", rope_theta=500.0, **changes)


FULL, SLIDING = "full_attention", "sliding_attention"

# name -> (model type, configuration). A note says what the entry is there to catch.
MODELS = {
    # Norms behind the parts only, and over all heads of q and of k.
    "olmo2": ("olmo2", base(num_key_value_heads=2)),
    # A set of RoPE for each type of layer; the scaling is that of layers that see everything.
    "olmo3": ("olmo3", base(
        num_hidden_layers=3, sliding_window=7, layer_types=[SLIDING, FULL, SLIDING],
        rope_parameters={
            FULL: dict(rope_type="yarn", rope_theta=700.0, factor=2.0, beta_fast=4.0, beta_slow=1.0,
                       original_max_position_embeddings=64),
            SLIDING: dict(rope_type="default", rope_theta=300.0)})),
    # The second layer knows no positions.
    "smollm3": ("smollm3", base(no_rope_layers=[1, 0], tie_word_embeddings=True)),
    # Every fourth, as the class counts them; the same layers see a window.
    "smollm3_window": ("smollm3", base(
        num_hidden_layers=4, intermediate_size=16, hidden_size=16, use_sliding_window=True, sliding_window=6, attention_bias=True,
        mlp_bias=True)),
    # Half of each head turns, neighbours together.
    "glm": ("glm", base(head_dim=8, rope_parameters=rope(partial_rotary_factor=0.5))),
    # Norms before and after each part; heads * head_dim is not hidden.
    "glm4": ("glm4", base(head_dim=12, rope_parameters=rope(partial_rotary_factor=0.5), attention_bias=False)),
    "granite": ("granite", base(
        embedding_multiplier=3.0, residual_multiplier=0.6, attention_multiplier=0.4, logits_scaling=1.6, attention_bias=True,
        mlp_bias=True)),
    "cohere": ("cohere", layer_norm("layer_norm_eps", logit_scale=0.7, tie_word_embeddings=True)),
    # A scale of its own for each head.
    "cohere_norms": ("cohere", layer_norm("layer_norm_eps", logit_scale=0.7, use_qk_norm=True, attention_bias=True)),
    # Layers without a window know no positions.
    "cohere2": ("cohere2", layer_norm(
        "layer_norm_eps", logit_scale=0.6, num_hidden_layers=3, sliding_window=7, layer_types=[SLIDING, FULL, SLIDING])),
    "exaone4": ("exaone4", base(num_hidden_layers=3, sliding_window=7, layer_types=[SLIDING, FULL, SLIDING])),
    # Without windows every layer turns.
    "exaone4_full": ("exaone4", base(sliding_window=None, layer_types=[FULL, FULL])),
    "seed_oss": ("seed_oss", base(head_dim=12, attention_bias=True, attention_out_bias=True)),
    "ministral": ("ministral", base(head_dim=12, sliding_window=7, layer_types=[SLIDING, FULL])),
    # Queries grow with their position, every ten of them.
    "ministral3": ("ministral3", base(
        head_dim=12, rope_parameters=dict(
            rope_type="yarn", rope_theta=700.0, factor=4.0, original_max_position_embeddings=10, beta_fast=4.0, beta_slow=1.0,
            mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.4))),
    "ernie4_5": ("ernie4_5", base(head_dim=12, use_bias=True, tie_word_embeddings=True)),
    # Norms of heads behind RoPE, whose base grows.
    "hunyuan_v1_dense": ("hunyuan_v1_dense", base(
        head_dim=12, rope_parameters=dict(rope_type="dynamic", rope_theta=500.0, alpha=3.0, factor=1.0))),
    # Norms that learn nothing; q, k and v are cut.
    "olmo": ("olmo", base(rms_norm_eps="absent", clip_qkv=1.2)),
    # Attention and FFN side by side behind one norm; a bias on the logits.
    "phi": ("phi", layer_norm("layer_norm_eps", rope_parameters=rope(partial_rotary_factor=0.5), hidden_act="gelu_new")),
    "phi_norms": ("phi", layer_norm("layer_norm_eps", rope_parameters=rope(partial_rotary_factor=0.25), qk_layernorm=True)),
    "starcoder2": ("starcoder2", layer_norm("norm_epsilon", sliding_window=9, hidden_act="gelu_pytorch_tanh")),
    "stablelm": ("stablelm", layer_norm("layer_norm_eps", rope_parameters=rope(partial_rotary_factor=0.25), use_qkv_bias=True)),
    "stablelm_parallel": ("stablelm", layer_norm(
        "layer_norm_eps", rope_parameters=rope(partial_rotary_factor=0.25), use_parallel_residual=True)),
    # relu², norms whose files keep the scale less one.
    "nemotron": ("nemotron", layer_norm("norm_eps", head_dim=12, rope_parameters=rope(partial_rotary_factor=0.5))),
    "gemma": ("gemma", base(head_dim=12, tie_word_embeddings=True, pad_token_id=0)),
    # Side by side behind norms of their own; q, k and v head by head in one matrix.
    "gpt_neox": ("gpt_neox", layer_norm("layer_norm_eps", rope_parameters=rope(partial_rotary_factor=0.25))),
    "gpt_neox_sequential": ("gpt_neox", layer_norm(
        "layer_norm_eps", rope_parameters=rope(partial_rotary_factor=0.5), use_parallel_residual=False, attention_bias=False)),
    # One key head, and one norm.
    "falcon": ("falcon", layer_norm("layer_norm_epsilon", ffn_hidden_size=40, tie_word_embeddings=True)),
    # The new form: groups of heads, and two norms.
    "falcon_new": ("falcon", layer_norm(
        "layer_norm_epsilon", ffn_hidden_size=40, new_decoder_architecture=True, num_kv_heads=2, bias=True)),
    # One after the other, as many key heads as query heads.
    "falcon_sequential": ("falcon", layer_norm(
        "layer_norm_epsilon", ffn_hidden_size=40, multi_query=False, parallel_attn=False, bias=True)),
    "helium": ("helium", base(head_dim=8)),
    "apertus": ("apertus", base()),
    # Side by side behind one norm, neighbours turn.
    "gptj": ("gptj", dict(
        vocab_size=VOCAB, n_positions=128, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_inner=40, layer_norm_epsilon=1e-4,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)),
    # ALiBi, of a number of heads that is no power of two, and a norm behind the embedding.
    "bloom": ("bloom", dict(
        vocab_size=VOCAB, hidden_size=24, n_layer=2, n_head=6, layer_norm_epsilon=1e-4, bos_token_id=1, eos_token_id=2)),
}


def randomise(model, generator):
    """As make_tiny.py does it, by the names of these classes."""
    kind = model.config.model_type
    less_one = kind in ("gemma", "nemotron")
    tied, hidden = model.config.tie_word_embeddings, model.config.hidden_size
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            norm = any(n in name for n in ("norm", "ln_"))
            if norm or p.ndim == 1:
                scale = norm and name.endswith("weight")
                p.copy_(0.3 * noise + (1.0 if scale and not less_one else 0.0))
            elif ("embed" in name or "wte" in name) and "embed_out" not in name:
                p.copy_(noise * (2.0 / hidden**0.5 if tied else 1.0))
            elif "lm_head" in name or "embed_out" in name:
                p.copy_(noise * (2.0 / hidden**0.5))
            else:
                p.copy_(noise * (1.3 / p.shape[-1] ** 0.5))


def load(directory, dtype):
    model, info = tf.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], f"{directory}: {kind}: {info[kind]}"
    return model.to(dtype).eval()


def run(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[0]


def greedy(model, seed):
    """A prompt after which every likeliest token leads clearly, and the 64 that follow."""
    for attempt in range(40):
        g = torch.Generator().manual_seed(seed + attempt)
        ids = torch.randint(0, VOCAB, (1, PROMPT), generator=g)
        text = ids
        while text.shape[1] < PROMPT + 64:
            top = run(model, text)[-1].topk(2)
            if top.values[0] - top.values[1] < 0.01:
                break
            text = torch.cat([text, top.indices[:1][None]], dim=1)
        else:
            return [text[0, :PROMPT].tolist(), text[0, PROMPT:].tolist()]
    raise AssertionError("no prompt leads to clear answers")


def save(name, out):
    model_type, fields = MODELS[name]
    directory = os.path.join(out, name)
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)
    config = tf.AutoConfig.for_model(model_type, **fields)
    config._attn_implementation = "eager"
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(torch.float32).eval()
    seed = zlib.crc32(name.encode())
    randomise(model, torch.Generator().manual_seed(seed))
    model.save_pretrained(directory)
    if os.path.exists(path := os.path.join(directory, "generation_config.json")):
        os.remove(path)
    g = torch.Generator().manual_seed(zlib.crc32(b"ids " + name.encode()))
    ids = [torch.randint(0, VOCAB, (1, n), generator=g) for n in LENGTHS]
    single, double = load(directory, torch.float32), load(directory, torch.float64)
    logits, exact = [run(single, i) for i in ids], [run(double, i) for i in ids]
    apart = max(float((s.double() - d).abs().max()) for s, d in zip(logits, exact))
    spread = torch.cat(logits).std()
    nll = [torch.nn.functional.cross_entropy(s[:-1].double(), i[0, 1:]) for s, i in zip(logits, ids)]
    write_json(os.path.join(directory, "golden.json"), {
        "made_with": versions(),
        "model": type(model).__name__,
        "f32_against_f64_max_abs": float(f"{apart:.3g}"),
        "input_ids": [i[0].tolist() for i in ids],
        "logits": [numbers(s) for s in logits],
        "nll": [number(x) for x in nll],
        "greedy": greedy(single, seed % 1000000),
    })
    size = sum(os.path.getsize(os.path.join(directory, f)) for f in os.listdir(directory))
    print(f"{name}: logits std {spread:.2f}, f32 vs f64 {apart:.1e}, {size / 1000:.0f} kB", flush=True)
    assert 0.8 < spread < 4.5 and apart < 1e-3, (name, spread, apart)
    assert size < 200_000, f"{name}: {size} bytes"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("names", nargs="*", help="default: all")
    arguments = parser.parse_args()
    assert int(tf.__version__.split(".")[0]) >= 5, tf.__version__
    for name in arguments.names or MODELS:
        save(name, arguments.out)


if __name__ == "__main__":
    main()
