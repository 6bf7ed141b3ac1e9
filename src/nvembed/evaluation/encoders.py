"""Encoders around encoders: several processes as one, and vectors that are kept on disk by text.

A task is shared out or kept whoever scores it: the scorer sees one encoder.

Letters: N texts of a call, M texts kept, D width.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nvembed.core.arguments import Precision
from nvembed.core.errors import DataError
from nvembed.core.files import tidy
from nvembed.core.reporting import release_notes
from nvembed.core.store import key_of, make_missing, read_array, write_array
from nvembed.encoding.embed import (
    WINDOW_TEXTS,
    EncodeOptions,
    Job,
    embed_job,
    encode_window,
)
from nvembed.encoding.encoder import BaseEncoder, Encoder
from nvembed.encoding.workers import Loader, Pool, process_pool, result_of
from nvembed.text.instructions import Side

T = TypeVar("T")
Vectors = NDArray[np.float32]

_KEY_BYTES = 16


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
    """Vectors from the files of a model in ``folder``, or else from an encoder, and then kept.

    Each text is found by itself, whatever batch it came in. Only keys are held in memory, 24 bytes
    per text; vectors are mapped. A pair of files (``vectors-X.npy``, ``keys-X.npy``) holds what
    one call embedded, named after its keys; other processes that need the very same wait for it.
    """

    def __init__(self, encoder: Encoder, folder: Path, fingerprint: str) -> None:
        self._encoder = encoder
        self.dimension = encoder.dimension
        self._folder = folder / key_of(fingerprint)
        self._files: list[Path] = []
        # Keys with their places (number of the file, row), in sorted runs that are merged when they
        # come to similar sizes: to learn M keys bit by bit costs M log M, and runs are few.
        self._runs: list[tuple[NDArray[np.bytes_], NDArray[np.int32]]] = []

    def _encode(self, side: Side, texts: Sequence[str], task: str | None) -> Vectors:
        keys_N = _keys(texts, side, task)
        places_N2 = self._find(keys_N)
        if (places_N2 < 0).any():
            self._look_again()  # another process may have written them
            new = np.flatnonzero(self._find(keys_N)[:, 0] < 0)
            new = new[np.sort(np.unique(keys_N[new], return_index=True)[1])]
            for start in range(0, len(new), WINDOW_TEXTS):
                rows = new[start : start + WINDOW_TEXTS]
                missing = [texts[row] for row in rows.tolist()]
                encode = partial(encode_window, self._encoder, missing, side=side, task=task)
                self._keep(keys_N[rows], encode)
            self._look_again()
            places_N2 = self._find(keys_N)
        vectors_ND = np.empty((len(texts), self.dimension), dtype=np.float32)
        for number in np.unique(places_N2[:, 0]).tolist():
            mine = places_N2[:, 0] == number
            vectors_ND[mine] = self._read_vectors(self._files[number])[places_N2[mine, 1]]
        return vectors_ND

    def _keep(self, keys_N: NDArray[np.bytes_], encode: Callable[[], Vectors]) -> None:
        name = hashlib.blake2b(keys_N.tobytes(), digest_size=_KEY_BYTES).hexdigest()
        path = self._folder / f"keys-{name}.npy"

        def make(_: int) -> None:
            tidy(self._folder, glob.escape(_vectors_file(path).name))
            write_array(_vectors_file(path), encode())
            write_array(path, keys_N)

        make_missing([path], make)

    def _look_again(self) -> None:
        """Learn the keys of the files that are new."""
        for path in sorted(set(self._folder.glob("keys-*.npy")) - set(self._files)):
            keys_N = _read(path, mapped=False)
            places_N2 = np.empty((len(keys_N), 2), dtype=np.int32)
            places_N2[:, 0], places_N2[:, 1] = len(self._files), np.arange(len(keys_N))
            while self._runs and len(self._runs[-1][0]) <= 2 * len(keys_N):
                keys_M, places_M2 = self._runs.pop()
                keys_N = np.concatenate([keys_M, keys_N])
                places_N2 = np.concatenate([places_M2, places_N2])
            order = np.argsort(keys_N, kind="stable")
            self._runs.append((keys_N[order], places_N2[order]))
            self._files.append(path)

    def _find(self, keys_N: NDArray[np.bytes_]) -> NDArray[np.int32]:
        """Places, ``(N, 2)``; -1 where there is none."""
        places_N2 = np.full((len(keys_N), 2), -1, dtype=np.int32)
        for keys_M, places_M2 in self._runs:
            at_N = np.minimum(np.searchsorted(keys_M, keys_N), len(keys_M) - 1)
            found_N = keys_M[at_N] == keys_N
            places_N2[found_N] = places_M2[at_N[found_N]]
        return places_N2

    def _read_vectors(self, keys: Path) -> Vectors:
        path = _vectors_file(keys)
        vectors: Vectors = _read(path, mapped=True)
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension:
            raise DataError(
                f"holds vectors of shape {vectors.shape}, the model's width is {self.dimension}",
                where=str(path),
                hint=f"The cache and the model disagree: delete {path.parent}",
            )
        return vectors


def _keys(texts: Sequence[str], side: Side, task: str | None) -> NDArray[np.bytes_]:
    start = hashlib.blake2b(repr((side, task)).encode(), digest_size=_KEY_BYTES)
    keys = []
    for text in texts:
        digest = start.copy()
        digest.update(text.encode("utf-8", "surrogatepass"))
        keys.append(digest.digest())
    return np.array(keys, dtype=f"S{_KEY_BYTES}")


def _vectors_file(keys: Path) -> Path:
    return keys.with_name(keys.name.replace("keys-", "vectors-", 1))


def _read(path: Path, *, mapped: bool) -> NDArray[Any]:
    hint = f"Delete {path.parent}; what it holds is embedded again"
    return read_array(path, mapped=mapped, hint=hint)
