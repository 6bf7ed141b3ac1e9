"""How much of an evaluation is not the model: a retrieval task of up to 100,000 documents.

The corpora of ../shared/data/tasks are repeated with noise (a word more per copy) up to each size
and scored with and without a cache of vectors, each in a process of its own. Printed: seconds,
those spent inside the model, the share outside of it, and how far the resident memory rose.

    python benchmarks/evaluate_overhead.py ../shared/models/base-8m
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed.evaluation.encoders import CachedEncoder
from nvembed.evaluation.local_scores import score_local
from nvembed.evaluation.task_files import RetrievalData
from nvembed.evaluation.tasks import LocalTask, load_task
from nvembed.model.encoder import Encoder

WORDS_PER_TEXT = 8


class Clock:
    """An encoder that counts the seconds spent in another."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.seconds = 0.0

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        return self.encoder.dimension

    def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> NDArray[np.float32]:
        """Embed queries."""
        return self._timed(self.encoder.encode_query, texts, task)

    def encode_document(
        self, texts: Sequence[str], *, task: str | None = None
    ) -> NDArray[np.float32]:
        """Embed documents."""
        return self._timed(self.encoder.encode_document, texts, task)

    def _timed(self, encode: Any, texts: Sequence[str], task: str | None) -> NDArray[np.float32]:
        started = time.perf_counter()
        vectors: NDArray[np.float32] = encode(texts, task=task)
        self.seconds += time.perf_counter() - started
        return vectors


def enlarged(tasks: Path, documents: int) -> LocalTask:
    """Join a few corpora, cut to a few words, and repeat them up to so many documents."""
    task = load_task(tasks / "nfcorpus")
    assert isinstance(task.data, RetrievalData)
    data = task.data
    texts = list(data.documents)
    for name in ("cranfield", "cisi", "msmarco_dl19"):
        other = load_task(tasks / name).data
        assert isinstance(other, RetrievalData)
        texts += other.documents
    short = [" ".join(text.split()[:WORDS_PER_TEXT]) for text in texts]
    noise = np.random.default_rng(0)
    copies = itertools.islice(itertools.cycle(short), max(documents - len(short), 0))
    short += [f"{text} {noise.integers(1_000_000)}" for text in copies]
    ids = [*data.document_ids, *(f"more-{i}" for i in range(len(short) - len(data.document_ids)))]
    larger = RetrievalData(
        document_ids=tuple(ids),
        documents=tuple(short),
        query_ids=data.query_ids,
        queries=data.queries,
        judgements=data.judgements,
    )
    return LocalTask(
        task.name, task.type, task.instruction, task.main_score, folder=task.folder, data=larger
    )


def measure(model: str, tasks: Path, documents: int, cache: Path | None, max_tokens: int) -> None:
    """Score once and print a line of JSON."""
    from nvembed.model.embedder import NVEmbed

    encoder = NVEmbed.from_pretrained(model, max_tokens=max_tokens)
    encoder.encode_document(["warm up"] * 8)
    task = enlarged(tasks, documents)
    clock = Clock(encoder)  # type: ignore[arg-type]
    used = clock if cache is None else CachedEncoder(clock, cache, "benchmark")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    scored = score_local(task, used)
    seconds = time.perf_counter() - started
    rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    row = {
        "documents": documents,
        "cache": "none" if cache is None else "empty" if clock.seconds else "full",
        "seconds": round(seconds, 2),
        "model": round(clock.seconds, 2),
        "outside": round(1 - clock.seconds / seconds, 4),
        "rise_MiB": round(rise / 1024),
        "ndcg_at_10": scored.scores["ndcg_at_10"],
    }
    print(json.dumps(row), flush=True)


def main() -> None:
    """Run every size without a cache, then with an empty and a full one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tasks", type=Path, default=Path("../shared/data/tasks"))
    parser.add_argument("--documents", type=int, nargs="+", default=[12_000, 100_000])
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for documents in options.documents:
        with tempfile.TemporaryDirectory() as folder:
            for cache in (None, Path(folder), Path(folder)):
                arguments = (options.model, options.tasks, documents, cache, options.max_tokens)
                process = context.Process(target=measure, args=arguments)
                process.start()
                process.join()


if __name__ == "__main__":
    main()
