#!/usr/bin/env python3
"""Logits and losses of the two real models, weights read from their GGUF files, computed by transformers in f32 on a CPU.

    python make_real.py MODEL.gguf OUT.json                     three short texts: top 5, 32 fixed logits, losses
    python make_real.py MODEL.gguf OUT.json --check             first compare every tensor with transformers' own GGUF reader
    python make_real.py MODEL.gguf OUT.json --perplexity TEXT   the perplexity protocol on a file of text
"""

import argparse
import hashlib
import math
import os
import time

import torch
import transformers as tf

import gguf_twin
from common import number, numbers, versions, write_json

POSITIONS = 64

TEXTS = {
    "prose": (
        "The lighthouse keeper had counted the steps so often that he no longer noticed them: one hundred and twelve, "
        "from the store room to the lamp. In winter he carried the oil up before dusk, because the wind on the gallery "
        "could take a bucket out of a man's hand and drop it into the sea. That evening the fog came early. He lit the "
        "lamp at four, wound the clockwork, and sat down with the logbook on his knees. \"Visibility nil,\" he wrote, "
        "and then, after a while, because nobody would ever read it, he added a line about the geese that had gone over "
        "at noon, flying south, very high, in a long uneven V."
    ),
    "code": (
        "fn median(values: &mut [f64]) -> Option<f64> {\n"
        "    if values.is_empty() {\n"
        "        return None;\n"
        "    }\n"
        "    values.sort_by(|a, b| a.partial_cmp(b).unwrap());\n"
        "    let middle = values.len() / 2;\n"
        "    if values.len() % 2 == 1 {\n"
        "        Some(values[middle])\n"
        "    } else {\n"
        "        Some((values[middle - 1] + values[middle]) / 2.0)\n"
        "    }\n"
        "}\n\n"
        "#[test]\nfn median_of_an_even_number_of_values() {\n"
        "    let mut values = [4.0, 1.0, 3.0, 2.0];\n"
        "    assert_eq!(median(&mut values), Some(2.5));\n}\n"
    ),
    "dialogue": (
        "Waiter: Good evening! Have you decided, or shall I come back in a minute?\n"
        "Anna: I think we are ready. Is the soup made with cream? I can't eat milk.\n"
        "Waiter: The tomato soup isn't; the mushroom soup is. The bread is fine too, 100% rye.\n"
        "Anna: Then the tomato soup and the grilled trout, please.\n"
        "Ben: And for me the lentil stew. How spicy is it, on a scale from 1 to 10?\n"
        "Waiter: I'd say a 6. The kitchen can make it milder if you like.\n"
        "Ben: No, no, 6 sounds perfect. Could we also have a bottle of still water?\n"
        "Waiter: Of course. Two soups of the day come with it \u2014 or did you want only one?\n"
        "Anna: Just one, thank you!\n"
    ),
}


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def forward(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def check(path, ours):
    """transformers' own GGUF reader must give the same matrices, bit for bit."""
    theirs = type(ours).from_pretrained(os.path.dirname(path) or ".", gguf_file=os.path.basename(path), dtype=torch.float32)
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different
    print(f"all {len(a)} tensors equal transformers' own reading of the file", flush=True)


def short_texts(model, tokenizer):
    vocab = model.config.vocab_size
    indices = sorted({(7 + 104729 * i) % vocab for i in range(32)})
    assert len(indices) == 32
    texts = {}
    for name, text in TEXTS.items():
        ids = tokenizer.encode(text)
        if tokenizer.bos is not None:
            ids = [tokenizer.bos] + ids
        assert len(ids) > POSITIONS + 32, (name, len(ids))
        logits = forward(model, ids)
        nll = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:]), reduction="none")
        top = logits[:POSITIONS].topk(5)
        texts[name] = {
            "text": text, "ids": ids,
            "top5_ids": top.indices.tolist(), "top5_logits": numbers(top.values),
            "logits": numbers(logits[:POSITIONS][:, indices]),
            "nll": numbers(nll), "nll_mean": number(nll.mean()),
        }
        print(f"{name}: {len(ids)} tokens, nll {nll.mean():.4f}")
    return {"indices": indices, "positions": POSITIONS, **texts}


def perplexity(model, tokenizer, path, windows, ctx, raw_line_ends):
    """Yields what is known after each window: a long run that is stopped leaves the windows it did."""
    # Python's text mode reads CRLF as LF. WikiText-2 is often found with CRLF, and published numbers are of the LF
    # text.
    with open(path, encoding="utf-8", newline="" if raw_line_ends else None) as f:
        ids = tokenizer.encode(f.read())
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    body = ctx - len(bos)
    sums, started = [], time.time()
    for w in range(windows):
        window = bos + ids[w * body:(w + 1) * body]
        assert len(window) == ctx
        logits = forward(model, window)
        losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(window[1:]), reduction="none")
        sums.append(float(losses.double().sum()))
        mean = sum(sums) / (len(sums) * (ctx - 1))
        print(f"window {w + 1}/{windows}: ppl so far {math.exp(mean):.4f} ({time.time() - started:.0f} s)", flush=True)
        yield {
            "text_sha256": sha256(path), "line_ends": "as they are" if raw_line_ends else "CRLF read as LF",
            "text_tokens": len(ids), "first_64_ids": ids[:64],
            "ctx": ctx, "windows": len(sums), "bos": bool(bos), "predicted_tokens": len(sums) * (ctx - 1),
            "dtype": "f32, losses summed in f64", "nll_per_window": numbers(sums),
            "nll": number(mean), "ppl": number(math.exp(mean)),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--perplexity", metavar="TEXT")
    parser.add_argument("--raw-line-ends", action="store_true", help="keep CRLF; default: read it as LF")
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    tokenizer = gguf_twin.load_tokenizer(a.model)
    model = gguf_twin.load_model(a.model)
    if a.check:
        check(a.model, model)
    if a.perplexity:
        results = perplexity(model, tokenizer, a.perplexity, a.windows, a.ctx, a.raw_line_ends)
    else:
        results = [short_texts(model, tokenizer)]
    header = {"made_with": versions(), "model_sha256": sha256(a.model)}
    for result in results:
        write_json(a.out, {**header, **result})


if __name__ == "__main__":
    main()
