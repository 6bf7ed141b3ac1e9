"""The parts of an output: a file of vectors per window of texts, made once by whoever comes to it.

    documents → windows → (there already? passed over) → vectors → <output>.parts/<key>.npz

A part is named after everything its vectors depend on, so a run that was killed goes on with what
is missing, and processes or a cluster may make parts in any order. In one process the next window
is read and tokenised, and the last one written, while the model computes. Next file:
``encoding/outputs.py``.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed.core.background import ahead, behind
from nvembed.core.errors import DataError
from nvembed.core.files import atomic_path
from nvembed.core.reporting import ProgressBar, Rates
from nvembed.encoding.bulk import WINDOW_TEXTS, Way, check_vectors, prepare_window
from nvembed.encoding.protocol import Encoder
from nvembed.model.work import Work
from nvembed.text.tokens import batches

# What lies in a folder of parts.
BEGUN = "begun.json"  # what the output was begun with
PARTS = re.compile(rf"[0-9a-f]{{32}}\.npz|{re.escape(BEGUN)}")


@dataclass(frozen=True, slots=True)
class Window:
    """Neighbouring texts, and the file of their vectors."""

    texts: list[str]
    path: Path


@dataclass(frozen=True, slots=True)
class Part:
    """What a file holds.

    Attributes:
        vectors: ``(N, D)``.
        spans: ``(N, 2)`` int64, characters of chunks; empty where a text has one vector.
        counts: int64, vectors per text.
    """

    vectors: NDArray[np.generic]
    spans: NDArray[np.int64]
    counts: NDArray[np.int64]


class Tally:
    """How far it is: moves the bar on, with texts and tokens per second of what is made now."""

    def __init__(self, bar: ProgressBar) -> None:
        self._bar = bar
        self._rates: Rates | None = None

    def found(self, texts: int) -> None:
        """Count texts whose part was there."""
        self._bar.advance(texts)

    def made(self, texts: int, tokens: int | None) -> None:
        """Count texts whose part has been made."""
        self._rates = self._rates or Rates()
        counts = {"texts": texts} if tokens is None else {"texts": texts, "tokens": tokens}
        self._bar.advance(texts, **self._rates.add(**counts))


def windows(texts: Iterable[str], folder: Path, identity: str, way: Way) -> Iterator[Window]:
    """Cut texts into windows and name their parts.

    Args:
        texts: in order.
        folder: of the parts.
        identity: of the model.
        way: how the texts are embedded.
    """
    for window in batches(texts, WINDOW_TEXTS):
        settings = json.dumps([identity, *way.key, window])
        key = hashlib.sha256(settings.encode()).hexdigest()[:32]
        yield Window(window, folder / f"{key}.npz")


def make_here(missing: Iterable[Window], encoder: Encoder, way: Way, tally: Tally) -> None:
    """Make parts in this process.

    Args:
        missing: windows whose part is not there; read as they are needed.
        encoder: the model.
        way: how the texts are embedded.
        tally: is told what has been written.

    Raises:
        ModelError: vectors of another shape, or that are no numbers.
    """

    def prepared() -> Iterator[tuple[Window, Work]]:
        for window in missing:
            yield window, prepare_window(encoder, window.texts, way)

    def launched() -> Iterator[tuple[Window, Work, Callable[[], NDArray[np.float32]]]]:
        for window, work in ahead(prepared()):
            yield window, work, work.launch()

    def write(item: tuple[Window, Work, Callable[[], NDArray[np.float32]]]) -> None:
        window, work, vectors = item
        save_part(window.path, part_of(work, vectors(), window.texts, way.width(encoder)))
        tally.made(len(window.texts), work.tokens)

    behind(launched(), write)


def part_of(work: Work, vectors: NDArray[np.float32], texts: Sequence[str], width: int) -> Part:
    """Put a part together from what came out of the model.

    Raises:
        ModelError: the vectors have another shape, or are no numbers.
    """
    spans = [()] * len(texts) if work.spans is None else work.spans
    counts = [1] * len(texts) if work.spans is None else list(map(len, spans))
    check_vectors(vectors, (sum(counts), width), texts)
    flat = [span for mine in spans for span in mine]
    return Part(
        vectors,
        np.array(flat, dtype=np.int64).reshape(-1, 2),
        np.array(counts, dtype=np.int64),
    )


def save_part(path: Path, part: Part) -> None:
    """Write a part, whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, vectors=part.vectors, spans=part.spans, counts=part.counts)


def read_part(path: Path) -> Part:
    """Read a part.

    Raises:
        DataError: it is damaged.
    """
    with _opened(path) as arrays:
        return Part(arrays["vectors"], arrays["spans"], arrays["counts"])


def read_counts(path: Path) -> NDArray[np.int64]:
    """Read how many vectors each text of a part has.

    Raises:
        DataError: it is damaged.
    """
    with _opened(path) as arrays:
        counts: NDArray[np.int64] = arrays["counts"]
    return counts


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"cannot be read ({error})", where=str(path), hint="Delete it; it will be made again"
        ) from error
