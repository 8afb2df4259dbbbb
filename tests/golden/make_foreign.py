"""Tiny checkpoints as other tools write them, with what they decode to.

    python make_foreign.py stream OUT     # needs compressed-tensors 0.20.0
    python make_foreign.py legacy OUT     # needs compressed-tensors 0.11.0: the old packing, and the sparse forms that later releases dropped
    python make_foreign.py gptq OUT       # GPTQ and AWQ, packed slowly from the formats' definitions
    python make_foreign.py peft OUT       # needs peft 0.21.2
    python make_foreign.py others OUT     # fp8 in blocks, ModelOpt, nvfp4 and mxfp4, bitsandbytes, MLX, auto-round, from the formats' definitions

The two releases exclude each other: each needs an environment of its own beside requirements.txt.

Every checkpoint gets a golden.json: `sha256` of each matrix as its own tool decodes it (values brought to `dtype`, then f32, -0 as 0,
little-endian), its first eight values, and logits of transformers over those values in f32.
"""

import hashlib
import json
import os
import shutil
import sys
import zlib

import torch
from safetensors.torch import save_file

from common import numbers, versions, write_json

IDS = [3, 17, 42, 5, 61, 29, 8, 50]
SMALL = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
WIDE = dict(hidden_size=64, intermediate_size=384, num_attention_heads=4, num_key_value_heads=4, head_dim=16)


def llama(seed, sizes=SMALL, dtype=torch.float32):
    """A random one-layer Llama: its configuration and its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, num_hidden_layers=1, max_position_embeddings=64, rms_norm_eps=1e-5,
                         tie_word_embeddings=True, rope_theta=500.0, **sizes)
    g = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    state = {}
    for name, p in LlamaForCausalLM(config).state_dict().items():
        noise = torch.randn(p.shape, generator=g)
        if p.ndim == 1:
            noise = 1.0 + 0.3 * noise
        else:
            noise *= (2.0 if "embed" in name or "lm_head" in name else 1.3) / p.shape[-1] ** 0.5
        state[name] = noise.to(dtype)
    state.pop("lm_head.weight")
    return config, state


def linears(state):
    return [n.removesuffix(".weight") for n, p in state.items() if p.ndim == 2 and "_proj" in n]


def finish(out, name, config, quantization, tensors, decoded, dtype=torch.float32, extra=None):
    """Writes a checkpoint; `decoded`: the matrices as their own tool gives them back."""
    from transformers import LlamaForCausalLM

    directory = os.path.join(out, name)
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)
    written = json.loads(config.to_json_string(use_diff=False))
    keep = ("model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings",
            "torch_dtype")
    written = {k: written[k] for k in keep if written.get(k) is not None}
    written["model_type"] = "llama"
    if quantization is not None:
        key, value = quantization
        written[key] = value
    with open(os.path.join(directory, "config.json"), "w") as f:
        json.dump(written, f, indent=2, sort_keys=True)
        f.write("\n")
    save_file({k: v.contiguous() for k, v in tensors.items()}, os.path.join(directory, "model.safetensors"), metadata={"format": "pt"})
    for file, value in (extra or {}).items():
        with open(os.path.join(directory, file), "w") as f:
            json.dump(value, f, indent=2, sort_keys=True)
            f.write("\n")
    golden(directory, config, decoded, dtype)


def golden(directory, config, decoded, dtype):
    from transformers import LlamaForCausalLM

    full = {k: v.to(dtype).float() + 0.0 for k, v in decoded.items()}
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(full, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected, (missing, unexpected)
    model.tie_weights()
    with torch.no_grad():
        logits = model.float()(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    assert 0.3 < logits.std() < 20, logits.std()
    write_json(os.path.join(directory, "golden.json"), {
        "made_with": versions() | writer(),
        "dtype": str(dtype).removeprefix("torch."),
        "sha256": {k: hashlib.sha256(v.contiguous().numpy().tobytes()).hexdigest() for k, v in full.items() if v.ndim == 2},
        "first": {k: numbers(v.flatten()[:8]) for k, v in full.items() if v.ndim == 2},
        "input_ids": [IDS],
        "logits": [numbers(logits)],
    })
    size = sum(os.path.getsize(os.path.join(directory, f)) for f in os.listdir(directory))
    print(f"{os.path.basename(directory)}: {size / 1000:.0f} kB, logits std {logits.std():.2f}")


def writer():
    import importlib.metadata as m

    out = {}
    for p in ("compressed-tensors", "peft"):
        try:
            out[p] = m.version(p)
        except m.PackageNotFoundError:
            pass
    return out


def qparams(w, bits, group, symmetric, strategy, block=None, g_idx=None):
    """Scales and zero points by minimum and maximum, in the weight's own type."""
    rows, cols = w.shape
    x = w.float()
    if g_idx is not None:
        x = x[:, torch.argsort(g_idx, stable=True)]
    if strategy == "tensor":
        x = x.reshape(1, 1, -1)
    elif strategy == "channel":
        x = x.reshape(rows, 1, cols)
    elif strategy == "group":
        x = x.reshape(rows, cols // group, group)
    elif strategy == "block":
        x = x.reshape(rows // block[0], block[0], cols // block[1], block[1]).transpose(1, 2).flatten(2)
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    half = 1 << (bits - 1)
    if symmetric:
        scale = torch.maximum(high, -low) / (half - 0.5)
        zero = torch.zeros_like(scale)
    else:
        scale = (high - low) / (2 * half - 1)
        zero = (-half - low / scale).round().clamp(-half, half - 1)
    if strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    return scale.to(w.dtype), zero.to(torch.int8)


def schemes(spec):
    """config_groups and a scheme for each module out of (pattern, arguments) pairs."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return {f"group_{i}": QuantizationScheme(targets=[t], **{k: QuantizationArgs(**v) for k, v in a.items()})
            for i, (t, a) in enumerate(spec)}


def scheme_of(groups, module):
    import re

    for s in groups.values():
        t = s.targets[0]
        if (t.startswith("re:") and re.match(t[3:], module)) or t == module:
            return s
    return next((s for s in groups.values() if s.targets == ["Linear"]), None)


def config_of(groups, fmt, sparsity=None, ignore=("lm_head",)):
    from compressed_tensors import __version__
    from compressed_tensors.quantization import QuantizationConfig

    q = json.loads(QuantizationConfig(config_groups=groups, format=fmt, ignore=list(ignore)).model_dump_json())
    q |= {"quant_method": "compressed-tensors", "version": __version__, "quantization_status": "compressed"}
    if sparsity is not None:
        q["sparsity_config"] = sparsity
    return q


def dequantized(q, scale, zero, args, g_idx=None):
    """(q - zero) * scale in f32, from the definition; what it is compared with is told below."""
    rows, cols = q.shape
    if args.strategy == "block":
        r, c = args.block_structure
        at = lambda t: t.float().repeat_interleave(r, 0)[:rows].repeat_interleave(c, 1)[:, :cols]
    elif args.strategy == "group" and g_idx is not None:
        at = lambda t: t.float()[:, g_idx.long()]
    elif args.strategy == "group":
        at = lambda t: t.float().repeat_interleave(args.group_size, 1)
    else:
        at = lambda t: t.float().reshape(-1, 1)
    return (q.float() - at(zero)) * at(scale)


MIXED = [
    ("re:.*q_proj", dict(num_bits=3, strategy="group", group_size=16)),
    ("re:.*k_proj", dict(num_bits=5, strategy="group", group_size=8, symmetric=False)),
    ("model.layers.0.self_attn.v_proj", dict(num_bits=6, strategy="channel", symmetric=False)),
    ("re:.*o_proj$", dict(num_bits=7, strategy="channel")),
    ("re:.*gate_proj", dict(num_bits=2, strategy="group", group_size=8, symmetric=False)),
    ("re:.*up_proj", dict(num_bits=8, strategy="group", group_size=32)),
    ("Linear", dict(num_bits=4, strategy="group", group_size=32)),
]


def stream(out):
    from compressed_tensors.compressors import BaseCompressor

    def model(name, fmt, spec, dtype=torch.float32, kind="int", inputs=None, per_module=None):
        config, state = llama(name, dtype=dtype)
        groups = schemes([(t, {"weights": dict(type=kind) | a, **({"input_activations": inputs} if inputs else {})}) for t, a in spec])
        tensors, decoded = dict(state), dict(state)
        for module in linears(state):
            s = scheme_of(groups, module)
            if s is None:
                continue
            a = s.weights
            w = state[module + ".weight"]
            if kind == "float":
                scale, zero = float_scale(w, a), None
            else:
                scale, zero = qparams(w, a.num_bits, a.group_size, a.symmetric, str(getattr(a.strategy, "value", a.strategy)), a.block_structure)
            local = {"weight": w, "weight_scale": scale}
            if zero is not None:
                local["weight_zero_point"] = zero
            compressor = BaseCompressor.get_value_from_registry(per_module or fmt)
            packed = compressor.compress(local, s)
            back = compressor.decompress(packed, s)["weight"]
            del tensors[module + ".weight"]
            tensors |= {f"{module}.{k}": v for k, v in packed.items()}
            if inputs and not inputs.get("dynamic"):
                tensors[f"{module}.input_scale"] = torch.ones(1)
            decoded[module + ".weight"] = back
        finish(out, name, config, ("quantization_config", config_of(groups, fmt)), tensors, decoded, dtype)

    def float_scale(w, a):
        x = w.float()
        if a.strategy == "block":
            r, c = a.block_structure
            x = x.reshape(w.shape[0] // r, r, w.shape[1] // c, c).transpose(1, 2).flatten(2).abs().amax(-1)
        elif a.strategy == "tensor":
            x = x.abs().amax().reshape(1)
        else:
            x = x.abs().amax(-1, keepdim=True)
        return (x / 448).to(w.dtype)

    model("pack_stream", "pack-quantized", MIXED)
    model("pack_int4_bf16", "pack-quantized", [("Linear", dict(num_bits=4, strategy="group", group_size=32))], torch.bfloat16)
    token = dict(num_bits=8, strategy="token", dynamic=True)
    model("int8", "int-quantized", [
        ("re:.*(q|k)_proj", dict(num_bits=8, strategy="tensor")),
        ("re:.*mlp.*", dict(num_bits=8, strategy="channel", symmetric=False)),
        ("Linear", dict(num_bits=8, strategy="channel")),
    ], torch.float16, inputs=token)
    model("fp8", "float-quantized", [
        ("re:.*(q|k)_proj", dict(num_bits=8, strategy="tensor")),
        ("re:.*mlp.*", dict(num_bits=8, strategy="block", block_structure=[16, 16])),
        ("Linear", dict(num_bits=8, strategy="channel")),
    ], kind="float", inputs=dict(num_bits=8, type="float", strategy="tensor", dynamic=False))
    model("naive_int8", "naive-quantized", [("Linear", dict(num_bits=8, strategy="group", group_size=16))])


def prune24(w):
    keep = w.abs().reshape(-1, 4).argsort(1)[:, 2:]
    mask = torch.zeros(w.numel() // 4, 4, dtype=torch.bool).scatter_(1, keep, True)
    return torch.where(mask.reshape(w.shape), w, torch.zeros_like(w))


def legacy(out):
    from compressed_tensors import __version__
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.config import Sparse24BitMaskConfig, BitmaskConfig
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import quantize

    def pack(name, fmt, spec, dtype=torch.float32, actorder=False, sizes=SMALL, prune=None, sparse=None):
        config, state = llama(name, sizes, dtype)
        groups = schemes([(t, {"weights": a}) for t, a in spec])
        model, decoded, names = dict(state), dict(state), {}
        for module in linears(state):
            s = scheme_of(groups, module)
            a, w = s.weights, state[module + ".weight"]
            if prune:
                w = model[module + ".weight"] = prune(w)
            g_idx = None
            if actorder and "mlp" in module:
                order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(len(module)))
                g_idx = (order // a.group_size).to(torch.int32)
                model[module + ".weight_g_idx"] = g_idx
            scale, zero = qparams(w, a.num_bits, a.group_size, a.symmetric, str(getattr(a.strategy, "value", a.strategy)), None, g_idx)
            model |= {module + ".weight_scale": scale, module + ".weight_zero_point": zero}
            extra = {} if g_idx is None else {"g_idx": g_idx}
            if fmt == "marlin-24":
                scale, w = scale.to(torch.float16), w.to(torch.float16)
            q = quantize(x=w, scale=scale, zero_point=zero, args=a, **extra)
            decoded[module + ".weight"] = dequantized(q, scale, zero, a, g_idx)
            names[module] = (s, scale, zero)
        compressor = BaseCompressor.load_from_registry(fmt, config=QuantizationConfig(config_groups=groups, format=fmt))
        tensors = compressor.compress(model, {k: v[0] for k, v in names.items()})
        sparsity = None
        if sparse:
            outer = BaseCompressor.load_from_registry(sparse, config=Sparse24BitMaskConfig())
            tensors = outer.compress(tensors, set(names))
            # What comes back, not what went in: the writer takes the magnitude of -128 in 8 bits for the smallest.
            for path, q in outer.decompress_from_state_dict(dict(tensors)):
                if path.removesuffix(".weight") in names:
                    s, scale, zero = names[path.removesuffix(".weight")]
                    decoded[path] = dequantized(q, scale, zero, s.weights)
            sparsity = {"format": sparse, "targets": ["Linear"], "ignore": [], "global_sparsity": 0.5, "sparsity_structure": "2:4",
                        "registry_requires_subclass": False}
        finish(out, name, config, ("quantization_config", config_of(groups, fmt, sparsity)), tensors, decoded, dtype)

    pack("pack_words", "pack-quantized", MIXED)
    pack("pack_actorder", "pack-quantized", [("Linear", dict(num_bits=4, strategy="group", group_size=16, symmetric=False, actorder="group"))],
         actorder=True)
    pack("sparse24_int8", "int-quantized", [("Linear", dict(num_bits=8, strategy="channel"))], prune=prune24, sparse="sparse-24-bitmask")
    pack("marlin24", "marlin-24", [
        ("re:.*down_proj", dict(num_bits=4, strategy="group", group_size=128)),
        ("re:.*self_attn.*", dict(num_bits=8, strategy="channel")),
        ("Linear", dict(num_bits=4, strategy="channel")),
    ], torch.float16, sizes=WIDE, prune=prune24)

    def sparse(name, fmt, cfg, prune, dtype, spelled=None, key="compression_config", glob=0.5):
        config, state = llama(name, SMALL, dtype)
        for module in linears(state):
            state[module + ".weight"] = prune(state[module + ".weight"])
        compressor = BaseCompressor.load_from_registry(fmt, config=cfg)
        tensors = compressor.compress(dict(state), set(linears(state)))
        back = dict(state)
        for path, value in compressor.decompress_from_state_dict(tensors):
            back[path] = value
        quantization = {"quant_method": "compressed-tensors", "version": __version__, "sparsity_config": {
            "format": spelled or fmt, "targets": ["Linear"], "ignore": [], "global_sparsity": glob,
            "sparsity_structure": "2:4" if "24" in fmt else "unstructured"}}
        finish(out, name, config, (key, quantization), tensors, back, dtype)

    def magnitude(w):
        return torch.where(w.abs() > w.abs().flatten().median(), w, torch.zeros_like(w))

    sparse("sparse_bitmask", "sparse-bitmask", BitmaskConfig(), magnitude, torch.bfloat16, "sparse_bitmask", glob="0.5")
    sparse("sparse24", "sparse-24-bitmask", Sparse24BitMaskConfig(), prune24, torch.float16, key="quantization_config")


def words(codes, bits):
    """Codes of one line as 32-bit words: a stream, least significant bit first."""
    stream = 0
    for i, c in enumerate(codes):
        stream |= int(c) << (i * bits)
    n = (len(codes) * bits + 31) // 32
    return [((stream >> (32 * i)) & 0xFFFFFFFF) for i in range(n)]


def signed(table):
    return torch.tensor(table, dtype=torch.int64).to(torch.int32)


def gptq(out):
    def affine(w, bits, g_idx, symmetric):
        """Codes, scales `[groups, out]` and zero points, one group at a time."""
        rows, cols = w.shape
        groups = int(g_idx.max()) + 1
        scale, zero, codes = torch.zeros(rows, groups), torch.zeros(rows, groups), torch.zeros(rows, cols)
        top = (1 << bits) - 1
        for g in range(groups):
            at = g_idx == g
            x = w[:, at].float()
            low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
            if symmetric:
                span = 2 * torch.maximum(high, -low)
                scale[:, g], zero[:, g] = span / top, (top + 1) // 2
            else:
                scale[:, g] = (high - low) / top
                zero[:, g] = (-low / scale[:, g]).round().clamp(0, top)
            scale[:, g] = scale[:, g].to(torch.float16).float()
            codes[:, at] = (x / scale[:, g : g + 1] + zero[:, g : g + 1]).round().clamp(0, top)
        value = (codes - zero[:, g_idx.long()]) * scale[:, g_idx.long()]
        return codes.int(), scale, zero.int(), value

    def one(name, bits, group, symmetric, desc, fmt, place="quantization_config", with_order=True):
        config, state = llama(name, dtype=torch.float16)
        tensors, decoded = dict(state), dict(state)
        less = 0 if fmt == "gptq_v2" else 1
        for module in linears(state):
            w = tensors.pop(module + ".weight")
            cols = w.shape[1]
            g_idx = torch.arange(cols) // (group if group > 0 else cols)
            if desc:
                g_idx = g_idx[torch.randperm(cols, generator=torch.Generator().manual_seed(len(module)))]
            codes, scale, zero, decoded[module + ".weight"] = affine(w, bits, g_idx, symmetric)
            # Zero points of 0 wrap around within their bits.
            stored = (zero - less) & ((1 << bits) - 1)
            tensors[module + ".qweight"] = signed([words(row, bits) for row in codes]).T
            tensors[module + ".qzeros"] = signed([words(row, bits) for row in stored.T])
            tensors[module + ".scales"] = scale.T.to(torch.float16)
            if with_order:
                tensors[module + ".g_idx"] = g_idx.to(torch.int32)
            if "q_proj" in module:
                tensors[module + ".bias"] = torch.zeros(w.shape[0], dtype=torch.float16)
        q = {"bits": bits, "group_size": group, "desc_act": desc, "sym": symmetric, "checkpoint_format": fmt, "damp_percent": 0.01}
        if place == "quantization_config":
            finish(out, name, config, (place, q | {"quant_method": "gptq"}), tensors, decoded)
        else:
            finish(out, name, config, None, tensors, decoded, extra={place: q})

    one("gptq4", 4, 16, False, True, "gptq")
    one("gptq4_v2_sym", 4, 32, True, False, "gptq_v2")
    one("gptq3", 3, -1, False, False, "gptq", "quantize_config.json")
    one("gptq2", 2, 16, False, False, "gptq_v2", with_order=False)
    one("gptq8", 8, 16, False, False, "gptq")

    def awq(name, version, group):
        config, state = llama(name, dtype=torch.float16)
        tensors, decoded = dict(state), dict(state)
        for module in linears(state):
            w = tensors.pop(module + ".weight")
            codes, scale, zero, decoded[module + ".weight"] = affine(w, 4, torch.arange(w.shape[1]) // group, False)
            if version == "gemm":
                # A word holds eight outputs of one input, in this order from the lowest nibble up.
                order = [0, 2, 4, 6, 1, 3, 5, 7]
                lay = lambda line: words([line[i // 8 * 8 + order[i % 8]] for i in range(len(line))], 4)
                tensors[module + ".qweight"] = signed([lay(row) for row in codes.T])
                tensors[module + ".qzeros"] = signed([lay(row) for row in zero.T])
                tensors[module + ".scales"] = scale.T.to(torch.float16)
            else:
                # A word holds eight inputs of one output; groups are padded to whole words, and further for small
                # groups.
                groups = scale.shape[1]
                multiple = 8 * {128: 1, 64: 2, 32: 4, 16: 4}[group]
                wide = -(-groups // multiple) * multiple
                pad = torch.nn.functional.pad
                tensors[module + ".qweight"] = signed([words(row, 4) for row in codes])
                tensors[module + ".qzeros"] = signed([words(row, 4) for row in pad(zero, (0, wide - groups))])
                tensors[module + ".scales"] = pad(scale, (0, wide - groups)).to(torch.float16)
        q = {"quant_method": "awq", "bits": 4, "group_size": group, "version": version, "zero_point": True, "modules_to_not_convert": None}
        finish(out, name, config, ("quantization_config", q), tensors, decoded)

    awq("awq_gemm", "gemm", 16)
    awq("awq_gemv", "gemv", 32)


def peft(out):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    config, state = llama("peft_base")
    base = os.path.join(out, "peft_base")
    finish(out, "peft_base", config, None, dict(state), dict(state))

    def adapter(name, **settings):
        model = LlamaForCausalLM(config).eval()
        model.load_state_dict(state, strict=False)
        model.tie_weights()
        wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path="../peft_base", **settings)).eval()
        g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        with torch.no_grad():
            for key, p in wrapped.named_parameters():
                if "lora_" in key:
                    p.copy_(0.2 * torch.randn(p.shape, generator=g))
        directory = os.path.join(out, name)
        shutil.rmtree(directory, ignore_errors=True)
        wrapped.peft_config["default"].base_model_name_or_path = "../peft_base"
        wrapped.save_pretrained(directory)
        readme = os.path.join(directory, "README.md")
        if os.path.exists(readme):
            os.remove(readme)
        with torch.no_grad():
            logits = wrapped(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
        merged = wrapped.merge_and_unload().state_dict()
        merged = {k: v for k, v in merged.items() if k != "lm_head.weight"}
        golden(directory, config, merged, torch.float32)
        path = os.path.join(directory, "golden.json")
        with open(path) as f:
            made = json.load(f)
        made["unmerged_logits"] = [numbers(logits)]
        write_json(path, made)

    adapter("peft_lora", r=4, lora_alpha=10, target_modules=["q_proj", "v_proj", "down_proj"])
    adapter("peft_patterns", r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear",
            rank_pattern={"up_proj": 2, "self_attn.q_proj": 6}, alpha_pattern={"o_proj": 3, "layers.0.mlp.gate_proj": 5})


def main():
    kind, out = sys.argv[1:]
    torch.set_num_threads(1)
    if kind == "others":
        from foreign_others import others

        return others(out, sys.modules[__name__])
    {"stream": stream, "legacy": legacy, "gptq": gptq, "peft": peft}[kind](out)


if __name__ == "__main__":
    main()
