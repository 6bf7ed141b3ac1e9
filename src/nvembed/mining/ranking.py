"""What ranks documents for queries: the vectors of a model, BM25, or a cross-encoder on either.

In: row numbers of queries; out: the nearest documents, and the scores of given pairs. The miner
knows no more of a teacher: every ranking has the two methods of ``VectorRanking``. Next file:
``selection.py``.

Letters: D width, B queries, K documents of each, P pairs or rows taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

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

Rows = NDArray[np.int64]
Scores = NDArray[np.float32]


class Vectors:
    """Vectors in parts, each an array or the path of one; all but the last have equally many."""

    def __init__(self, parts: Sequence[Scores | Path], rows_per_part: int) -> None:
        self._parts = parts
        self._rows_per_part = rows_per_part

    def __iter__(self) -> Iterator[Scores]:
        """Go through the parts; each is mapped no longer than it is looked at."""
        for part in self._parts:
            yield _opened(part)

    def take(self, rows_P: Rows) -> NDArray[Any]:
        """Copy some rows, ``(P, D)``."""
        numbers_P, places_P = np.divmod(rows_P, self._rows_per_part)
        first = _opened(self._parts[0])
        taken = np.empty((len(rows_P), *first.shape[1:]), first.dtype)
        for number in np.unique(numbers_P).tolist():
            mine_P = numbers_P == number
            taken[mine_P] = _opened(self._parts[number])[places_P[mine_P]]
        return taken


def _opened(part: Scores | Path) -> Scores:
    return read_array(part, mapped=True) if isinstance(part, Path) else part


class VectorRanking:
    """By cosine of the vectors of one model, ``depth`` documents for a query."""

    def __init__(self, queries: Vectors, documents: Vectors, depth: int) -> None:
        self._queries, self._documents, self._depth = queries, documents, depth
        self._near: Vectors | None = None

    def search_to_files(self, num_queries: int, folder: Path, keys: Sequence[str]) -> None:
        """Search for all queries and keep what is found in files, ``GROUP_QUERIES`` in each.

        Several processes may share the work; ``keys`` tell the vectors apart.
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

    def nearest(self, queries_B: Rows) -> tuple[Scores, Rows]:
        """Find the nearest documents: scores_BK, falling, and rows_BK, which end in ``NOTHING``."""
        if self._near is not None:
            near = self._near.take(queries_B)
            return near["score"], near["row"]
        return top_k(self._queries.take(queries_B), self._documents, self._depth)

    def scores(self, queries_P: Rows, documents_P: Rows) -> Scores:
        """Score pairs of a query and a document, ``(P,)``."""
        queries_PD, documents_PD = self._queries.take(queries_P), self._documents.take(documents_P)
        return np.asarray(np.einsum("pd,pd->p", queries_PD, documents_PD))


class BM25Ranking:
    """By BM25 of texts; documents that share no word with the query are not found."""

    def __init__(self, queries: Sequence[str], documents: Sequence[str], depth: int) -> None:
        self._queries, self._depth = queries, depth
        self._index = BM25(documents)

    def nearest(self, queries_B: Rows) -> tuple[Scores, Rows]:
        """See ``VectorRanking``."""
        scores_BK, rows_BK = self._index.top_k(self._texts(queries_B), self._depth)
        return scores_BK.astype(np.float32), np.where(scores_BK > 0.0, rows_BK, NOTHING)

    def scores(self, queries_P: Rows, documents_P: Rows) -> Scores:
        """See ``VectorRanking``."""
        return self._index.scores(self._texts(queries_P), documents_P).astype(np.float32)

    def _texts(self, rows: Rows) -> list[str]:
        return [self._queries[row] for row in rows.tolist()]


# Scores pairs of query and document, ``(len(pairs),)``, higher for those that answer better.
PairScorer = Callable[[Sequence[tuple[str, str]]], Scores]


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

    def score(pairs: Sequence[tuple[str, str]]) -> Scores:
        return np.asarray(model.predict(list(pairs), show_progress_bar=False), dtype=np.float32)

    return score


class Reranking:
    """What another ranking finds, scored again by a cross-encoder.

    It reads query and document together, which is better and far slower than comparing vectors:
    only the nearest are scored again. From then on its scores are the scores, of positives too: the
    rule, the order, the report and what is written for distillation go by them.

    ``load`` gives the scorer once it is needed, ``depth`` is how many of the nearest are scored
    again (the rest are let go), and ``kept_in`` names folder and key of files that keep scores,
    from which a killed run goes on.
    """

    def __init__(
        self,
        base: VectorRanking | BM25Ranking,
        load: Callable[[], PairScorer],
        queries: Sequence[str],
        documents: Sequence[str],
        depth: int,
        kept_in: tuple[Path, str] | None = None,
    ) -> None:
        self._base, self._load, self._depth = base, cache(load), depth
        self._queries, self._documents, self._kept_in = queries, documents, kept_in

    def nearest(self, queries_B: Rows) -> tuple[Scores, Rows]:
        """See ``VectorRanking``."""
        _, rows_BK = self._base.nearest(queries_B)
        rows_BK = rows_BK[:, : self._depth]
        scores_BK = np.full(rows_BK.shape, -np.inf, dtype=np.float32)
        row, column = np.nonzero(rows_BK != NOTHING)
        scores_BK[row, column] = self.scores(queries_B[row], rows_BK[row, column])
        order_BK = np.argsort(-scores_BK, axis=1, kind="stable")
        return (
            np.take_along_axis(scores_BK, order_BK, axis=1),
            np.take_along_axis(rows_BK, order_BK, axis=1),
        )

    def scores(self, queries_P: Rows, documents_P: Rows) -> Scores:
        """See ``VectorRanking``."""
        if self._kept_in is None:
            return self._scored(queries_P, documents_P)
        folder, key = self._kept_in
        pairs = key_of(key, queries_P.tobytes().hex(), documents_P.tobytes().hex())
        path = folder / f"scores-{pairs}.npy"
        make_missing([path], lambda _: write_array(path, self._scored(queries_P, documents_P)))
        return read_array(path)

    def _scored(self, queries_P: Rows, documents_P: Rows) -> Scores:
        scores_P = np.empty(len(queries_P), dtype=np.float32)
        for start in range(0, len(queries_P), PAIRS_PER_CALL):
            of = slice(start, start + PAIRS_PER_CALL)
            rows = zip(queries_P[of].tolist(), documents_P[of].tolist(), strict=True)
            pairs = [(self._queries[query], self._documents[row]) for query, row in rows]
            scores = self._load()(pairs)
            if scores.shape != (len(pairs),) or not np.isfinite(scores).all():
                raise ModelError(
                    "the cross-encoder gave no score, or one that is no number, for some pair",
                    expected="one finite number each",
                )
            scores_P[of] = scores
        return scores_P


Ranking = VectorRanking | BM25Ranking | Reranking
