"""Near-duplicate texts in a stream, found without comparing all pairs.

In: texts with keys; out: the keys of texts seen before that share most of their shingles. MinHash
LSH (``datasketch``) proposes candidates, and the Jaccard similarity of the shingle sets decides:
nothing is called a duplicate that is not one, and the share of duplicates that the proposal misses
falls quickly above the threshold (``docs/architecture.md``). Everything is seeded: the same texts
in the same order give the same answers in every process.

Where all texts are there at once and few, ``demo/duplicates.py`` finds every pair exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed.building.shingles import shingles
from nvembed.core.errors import UserError

_SEED = 1
# A missed duplicate is lost, a wrong proposal costs one comparison.
_WEIGHTS_FALSE = (0.1, 0.9)


class NearDuplicates:
    """The texts seen so far.

    Args:
        threshold: Jaccard similarity in (0, 1] of the shingle sets from which two texts count as
            duplicates.
        shingle_words: words in a shingle. Longer ones tell apart texts that share a vocabulary.
        num_hashes: length of a MinHash; more find more of the duplicates near the threshold.

    Raises:
        UserError: ``datasketch`` is not installed.
    """

    def __init__(
        self, threshold: float = 0.8, *, shingle_words: int = 3, num_hashes: int = 128
    ) -> None:
        assert 0 < threshold <= 1
        datasketch = _library()
        self.threshold = threshold
        self._shingle_words = shingle_words
        self._empty = datasketch.MinHash(
            num_perm=num_hashes, seed=_SEED, hashfunc=_low_bits, scheme="affine32"
        )
        self._index = datasketch.MinHashLSH(
            threshold=threshold, num_perm=num_hashes, weights=_WEIGHTS_FALSE
        )
        self._shingles: dict[int, NDArray[np.uint64]] = {}

    def __len__(self) -> int:
        return len(self._shingles)

    def add(self, key: int, text: str) -> None:
        """Take a text in under a key that was not used before."""
        assert key not in self._shingles
        own = shingles(text, self._shingle_words)
        self._index.insert(key, self._minhash(own), check_duplication=False)
        self._shingles[key] = _stored(own)

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
            assert key not in self._shingles
            self._index.insert(key, minhash, check_duplication=False)
            self._shingles[key] = _stored(own)
        return found

    def _verified(self, own: frozenset[int], candidates: Iterable[int]) -> list[int]:
        array = _stored(own)
        found = []
        for key in candidates:
            other = self._shingles[key]
            shared = len(np.intersect1d(array, other, assume_unique=True))
            if shared >= self.threshold * (len(array) + len(other) - shared):
                found.append(key)
        return sorted(found)

    def _minhash(self, own: frozenset[int]) -> Any:
        minhash = self._empty.copy()
        minhash.update_batch(own)
        return minhash


def _stored(own: frozenset[int]) -> NDArray[np.uint64]:
    return np.fromiter(sorted(own), dtype=np.uint64, count=len(own))


def _low_bits(shingle: int) -> int:
    return shingle & 0xFFFFFFFF


def _library() -> Any:
    try:
        import datasketch
    except ImportError as error:
        raise UserError(
            "near-duplicates need the package datasketch", hint="pip install 'nvembed[data]'"
        ) from error
    return datasketch
