#!/usr/bin/env python3
"""What transformers 5 assumes where a config.json of the later architectures says nothing.

    python make_defaults_v5.py OUT.json [NAME ...]

For each class `values`, its configuration with every default written out, those keys apart that change no result of a forward pass;
`layers`, and `tensors`: names and shapes of what lies outside the blocks and in the first one, built on no device. With names these
classes alone, put to what OUT.json has.
"""

import json
import sys
import tempfile

import torch
import transformers as tf

from common import versions, write_json
from make_tiny_v5 import MODELS

# Keys that are of training, of generation, or of the library's own.
IDLE = {
    "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype", "embd_pdrop", "embedding_dropout",
    "eod_token_id", "eos_token_id", "hidden_dropout", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder",
    "label2id", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop",
    "residual_dropout", "return_dict", "transformers_version", "use_cache", "_name_or_path", "layer_types", "no_rope_layers",
    "head_dim", "sep_token_id", "slow_but_exact", "classifier_dropout",
}


# Classes whose golden checkpoints make_tiny_moe.py makes.
MORE = ("gemma3n_text", "gemma4_text", "llama4_text")


def main():
    out = {"made_with": versions()}
    if names := sys.argv[2:]:
        with open(sys.argv[1]) as f:
            out = {**json.load(f), **out}
    for name in names or sorted({*(kind for kind, _ in MODELS.values()), *MORE}):
        # Without a word for it these classes fail.
        more = {"head_dim": 128} if name in ("hunyuan_v1_dense", "ministral") else {}
        more = {"num_key_value_heads": 8} if name == "nemotron" else more
        with tempfile.TemporaryDirectory() as d:
            with open(f"{d}/config.json", "w") as f:
                json.dump({"model_type": name, **more}, f)
            config = tf.AutoConfig.from_pretrained(d)
        with torch.device("meta"):
            model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        said = config.to_dict()
        values = {"model_type": name, **{k: v for k, v in said.items() if k not in IDLE and k != "model_type"}}
        # Derived in some classes, a default of its own in others.
        if name not in ("cohere2", "stablelm", "gpt_neox") and said.get("head_dim") is not None:
            values["head_dim"] = said["head_dim"]
        tied = {} if not config.tie_word_embeddings else {"lm_head.weight"}
        tensors = {k: list(v.shape) for k, v in model.state_dict().items() if k not in tied}
        inside = lambda k: ".layers." in k or ".h." in k
        first = {k: v for k, v in tensors.items() if not inside(k) or ".0." in k}
        out[name] = {"values": values, "layers": config.num_hidden_layers, "tensors": first}
    made = out.pop("made_with")
    write_json(sys.argv[1], {"made_with": made, **{name: out[name] for name in sorted(out)}})


if __name__ == "__main__":
    main()
