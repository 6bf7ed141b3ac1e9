"""Mining against sentence-transformers' ``mine_hard_negatives``, with the same vectors.

    python benchmarks/mine_peers.py                          # speed and agreement, 50k x 50k
    python benchmarks/mine_peers.py --model smollm2-135m     # with vectors of its width
    python benchmarks/mine_peers.py --parts growth           # memory against the corpus
    python benchmarks/mine_peers.py --parts exact            # ids and scores against brute force

Every side runs in a process of its own, in turn, and is handed vectors that are computed already:
what is measured is search and choice. Settings are equal: 7 negatives below 95 % of the positive's
score, among the 100 nearest beside it. Ours is measured with its check for near duplicates too,
which the other side does not have. Needs ``datasets``; ``faiss-cpu`` if it is there.
"""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from peers.bench import Bench, Case, Side, of_all, one_by_one, option_parser
from peers.job import OURS, SENTENCE
from peers.miners import DEPTH, GROWTH_QUERIES, NEGATIVES, text, vectors
from peers.models import open_models
from peers.report import say

GROWTH = tuple(25_000 * factor for factor in (1, 2, 4, 8))
ALIKE = {"near_duplicate": 0.9}


def sides() -> list[Side]:
    """Ours without and with the check for near duplicates, theirs by torch and by faiss."""
    made = [
        Side(OURS, "float32"),
        Side(OURS, "float32", lambda part: [ALIKE] * (part == "speed"), f"{OURS}, near duplicates"),
        Side(SENTENCE, "float32"),
    ]
    if importlib.util.find_spec("faiss"):
        faiss = {"use_faiss": True}
        made.append(
            Side(
                SENTENCE, "float32", lambda part: [faiss] * (part == "speed"), f"{SENTENCE}, faiss"
            )
        )
    return made


def write_vectors(folder: Path, count: int, width: int) -> None:
    """Documents, and queries near them."""
    documents = vectors(count, width, 2)
    noise = np.random.default_rng(3).standard_normal((count, width), dtype=np.float32)
    queries = documents + 0.03 * noise
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    np.save(folder / "document.npy", documents)
    np.save(folder / "query.npy", queries)
    (folder / "texts.json").write_text(json.dumps([text(row) for row in range(count)]))


def exact(count: int, width: int) -> None:
    """Whole numbers, whose products are exact in float32: ids and scores must be equal."""
    from nvembed.kernels.nearest import top_k

    rng = np.random.default_rng(7)
    queries, documents = (
        rng.integers(-100, 101, (count, width)).astype(np.float32) for _ in range(2)
    )
    documents[count // 2 : count // 2 + count // 10] = documents[: count // 10]  # equal ones
    started = time.perf_counter()
    scores, indices = top_k(queries, documents, DEPTH)
    say(f"top_k: {time.perf_counter() - started:.1f} s")
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
    say(f"brute force: {time.perf_counter() - started:.1f} s")
    say(f"{count:,} x {count:,}, k = {DEPTH}: {wrong} queries differ in ids or scores")


def main() -> None:
    parser = option_parser(__doc__)
    choices = ("speed", "growth", "exact")
    parser.add_argument("--parts", nargs="+", choices=choices, default=["speed"])
    parser.add_argument("--count", type=int, default=50_000, help="queries, and documents")
    given = parser.parse_args()
    models = open_models(given.model, given.output)
    config = json.loads((models.decoder / "config.json").read_text("utf-8"))
    count, width = given.count, int(config["hidden_size"])
    bench = Bench("mine", given, models, {"count": count, "width": width})
    growth = {f"{n:,} documents": n for n in GROWTH}
    parts = ["speed"] * ("speed" in given.parts) + [*growth] * ("growth" in given.parts)
    if "speed" in parts:
        write_vectors(bench.out, count, width)
    negatives: dict[str, list[list[int]]] = {}

    def measure(side: Side, case: Case) -> dict[str, Any]:
        job = {"side": side.name, "options": case.options, "width": width}
        job |= {"folder": str(bench.out.absolute()), "documents": growth.get(case.part)}
        found = bench.run("peers.miners", job, side.name)
        if case.part == "speed":
            negatives[side.title] = mined = found.pop("mined")
            full = [row for row in range(count) if len(mined[row]) == NEGATIVES]
            first = negatives.get(OURS, mined)
            found["equal"] = sum(mined[row] == first[row] for row in full) / max(len(full), 1)
        rate = (count if case.part == "speed" else GROWTH_QUERIES) / found["seconds"]
        return {**found, "rate": rate, "over_mb": found["peak_mb"] - found.pop("before") / 1e6}

    if parts:
        bench.turns(parts, bench.installed(sides()), one_by_one(measure))
    columns = {
        "peak, MB": of_all("peak_mb", ",.0f", max),
        "of it while mining": of_all("over_mb", ",.0f", max),
        "equal to ours, of queries with 7": of_all("equal", ".2%", min),
    }
    bench.report(["speed", *growth], sides(), columns, unit="queries/s", passes=0)
    if "exact" in given.parts:
        exact(count, width)


if __name__ == "__main__":
    main()
