#!/usr/bin/env python3
"""Two hundred clients of all manners against one server, for minutes: no crash, no leak, nobody without an answer.

    cargo build --release
    python3 bench/serve_soak.py --lacuna target/release/lacuna --model smollm2-135m-instruct --minutes 10 --record bench/record/FOLDER

Clients of six kinds take turns at random: those that wait for whole answers, that stream, that leave in the middle, that read slowly, that send
too much, that send nonsense. Held at the end: the server lives; every request that was accepted came to its end or to its error; every
refusal has OpenAI's shape and a reason; resident memory in the last third is within 5% + 16 MiB of that after warm-up; nothing is at work or in
use afterwards. Needs nothing but Python. Only the machine's own addresses are spoken to.

With a keeper texts are long, so that it evicts, and two more things are held: it did evict, and the blocks in use never are more than those of as
many texts as are at work, each with the keeper's budget, what comes between two decisions, and a block to move them:

    python3 bench/serve_soak.py --keep streaming-llm:budget=256 --minutes 2.5 --clients 24 --record bench/record/FOLDER/soak --name streaming-llm
"""

import argparse
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter


class Soak:
    def __init__(self, port, model, seed, words, tokens):
        self.port, self.model, self.seed, self.words, self.tokens = port, model, seed, words, tokens
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.seen = Counter()
        self.wrong = []

    def count(self, kind, what):
        with self.lock:
            self.seen[f"{kind}: {what}"] += 1

    def blame(self, kind, what):
        with self.lock:
            self.wrong.append(f"{kind}: {what}")

    def chat(self, rng, **more):
        words = " ".join(rng.choice(["river", "stone", "cloud", "paper", "seven", "blue"]) for _ in range(rng.randint(1, self.words)))
        return {"model": self.model, "messages": [{"role": "user", "content": words}], "max_tokens": rng.randint(1, self.tokens), "temperature": rng.choice([0, 0.8]), **more}

    def open(self, body, raw=None, length=None):
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        data = raw if raw is not None else json.dumps(body).encode()
        c.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
        return c, c.getresponse()

    def refusal(self, kind, status, body):
        try:
            e = json.loads(body)["error"]
            ok = bool(e["message"]) and "type" in e and "param" in e and "code" in e
        except (ValueError, KeyError, TypeError):
            ok = False
        if not ok:
            self.blame(kind, f"status {status} without a reason: {body[:200]!r}")
        self.count(kind, f"refused with {status}")

    def whole(self, rng, kind):
        c, r = self.open(self.chat(rng, n=rng.choice([1, 1, 2])))
        body = r.read()
        if r.status == 200:
            v = json.loads(body)
            if not all(x["finish_reason"] for x in v["choices"]):
                self.blame(kind, "an answer without an end")
            self.count(kind, "answered")
        else:
            self.refusal(kind, r.status, body)
            if r.status == 429:
                if not r.getheader("Retry-After"):
                    self.blame(kind, "429 without Retry-After")
                time.sleep(0.5 + rng.random())
        c.close()

    def stream(self, rng, kind, leave=False, slow=False):
        c, r = self.open(self.chat(rng, stream=True))
        if r.status != 200:
            self.refusal(kind, r.status, r.read())
            c.close()
            return time.sleep(0.5 + rng.random())
        stay = rng.randint(0, 12) if leave else 1 << 30
        done = failed = False
        for i, line in enumerate(r):
            if i >= stay:
                break
            if slow:
                time.sleep(0.02 * rng.random())
            if line.startswith(b"data: {") and b'"error"' in line:
                failed = True
                self.count(kind, "told of an error")
            done |= line.strip() == b"data: [DONE]"
        c.close()
        if leave and not done:
            self.count(kind, "left")
        elif done:
            self.count(kind, "answered")
        elif not failed:
            self.blame(kind, "a stream without an end")

    def leaving(self, rng, kind):
        if rng.random() < 0.5:
            return self.stream(rng, kind, leave=True)
        body = json.dumps(self.chat(rng)).encode()
        s = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body))
        s.sendall(body[: rng.randint(0, len(body))] if rng.random() < 0.3 else body)
        time.sleep(rng.random() * 0.3)
        s.close()
        self.count(kind, "left")

    def slow(self, rng, kind):
        self.stream(rng, kind, slow=True)

    def oversized(self, rng, kind):
        raw = b'{"model": "' + b"x" * (5 << 20) + b'"}'
        c, r = self.open(None, raw=raw)
        if r.status != 413:
            self.blame(kind, f"status {r.status}")
        self.refusal(kind, r.status, r.read())
        c.close()

    def nonsense(self, rng, kind):
        raw = rng.choice([b"", b"{", b"[]", b"null", b'{"model": 3}', bytes(rng.randrange(256) for _ in range(rng.randint(1, 400))), b"[" * 5000,
                          json.dumps(self.chat(rng, temperature="hot")).encode(), json.dumps(self.chat(rng, surprise=1)).encode(),
                          json.dumps(self.chat(rng, max_tokens=10**9)).encode()])
        c, r = self.open(None, raw=raw)
        # A full queue says so before it looks at what is asked.
        if r.status not in (400, 429):
            self.blame(kind, f"status {r.status} for {raw[:60]!r}")
        self.refusal(kind, r.status, r.read())
        c.close()

    def client(self, k):
        rng = random.Random(self.seed * 1000 + k)
        kinds = [(self.whole, 30), (self.stream, 25), (self.leaving, 20), (self.slow, 10), (self.oversized, 3), (self.nonsense, 12)]
        while not self.stop.is_set():
            f = rng.choices([f for f, _ in kinds], [w for _, w in kinds])[0]
            try:
                f(rng, f.__name__)
            except Exception as e:
                if not self.stop.is_set():
                    self.blame(f.__name__, repr(e))
            time.sleep(rng.random() * 0.2)


def resident(pid):
    for line in open(f"/proc/{pid}/status"):
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024


def evicted(port):
    c = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    c.request("GET", "/metrics")
    lines = c.getresponse().read().decode().splitlines()
    c.close()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("lacuna_keep_evicted_total"))


def most_blocks(keep):
    """Blocks that a text may hold under a keeper: its budget, what comes until it decides again, and one while slots move."""
    given = dict(pair.split("=") for pair in keep.partition(":")[2].split(",") if pair)
    return -(-(int(given.get("budget", 1024)) + int(given.get("every", 32))) // 32) + 1


def live(port):
    c = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    c.request("GET", "/api/live")
    v = json.loads(c.getresponse().read())
    c.close()
    return v


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lacuna", default="target/release/lacuna")
    p.add_argument("--model", default="smollm2-135m-instruct")
    p.add_argument("--minutes", type=float, default=10)
    p.add_argument("--clients", type=int, default=200)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--record", help="a folder for serve_soak.json and the server's log")
    p.add_argument("--name", default="serve_soak", help="of the record's file")
    p.add_argument("--keep", help="a keeper, as the server takes it; texts are then long")
    p.add_argument("--words", type=int, help="of a prompt, at most: 60, with a keeper 600")
    p.add_argument("--tokens", type=int, help="of an answer, at most: 48, with a keeper 160")
    p.add_argument("--serve", nargs="*", help="further flags of the server: --ctx 1024 (with a keeper 2048) --kv-memory 256MiB (96MiB) --max-queue 128")
    a = p.parse_args()
    words, tokens = a.words or (600 if a.keep else 60), a.tokens or (160 if a.keep else 48)
    # With a keeper so little that blocks left for others fill it while the server warms up.
    flags = a.serve or ["--ctx", "2048" if a.keep else "1024", "--kv-memory", "96MiB" if a.keep else "256MiB", "--max-queue", "128"]
    flags = [*flags, *(["--keep", a.keep] if a.keep else [])]
    folder = a.record or "."
    os.makedirs(folder, exist_ok=True)
    log = open(os.path.join(folder, f"{a.name}.log"), "wb")
    server = subprocess.Popen([a.lacuna, "serve", a.model, "--offline", "--port", "0", "--json", *flags], stdout=subprocess.PIPE, stderr=log)
    told = json.loads(server.stdout.readline())
    soak = Soak(told["port"], told["model"], a.seed, words, tokens)
    threads = [threading.Thread(target=soak.client, args=(k,), daemon=True) for k in range(a.clients)]
    [t.start() for t in threads]
    start, samples = time.time(), []
    while time.time() - start < 60 * a.minutes and server.poll() is None:
        time.sleep(2)
        v = live(told["port"])
        samples.append((round(time.time() - start, 1), resident(server.pid), v["running"], v["kv"]["used"], v["kv"]["bytes"]))
        if len(samples) % 15 == 0:
            print(f"{samples[-1][0]:>6.0f} s  {samples[-1][1] / 1e6:>7.1f} MB  {v['running']} at work, {v['waiting']} waiting, {sum(soak.seen.values())} done, {len(soak.wrong)} wrong", flush=True)
    alive = server.poll() is None
    soak.stop.set()
    [t.join(120) for t in threads]
    hung = sum(t.is_alive() for t in threads)
    rest, gone = {}, 0
    if alive:
        for _ in range(600):
            rest = live(told["port"])
            if not rest["running"] and not rest["waiting"]:
                break
            time.sleep(0.1)
        # Memory once more when all is quiet; then the end, which must be a clean one.
        samples.append((round(time.time() - start, 1), resident(server.pid), rest["running"], rest["kv"]["used"], rest["kv"]["bytes"]))
        gone = evicted(told["port"])
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    else:
        code = server.returncode
    warm = [m for t, m, *_ in samples if t >= 20 * a.minutes][: max(1, len(samples) // 6)]
    last = [m for t, m, *_ in samples if t >= 40 * a.minutes]
    before, after = max(warm), max(last)
    checks = {
        "the server lives": alive,
        "it ends with 0 when told": code == 0,
        "nobody hangs": hung == 0,
        "nothing is at work afterwards": bool(rest) and rest["running"] == 0 and rest["waiting"] == 0 and rest["kv"]["used"] == 0,
        "every request has its answer or its reason": not soak.wrong,
        "memory is flat after warm-up": after <= 1.05 * before + (16 << 20),
    }
    if a.keep:
        each = most_blocks(a.keep)
        checks["the keeper evicts"] = alive and gone > 0
        checks["blocks in use are those of what is kept"] = all(used <= running * each for _, _, running, used, _ in samples)
    out = {"minutes": a.minutes, "clients": a.clients, "flags": flags, "words": words, "tokens": tokens, "evicted": gone, "checks": checks, "memory_after_warm_up": before, "memory_at_the_end": after, "seen": dict(sorted(soak.seen.items())), "wrong": soak.wrong[:50], "samples (seconds, resident bytes, texts at work, blocks in use, bytes of keys and values)": samples}
    with open(os.path.join(folder, f"{a.name}.json"), "w") as f:
        json.dump(out, f, indent=1)
        f.write("\n")
    for k, n in sorted(soak.seen.items()):
        print(f"  {k:<40} {n}")
    for k, ok in checks.items():
        print(("ok      " if ok else "FAILED  ") + k)
    print(f"memory {before / 1e6:.1f} MB after warm-up, {after / 1e6:.1f} MB at the end")
    [print("wrong:", w) for w in soak.wrong[:10]]
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
