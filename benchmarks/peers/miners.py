"""Mining by us and by sentence-transformers, with vectors that are computed already."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers.job import OURS, child_main, memory_bytes

DEPTH = 100
NEGATIVES = 7
GROWTH_QUERIES = 4096
VOCABULARY = 20_000
WORDS_OF_TEXT = 60


def vectors(count: int, width: int, seed: int) -> NDArray[np.float32]:
    """Unit vectors in clusters, so that queries have near documents beside their positive."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((500, width), dtype=np.float32)
    made = centres[rng.integers(0, 500, count)]
    made += 0.8 * rng.standard_normal((count, width), dtype=np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def text(row: int) -> str:
    rng = np.random.default_rng(row)
    words = " ".join(f"w{number}" for number in rng.integers(0, VOCABULARY, WORDS_OF_TEXT).tolist())
    return f"{words} #{row}"


def row_of(text: str) -> int:
    return int(text.rsplit("#", 1)[1])


class Handed:
    """Hands stored rows out in order, for nothing; ours asks in pieces, the other for all."""

    def __init__(self, folder: Path) -> None:
        import torch
        from sentence_transformers.util import dot_score, pairwise_dot_score

        self.stored = {side: np.load(folder / f"{side}.npy") for side in ("query", "document")}
        self.rows = dict.fromkeys(self.stored, 0)
        self.dimension = self.stored["query"].shape[1]
        self.device = torch.device("cpu")
        self.similarity, self.similarity_pairwise = dot_score, pairwise_dot_score
        torch.ones(2, 2) @ torch.ones(2, 2)

    def get_embedding_dimension(self) -> int:
        return int(self.dimension)

    def _next(self, side: str, count: int) -> Any:
        self.rows[side] += count
        return self.stored[side][self.rows[side] - count : self.rows[side]]

    def encode_query(self, texts: Sequence[str], **_: Any) -> Any:
        return self._next("query", len(texts))

    def encode_document(self, texts: Sequence[str], **_: Any) -> Any:
        return self._next("document", len(texts))


def by_us(folder: Path, near_duplicate: float | None) -> dict[str, Any]:
    from nvembed.data.config import MiningConfig
    from nvembed.data.records import PairRecord
    from nvembed.mining.miner import mine_negatives

    model: Any = Handed(folder)
    texts = json.loads((folder / "texts.json").read_text())
    records = [PairRecord(f"query #{row}", (text,)) for row, text in enumerate(texts)]
    # The positive stands among what is found, as on the other side.
    config = MiningConfig(search_depth=DEPTH + 1, near_duplicate=near_duplicate)
    before, started = memory_bytes(), time.perf_counter()
    mined, _ = mine_negatives(records, None, model, config)
    seconds = time.perf_counter() - started
    negatives = [[row_of(text) for text in record.negatives] for record in mined]
    return {"seconds": seconds, "before": before, "mined": negatives}


def by_sentence_transformers(
    folder: Path, texts: Sequence[str], queries: int, **options: Any
) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    model: Any = Handed(folder)
    rows = {"query": [f"query #{row}" for row in range(queries)], "positive": texts[:queries]}
    dataset = Dataset.from_dict(rows)
    if options.get("use_faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
    before, started = memory_bytes(), time.perf_counter()
    mined = mine_hard_negatives(
        dataset,
        model,
        range_max=DEPTH,
        relative_margin=0.05,
        num_negatives=NEGATIVES,
        output_format="n-tuple",  # the fastest of its formats
        verbose=False,
        **options,
    )
    seconds = time.perf_counter() - started
    negatives: list[list[int]] = [[] for _ in range(queries)]
    for row in mined:
        found = (row_of(row[f"negative_{number}"]) for number in range(1, NEGATIVES + 1))
        negatives[row_of(row["query"])] = list(found)
    return {"seconds": seconds, "before": before, "mined": negatives}


def our_growth(folder: Path, documents: int, width: int) -> dict[str, Any]:
    """From files to a file, with vectors that are drawn when they are asked for."""
    import torch

    from nvembed.core.files import write_jsonl
    from nvembed.data.config import MiningConfig
    from nvembed.mining.miner import mine_file
    from nvembed.model import workers

    class Drawn:
        dimension = width

        def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> Any:
            return vectors(len(texts), width, row_of(texts[0]) + 1)

        encode_document = encode_query

    made: Any = Drawn()
    workers.load_encoder = lambda *_: made
    pairs = ({"query": f"query #{row}", "positive": text(row)} for row in range(GROWTH_QUERIES))
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "documents.jsonl", ({"text": text(row)} for row in range(documents)))
    torch.ones(2, 2) @ torch.ones(2, 2)
    before, started = memory_bytes(), time.perf_counter()
    mine_file(
        folder / "pairs.jsonl",
        folder / "mined.jsonl",
        "made",
        MiningConfig(search_depth=DEPTH + 1),
        documents=folder / "documents.jsonl",
        dtype="float32",
    )
    return {"seconds": time.perf_counter() - started, "before": before}


def run(given: dict[str, Any]) -> dict[str, Any]:
    """Mine with the vectors of a folder, or for 4,096 queries among ``documents`` others."""
    ours = given["side"].startswith(OURS)
    documents, width = given.get("documents"), given["width"]
    if documents is None:
        folder = Path(given["folder"])
        if ours:
            return by_us(folder, given["options"].get("near_duplicate"))
        texts = json.loads((folder / "texts.json").read_text())
        return by_sentence_transformers(folder, texts, len(texts), **given["options"])
    with tempfile.TemporaryDirectory(prefix="nvembed-growth-") as name:
        folder = Path(name)
        if ours:
            return our_growth(folder, documents, width)
        np.save(folder / "query.npy", vectors(GROWTH_QUERIES, width, 1))
        np.save(folder / "document.npy", vectors(documents, width, 2))
        texts = [text(row) for row in range(documents)]
        found = by_sentence_transformers(folder, texts, GROWTH_QUERIES, corpus=texts)
        del found["mined"]
        return found


if __name__ == "__main__":
    child_main(run)
