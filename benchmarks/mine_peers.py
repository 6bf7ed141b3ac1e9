"""Mining against sentence-transformers' ``mine_hard_negatives``, with the same vectors.

    python benchmarks/mine_peers.py                     # speed, memory and agreement, 50k x 50k
    python benchmarks/mine_peers.py --growth            # memory while the corpus grows 1x to 8x
    python benchmarks/mine_peers.py --exact             # ids and scores against a full brute force

Every side runs in a process of its own, in turn, and is handed vectors that are computed already:
what is measured is search and choice. Settings are equal: 7 negatives below 95 % of the positive's
score, among the 100 nearest beside it. Ours is measured with its check for near duplicates too,
which the other side does not have. Needs ``datasets``; ``faiss-cpu`` if it is there.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTH = 256
DEPTH = 100
NEGATIVES = 7
SIDES = ("nvembed", "nvembed, near duplicates", "sentence-transformers", "with faiss")
GROWTH_QUERIES = 4096
GROWTH_DOCUMENTS = 25_000
VOCABULARY = 20_000
WORDS_OF_TEXT = 60


def vectors(count: int, seed: int) -> NDArray[np.float32]:
    """Unit vectors in clusters, so that queries have near documents beside their positive."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((500, WIDTH), dtype=np.float32)
    made = centres[rng.integers(0, 500, count)]
    made += 0.8 * rng.standard_normal((count, WIDTH), dtype=np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def text(row: int) -> str:
    rng = np.random.default_rng(row)
    words = " ".join(f"w{number}" for number in rng.integers(0, VOCABULARY, WORDS_OF_TEXT).tolist())
    return f"{words} #{row}"


def row_of(text: str) -> int:
    return int(text.rsplit("#", 1)[1])


# --- One side, in a process of its own ------------------------------------------------------------


def memory(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def by_us(folder: Path, *, near_duplicate: float | None) -> tuple[float, list[list[int]], int]:
    from nvembed.data.config import MiningConfig
    from nvembed.data.records import PairRecord
    from nvembed.mining.miner import mine_negatives

    queries, documents = (np.load(folder / f"{side}.npy") for side in ("queries", "documents"))
    texts = json.loads((folder / "texts.json").read_text())

    class Stored:
        """Hands out rows in order, for nothing, as the other side's does; ours asks in pieces."""

        dimension = WIDTH

        def __init__(self) -> None:
            self.rows = {"query": 0, "document": 0}

        def next(self, side: str, stored: Any, count: int) -> Any:
            self.rows[side] += count
            return stored[self.rows[side] - count : self.rows[side]]

        def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> Any:
            return self.next("query", queries, len(texts))

        def encode_document(self, texts: Sequence[str], *, task: str | None = None) -> Any:
            return self.next("document", documents, len(texts))

    records = [PairRecord(f"query #{row}", (text,)) for row, text in enumerate(texts)]
    # The positive stands among what is found, as on the other side.
    config = MiningConfig(search_depth=DEPTH + 1, near_duplicate=near_duplicate)
    import torch

    torch.ones(2, 2) @ torch.ones(2, 2)
    before, started = memory("VmRSS"), time.perf_counter()
    mined, _ = mine_negatives(records, None, Stored(), config)
    seconds = time.perf_counter() - started
    return seconds, [[row_of(text) for text in record.negatives] for record in mined], before


def by_sentence_transformers(
    folder: Path, *, use_faiss: bool
) -> tuple[float, list[list[int]], int]:
    import torch
    from datasets import Dataset
    from sentence_transformers.util import (
        dot_score,
        mine_hard_negatives,
        pairwise_dot_score,
    )

    stored = {side: np.load(folder / f"{side}.npy") for side in ("queries", "documents")}

    class Stored:
        device = torch.device("cpu")
        similarity = staticmethod(dot_score)
        similarity_pairwise = staticmethod(pairwise_dot_score)

        def get_embedding_dimension(self) -> int:
            return WIDTH

        def encode_query(self, texts: list[str], **_: Any) -> Any:
            return stored["queries"][: len(texts)]

        def encode_document(self, texts: list[str], **_: Any) -> Any:
            return stored["documents"][: len(texts)]

    texts = json.loads((folder / "texts.json").read_text())
    queries = [f"query #{row}" for row in range(len(texts))]
    dataset = Dataset.from_dict({"query": queries, "positive": texts})
    model: Any = Stored()
    if use_faiss:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
    before, started = memory("VmRSS"), time.perf_counter()
    mined = mine_hard_negatives(
        dataset,
        model,
        range_max=DEPTH,
        relative_margin=0.05,
        num_negatives=NEGATIVES,
        output_format="n-tuple",  # the fastest of its formats
        use_faiss=use_faiss,
        verbose=False,
    )
    seconds = time.perf_counter() - started
    negatives: list[list[int]] = [[] for _ in texts]
    for row in mined:
        negatives[row_of(row["query"])] = [
            row_of(row[f"negative_{number}"]) for number in range(1, NEGATIVES + 1)
        ]
    return seconds, negatives, before


def run_side(side: str, folder: Path) -> dict[str, Any]:
    runs: dict[str, Callable[[], tuple[float, list[list[int]], int]]] = {
        "nvembed": lambda: by_us(folder, near_duplicate=None),
        "nvembed, near duplicates": lambda: by_us(folder, near_duplicate=0.9),
        "sentence-transformers": lambda: by_sentence_transformers(folder, use_faiss=False),
        "with faiss": lambda: by_sentence_transformers(folder, use_faiss=True),
    }
    seconds, negatives, before = runs[side]()
    return {"seconds": seconds, "peak": memory("VmHWM"), "before": before, "mined": negatives}


def run_growth(side: str, num_documents: int) -> dict[str, Any]:
    """Memory of mining for 4,096 queries among more and more documents."""
    with tempfile.TemporaryDirectory(prefix="nvembed-growth-") as name:
        folder = Path(name)
        if side == "nvembed":
            return _our_growth(folder, num_documents)
        np.save(folder / "queries.npy", vectors(GROWTH_QUERIES, 1))
        np.save(folder / "documents.npy", vectors(num_documents, 2))
        return _their_growth(folder, num_documents)


def _our_growth(folder: Path, num_documents: int) -> dict[str, Any]:
    from nvembed.core.files import write_jsonl
    from nvembed.data.config import MiningConfig
    from nvembed.mining.miner import mine_file
    from nvembed.model import workers

    class Made:
        """Vectors that are drawn when they are asked for, as a model would compute them."""

        dimension = WIDTH

        def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> Any:
            return vectors(len(texts), row_of(texts[0]) + 1)

        encode_document = encode_query

    write_jsonl(
        folder / "pairs.jsonl",
        ({"query": f"query #{row}", "positive": text(row)} for row in range(GROWTH_QUERIES)),
    )
    write_jsonl(folder / "documents.jsonl", ({"text": text(row)} for row in range(num_documents)))
    made: Any = Made()
    workers.load_encoder = lambda *_: made
    import torch

    torch.ones(2, 2) @ torch.ones(2, 2)
    before, started = memory("VmRSS"), time.perf_counter()
    mine_file(
        folder / "pairs.jsonl",
        folder / "mined.jsonl",
        "made",
        MiningConfig(search_depth=DEPTH + 1),
        documents=folder / "documents.jsonl",
        dtype="float32",
    )
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak": memory("VmHWM"), "before": before}


def _their_growth(folder: Path, num_documents: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from sentence_transformers.util import dot_score, mine_hard_negatives, pairwise_dot_score

    stored = {side: np.load(folder / f"{side}.npy") for side in ("queries", "documents")}

    class Stored:
        device = torch.device("cpu")
        similarity = staticmethod(dot_score)
        similarity_pairwise = staticmethod(pairwise_dot_score)

        def encode_query(self, texts: list[str], **_: Any) -> Any:
            return stored["queries"][: len(texts)]

        def encode_document(self, texts: list[str], **_: Any) -> Any:
            return stored["documents"][: len(texts)]

    corpus = [text(row) for row in range(num_documents)]
    queries = [f"query #{row}" for row in range(GROWTH_QUERIES)]
    dataset = Dataset.from_dict({"query": queries, "positive": corpus[:GROWTH_QUERIES]})
    model: Any = Stored()
    before, started = memory("VmRSS"), time.perf_counter()
    mine_hard_negatives(
        dataset,
        model,
        corpus=corpus,
        range_max=DEPTH,
        relative_margin=0.05,
        num_negatives=NEGATIVES,
        output_format="n-tuple",
        verbose=False,
    )
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak": memory("VmHWM"), "before": before}


# --- The report -----------------------------------------------------------------------------------


def in_process(threads: int, *arguments: str) -> dict[str, Any]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        command = [sys.executable, __file__, *arguments, "--result", result.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        answer: dict[str, Any] = json.loads(Path(result.name).read_text())
    return answer


def compare(count: int, repeats: int, threads: int) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="nvembed-mine-") as name:
        folder = Path(name)
        documents = vectors(count, 2)
        queries = documents + 0.03 * np.random.default_rng(3).standard_normal(
            (count, WIDTH), dtype=np.float32
        )
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        np.save(folder / "documents.npy", documents)
        np.save(folder / "queries.npy", queries)
        (folder / "texts.json").write_text(json.dumps([text(row) for row in range(count)]))
        sides = [side for side in SIDES if side != "with faiss" or _has_faiss()]
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(repeats):
            for side in sides:
                runs[side].append(in_process(threads, "--side", side, "--folder", name))
    ours = statistics.median(run["seconds"] for run in runs["nvembed"])
    yield f"{count:,} queries x {count:,} documents, width {WIDTH}, {threads} threads; medians"
    for side in sides:
        seconds = statistics.median(run["seconds"] for run in runs[side])
        peak = max(run["peak"] for run in runs[side])
        grown = max(run["peak"] - run["before"] for run in runs[side])
        yield (
            f"{side:<26} {seconds:7.2f} s  {count / seconds:8,.0f} queries/s  "
            f"{seconds / ours:5.2f} x ours   peak {peak / 1e9:5.2f} GB, "
            f"{grown / 1e9:5.2f} GB of it while mining"
        )
    mine, theirs = (runs[side][0]["mined"] for side in ("nvembed", "sentence-transformers"))
    full = [row for row in range(count) if len(theirs[row]) == NEGATIVES]
    same = sum(mine[row] == theirs[row] for row in full)
    yield f"equal negatives: {same:,} of {len(full):,} queries that both gave {NEGATIVES}"


def growth(threads: int) -> Iterator[str]:
    yield f"{GROWTH_QUERIES:,} queries; peak less what stood in memory before, MB"
    for factor in (1, 2, 4, 8):
        documents = factor * GROWTH_DOCUMENTS
        row = [f"{documents:>9,} documents"]
        for side in ("nvembed", "sentence-transformers"):
            found = in_process(threads, "--side", side, "--documents", str(documents))
            grown = (found["peak"] - found["before"]) / 1e6
            row.append(f"{side} {grown:7,.0f} MB (peak {found['peak'] / 1e6:6,.0f})")
        yield "   ".join(row)


def exact(count: int) -> Iterator[str]:
    """Whole numbers, whose products are exact in float32: ids and scores must be equal."""
    from nvembed.kernels.nearest import top_k

    rng = np.random.default_rng(7)
    queries, documents = (
        rng.integers(-100, 101, (count, WIDTH)).astype(np.float32) for _ in range(2)
    )
    documents[count // 2 : count // 2 + count // 10] = documents[: count // 10]  # equal ones
    started = time.perf_counter()
    scores, indices = top_k(queries, documents, DEPTH)
    yield f"top_k: {time.perf_counter() - started:.1f} s"
    started, wrong = time.perf_counter(), 0
    for start in range(0, count, 250):
        rows = slice(start, start + 250)
        products = queries[rows] @ documents.T
        floor = np.partition(products, count - DEPTH, axis=1)[:, count - DEPTH]
        for row, (product, lowest) in enumerate(zip(products, floor, strict=True), start=start):
            best = np.flatnonzero(product >= lowest)
            best = best[np.argsort(-product[best], kind="stable")][:DEPTH]
            wrong += not (
                np.array_equal(best, indices[row]) and np.array_equal(product[best], scores[row])
            )
    yield f"brute force: {time.perf_counter() - started:.1f} s"
    yield f"{count:,} x {count:,}, k = {DEPTH}: {wrong} queries differ in ids or scores"


def _has_faiss() -> bool:
    try:
        import faiss  # noqa: F401
    except ImportError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=50_000, help="queries, and documents")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--growth", action="store_true", help="memory while the corpus grows")
    parser.add_argument("--exact", action="store_true", help="against a brute force")
    for name in ("--side", "--folder", "--documents", "--result"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        found = (
            run_growth(given.side, int(given.documents))
            if given.documents
            else run_side(given.side, Path(given.folder))
        )
        Path(given.result).write_text(json.dumps(found))
        return
    rows = (
        exact(given.count)
        if given.exact
        else growth(given.threads)
        if given.growth
        else compare(given.count, given.repeats, given.threads)
    )
    for row in rows:
        print(row, flush=True)


if __name__ == "__main__":
    main()
