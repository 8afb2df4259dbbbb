"""Greedy tokens and logits from llama-cpp-python: MODEL.gguf IDS.json OUT.f32 N -> JSON on standard output.

OUT.f32 gets the logits of every position of the ids, row by row. The JSON holds the N greedy tokens that follow them, and whether long prompts are
multiplied by BLAS: in 32 bits, where llama.cpp's own products of quantized weights round activations to 8.
"""

import glob
import json
import os
import sys

import llama_cpp
import numpy as np

model, ids, out, n = sys.argv[1], json.load(open(sys.argv[2])), sys.argv[3], int(sys.argv[4])
llm = llama_cpp.Llama(
    model_path=model, n_ctx=len(ids) + n + 8, n_batch=max(len(ids), 32), logits_all=True, n_threads=2, verbose=False,
    use_mmap=True, type_k=0, type_v=0, flash_attn=False)
llm.eval(ids)
vocab = llm.n_vocab()
rows = np.array(llm.scores[: len(ids)], dtype=np.float32).reshape(len(ids), vocab)
rows.tofile(out)
greedy = []
for _ in range(n):
    best = int(np.argmax(llm.scores[llm.n_tokens - 1]))
    greedy.append(best)
    llm.eval([best])
text = "Hello, world! 123 don't  stop\n\nA second line."
print(json.dumps({
    "blas": bool(glob.glob(os.path.join(os.path.dirname(llama_cpp.llama_cpp._lib._name), "*ggml-blas*"))),
    "vocab": vocab, "greedy": greedy, "text": text, "tokens": llm.tokenize(text.encode(), add_bos=False, special=False),
    "template": llm.metadata.get("tokenizer.chat_template"),
}))
