"""The vectors of many texts: in memory, or in files of a few thousand that are mapped when read.

In: texts and an encoder; out: something to go through part by part, and to take rows from. A file
is named after the teacher, the instruction and its very texts, so it is never taken for another's.
Next file: ``ranking.py``.

Letters: N texts, D width, P rows taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import DataError
from nvembed.core.reporting import progress
from nvembed.core.store import key_of, make_missing, write_array
from nvembed.encoding.bulk import WINDOW_TEXTS, Side, encode_texts, encode_window
from nvembed.encoding.protocol import Encoder

# Texts of a file. What a killed process loses is less than one; 64 MB at a width of 4,096.
SHARD_TEXTS = 4096


class Vectors:
    """Rows in parts, each an array or the path of one; all but the last have equally many.

    Args:
        parts: in order.
        rows_per_part: of all but the last.
    """

    def __init__(self, parts: Sequence[NDArray[np.float32] | Path], rows_per_part: int) -> None:
        self._parts = parts
        self._rows_per_part = rows_per_part

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        """Go through the parts; each is mapped no longer than it is looked at."""
        for part in self._parts:
            yield _opened(part)

    def take(self, rows_P: NDArray[np.int64]) -> NDArray[Any]:
        """Copy some rows, ``(P, D)``."""
        numbers, places = np.divmod(rows_P, self._rows_per_part)
        if len(self._parts) == 1:
            return np.array(_opened(self._parts[0])[places])
        if not len(rows_P):
            return np.array(_opened(self._parts[0])[:0])
        order_P, pieces = np.argsort(numbers, kind="stable"), []
        for number in np.unique(numbers).tolist():
            pieces.append(_opened(self._parts[number])[places[numbers == number]])
        taken = np.concatenate(pieces)
        taken[order_P] = taken.copy()
        return taken


def _opened(part: NDArray[np.float32] | Path) -> NDArray[np.float32]:
    if not isinstance(part, Path):
        return part
    try:
        # "c": torch takes only memory that could be written, and nothing here writes.
        return np.load(part, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"cannot be read ({error})", where=str(part), hint="Delete it; it will be made again"
        ) from error


class Teacher(Protocol):
    """An encoder that is loaded when it is asked for."""

    @property
    def encoder(self) -> Encoder:
        """The encoder."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts of one side.

    Args:
        texts: what is embedded.
        side: query or document.
        task: the instruction; ``None`` is none.
        description: what the progress bar says.
        own_tasks: by its row, the instruction of a text that has one of its own.
    """

    texts: Sequence[str]
    side: Side
    task: str | None
    description: str
    own_tasks: Mapping[int, str] = field(default_factory=dict)

    def by_task(self) -> Iterator[tuple[str | None, list[int]]]:
        """Yield every instruction with the rows of its texts."""
        rows: dict[str | None, list[int]] = {}
        for row in range(len(self.texts)):
            rows.setdefault(self.own_tasks.get(row, self.task), []).append(row)
        yield from rows.items()


def embed_in_memory(batch: Batch, encoder: Encoder) -> Vectors:
    """Embed texts and keep the vectors.

    Raises:
        ModelError: see ``encode_texts``.
    """
    if batch.own_tasks:
        with progress(len(batch.texts), batch.description) as bar:
            vectors_ND = _embed(batch, encoder, bar.advance)
    else:
        vectors_ND = encode_texts(
            encoder, batch.texts, side=batch.side, task=batch.task, description=batch.description
        )
    return Vectors([vectors_ND], max(len(batch.texts), 1))


def shard_paths(batch: Batch, folder: Path, teacher: str) -> list[Path]:
    """Name the files of some texts.

    Args:
        batch: the texts, and how they are embedded.
        folder: where the files lie.
        teacher: fingerprint of the model.
    """
    paths = []
    for start in range(0, len(batch.texts), SHARD_TEXTS):
        shard = shard_of(batch, start // SHARD_TEXTS)
        digest = hashlib.sha256()
        for text in shard.texts:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        own = sorted(shard.own_tasks.items())
        key = key_of(teacher, batch.side, batch.task, digest.hexdigest(), *own)
        paths.append(folder / f"vectors-{key}.npy")
    return paths


def embed_to_files(batch: Batch, paths: Sequence[Path], teacher: Teacher) -> Vectors:
    """Embed what no file holds yet; several processes may do so at once.

    Args:
        batch: the texts.
        paths: of ``shard_paths``.
        teacher: not loaded when all files are there.

    Raises:
        ModelError: see ``encode_texts``.
        UserError: the disk is full.
    """
    there = sum(path.is_file() for path in paths)
    with progress(len(batch.texts), batch.description) as bar:
        bar.advance(there * SHARD_TEXTS)

        def make(number: int) -> None:
            write_shard(paths[number], shard_of(batch, number), teacher.encoder, done=bar.advance)

        make_missing(paths, make)
    return Vectors(paths, SHARD_TEXTS)


def shard_of(batch: Batch, number: int) -> Batch:
    """Return the texts of one file, with the instructions of their own."""
    start = number * SHARD_TEXTS
    texts = batch.texts[start : start + SHARD_TEXTS]
    own = {
        row: batch.own_tasks[start + row]
        for row in range(len(texts))
        if start + row in batch.own_tasks
    }
    return Batch(texts, batch.side, batch.task, batch.description, own)


def write_shard(path: Path, shard: Batch, encoder: Encoder, *, done: Callable[[int], None]) -> None:
    """Embed the texts of one file and write it; ``done`` is told how many at a time."""
    write_array(path, _embed(shard, encoder, done))


def _embed(batch: Batch, encoder: Encoder, done: Callable[[int], None]) -> NDArray[np.float32]:
    """Embed texts in windows of one instruction each; ``done`` is told how many at a time."""
    windows, order = [], []
    for task, rows in batch.by_task():
        for start in range(0, len(rows), WINDOW_TEXTS):
            window = rows[start : start + WINDOW_TEXTS]
            texts = [batch.texts[row] for row in window]
            windows.append(encode_window(encoder, texts, side=batch.side, task=task))
            order += window
            done(len(window))
    found_ND = np.concatenate(windows)
    vectors_ND = np.empty_like(found_ND)
    vectors_ND[order] = found_ND
    return vectors_ND
