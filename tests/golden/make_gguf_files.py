#!/usr/bin/env python3
"""One small GGUF file of many types, the same in three parts, and the same as a big-endian machine has it.

    python make_gguf_files.py OUT

Random numbers throughout: the files are compared with each other, and with what the `gguf` package reads from them.
"""

import builtins
import os
import shutil
import sys
import types

import gguf
import numpy as np
from gguf.scripts import gguf_convert_endian

from common import numbers, versions, write_json

Q = gguf.GGMLQuantizationType
HIDDEN, FFN, VOCAB, LAYERS = 32, 256, 64, 2
# What each matrix is, all of them types of which it is settled how a big-endian file has them.
KINDS = {
    "token_embd": ((VOCAB, HIDDEN), Q.Q8_0), "attn_q": ((HIDDEN, HIDDEN), Q.Q4_0), "attn_k": ((HIDDEN // 2, HIDDEN), Q.F16),
    "attn_v": ((HIDDEN // 2, HIDDEN), Q.BF16), "attn_output": ((HIDDEN, HIDDEN), Q.MXFP4), "ffn_gate": ((FFN, HIDDEN), Q.Q4_0),
    "ffn_up": ((FFN, HIDDEN), Q.MXFP4), "ffn_down": ((HIDDEN, FFN), Q.Q4_K), "ffn_down1": ((HIDDEN, FFN), Q.Q6_K),
}


def tensor(rng, shape, kind):
    values = rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
    if kind in (Q.Q4_K, Q.Q6_K):
        # The package cannot make these: random bytes, with f16 that are scales.
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (shape[0] * shape[1] // block, size), dtype=np.uint8)
        for at in [0, 2] if kind == Q.Q4_K else [208]:
            raw[:, at:at + 2] = rng.uniform(1e-4, 3e-4, len(raw)).astype(np.float16).view(np.uint8).reshape(-1, 2)
        return raw.reshape(shape[0], -1)
    return gguf.quants.quantize(values, kind)


def write(path, part, parts, chosen, pairs):
    w = gguf.GGUFWriter(path, "llama")
    if part == 0:
        for key, add, value in pairs:
            getattr(w, add)(key, value)
    else:
        w.kv_data[0].clear()
    if parts > 1:
        w.add_uint16("split.no", part)
        w.add_uint16("split.count", parts)
        w.add_int32("split.tensors.count", len(KINDS_ALL))
    for name, data, kind in chosen:
        w.add_tensor(name, data, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


KINDS_ALL = []


def main():
    out = sys.argv[1]
    shutil.rmtree(out, ignore_errors=True)
    os.makedirs(out)
    rng = np.random.default_rng(7)
    norm = lambda: (1 + 0.3 * rng.normal(size=HIDDEN)).astype(np.float32)
    KINDS_ALL.append(("token_embd.weight", tensor(rng, *KINDS["token_embd"]), KINDS["token_embd"][1]))
    for l in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            KINDS_ALL.append((f"blk.{l}.{name}.weight", norm(), Q.F32))
        for name, (shape, kind) in KINDS.items():
            if name in ("token_embd", "ffn_down1"):
                continue
            if name == "ffn_down" and l == 1:
                kind = Q.Q6_K
            KINDS_ALL.append((f"blk.{l}.{name}.weight", tensor(rng, shape, kind), kind))
    KINDS_ALL.append(("output_norm.weight", norm(), Q.F32))
    tokens = [f"t{i}" for i in range(VOCAB)]
    pairs = [
        ("general.name", "add_string", "parts"), ("llama.block_count", "add_uint32", LAYERS),
        ("llama.context_length", "add_uint32", 64), ("llama.embedding_length", "add_uint32", HIDDEN),
        ("llama.feed_forward_length", "add_array", [FFN, FFN]), ("llama.attention.head_count", "add_uint32", 2),
        ("llama.attention.head_count_kv", "add_uint32", 1), ("llama.attention.key_length", "add_uint32", 16),
        ("llama.attention.value_length", "add_uint32", 16), ("llama.attention.layer_norm_rms_epsilon", "add_float32", 1e-5),
        ("llama.rope.freq_base", "add_float32", 500.0), ("llama.vocab_size", "add_uint32", VOCAB),
        ("tokenizer.ggml.model", "add_string", "llama"), ("tokenizer.ggml.tokens", "add_array", tokens),
        ("tokenizer.ggml.scores", "add_array", [-float(i) for i in range(VOCAB)]),
        ("tokenizer.ggml.token_type", "add_array", [1] * VOCAB), ("tokenizer.ggml.bos_token_id", "add_uint32", 1),
        ("tokenizer.ggml.eos_token_id", "add_uint32", 2), ("tokenizer.ggml.add_bos_token", "add_bool", True),
    ]
    whole = os.path.join(out, "whole.gguf")
    write(whole, 0, 1, KINDS_ALL, pairs)
    cuts = [0, 6, 13, len(KINDS_ALL)]
    for i in range(3):
        write(os.path.join(out, f"parts-{i + 1:05d}-of-00003.gguf"), i, 3, KINDS_ALL[cuts[i]:cuts[i + 1]], pairs)
    # The package's own converter asks before it writes.
    big = os.path.join(out, "big.gguf")
    shutil.copy(whole, big)
    builtins.input = lambda _="": "YES"
    gguf_convert_endian.convert_byteorder(gguf.GGUFReader(big, "r+"), types.SimpleNamespace(order="big", dry_run=False))
    with open(big, "rb") as f:
        assert f.read(8)[4:] == b"\x00\x00\x00\x03"
    first = {}
    for t in gguf.GGUFReader(whole).tensors:
        first[t.name] = numbers(gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32).reshape(-1)[:8].tolist())
    write_json(os.path.join(out, "golden.json"), {"made_with": versions(), "first": first})


if __name__ == "__main__":
    main()
