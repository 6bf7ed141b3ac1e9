"""BM25: a teacher that needs no model, and the baseline that a retriever should beat.

Words are ``\\w+`` in lower case, with neither stemming nor stop words. Needs numpy and scipy alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

_WORD = re.compile(r"\w+")
_BLOCK_CELLS = 4_000_000  # scores held dense at once: 32 MB


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


class BM25:
    """A searchable collection of documents.

    score(q, d) = Σ over the words w of q, repeated ones repeatedly:
    ``idf(w) · f · (k1 + 1) / (f + k1 · (1 − b + b · |d| / mean |d|))`` with f the count of w in d
    and ``idf(w) = ln(1 + (N − n + 0.5) / (n + 0.5))`` for w in n of N documents. Always positive,
    so a score of 0 means that query and document share no word.

    ``weights`` is what a word adds to the score of a document, sparse, ``(documents, words)``;
    ``k1`` and ``b`` are those of Anserini. Source: Robertson and Zaragoza, The Probabilistic
    Relevance Framework (2009).
    """

    def __init__(
        self,
        documents: Sequence[str],
        k1: float = 0.9,
        b: float = 0.4,
        words: Callable[[str], list[str]] = _words,
    ) -> None:
        self._words = words
        self.vocabulary: dict[str, int] = {}
        counts = self._counts(documents, learn=True)
        lengths = np.asarray(counts.sum(axis=1)).ravel()
        mean = (lengths.mean() if len(lengths) else 0.0) or 1.0  # 0 where there are no words at all
        found_in = np.bincount(counts.indices, minlength=counts.shape[1])
        self.idf = np.log1p((len(documents) - found_in + 0.5) / (found_in + 0.5))
        saturation = np.repeat(k1 * (1 - b + b * lengths / mean), np.diff(counts.indptr))
        counts.data *= self.idf[counts.indices] * (k1 + 1) / (counts.data + saturation)
        self.weights = counts
        self._weights_by_word = counts.T.tocsr()

    def top_k(
        self, queries: Sequence[str], k: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Find the best ``k`` documents of each query, equal scores by index.

        Returns scores and indices ``(len(queries), min(k, documents))``, best first.
        """
        num_documents = self.weights.shape[0]
        k = min(k, num_documents)
        scores = np.empty((len(queries), k))
        indices = np.empty((len(queries), k), dtype=np.int64)
        counts = self._counts(queries)
        block = max(1, _BLOCK_CELLS // max(1, num_documents))
        for start in range(0, len(queries), block):
            dense = (counts[start : start + block] @ self._weights_by_word).toarray()
            for row, all_scores in enumerate(dense, start=start):
                # All that are as good as the k-th best, then a stable sort: ties by index at any k.
                kth = np.partition(all_scores, num_documents - k)[num_documents - k]
                candidates = np.flatnonzero(all_scores >= kth)
                best = candidates[np.argsort(-all_scores[candidates], kind="stable")[:k]]
                indices[row], scores[row] = best, all_scores[best]
        return scores, indices

    def scores(self, queries: Sequence[str], indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Score each query for one document, ``(len(queries),)``."""
        products = self._counts(queries).multiply(self.weights[indices])
        return np.asarray(products.sum(axis=1)).ravel()

    def _counts(self, texts: Sequence[str], *, learn: bool = False) -> sparse.csr_array:
        """Count the known words of each text; to learn is to know all of them afterwards."""
        columns: list[int] = []
        values: list[int] = []
        starts = [0]
        known = self.vocabulary
        for text in texts:
            for word, count in Counter(self._words(text)).items():
                column = known.setdefault(word, len(known)) if learn else known.get(word)
                if column is not None:
                    columns.append(column)
                    values.append(count)
            starts.append(len(columns))
        shape = (len(texts), len(known))
        return sparse.csr_array((np.array(values, np.float64), columns, starts), shape=shape)
