"""Encoders around encoders: several processes as one, and vectors that are kept on disk by text.

A task is shared out or kept whoever scores it: the scorer sees one encoder.

Letters: N texts of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from nvembed.core.arguments import Precision
from nvembed.core.reporting import release_notes
from nvembed.core.store import key_of
from nvembed.data.instructions import Side
from nvembed.model.bulk import (
    WINDOW_TEXTS,
    EncodeOptions,
    Job,
    embed_job,
    encode_window,
)
from nvembed.model.encoder import BaseEncoder, Encoder
from nvembed.model.kept_vectors import KeptVectors, text_keys
from nvembed.model.workers import Loader, Pool, process_pool, result_of

T = TypeVar("T")
Vectors = NDArray[np.float32]


# --- Several processes ----------------------------------------------------------------------------


@contextmanager
def shared_encoder(model: str, dtype: Precision | None, processes: int) -> Iterator[SharedEncoder]:
    """Start processes for a block, each with the model and a GPU where there are some."""
    with process_pool(processes, Loader(model, dtype)) as pool:
        yield SharedEncoder(pool)


class SharedEncoder(BaseEncoder):
    """One encoder made of the processes of a pool, each of which embeds a share of every call."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.dimension, self.max_seq_length = self.ask(_facts)
        release_notes()

    def ask(self, question: Callable[[Encoder], T]) -> T:
        """Ask the encoder of one of the processes; question and answer go through a pipe."""
        return result_of(self._pool.submit(question))

    def _encode(self, side: Side, texts: Sequence[str], task: str | None) -> Vectors:
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        parts = []
        for rows in shares(texts, self._pool.size):
            job = Job([texts[row] for row in rows], Path())
            parts.append((rows, self._pool.submit(embed_job, job, EncodeOptions(side, task))))
        for rows, part in parts:
            vectors[rows] = result_of(part)[0].vectors
        return vectors


def shares(texts: Sequence[str], count: int) -> list[list[int]]:
    """Deal the rows of texts into up to ``count`` shares: as many texts, much the same length."""
    rows = sorted(range(len(texts)), key=lambda row: len(texts[row]), reverse=True)
    return [part for start in range(count) if (part := rows[start::count])]


def _facts(encoder: Encoder) -> tuple[int, int | None]:
    return encoder.dimension, getattr(encoder, "max_seq_length", None)


# --- Vectors on disk ------------------------------------------------------------------------------


class CachedEncoder(BaseEncoder):
    """Vectors that are kept below ``folder`` for a model, or else from an encoder, and then kept.

    See ``model/kept_vectors.py``.
    """

    def __init__(self, encoder: Encoder, folder: Path, fingerprint: str) -> None:
        self._encoder = encoder
        self.dimension = encoder.dimension
        self._kept = KeptVectors(folder / key_of(fingerprint), encoder.dimension)

    def _encode(self, side: Side, texts: Sequence[str], task: str | None) -> Vectors:
        keys_N = text_keys((side, task, text) for text in texts)
        new = self._kept.missing(keys_N)
        for start in range(0, len(new), WINDOW_TEXTS):
            rows = new[start : start + WINDOW_TEXTS]
            missing = [texts[row] for row in rows.tolist()]
            encode = partial(encode_window, self._encoder, missing, side=side, task=task)
            self._kept.keep(keys_N[rows], encode)
        return self._kept.take(keys_N)
