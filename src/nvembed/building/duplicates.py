"""Near-duplicate texts in a stream, found without comparing all pairs.

In: texts with keys; out: the keys of texts seen before that share most of their shingles. MinHash
LSH (``rensa``) proposes candidates, and the Jaccard similarity of the shingle sets decides: nothing
is called a duplicate that is not one. A duplicate exactly at the threshold is missed with a chance
of 2 % at most, one above it far more seldom, and one of similarity 1 never. Everything is seeded:
the same texts in the same order give the same answers in every process.

Where all texts are there at once and few, ``examples/pydocs/duplicates.py`` finds every pair.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed.building.shingles import jaccard, shingles
from nvembed.core.errors import UserError

_SEED = 1
_MISSED = 0.02
_BYTES = 8
_ROUNDING = 1e-9


class NearDuplicates:
    """The texts seen so far, as hashes: about 2 kB each at the defaults, and 8 bytes per word.

    Args:
        threshold: Jaccard similarity in (0, 1] of the shingle sets from which two texts count as
            duplicates.
        shingle_words: words in a shingle. Longer ones tell apart texts that share a vocabulary.
        num_hashes: length of a MinHash at most; more of them mean fewer vain comparisons.

    Raises:
        UserError: ``rensa`` is not installed.
    """

    def __init__(
        self, threshold: float = 0.8, *, shingle_words: int = 3, num_hashes: int = 64
    ) -> None:
        assert 0 < threshold <= 1
        self._rensa = _library()
        self.threshold = threshold
        self._shingle_words = shingle_words
        bands, rows = lsh_shape(threshold, num_hashes)
        self._num_hashes = bands * rows
        self._index = self._rensa.RMinHashLSH(threshold, self._num_hashes, bands)
        self._shingles: dict[int, NDArray[np.uint64]] = {}

    def __len__(self) -> int:
        return len(self._shingles)

    def add(self, key: int, text: str) -> None:
        """Take a text in under a key, 0 or more, that was not used before."""
        own = shingles(text, self._shingle_words)
        self._insert(key, own, self._minhash(own))

    def find(self, text: str) -> list[int]:
        """Return the keys of the texts that are near-duplicates of this one, ascending."""
        own = shingles(text, self._shingle_words)
        return self._verified(own, self._index.query(self._minhash(own)))

    def find_or_add(self, key: int, text: str) -> list[int]:
        """Return what ``find`` returns; where that is nothing, take the text in."""
        own = shingles(text, self._shingle_words)
        minhash = self._minhash(own)
        found = self._verified(own, self._index.query(minhash))
        if not found:
            self._insert(key, own, minhash)
        return found

    def _insert(self, key: int, own: NDArray[np.uint64], minhash: Any) -> None:
        assert key not in self._shingles
        self._index.insert(key, minhash)
        self._shingles[key] = own

    def _verified(self, own: NDArray[np.uint64], candidates: Iterable[int]) -> list[int]:
        return sorted(
            key
            for key in candidates
            if jaccard(own, self._shingles[key]) >= self.threshold - _ROUNDING
        )

    def _minhash(self, own: NDArray[np.uint64]) -> Any:
        minhash = self._rensa.RMinHash(self._num_hashes, _SEED)
        # The same bytes on machines of either byte order.
        data = own.astype("<u8", copy=False).tobytes()
        minhash.update([data[at : at + _BYTES] for at in range(0, len(data), _BYTES)])
        return minhash


def lsh_shape(threshold: float, num_hashes: int) -> tuple[int, int]:
    """Choose bands and hashes per band.

    Two texts of similarity s meet in one of b bands of r hashes with the chance 1 - (1 - s^r)^b.
    The longest bands, which propose least in vain, that miss 2 % at the threshold at most.

    Returns:
        b and r, with ``b * r <= num_hashes``; at least ``(num_hashes, 1)``.
    """
    rows = 1
    while rows < num_hashes:
        bands = num_hashes // (rows + 1)
        if (1 - threshold ** (rows + 1)) ** bands > _MISSED:
            break
        rows += 1
    return num_hashes // rows, rows


def _library() -> Any:
    try:
        import rensa
    except ImportError as error:
        raise UserError(
            "near-duplicates need the package rensa", hint="pip install 'nvembed[data]'"
        ) from error
    return rensa
