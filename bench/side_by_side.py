#!/usr/bin/env python3
"""Lacuna and llama.cpp on the same files, by turns.

    python3 -m venv VENV && VENV/bin/pip install llama-cpp-python==0.3.36 numpy      builds llama.cpp for this processor: about ten minutes
    cargo build --release
    VENV/bin/python bench/side_by_side.py --models NAME=FILE.gguf NAME=FILE.gguf --work DIR --record bench/record/FOLDER [--text FILE]

Each model is brought into F16, Q8_0 and Q4_0 by llama.cpp's own quantizer; both programs read the same file. Every figure is the median of
`--rounds` runs of one program, alternating with the other's; a ratio is Lacuna's over llama.cpp's, at depth over the better of its flash
attention on and off. With --text, also the perplexity of each file in both programs (first 8 windows of 1024 tokens).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version

HERE = os.path.dirname(os.path.abspath(__file__))
TYPES = ["q4_0", "q8_0", "f16"]


def call(*command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def processor():
    if os.path.exists("/proc/cpuinfo"):
        for line in open("/proc/cpuinfo"):
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


class Bench:
    def __init__(self, a):
        self.a = a
        self.rows = []

    def peer(self, verb, *rest):
        return call(sys.executable, os.path.join(HERE, "peer.py"), verb, *map(str, rest))

    def ours(self, verb, *rest):
        return call(self.a.lacuna, verb, *map(str, rest), "--json")

    def case(self, name, path, threads, prompt=0, steps=0, depth=0):
        ours, theirs = [], {0: [], 1: []}
        flashes = (0, 1) if depth else (1,)
        reps = 1 if max(depth, prompt) >= 2048 else 2
        ceiling = []
        for _ in range(self.a.rounds):
            b = self.ours("bench", path, "--threads", threads, "--prompt", prompt, "--gen", steps, "--depth", depth, "--reps", reps)
            ours.append(b["decode_tok_s"] if steps else b["prefill_tok_s"])
            ceiling.append((b["read_bytes_per_second"], b["roofline_fraction"], b["arithmetic_fraction"], b["token_bytes"]))
            for flash in flashes:
                options = ("--threads", threads, "--prompt", prompt, "--steps", steps, "--depth", depth, "--flash", flash, "--reps", reps)
                theirs[flash].append(self.peer("speed", path, *options)["tok_s"])
        median = statistics.median(ours)
        peer = {flash: statistics.median(theirs[flash]) for flash in flashes}
        row = {
            "file": name, "threads": threads, "prompt": prompt, "steps": steps, "depth": depth,
            "lacuna_tok_s": median, "llama_cpp_tok_s": max(peer.values()), "llama_cpp_by_flash": peer,
            "ratio": median / max(peer.values()), "lacuna_runs": ours, "llama_cpp_runs": theirs,
            "read_bytes_per_second": statistics.median(c[0] for c in ceiling), "token_bytes": ceiling[0][3],
            "fraction_of_ceiling": statistics.median(c[1] if steps else c[2] for c in ceiling),
        }
        self.rows.append(row)
        what = f"decode {steps} at {depth}" if steps else f"prefill {prompt}"
        print(f"{name:<16} {threads} threads  {what:<22} {median:8.1f} {row['llama_cpp_tok_s']:8.1f}  {row['ratio']:.2f}x"
              f"  ({100 * row['fraction_of_ceiling']:.0f}% of the ceiling)", flush=True)
        self.save()

    def perplexity(self, name, path):
        theirs = self.peer("perplexity", path, self.a.text, "--windows", 8)
        peer = theirs["ppl"]
        options = ("--text", self.a.text, "--ctx", 1024, "--windows", 8, *(["--bos"] if theirs["bos"] else []))
        exact = self.ours("eval", path, *options)["ppl"]
        int8 = self.ours("eval", path, *options, "--activations", "int8")["ppl"]
        self.rows.append({"file": name, "ppl_exact": exact, "ppl_int8": int8, "ppl_llama_cpp": peer})
        print(f"{name:<16} perplexity {exact:.3f} exact, {int8:.3f} with 8-bit activations, llama.cpp {peer:.3f}", flush=True)

    def save(self):
        os.makedirs(self.a.record, exist_ok=True)
        a = self.a
        about = {"processor": processor(), "cores": os.cpu_count(), "rounds": a.rounds, "types": a.types, "threads": a.threads,
                 "prompts": a.prompts, "depths": a.depths, "peer": f"llama.cpp in llama-cpp-python {version('llama-cpp-python')}",
                 "rows": self.rows}
        with open(os.path.join(a.record, f"{a.name}.json"), "w") as f:
            json.dump(about, f, indent=1)
            f.write("\n")
        with open(os.path.join(a.record, f"{a.name}.md"), "w") as f:
            f.write(table(about))


def table(about):
    """The record as a page."""
    out = f"# {about['processor']}, {about['cores']} cores, {about['peer']}\n\nMedians of {about['rounds']} alternating runs each, tokens a second.\n\n"
    out += "| file | threads | work | Lacuna | llama.cpp | ratio | share of the ceiling | memory, GB/s |\n|---|---|---|---|---|---|---|---|\n"
    for r in (r for r in about["rows"] if "ratio" in r):
        work = f"decode at depth {r['depth']}" if r["steps"] else f"prefill {r['prompt']}"
        out += (f"| {r['file']} | {r['threads']} | {work} | {r['lacuna_tok_s']:.1f} | {r['llama_cpp_tok_s']:.1f} | **{r['ratio']:.2f}** "
                f"| {100 * r['fraction_of_ceiling']:.0f}% | {r['read_bytes_per_second'] / 1e9:.1f} |\n")
    judged = [r for r in about["rows"] if "ppl_exact" in r]
    if judged:
        out += "\n| file | perplexity, Lacuna exact | with 8-bit activations | llama.cpp |\n|---|---|---|---|\n"
        for r in judged:
            out += f"| {r['file']} | {r['ppl_exact']:.3f} | {r['ppl_int8']:.3f} | {r['ppl_llama_cpp']:.3f} |\n"
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", required=True, metavar="NAME=FILE")
    p.add_argument("--work", required=True)
    p.add_argument("--record", required=True)
    p.add_argument("--lacuna", default=os.path.join(HERE, "..", "target", "release", "lacuna"))
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    p.add_argument("--types", nargs="+", default=TYPES, choices=TYPES)
    p.add_argument("--prompts", type=int, nargs="*", default=[512, 2048])
    p.add_argument("--depths", type=int, nargs="*", default=[0, 4096, 8192 - 65])
    p.add_argument("--name", default="side_by_side", help="of the file in the record")
    p.add_argument("--text")
    a = p.parse_args()
    bench = Bench(a)
    os.makedirs(a.work, exist_ok=True)
    for model in a.models:
        name, source = model.split("=", 1)
        half = os.path.join(a.work, f"{name}-f16.gguf")
        for kind in ["f16", *(t for t in a.types if t != "f16")]:
            path = os.path.join(a.work, f"{name}-{kind}.gguf")
            if not os.path.exists(path):
                bench.peer("make", source if kind == "f16" else half, path, kind)
        for kind in a.types:
            path, what = os.path.join(a.work, f"{name}-{kind}.gguf"), f"{name} {kind}"
            if a.text:
                bench.perplexity(what, path)
            for threads in a.threads:
                for prompt in a.prompts:
                    bench.case(what, path, threads, prompt=prompt)
                for depth in a.depths:
                    bench.case(what, path, threads, steps=32 if depth else 128, depth=depth)
    bench.save()


if __name__ == "__main__":
    main()
