#!/usr/bin/env python3
"""The tiny models once more as transformers 5 writes them: `rope_parameters` in place of `rope_theta` and
`rope_scaling`, `num_local_experts` in place of Qwen3-MoE's `num_experts`. Needs its own virtual environment.

    python make_config_v5.py TINY

reads TINY/NAME/config.json and writes TINY/NAME/config.v5.json, which must give the same network; and writes
TINY/NAME_stacked for the two mixtures of experts, smaller, saved with all experts of a layer in two tensors
(`save_original_format=False`), with logits. The usual way of saving still names every expert's tensors as transformers 4
did: checked here.
"""

import os
import shutil
import sys
import tempfile
import zlib

import torch
import transformers
from safetensors import safe_open

from common import numbers, versions, write_json
from make_tiny import MODELS, VARIANTS, randomise

STACKED = "_stacked"
SMALL = dict(vocab_size=32, hidden_size=16, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1,
             head_dim=8, num_hidden_layers=2)


def names(directory):
    with safe_open(os.path.join(directory, "model.safetensors"), "pt") as f:
        return sorted(f.keys())


def configurations(tiny):
    for name in sorted(os.listdir(tiny)):
        directory = os.path.join(tiny, name)
        if name.endswith(STACKED) or (name not in MODELS and name not in VARIANTS):
            continue
        with tempfile.TemporaryDirectory() as out:
            transformers.AutoConfig.from_pretrained(directory).save_pretrained(out)
            shutil.copy(os.path.join(out, "config.json"), os.path.join(directory, "config.v5.json"))
        if os.path.exists(os.path.join(directory, "model.safetensors")):
            with tempfile.TemporaryDirectory() as out:
                transformers.AutoModelForCausalLM.from_pretrained(directory).save_pretrained(out)
                assert names(out) == names(directory), name


def stacked(tiny, name):
    config_class, model_class, fields = MODELS[name]
    directory = os.path.join(tiny, name + STACKED)
    shutil.rmtree(directory, ignore_errors=True)
    fields = {**fields, **SMALL}
    if name == "qwen3_moe":
        fields["moe_intermediate_size"] = 12
    config = config_class(**fields)
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    seed = zlib.crc32((name + STACKED).encode())
    randomise(model, torch.Generator().manual_seed(seed))
    model.save_pretrained(directory, save_original_format=False)
    os.remove(os.path.join(directory, "generation_config.json"))
    assert any(n.endswith("mlp.experts.gate_up_proj") for n in names(directory))
    model, info = model_class.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = torch.randint(0, 32, (1, 24), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits[0]
    assert 0.8 < logits.std() < 4.5, logits.std()
    write_json(os.path.join(directory, "golden.json"), {
        "made_with": versions(), "model": model_class.__name__, "input_ids": ids.tolist(), "logits": [numbers(logits)],
    })


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    assert int(transformers.__version__.split(".")[0]) >= 5, transformers.__version__
    configurations(sys.argv[1])
    for name in ("mixtral", "qwen3_moe"):
        stacked(sys.argv[1], name)


if __name__ == "__main__":
    main()
