"""The server against a sentence-transformers handler, infinity and vLLM: same weights, rising load.

    python benchmarks/serve_peers.py                                   # ours and the handler
    python benchmarks/serve_peers.py --dtypes float32 auto --peer-dtypes float32 bfloat16
    python benchmarks/serve_peers.py --infinity VENV/bin/infinity_emb  # and infinity
    python benchmarks/serve_peers.py --model assets/nvembed-smollm2-135m --levels 1 16 64 \\
        --vllm VENV/bin/python --dtypes float32 bfloat16 --peer-dtypes float32 bfloat16
    python benchmarks/serve_peers.py --overload 60                     # 10 times too many clients

Infinity wants an environment of its own: python -m venv VENV; VENV/bin/pip install
'infinity-emb[server,torch]'. So does vLLM, with nvembed in it (docs/serving-elsewhere.md); it
serves the model as saved, head and pool mask included, and the handler, which cannot, is left out.

Every server is a process; the load comes from another one, over keep-alive connections on the
loopback that each send the next request when the last is answered (closed loop), one text per
request, of 4 to 64 words. A side's throughput at equal p95 is its best level among those whose p95
is not above the other's. The sides take turns, ``--rounds`` times, and medians are shown; "load" is
the share of one core that the load itself took.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
OURS, PLAIN, INFINITY, VLLM = "nvembed", "sentence-transformers", "infinity", "vllm"
Side = tuple[str, str]  # a server and its data type
FIRST_PORT = 18400
ALL_CPUS = f"0-{(os.cpu_count() or 1) - 1}"  # vLLM would keep one for its HTTP server


# --- Models and servers ---------------------------------------------------------------------------


def prepare_models(name: str, folder: Path, *, stock: bool) -> None:
    """Write our folder, whole, and the same weights as stock modules where they are asked for."""
    from nvembed import NVEmbed
    from nvembed.encoding.export.folders import export_folder, export_model

    model = NVEmbed.from_pretrained(name, device="cpu", dtype="float32")
    export_model(model, folder / "ours", "nvembed", name=name)
    if not stock:
        return
    export_folder(str(folder / "ours"), folder / "stock", "sentence-transformers")
    settings = folder / "stock" / "tokenizer_config.json"  # infinity's transformers is an older one
    known = json.loads(settings.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(known), "utf-8")


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


def command(side: Side, folder: Path, port: int, arguments: argparse.Namespace) -> list[str]:
    name, dtype = side
    if name == OURS:
        words = [sys.executable, "-m", "nvembed", "serve", str(folder / "ours"), "model_name=m"]
        words += ["log_requests=false", *arguments.settings]
        return [*words, "--dtype", dtype, "--port", str(port)]
    if name == PLAIN:
        words = [sys.executable, __file__, "--plain", str(folder / "stock"), "--port", str(port)]
        return [*words, "--peer-dtypes", dtype]
    if name == VLLM:
        words = [arguments.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model"]
        words += [str(folder / "ours"), "--served-model-name", "m", "--dtype", dtype]
        return [*words, "--port", str(port), "--host", "127.0.0.1", *arguments.vllm_options]
    words = [arguments.infinity, "v2", "--model-id", str(folder / "stock")]
    words += ["--served-model-name", "m", "--engine", "torch", "--device", "cpu"]
    words += ["--dtype", dtype, "--no-model-warmup", "--no-bettertransformer"]
    return [*words, "--url-prefix", "/v1", "--port", str(port), "--host", "127.0.0.1"]


def start(
    side: Side, folder: Path, port: int, arguments: argparse.Namespace
) -> subprocess.Popen[bytes]:
    everywhere = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": ALL_CPUS}
    process = subprocess.Popen(
        command(side, folder, port, arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if side[0] in (INFINITY, VLLM) else None,
        env=everywhere | os.environ if side[0] == VLLM else None,
    )
    for _ in range(4500):
        if process.poll() is not None:
            raise SystemExit(f"{side[0]} ended with {process.returncode}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
        except OSError:
            time.sleep(0.2)
        else:
            return process
    raise SystemExit(f"{side[0]} does not answer")


# --- Load, in a process of its own ----------------------------------------------------------------


def make_texts(count: int) -> list[str]:
    words = " ".join(path.read_text("utf-8") for path in (ROOT / "docs").glob("*.md")).split()
    rng = random.Random(0)
    starts = [(rng.randrange(len(words) - 64), rng.randint(4, 64)) for _ in range(count)]
    # Short enough in tokens too: vLLM refuses a text beyond the model's limit.
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
    start = time.perf_counter()
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
        "load": 100 * time.process_time() / wall,
        "statuses": dict(statuses),
    }


def run_load(port: int, connections: int, duration: float) -> dict[str, Any]:
    words = [sys.executable, __file__, "--load", str(connections), "--seconds", str(duration)]
    done = subprocess.run([*words, "--port", str(port)], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# --- The comparison -------------------------------------------------------------------------------


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    ours: list[Side] = [(OURS, dtype) for dtype in arguments.dtypes]
    peer = VLLM if arguments.vllm else PLAIN
    peers: list[Side] = [(peer, dtype) for dtype in arguments.peer_dtypes]
    if arguments.infinity:
        peers.append((INFINITY, arguments.peer_dtypes[0]))
    rows: dict[tuple[Side, int], list[dict[str, Any]]] = {}
    for round_number in range(arguments.rounds):
        for place, side in enumerate(ours + peers):
            port = FIRST_PORT + 10 * round_number + place
            process = start(side, folder, port, arguments)
            try:
                run_load(port, 4, min(2.0, arguments.seconds))  # warm
                for level in arguments.levels:
                    found = run_load(port, level, arguments.seconds)
                    rows.setdefault((side, level), []).append(found)
            finally:
                process.terminate()
                process.wait(60)
    names = ("per_second", "p50", "p95", "p99", "load")
    medians = {
        key: {name: statistics.median(run[name] for run in runs) for name in names}
        for key, runs in rows.items()
    }
    print("| server | clients | texts/s | p50 ms | p95 ms | p99 ms | load % | statuses |")
    print("|---|---|---|---|---|---|---|---|")
    for (side, level), row in medians.items():
        times = " | ".join(f"{row[name]:.1f}" for name in names)
        statuses = rows[side, level][-1]["statuses"]
        print(f"| {' '.join(side)} | {level} | {times} | {statuses} |")
    for side, peer in itertools.product(ours, peers):
        for level in arguments.levels:
            other = medians[peer, level]
            fitting = [
                medians[side, mine]["per_second"]
                for mine in arguments.levels
                if medians[side, mine]["p95"] <= other["p95"]
            ]
            ratio = max(fitting, default=0.0) / other["per_second"]
            print(
                f"{' '.join(side)}: {ratio:.2f} times the throughput of {' '.join(peer)} "
                f"at its p95 with {level} clients"
            )


def overload(arguments: argparse.Namespace, folder: Path) -> None:
    process = start((OURS, arguments.dtypes[0]), folder, FIRST_PORT, arguments)
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "assets" / "decoder-6m"))
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=10.0, help="of one level")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="ours; auto chooses")
    parser.add_argument("--peer-dtypes", nargs="+", default=["float32"])
    parser.add_argument("--settings", nargs="*", default=[], help="key=value settings of ours")
    parser.add_argument("--infinity", help="path of infinity_emb")
    parser.add_argument("--vllm", help="path of a python that has vllm and nvembed")
    parser.add_argument("--vllm-options", nargs="*", default=[], help="written --vllm-options=…")
    parser.add_argument("--overload", type=float, help="seconds with ten times the last level")
    parser.add_argument("--plain", help=argparse.SUPPRESS)
    parser.add_argument("--load", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain:
        plain_handler(arguments.plain, arguments.port, arguments.peer_dtypes[0])
    elif arguments.load:
        print(json.dumps(asyncio.run(load(arguments.port, arguments.load, arguments.seconds))))
    else:
        with tempfile.TemporaryDirectory() as folder:
            prepare_models(arguments.model, Path(folder), stock=not arguments.vllm)
            (overload if arguments.overload else compare)(arguments, Path(folder))


if __name__ == "__main__":
    main()
