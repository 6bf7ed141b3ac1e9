"""Encoding against ``SentenceTransformer.encode`` and onnxruntime, same weights, one process each.

    python benchmarks/encode_peers.py --threads 2 --runs 5
    python benchmarks/encode_peers.py --threads 1 --scale 0.2      # a quick look

Three distributions of length from ``../shared/data``: questions and paragraphs of SQuAD, and both
mixed with long texts. The weights are those of a mean-pooled model, through the stock export for
the peers. Of each side: texts/s (median of the runs), peak memory, distance from our float32, and
nDCG@10 on a part of the retrieval task; of ours also the time outside matrix products and the share
of the machine's measured ceiling. A busy machine makes all of it worthless; ``--cpu-time`` counts
the seconds of the process instead of those of the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (2, 8, 32, 128)
SIDES = (
    ("nvembed", "float32"),
    ("nvembed", "bfloat16"),
    ("sentence-transformers", "float32"),
    ("sentence-transformers", "bfloat16"),
    ("onnxruntime", "float32"),
)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]


def texts_of(data: Path, scale: float) -> dict[str, list[str]]:
    task = data / "tasks" / "squad_test"
    questions = [row["text"] for row in read(task / "queries.jsonl")]
    paragraphs = [row["text"] for row in read(task / "corpus.jsonl")]
    long = [" ".join(paragraphs[at : at + 4]) for at in range(0, len(paragraphs) - 4, 4)]
    count = [max(1, round(full * scale)) for full in (3000, 800, 600, 200, 50)]
    mixed = questions[-count[2] :] + paragraphs[-count[3] :] + long[-count[4] :]
    order = np.random.default_rng(0).permutation(len(mixed))
    return {
        "questions": questions[: count[0]],
        "paragraphs": paragraphs[: count[1]],
        "mixed": [mixed[at] for at in order],
    }


def ndcg_at_10(queries: np.ndarray, documents: np.ndarray, right: list[int]) -> float:
    """One right document per query: the gain is one over the logarithm of its rank."""
    scores = queries @ documents.T
    own = scores[np.arange(len(right)), right]
    ranks = (scores > own[:, None]).sum(1)
    return float(np.where(ranks < 10, 1 / np.log2(ranks + 2), 0).mean())


def retrieval(data: Path, scale: float) -> tuple[list[str], list[str], list[int]]:
    task = data / "tasks" / "squad_test"
    documents = read(task / "corpus.jsonl")[: max(20, round(1000 * scale))]
    place = {row["_id"]: at for at, row in enumerate(documents)}
    lines = (task / "qrels" / "test.tsv").read_text().splitlines()[1:]
    judged = {query: document for query, document, _ in (line.split("\t") for line in lines)}
    queries = [row for row in read(task / "queries.jsonl") if judged.get(row["_id"]) in place]
    right = [place[judged[row["_id"]]] for row in queries]
    return [row["text"] for row in queries], [row["text"] for row in documents], right


def open_side(side: str, dtype: str, folders: dict[str, str], threads: int) -> Any:
    """A function (texts, batch size) → vectors, and the model."""
    import torch

    torch.set_num_threads(threads)
    if side == "nvembed":
        from nvembed.model.embedder import NVEmbed

        ours = NVEmbed.from_pretrained(folders["ours"], dtype=dtype, device="cpu")
        return (lambda texts, _: ours.encode(texts)), ours
    from sentence_transformers import SentenceTransformer

    if side == "sentence-transformers":
        options = {"dtype": dtype}
        stock = SentenceTransformer(folders["stock"], device="cpu", model_kwargs=options)
        return (
            lambda texts, batch: stock.encode(texts, batch_size=batch, show_progress_bar=False)
        ), stock
    return open_onnx(folders, threads), None


def open_onnx(folders: dict[str, str], threads: int) -> Any:
    import onnxruntime
    from transformers import AutoTokenizer

    from nvembed.model.encoder import padded_inputs
    from nvembed.model.tokens import TextTokenizer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    path = next(Path(folders["onnx"]).rglob("*.onnx"))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    tokenize = TextTokenizer(AutoTokenizer.from_pretrained(folders["ours"]))

    def encode(texts: list[str], batch: int) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        found: list[Any] = [None] * len(texts)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            inputs = padded_inputs(tokenize([texts[row] for row in rows]))
            vectors = session.run(None, dict(inputs))[0]
            for row, vector in zip(rows, vectors, strict=True):
                found[row] = vector
        return np.asarray(found)

    return encode


def outside_products(model: Any, texts: list[str], threads: int) -> dict[str, float]:
    """Share of the time outside linear layers, and their rate against the fastest product here."""
    import torch

    from nvembed.kernels.functions import product

    spent, work = [0.0], [0.0]
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    for linear in linears:
        forward = linear.forward

        def timed(x: Any, forward: Any = forward, linear: Any = linear) -> Any:
            started = time.perf_counter()
            out = forward(x)
            spent[0] += time.perf_counter() - started
            work[0] += 2.0 * x.numel() * linear.out_features
            return out

        linear.forward = timed
    started = time.perf_counter()
    model.encode(texts)
    whole = time.perf_counter() - started
    for linear in linears:
        del linear.forward
    dtype = model.backbone.dtype
    left, right = torch.ones(1024, 704, dtype=dtype), torch.ones(704, 704, dtype=dtype)
    with torch.inference_mode():
        fastest = min(timeit.repeat(lambda: product(left, right), number=1, repeat=9))
        ceiling = 2.0 * 1024 * 704 * 704 / fastest
    return {
        "outside_products": 1 - spent[0] / whole,
        "products_gflops": work[0] / spent[0] / 1e9,
        "ceiling_gflops": ceiling / 1e9,
        "of_ceiling": work[0] / whole / ceiling,
    }


def peak_mb() -> float:
    """Of this process: ``ru_maxrss`` would begin with that of its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def run_side(job: dict[str, Any]) -> None:
    """In a process of its own: measure one side and print a line of JSON."""
    data, clock = Path(job["data"]), time.process_time if job["cpu_time"] else time.perf_counter
    encode, model = open_side(job["side"], job["dtype"], job["folders"], job["threads"])
    report: dict[str, Any] = {"side": job["side"], "dtype": job["dtype"]}
    texts = texts_of(data, job["scale"])
    for name, some in texts.items():
        encode(some[:32], 8)
        best: tuple[float, int] | None = None
        batches = (0,) if job["side"] == "nvembed" else BATCHES
        for batch in batches:
            seconds = []
            for _ in range(job["runs"]):
                started = clock()
                vectors = encode(some, batch)
                seconds.append(clock() - started)
            if best is None or statistics.median(seconds) < best[0]:
                best = statistics.median(seconds), batch
        assert best is not None
        np.save(Path(job["folders"]["vectors"], f"{job['side']}-{job['dtype']}-{name}"), vectors)
        report[name] = {"texts_per_second": len(some) / best[0], "batch": best[1]}
    # Before the quality is measured: memory is that of encoding.
    report["peak_mb"] = peak_mb()
    queries, documents, right = retrieval(data, job["scale"])
    report["ndcg_at_10"] = ndcg_at_10(encode(queries, 32), encode(documents, 8), right)
    if job["side"] == "nvembed":
        report["products"] = outside_products(model, texts["paragraphs"], job["threads"])
    print(json.dumps(report))


def make_models(base: Path, folder: Path) -> dict[str, str]:
    from nvembed.encoding.export.onnx import write_onnx
    from nvembed.encoding.export.stock import write_stock
    from nvembed.model.embedder import NVEmbed

    model = NVEmbed.from_pretrained(base, pooling="mean", device="cpu")
    folders = {name: str(folder / name) for name in ("ours", "stock", "onnx", "vectors")}
    for path in folders.values():
        Path(path).mkdir(parents=True)
    model.save(folders["ours"])
    write_stock(model, Path(folders["stock"]), name=str(base))
    write_onnx(model, Path(folders["onnx"]), name=str(base))
    return folders


def show(reports: list[dict[str, Any]], vectors: Path) -> None:
    names = ("questions", "paragraphs", "mixed")
    base = next(r for r in reports if r["side"] == SIDES[2][0] and r["dtype"] == "float32")
    print(f"{'side':32}" + "".join(f"{name:>22}" for name in names) + "   peak MB  nDCG@10")
    for report in reports:
        line = f"{report['side']} {report['dtype']:10}".ljust(32)
        for name in names:
            speed = report[name]["texts_per_second"]
            line += f"{speed:9.0f}/s {speed / base[name]['texts_per_second']:5.2f}x".rjust(22)
        print(f"{line}{report['peak_mb']:10.0f}{report['ndcg_at_10']:9.4f}")
    for report in reports:
        worst = 1.0
        for name in names:
            mine, wanted = (
                np.load(vectors / f"{side}-{dtype}-{name}.npy").astype(np.float32)
                for side, dtype in ((report["side"], report["dtype"]), SIDES[0])
            )
            worst = min(worst, float((mine * wanted).sum(1).min()))
        print(f"{report['side']} {report['dtype']}: least cosine to our float32 {worst:.6f}")
        if "products" in report:
            print("   " + ", ".join(f"{k} {v:.3g}" for k, v in report["products"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=ROOT.parent / "shared/models/base-8m")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of texts")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--sides", default="nvembed,sentence-transformers,onnxruntime")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        run_side(json.loads(given.job))
        return
    with tempfile.TemporaryDirectory() as folder:
        folders = make_models(given.base, Path(folder))
        reports = []
        for side, dtype in SIDES:
            if side not in given.sides.split(","):
                continue
            job = {"side": side, "dtype": dtype, "folders": folders, "data": str(given.data)}
            job |= {"threads": given.threads, "scale": given.scale, "runs": given.runs}
            job["cpu_time"] = given.cpu_time
            done = subprocess.run(
                [sys.executable, __file__, "--job", json.dumps(job)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": str(given.threads)},
            )
            reports.append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(json.dumps(reports[-1]), file=sys.stderr)
        show(reports, Path(folders["vectors"]))


if __name__ == "__main__":
    main()
