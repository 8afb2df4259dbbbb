#!/usr/bin/env python3
"""Greedy continuations that cross LongRoPE's original context. Needs transformers 5.

    python make_longrope.py TINY OUT      reads TINY/{phi3, llama_rope_longrope}, writes OUT

Every token is the likeliest after one pass, without a cache, over the whole text before it: the list of factors is that of
the text's length at that moment. `generate` of Phi-3, which drops its cache where it crosses the original context, must say the
same; that of Llama keeps its short keys and says something else.
"""

import os
import sys
import zlib
from importlib.metadata import version

import torch
import transformers as tf

from common import write_json

ORIGINAL = 32
MODELS = {"phi3": tf.Phi3ForCausalLM, "llama_rope_longrope": tf.LlamaForCausalLM}
# Short of the original context (crossing it after 25, 13, 2 and 1 tokens), and beyond it.
LENGTHS = (8, 20, 31, 32, 33, 40)
TOKENS = 64
# Between the likeliest token and the next: far more than what f32 programs differ by.
MARGIN = 0.01

torch.set_num_threads(1)


def load(directory, cls, **rope):
    """The checkpoint, with changes to its rope."""
    config = tf.AutoConfig.from_pretrained(directory)
    config.rope_parameters.update(rope)
    if "original_max_position_embeddings" in rope:
        config.original_max_position_embeddings = rope["original_max_position_embeddings"]
    config.eos_token_id = None
    model = cls.from_pretrained(directory, config=config, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config = tf.GenerationConfig(do_sample=False, pad_token_id=0, max_new_tokens=TOKENS)
    return model


@torch.no_grad()
def anew(model, prompt):
    """One pass over the whole text a token; also the least margin."""
    ids, least = list(prompt), float("inf")
    for _ in range(TOKENS):
        top = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].topk(2)
        least = min(least, float(top.values[0] - top.values[1]))
        ids.append(int(top.indices[0]))
    return ids[len(prompt):], least


@torch.no_grad()
def cached(model, prompt):
    return model.generate(torch.tensor([prompt]))[0, len(prompt):].tolist()


def main():
    if len(sys.argv) != 3 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    tiny, out = sys.argv[1:]
    golden = {"made_with": {p: version(p) for p in ("torch", "transformers")}, "original": ORIGINAL}
    for name, cls in MODELS.items():
        directory = os.path.join(tiny, name)
        model = load(directory, cls)
        factor = model.model.rotary_emb.attention_scaling
        always = [
            load(directory, cls, original_max_position_embeddings=n, attention_factor=factor) for n in (100_000, 1)
        ]
        golden[name] = []
        for length in LENGTHS:
            g = torch.Generator().manual_seed(zlib.crc32(f"{name} {length}".encode()))
            for attempt in range(1000):
                prompt = torch.randint(3, model.config.vocab_size, (length,), generator=g).tolist()
                tokens, least = anew(model, prompt)
                if least < MARGIN:
                    continue
                # A rule that decides otherwise must show: always short, and, from a short prompt, always long.
                if all(anew(other, prompt)[0] != tokens for other in always[:2 if length <= ORIGINAL else 1]):
                    break
            else:
                raise SystemExit(f"{name} {length}: no prompt will do")
            alike = sum(a == b for a, b in zip(cached(model, prompt), tokens))
            assert (alike == TOKENS) == (name == "phi3" or length > ORIGINAL), (name, length, alike)
            print(f"{name} {length}: attempt {attempt}, margin {least:.3f}, {alike} tokens alike with a cache")
            golden[name].append({"prompt": prompt, "tokens": tokens})
    write_json(out, golden)


if __name__ == "__main__":
    main()
