"""Logits and token ids from transformers: DIR IDS.json OUT.f32 [ADAPTER] -> JSON on standard output."""

import json
import sys

import torch
import transformers

torch.set_num_threads(2)
directory, ids, out = sys.argv[1], json.load(open(sys.argv[2])), sys.argv[3]
model, info = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
wrong = {k: sorted(v) for k, v in info.items() if k in ("missing_keys", "unexpected_keys", "mismatched_keys") and v}
if len(sys.argv) > 4:
    import peft

    model = peft.PeftModel.from_pretrained(model, sys.argv[4])
if not getattr(model, "is_quantized", False) and not getattr(model, "hf_quantizer", None):
    model = model.float()
model = model.eval()
with torch.no_grad():
    rows = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
rows.float().numpy().tofile(out)
text = "Hello, world! 123 don't  stop\n\nA second line."
try:
    tokens = transformers.AutoTokenizer.from_pretrained(directory)(text, add_special_tokens=False)["input_ids"]
except OSError as e:
    tokens = None
print(json.dumps({"vocab": rows.shape[-1], "wrong": wrong, "text": text, "tokens": tokens}))
