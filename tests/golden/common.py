"""What the golden-value scripts share: one way to write numbers, one way to build a model."""

import json
import os

import torch


def number(x):
    """A float with nine significant digits: enough to bring every f32 back bit for bit."""
    return float(f"{float(x):.9g}")


def numbers(row):
    """A list (of lists ...) of floats, each with nine significant digits."""
    if isinstance(row, torch.Tensor):
        row = row.tolist()
    return [numbers(x) if isinstance(x, (list, tuple)) else number(x) for x in row]


def write_json(path, value):
    """One key a line at the outermost level, everything below packed: small files, readable diffs."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    lines = [
        json.dumps(key) + ": " + json.dumps(value[key], separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        for key in value
    ]
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        f.write("{\n" + ",\n".join(lines) + "\n}\n")


def versions():
    """The packages that made a file; recorded in it."""
    import importlib.metadata as m

    return {p: m.version(p) for p in ("torch", "transformers", "tokenizers", "gguf", "safetensors", "numpy")}
