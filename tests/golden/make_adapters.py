"""Adapters as PEFT writes them, on bases that lie here already, with logits of PEFT's own forward.

    python make_adapters.py new OUT       # needs peft 0.21.2 and transformers 5: experts are one parameter of three axes
    python make_adapters.py old OUT       # needs peft 0.21.2 and transformers 4: an expert is a module

OUT is `foreign`; `peft_base` there and the checkpoints of `../tiny` are the bases. `golden.json` holds `input_ids` and `logits` of the adapter
beside its base in f32.
"""

import json
import os
import shutil
import sys
import zlib

import torch
from transformers import AutoModelForCausalLM

from common import numbers, versions, write_json
from make_foreign import IDS, writer


def adapter(out, name, base, rows=None, save=None, **settings):
    """Makes one; `rows`: the vocabulary that the base is brought to first; `save`: arguments of saving."""
    from peft import LoraConfig, get_peft_model

    directory = os.path.join(out, name)
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)
    path = os.path.join(directory, base)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    if rows:
        torch.manual_seed(0)
        model.resize_token_embeddings(rows, mean_resizing=False)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    shaken = 0
    with torch.no_grad():
        for key, p in wrapped.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if "lora_magnitude_vector" in key:
                p.mul_(1 + 0.3 * noise)
            elif "lora_" in key:
                p.copy_(0.2 * noise)
            elif "trainable_tokens" in key or "modules_to_save" in key:
                p.add_(0.3 * noise)
            elif key.endswith("bias") and settings.get("bias") and p.requires_grad:
                p.add_(0.3 * noise)
            else:
                continue
            shaken += 1
        assert shaken
        logits = wrapped(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
        disabled = None
        if not settings.get("bias") and not rows:
            with wrapped.disable_adapter():
                disabled = wrapped(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    wrapped.save_pretrained(directory, **(save or {}))
    readme = os.path.join(directory, "README.md")
    if os.path.exists(readme):
        os.remove(readme)
    config = os.path.join(directory, "adapter_config.json")
    with open(config) as f:
        said = json.load(f)
    said["base_model_name_or_path"] = base
    for key, value in said.items():
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            said[key] = sorted(value)
    with open(config, "w") as f:
        json.dump(said, f, indent=2, sort_keys=True)
        f.write("\n")
    write_json(os.path.join(directory, "golden.json"), {
        "made_with": versions() | writer(), "dtype": "float32", "input_ids": [IDS], "logits": [numbers(logits)],
    })
    size = sum(os.path.getsize(os.path.join(directory, f)) for f in os.listdir(directory))
    moved = "" if disabled is None else f", moves logits by {(logits - disabled).abs().max():.2f}"
    print(f"{name}: {size / 1000:.0f} kB, logits std {logits.std():.2f}{moved}")
    assert disabled is None or (logits - disabled).abs().max() > 0.1


def new(out):
    tied, tiny = "../peft_base", "../../tiny/"
    # The saved base of an embedding that is aimed at; the other of two that share it keeps what both had.
    adapter(out, "peft_tied_embed", tied, r=4, lora_alpha=6, target_modules=["embed_tokens", "q_proj"])
    adapter(out, "peft_tied_head", tied, r=4, lora_alpha=6, target_modules=["lm_head", "v_proj"])
    adapter(out, "peft_tied_both", tied, r=4, lora_alpha=6, target_modules=["embed_tokens"], ensure_weight_tying=True)
    adapter(out, "peft_embed_head", tiny + "llama", r=2, lora_alpha=3, target_modules=["embed_tokens", "lm_head"])
    adapter(out, "peft_resized", tied, rows=70, save={"save_embedding_layers": True}, r=2, lora_alpha=3,
            target_modules=["k_proj"])
    adapter(out, "peft_dora", tied, r=4, lora_alpha=6, use_dora=True, use_rslora=True,
            target_modules=["q_proj", "down_proj", "embed_tokens"])
    adapter(out, "peft_dora_fused", tiny + "gpt2", r=2, lora_alpha=6, use_dora=True, bias="all", fan_in_fan_out=True,
            target_modules=["c_attn", "c_fc"])
    adapter(out, "peft_bias", tiny + "qwen2", r=2, lora_alpha=3, bias="all", target_modules=["q_proj", "down_proj"])
    adapter(out, "peft_bias_lora_only", tiny + "qwen2", r=2, lora_alpha=3, bias="lora_only", target_modules=["q_proj", "down_proj"])
    adapter(out, "peft_lora_bias", tiny + "qwen2", r=2, lora_alpha=3, lora_bias=True, target_modules=["q_proj", "o_proj", "up_proj"])
    adapter(out, "peft_experts", tiny + "qwen3_moe", r=2, lora_alpha=3, target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            rank_pattern={"experts.down_proj": 3}, alpha_pattern={"layers.1.mlp.experts.gate_up_proj": 7})
    adapter(out, "peft_experts_down", tiny + "mixtral", r=2, lora_alpha=3, target_modules=[],
            target_parameters=["experts.down_proj", "mlp.gate.weight"])
    adapter(out, "peft_tokens", tied, r=2, lora_alpha=3, target_modules=["q_proj"], trainable_token_indices=[42, 3, 17])
    adapter(out, "peft_tokens_two", tiny + "llama", r=2, lora_alpha=3, target_modules=["q_proj"],
            trainable_token_indices={"embed_tokens": [61, 5], "lm_head": [7]})
    adapter(out, "peft_modules", tied, r=2, lora_alpha=3, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
    adapter(out, "peft_bin", tied, save={"safe_serialization": False}, r=4, lora_alpha=10, target_modules=["q_proj", "up_proj"])


def old(out):
    adapter(out, "peft_experts_apart", "../../tiny/mixtral", r=2, lora_alpha=3, target_modules=["w1", "w2", "w3", "gate"],
            rank_pattern={"experts.1.w1": 3, "w2": 1}, alpha_pattern={"layers.1.block_sparse_moe.experts.2.w3": 5})


if __name__ == "__main__":
    mode, out = sys.argv[1:]
    torch.set_num_threads(1)
    {"new": new, "old": old}[mode](out)
