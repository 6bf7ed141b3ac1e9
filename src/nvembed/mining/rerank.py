"""A cross-encoder's scores in place of the teacher's, for the documents that the teacher found.

It reads query and document together, which is better and far slower than comparing vectors: only
the nearest are scored again. From then on its scores are the scores, of positives too: the rule,
the order, the report and what is written for distillation go by them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import ModelError
from nvembed.core.store import key_of, make_missing, write_array
from nvembed.mining.ranking import NOTHING, Near, Ranking

PAIRS_PER_CALL = 1024
# Queries at once: what a killed process loses.
BLOCK_QUERIES = 64


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
    """What another ranking finds, scored again.

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
            scores: NDArray[np.float32] = np.load(path, allow_pickle=False)
            return scores

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
