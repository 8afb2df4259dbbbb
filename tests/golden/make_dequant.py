#!/usr/bin/env python3
"""Random blocks of every GGUF type, and the values the `gguf` package reads from them.

    python make_dequant.py dequant.json

Every byte of a block is random but for its 16-bit scales, which are drawn as finite, moderate numbers of either sign.
"""

import sys

import gguf
import numpy as np

from common import numbers, versions, write_json

# type -> the byte offsets of its f16 fields
F16_FIELDS = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
    "IQ4_NL": [0], "IQ4_XS": [0],
}
BLOCKS = 2


def blocks(name, rng):
    """[BLOCKS, bytes of a block] of u8."""
    if name == "F16":
        values = rng.normal(0, 4, (1, 64)).astype(np.float16)
        # Both zeros, the smallest subnormal, the largest subnormal, the smallest normal, the largest number.
        values[0, :8] = np.array([0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF], np.uint16).view(np.float16)
        return values.view(np.uint8)
    if name == "BF16":
        bits = (rng.normal(0, 4, (1, 64)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        bits[0, :4] = [0x0000, 0x8000, 0x0080, 0x7F7F]
        return bits.view(np.uint8)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1]
    raw = rng.integers(0, 256, (BLOCKS, size), dtype=np.uint8)
    for offset in F16_FIELDS[name]:
        magnitude = rng.uniform(0.002, 0.5, BLOCKS) * rng.choice([-1, 1], BLOCKS)
        raw[:, offset:offset + 2] = magnitude.astype(np.float16).view(np.uint8).reshape(BLOCKS, 2)
    return raw


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    types = {}
    for index, name in enumerate(["F16", "BF16", *F16_FIELDS]):
        kind = gguf.GGMLQuantizationType[name]
        raw = blocks(name, np.random.default_rng(1000 + index))
        values = gguf.quants.dequantize(raw, kind).astype(np.float32).reshape(-1)
        assert np.isfinite(values).all(), name
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        types[name] = {
            "ggml_type": int(kind), "block_elements": elements, "block_bytes": size,
            "bytes_hex": raw.tobytes().hex(), "values": numbers(values.tolist()),
        }
    write_json(sys.argv[1], {"made_with": versions(), **types})


if __name__ == "__main__":
    main()
