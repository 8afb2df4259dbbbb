#!/usr/bin/env python3
"""Random blocks of every GGUF type, and the values the `gguf` package reads from them.

    python make_dequant.py dequant.json

Every byte of a block is random but for its 16-bit scales, which are drawn as finite, moderate numbers of either sign.
"""

import hashlib
import sys

import gguf
import numpy as np

from common import numbers, versions, write_json

# type -> the byte offsets of its f16 fields
F16_FIELDS = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
    "IQ4_NL": [0], "IQ4_XS": [0],
    "IQ2_XXS": [0], "IQ2_XS": [0], "IQ2_S": [0], "IQ3_XXS": [0], "IQ3_S": [0], "IQ1_S": [0], "IQ1_M": [],
    "TQ1_0": [52], "TQ2_0": [64], "MXFP4": [], "NVFP4": [],
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
    if name == "IQ1_M":
        # The f16 lies in the upper quarters of four words.
        d = np.float16(rng.uniform(0.002, 0.5)).view(np.uint16)
        words = raw[:, 48:].copy().view(np.uint16) & 0x0FFF
        for i in range(4):
            words[:, i] |= (d >> (4 * i) & 15) << 12
        raw[:, 48:] = words.view(np.uint8)
    if name == "MXFP4":
        # The first below the normal numbers of f32, the second in the middle.
        raw[:, 0] = [1, 121]
    if name == "NVFP4":
        # Nothing, no number, the smallest and the largest among them.
        raw[0, :4] = [0x00, 0x7F, 0x01, 0x7E]
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
        values = values + np.float32(0)
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        types[name] = {
            "ggml_type": int(kind), "block_elements": elements, "block_bytes": size,
            "bytes_hex": raw.tobytes().hex(), "values": numbers(values.tolist()),
        }
    grids = {}
    for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"):
        kind = getattr(gguf.quants, name)
        kind.init_grid()
        grids[name] = hashlib.sha256(kind.grid.astype(np.int8).tobytes()).hexdigest()
    write_json(sys.argv[1], {"made_with": versions(), **types, "grids": grids})


if __name__ == "__main__":
    main()
