"""Decompresses a pack-quantized checkpoint with the compressed-tensors package: DIR OUT.safetensors.

The configuration goes through the package's own checks first, so that a key it does not know fails here. What was decompressed is compressed
by the package again: in "other" are the tensors that then differ from the file's.
"""

import json
import os
import sys

from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open
from safetensors.torch import save_file

directory, out = sys.argv[1], sys.argv[2]
raw = json.load(open(os.path.join(directory, "config.json")))["quantization_config"]
assert not raw.get("sparsity_config"), "sparsity_config is not empty"
config = QuantizationConfig.model_validate({k: v for k, v in raw.items() if k != "sparsity_config"})
group = next(iter(config.config_groups.values()))
scheme = group.weights
parts, dense = {}, {}
with safe_open(os.path.join(directory, "model.safetensors"), "pt") as f:
    for name in f.keys():
        module, _, part = name.rpartition(".")
        if part.startswith("weight_"):
            parts.setdefault(module, {})[part] = f.get_tensor(name)
# Later than 0.13 it works on whole schemes, without an instance.
today = not hasattr(PackedQuantizationCompressor, "decompress_weight")
unpack = sys.modules[PackedQuantizationCompressor.__module__].unpack_from_int32
compressor = None if today else PackedQuantizationCompressor(config=config)
other = []
for module, tensors in parts.items():
    if today:
        weight = PackedQuantizationCompressor.decompress(tensors, group)["weight"]
    else:
        weight = compressor.decompress_weight(tensors, quantization_args=scheme)
    scale, zero = tensors["weight_scale"], tensors.get("weight_zero_point")
    if zero is not None:
        zero = unpack(zero, scheme.num_bits, scale.shape, packed_dim=0)
    if today:
        given = {"weight": weight, "weight_scale": scale}
        if zero is not None:
            given["weight_zero_point"] = zero
        again = PackedQuantizationCompressor.compress(given, group)
    else:
        again = compressor.compress_weight(weight, scale, scheme, zero_point=zero)
    other += [f"{module}.{n}" for n in ("weight_packed", "weight_zero_point")
              if n in tensors and (n not in again or again[n].tolist() != tensors[n].tolist())]
    dense[module] = weight.float().contiguous()
save_file(dense, out)
print(json.dumps({"modules": len(dense), "other": other, "scheme": scheme.model_dump(mode="json")}))
