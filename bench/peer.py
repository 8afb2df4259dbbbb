#!/usr/bin/env python3
"""What `side_by_side.py` asks of llama.cpp, through the C interface in the llama-cpp-python package. Prints one JSON object.

    peer.py make SOURCE.gguf OUT.gguf f16|q8_0|q4_0            another encoding of a model
    peer.py speed MODEL.gguf --threads 2 --prompt 512          tokens a second read in one go, logits of the last only
    peer.py speed MODEL.gguf --threads 2 --steps 64 --depth 0  single-token steps after so many tokens of context
    peer.py perplexity MODEL.gguf TEXT --windows 8             over windows of 1024 tokens, each begun with BOS where the model wants it
"""

import argparse
import ctypes
import json
import math
import random
import statistics
import time

import llama_cpp as ll
import numpy as np

FILE_TYPES = {"f16": 1, "q4_0": 2, "q8_0": 7}


@ll.llama_log_callback
def silent(_level, _text, _user):
    pass


def opened(path, context, batch, threads, flash):
    model = ll.llama_model_load_from_file(path.encode(), ll.llama_model_default_params())
    if not model:
        raise SystemExit(f"{path}: cannot be loaded")
    p = ll.llama_context_default_params()
    p.n_ctx, p.n_batch, p.n_ubatch = context, batch, 512
    p.n_threads = p.n_threads_batch = threads
    if hasattr(p, "flash_attn_type"):
        p.flash_attn_type = int(flash)
    else:
        p.flash_attn = bool(flash)
    ctx = ll.llama_init_from_model(model, p)
    if not ctx:
        raise SystemExit(f"{path}: no context of {context} tokens")
    return model, ctx


def read(ctx, ids, size=2048):
    for at in range(0, len(ids), size):
        part = ids[at:at + size]
        tokens = (ll.llama_token * len(part))(*part)
        if ll.llama_decode(ctx, ll.llama_batch_get_one(tokens, len(part))):
            raise SystemExit("llama_decode failed")
    ll.llama_synchronize(ctx)


def forget(ctx):
    ll.llama_memory_clear(ll.llama_get_memory(ctx), True)


def speed(a):
    model, ctx = opened(a.model, max(a.prompt, a.depth + a.steps + 1) + 8, 2048, a.threads, a.flash)
    vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    draw = random.Random(1)
    text = [draw.randrange(16, vocab) for _ in range(max(a.prompt, a.depth + a.steps + 1))]
    runs = []
    read(ctx, text[:64])
    for _ in range(a.reps):
        forget(ctx)
        if a.steps:
            read(ctx, text[:max(a.depth, 1)])
            started = time.perf_counter()
            for i in range(a.steps):
                read(ctx, text[a.depth + i:a.depth + i + 1])
            runs.append(a.steps / (time.perf_counter() - started))
        else:
            started = time.perf_counter()
            read(ctx, text[:a.prompt])
            runs.append(a.prompt / (time.perf_counter() - started))
    return {"tok_s": statistics.median(runs), "runs": runs}


def perplexity(a):
    model, ctx = opened(a.model, a.ctx, a.ctx, a.threads, a.flash)
    words = ll.llama_model_get_vocab(model)
    vocab = ll.llama_vocab_n_tokens(words)
    with open(a.text, encoding="utf-8") as f:  # CRLF read as LF
        text = f.read(12 * a.ctx * a.windows).encode()
    room = (ll.llama_token * len(text))()
    n = ll.llama_tokenize(words, text, len(text), room, len(text), False, False)
    bos = [ll.llama_vocab_bos(words)] if ll.llama_vocab_get_add_bos(words) else []
    body = a.ctx - len(bos)
    windows = [bos + list(room[w * body:(w + 1) * body]) for w in range(min(a.windows, n // body))]
    total = 0.0
    for window in windows:
        forget(ctx)
        batch = ll.llama_batch_init(len(window), 0, 1)
        batch.n_tokens = len(window)
        for i, token in enumerate(window):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        if ll.llama_decode(ctx, batch):
            raise SystemExit("llama_decode failed")
        for i in range(len(window) - 1):
            row = np.ctypeslib.as_array(ll.llama_get_logits_ith(ctx, i), (vocab,)).astype(np.float64)
            top = row.max()
            total += top + math.log(np.exp(row - top).sum()) - row[window[i + 1]]
        ll.llama_batch_free(batch)
    predicted = sum(len(w) - 1 for w in windows)
    return {"ppl": math.exp(total / predicted), "tokens": predicted, "bos": bool(bos)}


def make(a):
    p = ll.llama_model_quantize_default_params()
    p.ftype, p.allow_requantize, p.nthread = FILE_TYPES[a.type], True, 2
    if ll.llama_model_quantize(a.model.encode(), a.out.encode(), ctypes.byref(p)):
        raise SystemExit(f"{a.model}: cannot be made {a.type}")
    return {"out": a.out}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    v = verbs.add_parser("make")
    v.add_argument("model")
    v.add_argument("out")
    v.add_argument("type", choices=FILE_TYPES)
    v.set_defaults(run=make)
    v = verbs.add_parser("speed")
    v.add_argument("model")
    for name, default in (("prompt", 0), ("steps", 0), ("depth", 0), ("reps", 3)):
        v.add_argument("--" + name, type=int, default=default)
    v.set_defaults(run=speed)
    v = verbs.add_parser("perplexity")
    v.add_argument("model")
    v.add_argument("text")
    v.add_argument("--ctx", type=int, default=1024)
    v.add_argument("--windows", type=int, default=8)
    v.set_defaults(run=perplexity)
    for v in verbs.choices.values():
        v.add_argument("--threads", type=int, default=2)
        v.add_argument("--flash", type=int, default=1, choices=(0, 1))
    a = parser.parse_args()
    ll.llama_log_set(silent, ctypes.c_void_p(0))
    ll.llama_backend_init()
    print(json.dumps({"engine": "llama.cpp", "package": ll.__version__, **a.run(a)}))


if __name__ == "__main__":
    main()
