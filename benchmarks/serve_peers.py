"""The server against a sentence-transformers handler, infinity and vLLM: same weights, rising load.

    python benchmarks/serve_peers.py
    python benchmarks/serve_peers.py --model smollm2-135m
    python benchmarks/serve_peers.py --levels 1 4 --seconds 2 --runs 1  # a rehearsal
    python benchmarks/serve_peers.py --dtypes bfloat16 --overload 60  # 10 times too many clients

Every server is a process; the load comes from another one, over keep-alive connections on the
loopback that each send the next request when the last is answered (closed loop), one text per
request, of 4 to 64 words. A side's throughput at equal p95 is its best level among those whose p95
is not above the other's. The sides take turns, ``--runs`` times, and medians are shown; "load" is
the share of one core that the load itself took.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import psutil
from peers.bench import DTYPES, Bench, Case, Side, of_all, option_parser
from peers.environments import interpreter
from peers.job import OFFLINE, OURS, JobError
from peers.job import SENTENCE as PLAIN
from peers.models import Models, open_models
from peers.report import median, table

ROOT = Path(__file__).resolve().parents[1]
INFINITY, VLLM = "infinity", "vllm"
FIRST_PORT = 18400
# vLLM would keep one of the CPUs for its HTTP server.
VLLM_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
}


# --- Models and servers ---------------------------------------------------------------------------


def plain_handler(folder: str, port: int, dtype: str) -> None:
    """What one writes in five minutes; runs in a process of its own."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel
    from sentence_transformers import SentenceTransformer

    class Body(BaseModel):
        model: str
        input: list[str]

    app = FastAPI()
    model = SentenceTransformer(folder, model_kwargs={"dtype": dtype})

    def embeddings(body: Body) -> dict[str, Any]:
        vectors = model.encode(body.input, normalize_embeddings=True).tolist()
        return {"data": [{"index": i, "embedding": v} for i, v in enumerate(vectors)]}

    embeddings.__annotations__["body"] = Body
    app.post("/v1/embeddings")(embeddings)
    app.get("/health")(lambda: {})
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def command(side: Side, folder: Path, port: int, given: argparse.Namespace) -> list[str]:
    python = str(interpreter(side.name, given.venvs))
    if side.name == OURS:
        words = [python, "-m", "nvembed", "serve", str(folder / "ours"), "model_name=m"]
        words += ["log_requests=false", *given.settings]
        return [*words, "--dtype", side.dtype, "--port", str(port)]
    if side.name == PLAIN:
        words = [python, __file__, "--plain", str(folder / "stock"), "--port", str(port)]
        return [*words, "--dtype", side.dtype]
    if side.name == VLLM:
        words = [python, "-m", "vllm.entrypoints.openai.api_server", "--served-model-name", "m"]
        words += ["--model", str(folder / "stock"), "--dtype", side.dtype]
        return [*words, "--port", str(port), "--host", "127.0.0.1", *given.vllm_options]
    words = [python, "-m", "infinity_emb.cli", "v2", "--model-id", str(folder / "stock")]
    words += ["--served-model-name", "m", "--engine", "torch", "--device", "cpu"]
    words += ["--dtype", side.dtype, "--no-model-warmup", "--no-bettertransformer"]
    return [*words, "--url-prefix", "/v1", "--port", str(port), "--host", "127.0.0.1"]


def start(
    side: Side, folder: Path, port: int, given: argparse.Namespace
) -> subprocess.Popen[bytes]:
    extra = {INFINITY: OFFLINE, VLLM: OFFLINE | VLLM_SETTINGS}.get(side.name, {})
    log = folder / "server.log"
    with open(log, "wb") as said:
        process = subprocess.Popen(
            command(side, folder, port, given), stdout=said, stderr=said, env=os.environ | extra
        )
    deadline = time.monotonic() + (900 if side.name == VLLM else 240)  # it compiles
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
        except OSError:
            time.sleep(0.2)
        else:
            return process
    process.kill()
    last = (log.read_text("utf-8", "replace").strip().splitlines() or ["nothing was said"])[-1]
    raise JobError(f"{side.name} {side.dtype} does not answer: {last}")


def vectors_of(port: int, texts: Sequence[str]) -> list[list[float]]:
    """What a server answers to texts."""
    body = json.dumps({"model": "m", "input": list(texts)}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/embeddings", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        rows = json.load(answer)["data"]
    return [row["embedding"] for row in sorted(rows, key=lambda row: row["index"])]


# --- Load, in a process of its own ----------------------------------------------------------------


def make_texts(count: int) -> list[str]:
    words = " ".join(path.read_text("utf-8") for path in (ROOT / "docs").glob("*.md")).split()
    rng = random.Random(0)
    starts = [(rng.randrange(len(words) - 64), rng.randint(4, 64)) for _ in range(count)]
    # Short enough in tokens too: vLLM refuses a text beyond the limit of the model.
    return [" ".join(words[at : at + length])[:200] for at, length in starts]


async def one_connection(
    port: int, texts: list[str], until: float, seconds: list[float], statuses: Counter[str]
) -> None:
    reader = writer = None
    for text in texts:
        if time.perf_counter() >= until:
            break
        body = json.dumps({"model": "m", "input": [text]}).encode()
        head = (
            "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        start = time.perf_counter()
        try:
            if writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head.encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            lengths = [
                row for row in answer.lower().split(b"\r\n") if row[:15] == b"content-length:"
            ]
            await reader.readexactly(int(lengths[0][15:]))
        except (OSError, asyncio.IncompleteReadError) as error:
            statuses[f"no answer: {type(error).__name__}"] += 1
            writer = None
            continue
        status = answer[9:12].decode()
        statuses[status] += 1
        if status == "200":
            seconds.append(time.perf_counter() - start)
        else:
            await asyncio.sleep(0.01)  # a client that does not listen to Retry-After
    if writer is not None:
        writer.close()


async def load(port: int, connections: int, duration: float) -> dict[str, Any]:
    texts = make_texts(4000)
    seconds: list[float] = []
    statuses: Counter[str] = Counter()
    start, busy = time.perf_counter(), time.process_time()
    order = [random.Random(n).sample(texts, len(texts)) * 50 for n in range(min(connections, 64))]
    await asyncio.gather(
        *(
            one_connection(port, order[n % len(order)], start + duration, seconds, statuses)
            for n in range(connections)
        )
    )
    wall = time.perf_counter() - start
    cuts = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else [float("nan")] * 99
    return {
        "per_second": len(seconds) / wall,
        "p50": 1000 * cuts[49],
        "p95": 1000 * cuts[94],
        "p99": 1000 * cuts[98],
        "load": 100 * (time.process_time() - busy) / wall,
        "statuses": dict(statuses),
    }


def run_load(port: int, connections: int, duration: float) -> dict[str, Any]:
    words = [sys.executable, __file__, "--load", str(connections), "--seconds", str(duration)]
    done = subprocess.run([*words, "--port", str(port)], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# --- The comparison -------------------------------------------------------------------------------


def level(part: str) -> int:
    return int(part.split()[0])


def at_equal_p95(bench: Bench, sides: Sequence[Side], parts: Sequence[str]) -> None:
    """Print how much more ours serves at a p95 that is not above a peer's."""
    seen: dict[tuple[Side, str], tuple[float, float]] = {}
    for side in sides:
        for part in parts:
            if rows := bench.found(part, side):
                p95, rate = (median([row[name] for row in rows]) for name in ("p95", "rate"))
                seen[side, part] = p95, rate
    lines = []
    for peer in sides:
        for ours in sides:
            if ours.name != OURS or peer.name == OURS:
                continue
            if not {(ours, parts[0]), (peer, parts[0])} <= set(seen):
                continue
            cells = []
            for part in parts:
                p95, rate = seen.get((peer, part), (0.0, 1.0))
                mine = [seen[ours, each] for each in parts if (ours, each) in seen]
                most = max((r for p, r in mine if p <= p95), default=0.0)
                cells.append(f"{most / rate:.2f}×")
            lines.append([f"{ours.title} {ours.dtype}", f"{peer.title} {peer.dtype}", *cells])
    table(["at a p95 not above", "that of", *parts], lines)


def measure(bench: Bench, side: Side, cases: Sequence[Case]) -> Iterator[tuple[Case, Any]]:
    """Start a server and raise the number of its clients."""
    texts, _ = bench.models.checks()
    process = start(side, bench.models.folder, FIRST_PORT, bench.given)
    try:
        cosine = bench.models.cosine(vectors_of(FIRST_PORT, texts))
        run_load(FIRST_PORT, 4, min(2.0, bench.given.seconds))  # warm
        for case in cases:
            if bench.seconds_left() <= 0:
                raise subprocess.TimeoutExpired(side.title, 0)
            found = run_load(FIRST_PORT, level(case.part), bench.given.seconds)
            peak = psutil.Process(process.pid).memory_info().rss / 1e6
            found |= {"rate": found.pop("per_second"), "cosine": cosine, "resident_mb": peak}
            yield case, found
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def compare(given: argparse.Namespace, models: Models) -> None:
    every = [Side(name, dtype) for dtype in DTYPES for name in (OURS, PLAIN, INFINITY, VLLM)]
    levels = [f"{n} client{'s' if n > 1 else ''}" for n in sorted(given.levels)]
    bench = Bench("serve", given, models, {"seconds": given.seconds, "settings": given.settings})
    bench.turns(levels, bench.installed(every), lambda *what: measure(bench, *what))
    columns = {
        **{f"{name}, ms": of_all(name, ",.1f") for name in ("p50", "p95", "p99")},
        "load, %": of_all("load", ".0f"),
        "resident, MB": of_all("resident_mb", ",.0f", max),
        "least cosine to our float32": of_all("cosine", ".6f", min),
        "answers": lambda rows: str(rows[-1]["statuses"]),
    }
    bench.report(levels, every, columns, unit="texts/s", passes=0)
    at_equal_p95(bench, every, levels)


def overload(arguments: argparse.Namespace, models: Models) -> None:
    side = Side(OURS, arguments.dtypes[0])
    process = start(side, models.folder, FIRST_PORT, arguments)
    try:
        server = psutil.Process(process.pid)
        calm = run_load(FIRST_PORT, max(arguments.levels), arguments.seconds)
        memory = [server.memory_info().rss]
        with ThreadPoolExecutor(1) as pool:
            crowd = 10 * max(arguments.levels)
            loading = pool.submit(run_load, FIRST_PORT, crowd, arguments.overload)
            while not loading.done():
                wait([loading], timeout=arguments.overload / 12)
                memory.append(server.memory_info().rss)
            found = loading.result()
        page = urllib.request.urlopen(f"http://127.0.0.1:{FIRST_PORT}/metrics").read().decode()
        again = run_load(FIRST_PORT, max(arguments.levels), arguments.seconds)
    finally:
        process.terminate()
        code = process.wait(60)
    for name, row in (("before", calm), ("overload", found), ("after", again)):
        print(
            f"{name}: {row['per_second']:.0f} texts/s, p95 {row['p95']:.0f} ms, {row['statuses']}"
        )
    counted = [row for row in page.splitlines() if row.startswith("nvembed_requests_total{")]
    print("counted by the server until then:", *counted, sep="\n  ")
    sizes = " ".join(f"{rss / 2**20:.0f}" for rss in memory)
    print(f"memory before, and a dozen times meanwhile: {sizes} MB; exit code {code}")


def main() -> None:
    parser = option_parser(__doc__)
    add = parser.add_argument
    add("--levels", type=int, nargs="+", default=[1, 4, 16, 64], help="numbers of clients")
    add("--seconds", type=float, default=5.0, help="of one level")
    add("--settings", nargs="*", default=[], help="key=value settings of ours")
    add("--vllm-options", nargs="*", default=[], help="written --vllm-options=--enforce-eager")
    add("--overload", type=float, help="seconds with ten times the last level")
    for name in ("--plain", "--load", "--port", "--dtype"):
        add(name, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.plain:
        plain_handler(given.plain, int(given.port), given.dtype)
    elif given.load:
        print(json.dumps(asyncio.run(load(int(given.port), int(given.load), given.seconds))))
    else:
        models = open_models(given.model, given.output)
        models.need("ours", "stock")
        (overload if given.overload else compare)(given, models)


if __name__ == "__main__":
    main()
