"""Indexes of texts that find the similar ones without comparing each with each.

They hold of every text only so many of its rarest parts that no text can reach the threshold
without one of them (prefix filter; Bayardo et al., Scaling Up All Pairs Similarity Search, 2007).
``NearDuplicates`` finds them in a stream.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import UserError
from nvembed.encoding.bm25 import BM25
from nvembed.text.similarity import jaccard, shingles, word_list

_ROUNDING = 1e-9
_SEED = 1
_MISSED = 0.02


class ShingleIndex:
    """Texts by the Jaccard similarity in (0, 1] of their shingles of ``shingle_words`` words."""

    def __init__(self, texts: Sequence[str], threshold: float, shingle_words: int) -> None:
        self._threshold = threshold
        self._shingle_words = shingle_words
        self._shingles = [shingles(text, shingle_words) for text in texts]
        self._rows_with: defaultdict[int, list[int]] = defaultdict(list)
        together = np.concatenate([np.empty(0, np.uint64), *self._shingles])
        different, counts = np.unique(together, return_counts=True)
        self._different = np.append(different, np.uint64(2**64 - 1))  # so that there is a next one
        self._counts = np.append(counts, 0)
        for row, own in enumerate(self._shingles):
            for shingle in self._rarest(own):
                self._rows_with[shingle].append(row)

    def _rarest(self, own: NDArray[np.uint64]) -> list[int]:
        """Return so many shingles that every text that reaches the threshold has one of its own.

        Such a text holds ceil(t * n) of the n shingles. In one order of all shingles the first
        n - ceil(t * n) + 1 of both texts meet; rare ones come first, as few texts share them.
        """
        size = len(own) - math.ceil(self._threshold * len(own) - _ROUNDING) + 1
        at = np.searchsorted(self._different, own)
        counts = np.where(self._different[at] == own, self._counts[at], 0)
        return own[np.argsort(counts, kind="stable")[:size]].tolist()

    def search(self, text: str) -> dict[int, float]:
        """Return the similarity of every row that reaches the threshold."""
        own = shingles(text, self._shingle_words)
        rarest = self._rarest(own)
        candidates = {row for shingle in rarest for row in self._rows_with.get(shingle, ())}
        found = {}
        for row in candidates:
            other = self._shingles[row]
            if min(len(own), len(other)) < self._threshold * max(len(own), len(other)) - _ROUNDING:
                continue
            similarity = jaccard(own, other)
            if similarity >= self._threshold - _ROUNDING:
                found[row] = similarity
        return found


class Bm25Index:
    """Texts by the share of their BM25 score that a query reaches, and the query's own share.

    The score of query q for text d, with every different word of q once, is divided by the most
    that any query scores: from 0 (no word in common) to 1. Any long query reaches 1 for a short d,
    so the lower one counts of this share and of the part that words of d have in q, by weight idf.
    """

    def __init__(self, texts: Sequence[str], threshold: float) -> None:
        self._threshold = threshold
        searched = BM25(texts, words=word_list)
        self._idf = dict(zip(searched.vocabulary, searched.idf.tolist(), strict=True))
        self._idf_unseen = math.log1p((len(texts) + 0.5) / 0.5)
        self._weights: list[dict[str, float]] = []
        self._rows_with: defaultdict[str, list[int]] = defaultdict(list)
        of_column = list(searched.vocabulary)
        weights, starts = searched.weights, searched.weights.indptr
        for row in range(len(texts)):
            own = slice(starts[row], starts[row + 1])
            shares = weights.data[own] / weights.data[own].sum()
            words = [of_column[column] for column in weights.indices[own].tolist()]
            self._weights.append(dict(zip(words, shares.tolist(), strict=True)))
            # Without one of the heaviest words the rest cannot reach the threshold.
            rest = 1.0
            for word, share in sorted(self._weights[-1].items(), key=lambda one: (-one[1], one[0])):
                if rest < threshold - _ROUNDING:
                    break
                self._rows_with[word].append(row)
                rest -= share

    def search(self, text: str) -> dict[int, float]:
        """Return the share of every row that reaches the threshold."""
        own = {word: self._idf.get(word, self._idf_unseen) for word in word_list(text)}
        whole = sum(own.values())
        found = {}
        for row in {row for word in own for row in self._rows_with.get(word, ())}:
            weights = self._weights[row]
            shared = sorted(own.keys() & weights.keys())
            of_text = sum(weights[word] for word in shared)
            if of_text < self._threshold - _ROUNDING:
                continue
            share = min(1.0, of_text, sum(own[word] for word in shared) / whole)
            if share >= self._threshold - _ROUNDING:
                found[row] = share
        return found


class NearDuplicates:
    """The texts of a stream so far, as hashes: about 2 kB each at the defaults, 8 bytes per word.

    MinHash LSH (``rensa``) proposes candidates, and the Jaccard similarity of the shingle sets
    decides. A duplicate exactly at the threshold is missed with a chance of 2 % at most, one of
    similarity 1 never. The same texts in the same order give the same answers in every process.
    """

    def __init__(
        self, threshold: float = 0.8, *, shingle_words: int = 3, num_hashes: int = 64
    ) -> None:
        try:
            import rensa
        except ImportError as error:
            raise UserError(
                "near-duplicates need the package rensa", hint="pip install 'nvembed[data]'"
            ) from error
        bands, rows = lsh_shape(threshold, num_hashes)
        self._threshold = threshold
        self._shingle_words = shingle_words
        self._num_hashes = bands * rows
        self._new_minhash = rensa.RMinHash
        self._index = rensa.RMinHashLSH(threshold, self._num_hashes, bands)
        self._shingles: dict[int, NDArray[np.uint64]] = {}

    def find_or_add(self, key: int, text: str) -> list[int]:
        """Return the keys of the near-duplicates of a text, ascending; if none, take it in."""
        own = shingles(text, self._shingle_words)
        minhash = self._new_minhash(self._num_hashes, _SEED)
        # The same bytes on machines of either byte order.
        data = own.astype("<u8", copy=False).tobytes()
        minhash.update([data[at : at + 8] for at in range(0, len(data), 8)])
        least = self._threshold - _ROUNDING
        candidates = self._index.query(minhash)
        found = sorted(key for key in candidates if jaccard(own, self._shingles[key]) >= least)
        if not found:
            self._index.insert(key, minhash)
            self._shingles[key] = own
        return found


def lsh_shape(threshold: float, num_hashes: int) -> tuple[int, int]:
    """Choose the number of bands b and of hashes per band r, with ``b * r <= num_hashes``.

    Two texts of similarity s meet with the chance 1 - (1 - s^r)^b: the longest bands that miss 2 %
    at the threshold at most.
    """
    rows = 1
    while rows < num_hashes:
        bands = num_hashes // (rows + 1)
        if (1 - threshold ** (rows + 1)) ** bands > _MISSED:
            break
        rows += 1
    return num_hashes // rows, rows
