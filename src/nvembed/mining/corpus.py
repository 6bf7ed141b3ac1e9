"""The documents that negatives are taken from, each different text once, with its row."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Self, overload

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import UserError
from nvembed.core.reporting import progress
from nvembed.data.hashed import FirstPlaces, text_digest
from nvembed.data.similarity import text_key

_WORD = re.compile(r"\w+")
_ADVANCE = 1024
_ROUNDING = 1e-6


def word_overlap(first: frozenset[str], second: frozenset[str]) -> float:
    """Return intersection over union of two sets of words, 0 for two empty sets."""
    shared = len(first & second)
    union = len(first) + len(second) - shared
    return shared / union if union else 0.0


def words(text: str) -> frozenset[str]:
    """Return the different words of a text, without case."""
    return frozenset(_WORD.findall(text.casefold()))


def nearly_equal(text: str, other: frozenset[str], threshold: float) -> bool:
    """Whether a text shares ``threshold`` of its words with another's; mostly without a split."""
    folded = text.casefold()
    may_miss = (1.0 - threshold) * len(other) + _ROUNDING
    for word in other:
        if word not in folded:
            may_miss -= 1.0
            if may_miss < 0.0:
                return False
    return word_overlap(frozenset(_WORD.findall(folded)), other) >= threshold


class MemoryCorpus:
    """Different texts in memory, in the order they came and in the spelling that came first."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.texts: list[str] = []
        self._rows: dict[str, int] = {}
        for text in texts:
            self.add(text)

    def add(self, text: str) -> int:
        """Take a text in, unless it is there already, and return its row."""
        row = self._rows.setdefault(text_key(text), len(self.texts))
        if row == len(self.texts):
            self.texts.append(text)
        return row

    def find(self, text: str) -> int | None:
        """Return the row of a text, ``None`` where it is not there."""
        return self._rows.get(text_key(text))


class StoredCorpus:
    """The same in a file, for more texts than memory should hold: it keeps 48 bytes of each.

    The file lies in ``folder`` and has no name, so it goes with the process, however that ends.
    Texts are told apart by 128 bits of their key's BLAKE2b.
    """

    def __init__(self, texts: Iterable[str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = TemporaryFile(dir=folder)
        try:
            ends, digests = self._write(texts, folder)
        except BaseException:
            self._file.close()
            raise
        self._firsts = FirstPlaces(digests)
        places = self._firsts.places
        self.texts: Sequence[str] = _StoredTexts(self._file, ends[places], ends[places + 1])

    def find(self, text: str) -> int | None:
        """Return the row of a text, ``None`` where it is not there."""
        place = self._firsts.find(text_digest(text_key(text)))
        return None if place is None else int(np.searchsorted(self._firsts.places, place))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _write(self, texts: Iterable[str], folder: Path) -> tuple[NDArray[np.int64], bytearray]:
        """Write all texts, repeated ones included."""
        ends, digests, size = array("q", [0]), bytearray(), 0
        try:
            with progress(None, "read documents") as bar:
                for number, text in enumerate(texts, start=1):
                    size += self._file.write(_to_bytes(text))
                    ends.append(size)
                    digests += text_digest(text_key(text))
                    if number % _ADVANCE == 0:
                        bar.advance(_ADVANCE)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write: {error.strerror or error}",
                where=str(folder),
                hint="Free space on the disk or choose another place with --work",
            ) from error
        return np.frombuffer(ends, dtype=np.int64), digests


Corpus = MemoryCorpus | StoredCorpus


class _StoredTexts(Sequence[str]):
    def __init__(self, file: IO[bytes], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        self._file, self._starts, self._ends = file, starts, ends

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        start, end = int(self._starts[index]), int(self._ends[index])
        return os.pread(self._file.fileno(), end - start, start).decode("utf-8", "surrogatepass")


def _to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
