#!/usr/bin/env python3
"""Instructions a weight of the kernel rows, counted in qemu's user mode: for processors that are not at hand.

    cargo build --release --manifest-path bench/rows/Cargo.toml --bin passes [--target ...]
    gcc -O2 -shared -fPIC -o count.so bench/instructions/count.c
    python3 bench/instructions/count.py --plugin ./count.so --out bench/record/qemu-aarch64/instructions \\
        --x86 PASSES --arm PASSES

Every row is run twice, with few and with more passes over the matrix: the difference is that of passes alone.
Instructions are no time: processors run several in a cycle, and not every processor as many.
"""

import argparse
import json
import pathlib
import subprocess

ROWS = [
    "f32", "f16", "bf16", "int2 g32", "int3 g32", "int4 g32", "int5 g32", "int6 g32", "int8 g32", "ternary g32",
    "q6_k", "f16, bitmask 50%", "f16, 16x1 50%", "int4 g32, 2:4", "int4 g32, 16x1 50%",
]
SHAPE = (512, 2048)
TOKENS = [1, 16]
FEW, MORE = 1, 5


def ran(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("instructions ")]
    if done.returncode != 0 or len(lines) != 1:
        raise SystemExit(f"{' '.join(command)}: {done.returncode}\n{done.stderr}")
    return int(lines[0].split()[1])


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--plugin", required=True)
    args.add_argument("--out", required=True, type=pathlib.Path)
    args.add_argument("--x86")
    args.add_argument("--arm")
    args.add_argument("--root", default="/", help="where AArch64's loader and C library are")
    args = args.parse_args()
    machines = []
    if args.x86:
        machines.append((["qemu-x86_64", "-cpu", "max"], args.x86, ["avx2"]))
    if args.arm:
        machines.append((["qemu-aarch64", "-cpu", "max", "-L", args.root], args.arm,
                         ["neon", "neon-dotprod", "neon-i8mm"]))
    rows, cols = SHAPE
    found = []
    for row in ROWS:
        for tokens in TOKENS:
            each = {}
            for qemu, binary, isas in machines:
                for isa in isas:
                    command = qemu + ["-plugin", args.plugin, binary, row, isa, str(tokens)]
                    few, more = (ran(command + [str(n), f"{rows}x{cols}"]) for n in (FEW, MORE))
                    each[isa] = (more - few) / ((MORE - FEW) * rows * cols * tokens)
            found.append({"row": row, "tokens": tokens, "instructions_per_weight": each})
            print(row, tokens, {isa: round(n, 3) for isa, n in each.items()}, flush=True)
    isas = list(found[0]["instructions_per_weight"])
    table = [f"| row | tokens | {' | '.join(isas)} |", f"|{'---|' * (len(isas) + 2)}"]
    for one in found:
        counts = " | ".join(f"{one['instructions_per_weight'][isa]:.3f}" for isa in isas)
        table.append(f"| {one['row']} | {one['tokens']} | {counts} |")
    args.out.mkdir(parents=True, exist_ok=True)
    shown = {"rows": rows, "columns": cols, "passes": MORE - FEW, "found": found}
    (args.out / "instructions.json").write_text(json.dumps(shown, indent=1) + "\n")
    (args.out / "table.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
