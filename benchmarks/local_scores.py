"""Time of scoring outside the model: ``score_local`` against mteb, with vectors that are known.

    python benchmarks/local_scores.py --model ../shared/models/base-8m \
        --tasks ../shared/data/tasks --names nfcorpus wikiqa stsb mrpc banking77 covid_q summeval
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nvembed.evaluation.local_scores import score_local
from nvembed.evaluation.mteb_adapter import score
from nvembed.evaluation.tasks import load_tasks
from nvembed.model.encoder import Encoder, load_encoder


class Remembering:
    """An encoder that encodes nothing twice, and keeps the time that the model took."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._known: dict[tuple[str, str | None], NDArray[np.float32]] = {}
        self.seconds = 0.0

    @property
    def dimension(self) -> int:
        return self._encoder.dimension

    def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> NDArray[np.float32]:
        new = [text for text in dict.fromkeys(texts) if (text, task) not in self._known]
        if new:
            started = time.perf_counter()
            vectors = self._encoder.encode_query(new, task=task)
            self.seconds += time.perf_counter() - started
            self._known.update(((text, task), v) for text, v in zip(new, vectors, strict=True))
        return np.stack([self._known[text, task] for text in texts])

    encode_document = encode_query


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--names", nargs="*")
    arguments = parser.parse_args()
    base = load_encoder(arguments.model)
    print("task               model s   mteb s  local s  ratio  largest difference")
    for task in load_tasks([arguments.tasks], arguments.names):
        encoder = Remembering(base)
        score_local(task, encoder)  # everything is known after this
        seconds, found = {}, {}
        for name, function in (("mteb", score), ("local", lambda *a: score_local(*a).scores)):
            started = time.perf_counter()
            found[name] = function(task, encoder)
            seconds[name] = time.perf_counter() - started
        both = [(a, found["local"][n]) for n, a in found["mteb"].items() if a is not None]
        worst = max(abs(a - b) if b is not None else np.inf for a, b in both)
        print(
            f"{task.name:18} {encoder.seconds:7.2f} {seconds['mteb']:8.3f} {seconds['local']:8.3f}"
            f" {seconds['mteb'] / seconds['local']:6.1f}  {worst:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
