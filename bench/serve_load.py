#!/usr/bin/env python3
"""Load on `lacuna serve` and on llama-server, by turns: tokens a second and time to first token at 1, 4, 8 and 16 clients.

    python3 -m venv VENV && VENV/bin/pip install 'llama-cpp-python[server]==0.3.36'
    cargo build --release
    VENV/bin/python bench/serve_load.py --model FILE.gguf --lacuna target/release/lacuna --record bench/record/FOLDER [--peer-command '...']

Every client sends chat requests one after the other, each with a prompt of its own, greedy, 64 tokens of answer that no end token cuts short (its
logits are pushed down on both sides), streamed. A round starts one server, warms it up, runs the clients, stops it; rounds alternate
between the two. Figures are medians over rounds; a ratio is Lacuna's over the other's. Only the machine's own addresses are spoken to.

`--peer-command` starts another server instead, with {model}, {port}, {clients} and {ctx} filled in; e.g. a llama-server binary:
    --peer-command 'llama-server -m {model} --port {port} -np {clients} -c {ctx} -t 2'
"""

import argparse
import http.client
import json
import os
import platform
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time

WORDS = "river mountain garden winter music bread paper window history ocean forest city silver engine letter bridge".split()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def prompt(i):
    a, b, c = (WORDS[(i * k + k) % len(WORDS)] for k in (1, 5, 11))
    return f"Write a few sentences about {a}, {b} and {c}, and explain how they belong together. This is request number {i}."


def ask(port, model, i, tokens, end_token, result):
    body = {
        "model": model, "messages": [{"role": "user", "content": prompt(i)}], "max_tokens": tokens, "temperature": 0, "stream": True,
        "logit_bias": {str(t): -100 for t in end_token},
    }
    start = time.perf_counter()
    c = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    c.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    r = c.getresponse()
    if r.status != 200:
        raise RuntimeError(f"{r.status}: {r.read()[:300]}")
    first, pieces = None, 0
    for line in r:
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        event = json.loads(line[6:])
        if event.get("choices") and event["choices"][0].get("delta", {}).get("content"):
            first = first or time.perf_counter() - start
            pieces += 1
    c.close()
    result.append((first, pieces, time.perf_counter() - start))


def p95(values):
    values = sorted(values)
    return values[min(len(values) - 1, int(0.95 * len(values)))]


class Server:
    def __init__(self, command, port, log):
        self.log = open(log, "ab")
        self.child = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        end = time.time() + 300
        while time.time() < end:
            if self.child.poll() is not None:
                raise SystemExit(f"{command[0]} ended with {self.child.returncode}; see {log}")
            try:
                c = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
                c.request("GET", "/v1/models")
                r = c.getresponse()
                body = r.read()
                if r.status == 200:
                    self.model = json.loads(body)["data"][0]["id"]
                    return
            except OSError:
                pass
            time.sleep(0.2)
        raise SystemExit("the server does not answer")

    def stop(self):
        self.child.send_signal(signal.SIGTERM)
        try:
            self.child.wait(20)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.log.close()


def load(port, model, clients, requests, tokens, end_token, base):
    results, failures = [], []

    def client(k):
        try:
            for j in range(requests):
                ask(port, model, base + k * 1000 + j, tokens, end_token, results)
        except Exception as e:
            failures.append(repr(e))

    threads = [threading.Thread(target=client, args=(k,)) for k in range(clients)]
    start = time.perf_counter()
    [t.start() for t in threads]
    [t.join() for t in threads]
    seconds = time.perf_counter() - start
    if failures:
        raise SystemExit(f"a client failed: {failures[0]}")
    # Tokens as asked: both sides write exactly as many.
    return {"tok_s": len(results) * tokens / seconds, "first_p95_ms": 1e3 * p95([r[0] for r in results]), "first_p50_ms": 1e3 * statistics.median(r[0] for r in results)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="a GGUF file that both read")
    p.add_argument("--lacuna", default="target/release/lacuna")
    p.add_argument("--peer-command", help="how to start the other server; by default llama_cpp.server of this Python")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16])
    p.add_argument("--requests", type=int, default=4, help="of each client in a round")
    p.add_argument("--tokens", type=int, default=64)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--end-token", type=int, nargs="*", default=[2, 0], help="ids pushed down; SmolLM2's are 2 and 0")
    p.add_argument("--record", help="a folder for serve_load.json and logs")
    a = p.parse_args()
    folder = a.record or "."
    os.makedirs(folder, exist_ok=True)
    rows = []
    for clients in a.clients:
        got = {"lacuna": [], "peer": []}
        for rnd in range(a.rounds):
            for who in ("lacuna", "peer") if rnd % 2 == 0 else ("peer", "lacuna"):
                port, ctx = free_port(), 1024
                if who == "lacuna":
                    command = [a.lacuna, "serve", a.model, "--offline", "--port", str(port), "--ctx", str(ctx), "--max-batch", str(clients), "--threads", str(a.threads)]
                elif a.peer_command:
                    command = shlex.split(a.peer_command.format(model=a.model, port=port, clients=clients, ctx=ctx * clients))
                else:
                    command = [sys.executable, "-m", "llama_cpp.server", "--model", a.model, "--host", "127.0.0.1", "--port", str(port), "--n_ctx", str(ctx), "--n_threads", str(a.threads), "--n_threads_batch", str(a.threads), "--interrupt_requests", "false"]
                server = Server(command, port, os.path.join(folder, f"{who}.log"))
                try:
                    load(port, server.model, 1, 1, 8, a.end_token, 900_000)
                    one = load(port, server.model, clients, a.requests, a.tokens, a.end_token, 10_000 * (rnd + 1))
                finally:
                    server.stop()
                got[who].append(one)
                print(f"{clients:>3} clients, round {rnd + 1}, {who:<7} {one['tok_s']:>7.1f} tok/s, first token p95 {one['first_p95_ms']:>7.0f} ms", flush=True)
        median = {who: {k: statistics.median(r[k] for r in all) for k in all[0]} for who, all in got.items()}
        row = {"clients": clients, **{who: {**m, "rounds": got[who]} for who, m in median.items()},
               "ratio_tok_s": median["lacuna"]["tok_s"] / median["peer"]["tok_s"],
               "ratio_first_p95": median["lacuna"]["first_p95_ms"] / median["peer"]["first_p95_ms"]}
        rows.append(row)
        print(f"{clients:>3} clients: {median['lacuna']['tok_s']:.1f} beside {median['peer']['tok_s']:.1f} tok/s, ratio {row['ratio_tok_s']:.2f}; first token p95 {median['lacuna']['first_p95_ms']:.0f} beside {median['peer']['first_p95_ms']:.0f} ms\n", flush=True)
    out = {"model": os.path.basename(a.model), "tokens": a.tokens, "requests": a.requests, "threads": a.threads, "machine": platform.processor() or platform.machine(), "peer": a.peer_command or "llama_cpp.server", "rows": rows}
    with open(os.path.join(folder, "serve_load.json"), "w") as f:
        json.dump(out, f, indent=1)
        f.write("\n")


if __name__ == "__main__":
    main()
