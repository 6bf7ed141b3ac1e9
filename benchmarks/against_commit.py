"""This checkout against an earlier commit of it: the same commands, in turn, in processes.

    python benchmarks/against_commit.py 69157ed                  # everything, three rounds
    python benchmarks/against_commit.py 69157ed --only encode import --rounds 5

Needs ``shared/`` beside the checkout. The earlier commit is checked out into a temporary folder and
imported from there; both use the packages of this environment. A number is a rate (higher is
better) or seconds (lower is better); "speed" is new against old so that above 1 is better, and
"memory" is the peak of the process, new against old. Medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
SERVED_SECONDS = 10.0

ENCODE = """
import json, statistics, sys, time, torch
from nvembed import NVEmbed
model = NVEmbed.from_pretrained(sys.argv[1], dtype="float32")
texts = json.load(open(sys.argv[2]))
model.encode(texts[:100])
def seconds(work):
    began = time.perf_counter(); work(); return time.perf_counter() - began
whole = statistics.median(seconds(lambda: model.encode(texts)) for _ in range(3))
one = statistics.median(seconds(lambda: model.encode(texts[:1])) for _ in range(60))
print(json.dumps({"encode, texts/s": len(texts) / whole, "one query, s": one}))
"""
MODEL = """
import sys
from nvembed import NVEmbed
model = NVEmbed.from_pretrained(sys.argv[1], pooling="latent", num_latents=64, num_heads=4)
model.save(sys.argv[2])
"""
RECIPE = """
output: {output}
model:
  backbone: {backbone}
  max_tokens: 128
  pooling: {{kind: latent, num_latents: 64, num_heads: 4}}
lora: {{rank: 16, alpha: 32}}
precision: float32
pack_tokens: 4096
memory_gb: {memory}
checkpoint_every: 100
stages:
  - name: one
    steps: 6
    batch_size: 64
    learning_rate: 1.0e-3
    in_batch_negatives: true
    num_negatives: 1
datasets:
  - name: squad
    path: {data}
    kind: retrieval
    instruction: find
    stages: [1]
    max_records: 4000
"""


def run(source: Path, *arguments: str, folder: Path) -> tuple[str, float, int]:
    """Run Python with the package of ``source``; return its stdout, seconds and peak bytes."""
    environment = os.environ | {
        "PYTHONPATH": str(source / "src"),
        "NVEMBED_CACHE": str(folder / "cache"),
        "NVEMBED_PROGRESS": "0",
    }
    log = folder / "stderr.txt"
    began = time.perf_counter()
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdout is not None
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments[:4])} failed:\n{log.read_text()[-3000:]}")
    return out, time.perf_counter() - began, usage.ru_maxrss * 1024


class Jobs:
    """What is measured, in a folder that both commits share but for their outputs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.texts = folder / "texts.json"
        self.pairs = folder / "pairs.jsonl"
        run(ROOT, "-c", MODEL, str(SHARED / "models" / "base-8m"), str(self.model), folder=folder)
        rows = self._rows(2000)
        self.texts.write_text(json.dumps([row["positive"][:600] for row in rows[:1000]]))
        self.pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def _rows(self, count: int) -> list[dict[str, Any]]:
        import gzip

        with gzip.open(SHARED / "data" / "train" / "squad_train.jsonl.gz", "rt") as file:
            rows = [json.loads(next(file)) for _ in range(count)]
        kept = ({"query": row["query"], "positive": row["positive"]} for row in rows)
        return [
            row if isinstance(row["positive"], str) else row | {"positive": row["positive"][0]}
            for row in kept
        ]

    def encode(self, source: Path) -> dict[str, float]:
        out, _, peak = run(
            source, "-c", ENCODE, str(self.model), str(self.texts), folder=self.folder
        )
        return {**json.loads(out.splitlines()[-1]), "encode, bytes": peak}

    def train(self, source: Path) -> dict[str, float]:
        found = {}
        for kind, memory in (("uncached", 8.0), ("cached", 1.2)):
            with tempfile.TemporaryDirectory(dir=self.folder) as name:
                recipe = Path(name) / "recipe.yaml"
                recipe.write_text(
                    RECIPE.format(
                        output=Path(name) / "run",
                        backbone=SHARED / "models" / "base-8m",
                        memory=memory,
                        data=SHARED / "data" / "train" / "squad_train.jsonl.gz",
                    )
                )
                _, _, peak = run(source, "-m", "nvembed", "train", str(recipe), folder=self.folder)
                lines = (Path(name) / "run" / "metrics.jsonl").read_text().splitlines()
            rates = [json.loads(line)["tokens_per_second"] for line in lines][2:]
            found[f"step {kind}, tokens/s"] = statistics.median(rates)
            found[f"step {kind}, bytes"] = peak
        return found

    def mine(self, source: Path) -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            mined = str(Path(name) / "mined.jsonl")
            options = ("--teacher", str(self.model), "--dtype", "float32")
            command = ("-m", "nvembed", "mine", str(self.pairs), mined, *options)
            _, seconds, peak = run(source, *command, folder=self.folder)
        return {"mine, s": seconds, "mine, bytes": peak}

    def serve(self, source: Path) -> dict[str, float]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {"PYTHONPATH": str(source / "src")}
        options = ("--port", str(port), "--dtype", "float32")
        command = [sys.executable, "-m", "nvembed", "serve", str(self.model), *options]
        with (self.folder / "server.txt").open("w") as log:
            server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            found = {f"server, {n} clients, 1/s": self._load(port, n) for n in (1, 16)}
        finally:
            server.terminate()
            _, _, usage = os.wait4(server.pid, 0)
        return {**found, "server, bytes": usage.ru_maxrss * 1024}

    def _load(self, port: int, clients: int) -> float:
        import http.client

        texts = [text[:200] for text in json.loads(self.texts.read_text())]

        def ask(connection: http.client.HTTPConnection, text: str) -> None:
            body = json.dumps({"input": text, "model": "model"})
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/embeddings", body, headers)
            response = connection.getresponse()
            response.read()
            assert response.status == 200, response.status

        for _ in range(600):  # until it listens
            try:
                first = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                ask(first, texts[0])
                break
            except OSError:
                time.sleep(0.1)
        ends = time.perf_counter() + 2 + SERVED_SECONDS
        begins = time.perf_counter() + 2  # after a warm-up

        def client(number: int) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            count = 0
            for step in range(10**9):
                ask(connection, texts[(number * 97 + step) % len(texts)])
                if (now := time.perf_counter()) > ends:
                    return count
                count += now > begins
            return count

        with ThreadPoolExecutor(clients) as pool:
            return sum(pool.map(client, range(clients))) / SERVED_SECONDS

    def imported(self, source: Path) -> dict[str, float]:
        return {
            "import nvembed, s": cpu_seconds(source, "-c", "import nvembed"),
            "--help, s": cpu_seconds(source, "-m", "nvembed", "--help"),
        }


def cpu_seconds(source: Path, *arguments: str) -> float:
    environment = os.environ | {"PYTHONPATH": str(source / "src")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(3):
        subprocess.run([sys.executable, *arguments], env=environment, check=True, stdout=-3)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 3


def shown(name: str, old: list[float], new: list[float]) -> str:
    before, after = statistics.median(old), statistics.median(new)
    rate = not name.endswith((", s", ", bytes"))
    ratio = after / before if rate or name.endswith(", bytes") else before / after
    unit = 2**20 if name.endswith(", bytes") else 1
    label = name.replace(", bytes", ", MB")
    spread = f"{min(new) / unit:.4g} to {max(new) / unit:.4g}"
    return f"| {label} | {before / unit:.4g} | {after / unit:.4g} | {ratio:.2f} | {spread} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commit")
    kinds = ["encode", "train", "mine", "serve", "imported"]
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        old, git = Path(name) / "old", ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "-q", "--detach", str(old), arguments.commit], check=True)
        try:
            jobs = Jobs(Path(name))
            print("| | old | new | new : old | new, from to |\n|---|---|---|---|---|", flush=True)
            for kind in arguments.only:
                job: Callable[[Path], dict[str, float]] = getattr(jobs, kind)
                found: dict[Path, list[dict[str, float]]] = {old: [], ROOT: []}
                for number in range(arguments.rounds):
                    for source in (old, ROOT) if number % 2 == 0 else (ROOT, old):
                        found[source].append(job(source))
                for each in found[ROOT][0]:
                    values = [[row[each] for row in found[side]] for side in (old, ROOT)]
                    print(shown(each, *values), flush=True)
        finally:
            subprocess.run([*git, "remove", "--force", str(old)], check=True)


if __name__ == "__main__":
    main()
