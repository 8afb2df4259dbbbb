#!/usr/bin/env python3
"""How far GPTQ's perplexity moves when only its arithmetic does: an independent PyTorch GPTQ on the real model, on a GPU.

    python gptq_spread.py MODEL.gguf CALIBRATION.txt WIKITEXT.txt [--bits 3]

Protocol of bench/evidence.toml: 32 x 1024 calibration tokens, every linear matrix of the blocks, groups of 64, asymmetric, damping 0.01, no
act-order; perplexity over the first 32 windows of 1024 tokens. Prints one JSON line for each variant. The first three variants are the same
algorithm in exact arithmetic; the others move one choice that a paper leaves open, or the calibration tokens.
"""

import argparse
import json
import math
import os
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "golden"))
import gguf_twin  # noqa: E402

NAMES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
STAGES = [NAMES[:3], NAMES[3:4], NAMES[4:6], NAMES[6:]]
CTX, GROUP = 1024, 64

VARIANTS = {
    "f32": {},
    "f32, blocks of 64 columns": {"block": 64},
    "statistics and factor in f64": {"f64": True},
    "products in TF32": {"tf32": True},
    "grids without the block's own updates": {"grid": "late"},
    "grids of the weights as they came": {"grid": "first"},
    "a forward for each stage of a block": {"staged": True},
    "31 sequences": {"n": 31},
    "tokens from 512 on": {"offset": 512},
    "tokens from 1024 on": {"offset": 1024},
    "tokens from 2048 on": {"offset": 2048},
}


def quantized(w, h, bits, block=128, grid="now", f64=False):
    w, first = w.clone(), w.clone()
    h = h.to(torch.float64 if f64 else torch.float32).clone()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    cols, top, out = w.shape[1], 2**bits - 1, torch.zeros_like(w)
    for start in range(0, cols, block):
        end = min(start + block, cols)
        now, ub = w[:, start:end].clone(), u[start:end, start:end]
        errors = torch.zeros_like(now)
        for j in range(end - start):
            at = start + j
            if at % GROUP == 0:
                group = {"now": now[:, j:j + GROUP], "late": w[:, at:at + GROUP], "first": first[:, at:at + GROUP]}[grid]
                low = group.amin(1)
                scale = (group.amax(1) - low) / top
                scale = torch.where(scale == 0, torch.ones_like(scale), scale)
                zero = torch.round(-low / scale)
            q = (torch.clamp(torch.round(now[:, j] / scale) + zero, 0, top) - zero) * scale
            out[:, at] = q
            errors[:, j] = (now[:, j] - q) / ub[j, j]
            now[:, j + 1:] -= errors[:, j, None] * ub[None, j, j + 1:]
        w[:, end:] -= errors @ u[start:end, end:]
    return out


class Run:
    def __init__(self, path, calibration, text):
        tokenizer = gguf_twin.load_tokenizer(path)
        encode = lambda p: tokenizer.encode(open(p, encoding="utf-8").read()[:400_000])
        self.calibration, self.text = encode(calibration), encode(text)
        self.model = gguf_twin.load_model(path).cuda().float().eval()
        self.model.config._attn_implementation = "sdpa"  # causal without a mask: the layers are called one by one
        self.weights = {k: v.clone() for k, v in self.model.state_dict().items()}

    @torch.no_grad()
    def perplexity(self):
        total = 0.0
        for w in range(32):
            ids = torch.tensor([self.text[w * CTX:(w + 1) * CTX]], device="cuda")
            logits = self.model(ids, use_cache=False).logits[0]
            total += torch.nn.functional.cross_entropy(logits[:-1].double(), ids[0, 1:], reduction="sum").item()
        return math.exp(total / (32 * (CTX - 1)))

    @torch.no_grad()
    def variant(self, bits, n=32, offset=0, staged=False, tf32=False, f64=False, **choices):
        self.model.load_state_dict(self.weights)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        inner = self.model.model
        ids = torch.tensor(self.calibration[offset:offset + n * CTX], device="cuda").view(n, CTX)
        x, positions = inner.embed_tokens(ids), torch.arange(CTX, device="cuda")[None]
        rope = inner.rotary_emb(x, positions)

        def forward(layer):
            parts = []
            for b in range(0, n, 8):
                y = layer(x[b:b + 8], attention_mask=None, position_embeddings=rope, position_ids=positions)
                parts.append(y[0] if isinstance(y, tuple) else y)
            return torch.cat(parts)

        for layer in inner.layers:
            for stage in STAGES if staged else [NAMES]:
                grams, hooks = {}, []
                for name in stage:
                    def see(module, inputs, _, name=name):
                        a = inputs[0].reshape(-1, inputs[0].shape[-1])
                        a = a.double() if f64 else a
                        grams[name] = grams.get(name, 0) + a.T @ a
                    hooks.append(layer.get_submodule(name).register_forward_hook(see))
                forward(layer)
                for hook in hooks:
                    hook.remove()
                for name in stage:
                    weight = layer.get_submodule(name).weight
                    weight.copy_(quantized(weight, grams[name] / (n * CTX), bits, f64=f64, **choices))
            x = forward(layer)
        torch.backends.cuda.matmul.allow_tf32 = False
        return self.perplexity()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("text")
    parser.add_argument("--bits", type=int, default=3)
    a = parser.parse_args()
    run = Run(a.model, a.calibration, a.text)
    print(json.dumps({"variant": "dense", "ppl": round(run.perplexity(), 4)}), flush=True)
    for name, choices in VARIANTS.items():
        print(json.dumps({"variant": name, "bits": a.bits, "ppl": round(run.variant(a.bits, **choices), 3)}), flush=True)


if __name__ == "__main__":
    main()
