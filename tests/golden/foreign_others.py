"""The part of make_foreign.py whose tools want a GPU or another machine: every format from its definition, slowly."""

import json

import torch

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FP4 = torch.tensor(E2M1 + [-x for x in E2M1])

# The 16 levels of nf4: quantiles of a normal distribution, as the QLoRA paper's appendix lists them.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
# Those of fp4: a sign, and by the three bits below it.
BNB_FP4 = [0.0, 0.005208333333333333, 0.6666666666666666, 1.0, 0.3333333333333333, 0.5, 0.16666666666666666, 0.25]


def nearest(x, levels):
    return (x.unsqueeze(-1) - levels).abs().argmin(-1)


def pairs(codes, high_first=False):
    """Two to a byte."""
    a, b = codes.reshape(-1, 2).unbind(-1)
    return ((a << 4 | b) if high_first else (b << 4 | a)).to(torch.uint8)


def stream(codes, bits):
    """Rows of codes as 32-bit words, least significant bit first."""
    out = []
    for row in codes.tolist():
        n = sum(int(c) << (i * bits) for i, c in enumerate(row))
        assert len(row) * bits % 32 == 0
        out.append([(n >> (32 * i)) & 0xFFFFFFFF for i in range(len(row) * bits // 32)])
    return torch.tensor(out, dtype=torch.int64).to(torch.uint32)


def others(out, mk):
    f8 = torch.float8_e4m3fn

    def each(name, dtype, quantization, make, extra=None, embed=False, keep=()):
        """`make(weight) -> tensors by suffix, values`."""
        config, state = mk.llama(name, dtype=dtype)
        tensors, decoded = dict(state), dict(state)
        modules = mk.linears(state) + (["model.embed_tokens"] if embed else [])
        for module in modules:
            if any(k in module for k in keep):
                continue
            made, value = make(module, tensors.pop(module + ".weight").float())
            tensors |= {f"{module}.{k}": v for k, v in made.items()}
            decoded[module + ".weight"] = value
        mk.finish(out, name, config, quantization, tensors, decoded, extra=extra)

    # Bytes of e4m3.
    def blocks(module, w, r=16, c=16):
        x = w.reshape(w.shape[0] // r, r, w.shape[1] // c, c)
        scale = x.abs().amax((1, 3)) / 448
        q = (x / scale[:, None, :, None]).reshape(w.shape).to(f8)
        wide = scale.repeat_interleave(r, 0).repeat_interleave(c, 1)
        return {"weight": q, "weight_scale_inv": scale}, q.float() * wide

    each("fp8_blocks", torch.bfloat16, ("quantization_config", {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 16],
        "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn.o_proj"]}), blocks, keep=["o_proj"])

    def whole(module, w):
        scale = w.abs().amax() / 448
        q = (w / scale).to(f8)
        return {"weight": q, "weight_scale": scale, "input_scale": torch.tensor(1.0)}, q.float() * scale

    each("modelopt_fp8", torch.bfloat16, ("quantization_config", {
        "quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False},
        "ignore": ["lm_head"], "producer": {"name": "modelopt", "version": "0.33.0"}}), whole)

    def rows(module, w):
        scale = w.abs().amax(1, keepdim=True) / 448
        q = (w / scale).to(f8)
        return {"weight": q, "weight_scale": scale}, q.float() * scale

    each("fbgemm_fp8", torch.bfloat16, ("quantization_config", {
        "quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}), rows)

    # FP4 with 8-bit scales for 16 columns under one of f32.
    def nvfp4(divide):
        def make(module, w):
            over = w.abs().amax() / (6 * 448)
            if divide:
                over = 1 / over
            x = w.reshape(w.shape[0], -1, 16)
            scale = x.abs().amax(-1) / 6
            scale = (scale * over if divide else scale / over).to(f8)
            real = scale.float() / over if divide else scale.float() * over
            codes = nearest(x / real.clamp(min=1e-9).unsqueeze(-1), FP4)
            value = (FP4[codes] * real.unsqueeze(-1)).reshape(w.shape)
            packed = pairs(codes).reshape(w.shape[0], -1)
            if divide:
                return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": over.reshape(1),
                        "input_global_scale": torch.ones(1)}, value
            return {"weight": packed, "weight_scale": scale, "weight_scale_2": over, "input_scale": torch.tensor(1.0)}, value
        return make

    four = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
    each("ct_nvfp4", torch.bfloat16, ("quantization_config", {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "version": "0.13.0", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": four | {"group_size": 16, "strategy": "tensor_group"},
                                      "input_activations": four | {"group_size": 16, "strategy": "tensor_group", "dynamic": "local"}}}}),
         nvfp4(True))
    each("modelopt_nvfp4", torch.bfloat16, None, nvfp4(False), extra={"hf_quant_config.json": {
        "producer": {"name": "modelopt", "version": "0.33.0"},
        "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head"]}}})

    # FP4 with powers of two for 32 columns.
    def powers(w, most):
        x = w.reshape(w.shape[0], -1, 32)
        e = (x.abs().amax(-1).clamp(min=1e-30).log2().floor() - most).clamp(-127, 127)
        return x, (e + 127).to(torch.uint8), torch.pow(2.0, e.double()).float()

    def mxfp4(names, words=False):
        def make(module, w):
            w = w.clone()
            # Groups of nothing, and of very little: scales that no f16 holds beside the others.
            w[3, :32] = 0
            if "up_proj" in module:
                w[5, :32] *= 2.0**-60
            x, e, scale = powers(w, 2)
            codes = nearest(x / scale.unsqueeze(-1), FP4)
            value = (FP4[codes] * scale.unsqueeze(-1)).reshape(w.shape)
            codes = codes.reshape(w.shape[0], -1)
            packed = stream(codes, 4) if words else pairs(codes).reshape(w.shape[0], -1)
            return {names[0]: packed, names[1]: e}, value
        return make

    each("ct_mxfp4", torch.bfloat16, ("quantization_config", {
        "quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "version": "0.13.0", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": four | {"group_size": 32, "strategy": "group"}}}}),
         mxfp4(("weight_packed", "weight_scale")))

    # bitsandbytes: the flattened matrix in blocks.
    def four_bits(kind, levels, nested):
        levels = torch.tensor(levels)

        def make(module, w):
            x = w.flatten()
            block = 64
            absmax = x.reshape(-1, block).abs().amax(-1)
            state = {"quant_type": kind, "blocksize": block, "dtype": "float16", "shape": list(w.shape)}
            tensors = {"weight.quant_map": levels.clone()}
            if nested:
                table = torch.linspace(-1, 1, 256)
                offset = absmax.mean().item()
                rest = absmax - torch.tensor(offset)
                over = torch.stack([g.abs().amax() for g in rest.split(256)])
                codes = nearest(rest / over.repeat_interleave(256)[: len(rest)], table)
                # A product, then a sum, each rounded.
                real = table[codes] * over.repeat_interleave(256)[: len(rest)] + torch.tensor(offset)
                state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
                tensors |= {"weight.absmax": codes.to(torch.uint8), "weight.nested_absmax": over, "weight.nested_quant_map": table.clone()}
            else:
                real = absmax
                tensors["weight.absmax"] = absmax
            q = nearest(x.reshape(-1, block) / real.unsqueeze(-1), levels)
            value = (levels[q] * real.unsqueeze(-1)).reshape(w.shape)
            text = json.dumps(state).encode()
            tensors["weight"] = pairs(q, high_first=True).reshape(-1, 1)
            tensors[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
            return tensors, value
        return make

    def bnb(kind, four):
        return ("quantization_config", {
            "quant_method": "bitsandbytes", "load_in_4bit": four, "_load_in_4bit": four, "load_in_8bit": not four,
            "_load_in_8bit": not four, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": kind == "nf4",
            "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8", "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": None, "llm_int8_has_fp16_weight": False, "llm_int8_enable_fp32_cpu_offload": False})

    each("bnb_nf4", torch.float16, bnb("nf4", True), four_bits("nf4", NF4, True), keep=["v_proj"])
    each("bnb_fp4", torch.float16, bnb("fp4", True), four_bits("fp4", BNB_FP4 + [-x for x in BNB_FP4], False))

    def eight_bits(module, w):
        absmax = w.abs().amax(1)
        q = (w * 127 / absmax[:, None]).round().to(torch.int8)
        value = q.float() * (absmax / 127)[:, None]
        return {"weight": q, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}, value

    each("bnb_int8", torch.float16, bnb("fp4", False), eight_bits)

    # MLX: scale * code + bias.
    def affine(bits_of, dtype, group=32):
        def make(module, w):
            bits = bits_of(module)
            x = w.reshape(w.shape[0], -1, group)
            low, high = x.amin(-1), x.amax(-1)
            scale, bias = ((high - low) / ((1 << bits) - 1)).to(dtype), low.to(dtype)
            q = ((x - bias.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)).round().clamp(0, (1 << bits) - 1)
            value = (q * scale.float().unsqueeze(-1) + bias.float().unsqueeze(-1)).reshape(w.shape)
            return {"weight": stream(q.long().reshape(w.shape), bits), "scales": scale, "biases": bias}, value
        return make

    names = {"q_proj": 2, "k_proj": 3, "o_proj": 6, "gate_proj": 8, "up_proj": 5}
    own = {f"model.layers.0.{'mlp' if 'gate' in n or 'up' in n else 'self_attn'}.{n}": {"group_size": 32, "bits": b} for n, b in names.items()}
    mixed = {"group_size": 32, "bits": 4, "model.layers.0.self_attn.v_proj": False} | own
    bits_of = lambda m: next((b for n, b in names.items() if n in m), 4)
    each("mlx_mixed", torch.bfloat16, ("quantization", mixed), affine(bits_of, torch.bfloat16), embed=True, keep=["v_proj"])
    each("mlx_f16", torch.float16, ("quantization", {"group_size": 32, "bits": 4, "mode": "affine"}), affine(lambda m: 4, torch.float16), embed=True)
    each("mlx_mxfp4", torch.bfloat16, ("quantization", {"group_size": 32, "bits": 4, "mode": "mxfp4"}), mxfp4(("weight", "scales"), words=True))

    # auto-round, packed as GPTQ and as AWQ pack.
    def auto(packing, less, awq=False):
        def make(module, w):
            bits, group = (8, 32) if "k_proj" in module and not awq else (4, 16)
            rows, cols = w.shape
            top = (1 << bits) - 1
            x = w.reshape(rows, -1, group)
            low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
            scale = ((high - low) / top).half().float()
            zero = (-low / scale).round().clamp(0, top).int()
            codes = (x / scale.unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, top).int()
            value = ((codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).reshape(rows, cols)
            codes = codes.reshape(rows, cols)
            if awq:
                order = [0, 2, 4, 6, 1, 3, 5, 7]
                lay = lambda line: mk.words([line[i // 8 * 8 + order[i % 8]] for i in range(len(line))], 4)
                return {"qweight": mk.signed([lay(r) for r in codes.T]), "qzeros": mk.signed([lay(r) for r in zero.T]),
                        "scales": scale.T.half()}, value
            stored = (zero - less) & top
            return {"qweight": mk.signed([mk.words(r, bits) for r in codes]).T, "scales": scale.T.half(),
                    "qzeros": mk.signed([mk.words(r, bits) for r in stored.T])}, value
        extra = {} if awq else {"extra_config": {"model.layers.0.self_attn.k_proj": {"bits": 8, "group_size": 32},
                                                 "model.layers.0.self_attn.v_proj": {"bits": 16, "data_type": "float"}}}
        q = {"quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": False, "data_type": "int", "iters": 200,
             "packing_format": packing, "autoround_version": "0.6.0", "block_name_to_quantize": "model.layers"} | extra
        return ("quantization_config", q), make, [] if awq else ["v_proj"]

    for name, packing, less, awq in [("auto_round_gptq", "auto_round:auto_gptq", 1, False), ("auto_round_awq", "auto_round:auto_awq", 0, True),
                                     ("auto_round_own", "auto_round:exllamav2", 0, False)]:
        config, make, keep = auto(packing, less, awq)
        each(name, torch.float16, config, make, keep=keep)
