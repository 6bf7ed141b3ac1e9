"""What ranks documents for queries: the vectors of a model, BM25, or a cross-encoder on either.

In: row numbers of queries; out: the nearest documents, and the scores of given pairs. The miner
knows no more of a teacher. Next file: ``selection.py``.

Letters: D width, B queries, K documents of each, P pairs or rows taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import ModelError
from nvembed.core.reporting import progress
from nvembed.core.store import key_of, make_missing, read_array, write_array
from nvembed.encoding.bm25 import BM25
from nvembed.encoding.nearest import GROUP_QUERIES, top_k

NOTHING = -1
"""In place of a row where fewer documents were found."""

PAIRS_PER_CALL = 1024
# Queries of a cross-encoder at once: what a killed process loses.
BLOCK_QUERIES = 64
_NEAR = np.dtype([("score", "<f4"), ("row", "<i8")])


Near = tuple[NDArray[np.float32], NDArray[np.int64]]


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
    return read_array(part, mapped=True) if isinstance(part, Path) else part


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


class PairScorer(Protocol):
    """Scores pairs of query and document."""

    def __call__(self, pairs: Sequence[tuple[str, str]], /) -> NDArray[np.float32]:
        """Return ``(len(pairs),)``, higher for documents that answer better."""
        ...


def load_cross_encoder(name: str) -> PairScorer:
    """Load a cross-encoder by folder or hub id, through sentence-transformers.

    Raises:
        ModelError: it cannot be loaded, or gives more than one score.
    """
    from sentence_transformers import CrossEncoder

    from nvembed.interop.loading import check_vocabulary, loading

    with loading(name, expected="the folder or the hub id of a cross-encoder"):
        model = CrossEncoder(name)
        check_vocabulary(model[0].model, model.tokenizer, where=name)
        # What it cannot do is told now, not after hours of mining.
        model.predict([("a query", "a document")], show_progress_bar=False)
    if model.num_labels != 1:
        raise ModelError(f"gives {model.num_labels} scores", where=name, expected="one score")

    def score(pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        return np.asarray(model.predict(list(pairs), show_progress_bar=False), dtype=np.float32)

    return score


class Reranking:
    """What another ranking finds, scored again by a cross-encoder.

    It reads query and document together, which is better and far slower than comparing vectors:
    only the nearest are scored again. From then on its scores are the scores, of positives too: the
    rule, the order, the report and what is written for distillation go by them.

    Args:
        base: finds the documents.
        load: gives the scorer, once it is needed.
        queries: the texts.
        documents: the texts.
        depth: how many of the nearest are scored again; the rest are let go.
    """

    def __init__(
        self,
        base: Ranking,
        load: Callable[[], PairScorer],
        queries: Sequence[str],
        documents: Sequence[str],
        depth: int,
    ) -> None:
        self._base, self._load, self._depth = base, cache(load), depth
        self._queries, self._documents = queries, documents
        self._kept: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]] = (
            self._scored
        )

    def keep_in(self, folder: Path, key: str) -> None:
        """Keep scores in files from now on, so that a run that is killed goes on from them."""

        def kept(
            queries_P: NDArray[np.int64], documents_P: NDArray[np.int64]
        ) -> NDArray[np.float32]:
            pairs = key_of(key, queries_P.tobytes().hex(), documents_P.tobytes().hex())
            path = folder / f"scores-{pairs}.npy"
            make_missing([path], lambda _: write_array(path, self._scored(queries_P, documents_P)))
            return read_array(path)

        self._kept = kept

    def nearest(self, queries_B: NDArray[np.int64]) -> Near:
        """See ``Ranking``."""
        _, rows_BK = self._base.nearest(queries_B)
        rows_BK = rows_BK[:, : self._depth]
        scores_BK = np.full(rows_BK.shape, -np.inf, dtype=np.float32)
        row, column = np.nonzero(rows_BK != NOTHING)
        scores_BK[row, column] = self._kept(queries_B[row], rows_BK[row, column])
        order_BK = np.argsort(-scores_BK, axis=1, kind="stable")
        return (
            np.take_along_axis(scores_BK, order_BK, axis=1),
            np.take_along_axis(rows_BK, order_BK, axis=1),
        )

    def scores(
        self, queries_P: NDArray[np.int64], documents_P: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """See ``Ranking``."""
        return self._kept(queries_P, documents_P)

    def _scored(
        self, queries_P: NDArray[np.int64], documents_P: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        scores_P = np.empty(len(queries_P), dtype=np.float32)
        for start in range(0, len(queries_P), PAIRS_PER_CALL):
            rows = slice(start, start + PAIRS_PER_CALL)
            pairs = [
                (self._queries[query], self._documents[document])
                for query, document in zip(
                    queries_P[rows].tolist(), documents_P[rows].tolist(), strict=True
                )
            ]
            scores = self._load()(pairs)
            if scores.shape != (len(pairs),) or not np.isfinite(scores).all():
                raise ModelError(
                    "the cross-encoder gave no score, or one that is no number, for some pair",
                    expected="one finite number each",
                )
            scores_P[rows] = scores
        return scores_P
