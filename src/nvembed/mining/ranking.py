"""What ranks documents for queries: the vectors of a model, or BM25.

In: row numbers of queries; out: the nearest documents, and the scores of given pairs. The miner
knows no more of a teacher. A cross-encoder that scores again: ``rerank.py``. Next file:
``selection.py``.

Letters: B queries, K documents of each, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nvembed.core.reporting import progress
from nvembed.core.store import key_of, make_missing, write_array
from nvembed.encoding.bm25 import BM25
from nvembed.encoding.nearest import GROUP_QUERIES, top_k
from nvembed.mining.vectors import Vectors

NOTHING = -1
"""In place of a row where fewer documents were found."""

_NEAR = np.dtype([("score", "<f4"), ("row", "<i8")])


Near = tuple[NDArray[np.float32], NDArray[np.int64]]


class Ranking(Protocol):
    """Documents ranked for queries; both are known by their rows."""

    def nearest(self, queries_B: NDArray[np.int64]) -> Near:
        """Find the nearest documents of some queries.

        Returns:
            scores_BK, falling, and rows_BK, ``NOTHING`` at the end of rows with fewer.
        """
        ...

    def scores(
        self, queries_P: NDArray[np.int64], documents_P: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Score pairs, ``(P,)``."""
        ...


class VectorRanking:
    """By cosine.

    Args:
        queries: their vectors.
        documents: of the same model.
        depth: K.
    """

    def __init__(self, queries: Vectors, documents: Vectors, depth: int) -> None:
        self._queries, self._documents, self._depth = queries, documents, depth
        self._near: Vectors | None = None

    def search_to_files(self, num_queries: int, folder: Path, keys: Sequence[str]) -> None:
        """Search for all queries and keep what is found in files, ``GROUP_QUERIES`` in each.

        Args:
            num_queries: all of them.
            folder: where the files lie; several processes may share the work.
            keys: what the vectors are told apart by.
        """
        key = key_of(self._depth, GROUP_QUERIES, num_queries, *keys)
        starts = range(0, num_queries, GROUP_QUERIES)
        paths = [folder / f"near-{key}-{number}.npy" for number in range(len(starts))]
        with progress(len(paths), "search") as bar:

            def make(number: int) -> None:
                end = min(starts[number] + GROUP_QUERIES, num_queries)
                scores_BK, rows_BK = self.nearest(np.arange(starts[number], end))
                near = np.empty(rows_BK.shape, dtype=_NEAR)
                near["score"], near["row"] = scores_BK, rows_BK
                write_array(paths[number], near)
                bar.advance()

            make_missing(paths, make)
        self._near = Vectors(paths, GROUP_QUERIES)

    def nearest(self, queries_B: NDArray[np.int64]) -> Near:
        """See ``Ranking``."""
        if self._near is not None:
            near = self._near.take(queries_B)
            return near["score"], near["row"]
        return top_k(self._queries.take(queries_B), self._documents, self._depth)

    def scores(
        self, queries_P: NDArray[np.int64], documents_P: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """See ``Ranking``."""
        products: NDArray[np.float32] = np.einsum(
            "pd,pd->p", self._queries.take(queries_P), self._documents.take(documents_P)
        )
        return products


class BM25Ranking:
    """By BM25; documents that share no word with the query are not found.

    Args:
        queries: the texts.
        documents: the texts; the index of their words is held in memory.
        depth: K.
    """

    def __init__(self, queries: Sequence[str], documents: Sequence[str], depth: int) -> None:
        self._queries, self._depth = queries, depth
        self._index = BM25(documents)

    def nearest(self, queries_B: NDArray[np.int64]) -> Near:
        """See ``Ranking``."""
        scores_BK, rows_BK = self._index.top_k(self._texts(queries_B), self._depth)
        return scores_BK.astype(np.float32), np.where(scores_BK > 0.0, rows_BK, NOTHING)

    def scores(
        self, queries_P: NDArray[np.int64], documents_P: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """See ``Ranking``."""
        return self._index.scores(self._texts(queries_P), documents_P).astype(np.float32)

    def _texts(self, rows: NDArray[np.int64]) -> list[str]:
        return [self._queries[row] for row in rows.tolist()]
