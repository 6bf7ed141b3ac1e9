"""Similar texts among fixed ones, all of them, without comparing with each.

In: texts to search; out: for a text, the rows of those whose score reaches a threshold, with the
scores. Each index holds of every text only so many of its rarest parts that no text can reach the
threshold without one of them (prefix filter; Bayardo et al., Scaling Up All Pairs Similarity
Search, 2007). What shares such a part is scored. Next file: ``contamination.py``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from nvembed.building.shingles import jaccard, shingles, word_list

# As encoding/bm25.py, from Anserini.
_K1, _B = 0.9, 0.4
_ROUNDING = 1e-9


class SimilarTexts(Protocol):
    """Texts that can be searched by a score in [0, 1]."""

    def search(self, text: str) -> dict[int, float]:
        """Return the score of every row that reaches the threshold."""
        ...


class ShingleIndex:
    """Texts by the Jaccard similarity of their shingles.

    Args:
        texts: what is searched.
        threshold: similarity in (0, 1].
        shingle_words: words in a shingle.
    """

    def __init__(self, texts: Sequence[str], threshold: float, shingle_words: int) -> None:
        assert 0 < threshold <= 1
        self._threshold = threshold
        self._shingle_words = shingle_words
        self._shingles = [shingles(text, shingle_words) for text in texts]
        self._rows_with: dict[int, list[int]] = {}
        together = np.concatenate([np.empty(0, np.uint64), *self._shingles])
        different, counts = np.unique(together, return_counts=True)
        for row, own in enumerate(self._shingles):
            # Whoever reaches the threshold holds ceil(t * n) of the n shingles, so one of any
            # n - ceil(t * n) + 1 of them.
            size = len(own) - math.ceil(threshold * len(own) - _ROUNDING) + 1
            rarest = np.argsort(counts[np.searchsorted(different, own)], kind="stable")[:size]
            for shingle in own[rarest].tolist():
                self._rows_with.setdefault(shingle, []).append(row)

    def search(self, text: str) -> dict[int, float]:
        """Return the similarity of every row that reaches the threshold."""
        own = shingles(text, self._shingle_words)
        candidates = {row for shingle in own.tolist() for row in self._rows_with.get(shingle, ())}
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

    The score of query q for text d is that of ``encoding/bm25.py`` with every different word of the
    query once. So d scores most for queries that hold all its words, itself among them, and
    dividing by that gives a share from 0 (no word in common) to 1, whatever the lengths and the
    collection. Any long query reaches 1 for a short d, so that alone says little: the score is the
    lower one of this share and of the part that words of d have in q, by weight idf.

    Args:
        texts: what is searched; the weights of words come from them.
        threshold: share in (0, 1].
    """

    def __init__(self, texts: Sequence[str], threshold: float) -> None:
        assert 0 < threshold <= 1
        self._threshold = threshold
        counts = [Counter(word_list(text)) for text in texts]
        found_in = Counter(word for own in counts for word in own)
        self._idf = {
            word: math.log1p((len(texts) - count + 0.5) / (count + 0.5))
            for word, count in found_in.items()
        }
        self._idf_unseen = math.log1p((len(texts) + 0.5) / 0.5)
        lengths = [sum(own.values()) for own in counts]
        mean = sum(lengths) / max(1, len(lengths))
        self._weights: list[dict[str, float]] = []
        self._rows_with: dict[str, list[int]] = {}
        for row, own in enumerate(counts):
            spread = _K1 * (1 - _B + _B * lengths[row] / mean)
            weights = {
                word: self._idf[word] * (count * (_K1 + 1) / (count + spread))
                for word, count in own.items()
            }
            whole = sum(weights.values())
            weights = {word: weight / whole for word, weight in weights.items()}
            self._weights.append(weights)
            # Without one of the heaviest words the rest cannot reach the threshold.
            rest = 1.0
            for word in sorted(weights, key=lambda word: (-weights[word], word)):
                if rest < threshold - _ROUNDING:
                    break
                self._rows_with.setdefault(word, []).append(row)
                rest -= weights[word]

    def search(self, text: str) -> dict[int, float]:
        """Return the share of every row that reaches the threshold."""
        own = {word: self._idf.get(word, self._idf_unseen) for word in word_list(text)}
        whole = sum(own.values())
        candidates = {row for word in own for row in self._rows_with.get(word, ())}
        found = {}
        for row in candidates:
            weights = self._weights[row]
            shared = own.keys() & weights.keys()
            of_text = sum(weights[word] for word in sorted(shared))
            if of_text < self._threshold - _ROUNDING:
                continue
            share = min(1.0, of_text, sum(own[word] for word in sorted(shared)) / whole)
            if share >= self._threshold - _ROUNDING:
                found[row] = share
        return found
