#!/usr/bin/env python3
"""Tokenizers where the edges matter: white space around special tokens, the space before a text, and vocab.json with merges.txt.

    python make_chat_tokenizers.py tokenizers

Run with transformers 5 after make_tokenizers.py, whose vocabularies are used again. OUT/phi3 is a tokenizer with special tokens that take the white
space behind them away, as Phi-3's do. OUT/schemes.json: ids of the `metaspace` tokenizer with a Metaspace pre-tokenizer of each scheme in place of its
normalizer. OUT/pair: vocab.json and merges.txt, and in golden.json the files beside them (`files`) and the ids for each class that reads such a pair.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import tempfile

import transformers as tf
from tokenizers import Tokenizer

TEXTS = [
    "",
    "The river takes the bridge again.",
    " one space first",
    "   three spaces first",
    "\nnewline first",
    "two  spaces,   three, and a trailing one ",
    "line one\n\n  line three\ttab\r\n",
    "In 1969, 12 people; 1234567 of 3.14159, it's THEY'LL don't",
    "caf\u00e9 cafe\u0301 \u00fcber u\u0308ber \u212bngstr\u00f6m A\u030angstro\u0308m \u1e69 s\u0323\u0307",
    "\u041c\u043e\u0441\u043a\u0432\u0430 \u4eca\u65e5\u306f \ud55c\uae00 \u1112\u1161\u11ab \U0001f600",
    "def area(w, h):\n    return w * h  # \u00b2\n",
    "\u2581bar \u00a0hard space",
]


def around(a, b):
    """What may stand around two special tokens."""
    return [
        a, f"{a}{a}", f"{a}{b}", f"{a} {b}", f"{a}\n{b}", f"{a}hi", f"{a} hi", f"{a}  hi", f"{a}\nhi", f"{a} \n\t hi", f"hi{a}", f"hi {a}",
        f"hi\n{a}", f" hi{a} there {b}\n", f"{a}\nhi{b}\n{a}\n", f" {a}", f"{a} ", f"{a}\n\n",
    ]


def write(path, value):
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    lines = [json.dumps(k) + ": " + json.dumps(v, separators=(",", ":"), ensure_ascii=True) for k, v in value.items()]
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        f.write("{\n" + ",\n".join(lines) + "\n}\n")


def versions():
    return {p: importlib.metadata.version(p) for p in ("transformers", "tokenizers")}


def cases(encode, texts):
    return [{"text": t, "ids": encode(t, False), "with_special_tokens": encode(t, True)} for t in texts]


def of_fast(t):
    return lambda text, special: t.encode(text, add_special_tokens=special).ids


def of_class(t):
    return lambda text, special: t.encode(text, add_special_tokens=special)


def added(id, content, **flags):
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id, "content": content, **plain, **flags}


def phi3(out):
    with open(os.path.join(out, "metaspace", "tokenizer.json"), encoding="utf-8") as f:
        t = json.load(f)
    pieces = [p for p, _ in sorted(t["model"]["vocab"].items(), key=lambda x: x[1])][4:]
    vocab = ["<unk>", "<s>", "</s>"] + pieces + ["\u2581\u2581", "\u2581\u2581\u2581\u2581"]
    t["model"]["vocab"] = {p: i for i, p in enumerate(vocab)}
    t["model"]["merges"] += [["\u2581", "\u2581"], ["\u2581\u2581", "\u2581\u2581"]]
    n = len(vocab)
    t["added_tokens"] = [
        added(0, "<unk>"), added(1, "<s>"), added(2, "</s>", special=False, rstrip=True), added(n, "<|endoftext|>"),
        *(added(n + 1 + i, c, rstrip=True) for i, c in enumerate(["<|assistant|>", "<|system|>", "<|end|>", "<|user|>"])),
    ]
    t["post_processor"]["single"] = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    t["post_processor"]["pair"] = t["post_processor"]["single"] + [{"Sequence": {"id": "B", "type_id": 0}}]
    t["post_processor"]["special_tokens"] = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    home = os.path.join(out, "phi3")
    os.makedirs(home, exist_ok=True)
    with open(os.path.join(home, "tokenizer.json"), "w", encoding="utf-8", newline="\n") as f:
        json.dump(t, f, ensure_ascii=False, separators=(",", ":"))
        f.write("\n")
    template = (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    )
    write(os.path.join(home, "tokenizer_config.json"), {
        "bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template,
    })
    fast = of_fast(Tokenizer.from_str(json.dumps(t)))
    texts = TEXTS + around("<|user|>", "<|end|>") + around("</s>", "<|assistant|>") + around("<s>", "<|endoftext|>")
    texts += ["<s><|user|>\nhi<|end|>\n<|assistant|>\n"]
    write(os.path.join(home, "golden.json"), {"made_with": versions(), "cases": cases(fast, texts)})


def schemes(out):
    with open(os.path.join(out, "metaspace", "tokenizer.json"), encoding="utf-8") as f:
        t = json.load(f)
    t["normalizer"] = None
    page = {"made_with": versions()}
    for scheme in ("first", "always", "never"):
        for split in (False, True):
            step = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": split}
            t["pre_tokenizer"] = step
            t["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, step]}
            fast = of_fast(Tokenizer.from_str(json.dumps(t)))
            page[f"{scheme} {'split' if split else 'whole'}"] = cases(fast, TEXTS + around("<bos>", "<eos>"))
    write(os.path.join(out, "schemes.json"), page)


def pair(out):
    with open(os.path.join(out, "bytelevel", "tokenizer.json"), encoding="utf-8") as f:
        t = json.load(f)
    own = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pieces = [p for p, _ in sorted(t["model"]["vocab"].items(), key=lambda x: x[1]) if p not in own]
    # GPT-2 keeps its one special token in the vocabulary, OPT four of them; Qwen2 keeps all outside.
    vocab = pieces + ["<|endoftext|>", "</s>", "<pad>"]
    home = os.path.join(out, "pair")
    shutil.rmtree(home, ignore_errors=True)
    os.makedirs(home)
    with open(os.path.join(home, "vocab.json"), "w", encoding="utf-8", newline="\n") as f:
        json.dump({p: i for i, p in enumerate(vocab)}, f, ensure_ascii=False, separators=(",", ":"))
        f.write("\n")
    with open(os.path.join(home, "merges.txt"), "w", encoding="utf-8", newline="\n") as f:
        f.write("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in t["model"]["merges"]))
    n = len(vocab)
    def flagged(content, **flags):
        return {k: v for k, v in added(0, content, **flags).items() if k != "id"}

    variants = {
        # As the first files were: ids in added_tokens.json, what is special in special_tokens_map.json.
        "qwen2": (tf.Qwen2Tokenizer, {
            "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "eos_token": "<|im_end|>",
                                      "pad_token": "<|endoftext|>", "unk_token": None, "bos_token": None},
            "added_tokens.json": {"<|im_start|>": n, "<|im_end|>": n + 1, "<tool_call>": n + 2},
            "special_tokens_map.json": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
                                        "eos_token": flagged("<|im_end|>"), "pad_token": "<|endoftext|>"},
        }),
        # As they became: everything in added_tokens_decoder. (transformers 5 forgets the settings of tokens that have a
        # task, such as eos.)
        "qwen2 listed": (tf.Qwen2Tokenizer, {
            "tokenizer_config.json": {
                "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
                "added_tokens_decoder": {
                    str(len(pieces)): flagged("<|endoftext|>"), str(n): flagged("<|im_start|>", rstrip=True), str(n + 1): flagged("<|im_end|>"),
                    str(n + 2): flagged("<tool_call>", special=False, lstrip=True),
                },
            },
        }),
        "gpt2": (tf.GPT2Tokenizer, {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024}}),
        "gpt2 with a space": (tf.GPT2Tokenizer, {
            "tokenizer_config.json": {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}}),
        "opt": (tf.GPT2Tokenizer, {
            "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False},
            "special_tokens_map.json": {"bos_token": flagged("</s>", normalized=True), "eos_token": flagged("</s>", normalized=True),
                                        "unk_token": flagged("</s>", normalized=True), "pad_token": "<pad>"},
        }),
        "codegen": (tf.CodeGenTokenizer, {
            "tokenizer_config.json": {"tokenizer_class": "CodeGenTokenizer"},
            "added_tokens.json": {"  ": n, "    ": n + 1, "\t\t": n + 2},
        }),
    }
    page = {"made_with": versions()}
    for name, (cls, files) in variants.items():
        with tempfile.TemporaryDirectory() as d:
            for file in ("vocab.json", "merges.txt"):
                shutil.copy(os.path.join(home, file), d)
            for file, content in files.items():
                with open(os.path.join(d, file), "w", encoding="utf-8") as f:
                    json.dump(content, f)
            theirs = of_class(cls.from_pretrained(d))
        texts = TEXTS + around("<|im_start|>" if "listed" in name else "<|im_end|>", "<|endoftext|>") + [
            "a<tool_call> b</s> <pad>c <|im_start|>user\nnai\u0308ve<|im_end|>\n", "x <tool_call>\ny\t\tz    w  v"]
        page[name] = {"files": files, "cases": cases(theirs, texts)}
    write(os.path.join(home, "golden.json"), page)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    out = parser.parse_args().out
    phi3(out)
    schemes(out)
    pair(out)


if __name__ == "__main__":
    main()
