"""Decompresses a pack-quantized checkpoint with the compressed-tensors package: DIR OUT.safetensors.

The configuration goes through the package's own checks first, so that a key it does not know fails here.
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
scheme = next(iter(config.config_groups.values())).weights
parts, dense = {}, {}
with safe_open(os.path.join(directory, "model.safetensors"), "pt") as f:
    for name in f.keys():
        module, _, part = name.rpartition(".")
        if part.startswith("weight_"):
            parts.setdefault(module, {})[part] = f.get_tensor(name)
compressor = PackedQuantizationCompressor(config=config)
for module, tensors in parts.items():
    dense[module] = compressor.decompress_weight(tensors, quantization_args=scheme).float().contiguous()
save_file(dense, out)
print(json.dumps({"modules": len(dense), "scheme": scheme.model_dump(mode="json")}))
