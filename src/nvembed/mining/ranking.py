"""Teachers, who say which documents are near to a query: a model, BM25, or a cross-encoder on top.

In: row numbers of queries; out: the nearest documents, and the scores of given pairs. With a work
folder everything is computed into files there, by all processes that share it.

Letters: D width, B queries, K documents of each, P pairs or rows taken.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from nvembed.core.arguments import Precision, PrecisionChoice, is_settled
from nvembed.core.errors import ConfigError, ModelError
from nvembed.core.reporting import progress
from nvembed.core.store import claims, key_of, make_missing, read_array, remembered, write_array
from nvembed.data.bm25 import BM25
from nvembed.data.config import MiningConfig
from nvembed.interop.model_folder import check_model_name, model_fingerprint
from nvembed.kernels.nearest import GROUP_QUERIES, top_k
from nvembed.model.bulk import EncodeOptions, Job, embed, encode_texts
from nvembed.model.encoder import Encoder, computed_fingerprint, is_endpoint, settle_dtype
from nvembed.model.workers import Engine, Loader, settle_for

NOTHING = -1
"""In place of a row where fewer documents were found."""

PAIRS_PER_CALL = 1024
# Queries of a cross-encoder at once: what a killed process loses.
BLOCK_QUERIES = 64
_NEAR = np.dtype([("score", "<f4"), ("row", "<i8")])

Rows = NDArray[np.int64]
Scores = NDArray[np.float32]
Query = tuple[str, str | None]
"""The text of a query, and its own instruction; ``None`` is that of its set."""


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
        """Search for all queries, into files of ``GROUP_QUERIES``; ``keys`` name the vectors."""
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
    """Load a cross-encoder by folder or hub id, through sentence-transformers."""
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
    """What another ranking finds, scored again by a cross-encoder, which reads pairs of texts.

    ``depth`` of the nearest are scored again, the rest are let go. Its scores are the scores from
    then on, of positives too. ``kept_in`` names folder and key of files that keep scores, from
    which a killed run goes on.
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


# --- Teachers -------------------------------------------------------------------------------------

# Texts of a file. What a killed process loses is less than one; 64 MB at a width of 4,096.
SHARD_TEXTS = 4096
BM25_NAME = "bm25"


@dataclass(frozen=True, slots=True)
class _Side:
    """Texts to embed; ``own_tasks`` has the instructions of single ones, by row."""

    options: EncodeOptions
    texts: Sequence[str]
    own_tasks: Mapping[int, str]
    description: str


def rank(
    queries: Sequence[Query],
    documents: Sequence[str],
    tasks: tuple[str | None, str | None],
    teacher: Encoder | Loader,
    config: MiningConfig,
    work: Path | None,
    engine: Engine,
) -> Ranking:
    """Rank documents for queries, in memory or, of a teacher that is named, in files of ``work``.

    ``tasks`` are the instructions of queries that have none of their own, and of documents.
    """
    own = {row: task for row, (_, task) in enumerate(queries) if task is not None}
    texts = [text for text, _ in queries]
    sides = (
        _Side(EncodeOptions("query", tasks[0]), texts, own, "queries"),
        _Side(EncodeOptions("document", tasks[1]), documents, {}, "documents"),
    )
    depth = min(config.search_depth, len(documents))
    keys: list[str] = []
    ranking: VectorRanking | BM25Ranking
    if not isinstance(teacher, Loader):
        asked, searched = (_embed_in_memory(side, teacher) for side in sides)
        ranking = VectorRanking(asked, searched, depth)
    elif teacher.name == BM25_NAME:
        ranking = BM25Ranking(texts, documents, depth)
    else:
        assert work is not None
        parts = [_embed_to_files(side, teacher, work, engine) for side in sides]
        keys = [path.name for paths in parts for path in paths]
        asked, searched = (Vectors(paths, SHARD_TEXTS) for paths in parts)
        ranking = VectorRanking(asked, searched, depth)
        ranking.search_to_files(len(queries), work, keys)
    name = config.rerank
    if name is None:
        return ranking
    kept_in = (work, key_of(model_fingerprint(name), *keys)) if work is not None and keys else None
    return Reranking(
        ranking, lambda: load_cross_encoder(name), texts, documents, config.rerank_depth, kept_in
    )


def _embed_in_memory(side: _Side, encoder: Encoder) -> Vectors:
    vectors_ND = encode_texts(
        encoder,
        side.texts,
        side=side.options.input_type,
        task=side.options.task,
        description=side.description,
        own_tasks=side.own_tasks,
    )
    return Vectors([vectors_ND], max(len(side.texts), 1))


def _embed_to_files(side: _Side, teacher: Loader, work: Path, engine: Engine) -> list[Path]:
    """Embed what no file holds yet; several processes may do so at once."""
    fingerprint = model_fingerprint if is_endpoint(teacher.name) else computed_fingerprint
    identity = fingerprint(teacher.name, teacher.dtype, teacher.endpoint_model)
    input_type, task = side.options.input_type, side.options.task

    def job(start: int) -> Job:
        texts = side.texts[start : start + SHARD_TEXTS]
        rows = range(start, start + len(texts))
        own = {row - start: side.own_tasks[row] for row in rows if row in side.own_tasks}
        digest = hashlib.sha256()
        for text in texts:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        key = key_of(identity, input_type, task, digest.hexdigest(), *sorted(own.items()))
        return Job(texts, work / f"vectors-{key}.npy", own)

    starts = range(0, len(side.texts), SHARD_TEXTS)
    paths = [job(start).path for start in starts]
    with progress(len(side.texts), side.description) as bar, claims(paths) as missing:
        bar.advance(sum(path.is_file() for path in paths) * SHARD_TEXTS)
        jobs = (job(starts[number]) for number in missing)
        embed(jobs, teacher, side.options, lambda count, _: bar.advance(count), engine=engine)
    return paths


def check_teacher(
    teacher: str | Encoder, model: str | None, config: MiningConfig, engine: Engine
) -> None:
    """Refuse what does not go together, naming the option, and models that are not there."""
    endpoint = isinstance(teacher, str) and is_endpoint(teacher)
    if endpoint and not model:
        raise ConfigError(
            "an endpoint serves models by name", where="--teacher-model", expected="the name"
        )
    if model and not endpoint:
        raise ConfigError(
            "only endpoints take a name beside --teacher",
            where="--teacher-model",
            expected="--teacher http://…/v1",
        )
    if engine == "ray" and (not isinstance(teacher, str) or teacher == BM25_NAME):
        raise ConfigError("there is nothing to embed on other machines", where="--engine")
    named = [] if endpoint or teacher == BM25_NAME else [teacher]
    for name in (*named, config.rerank):
        if isinstance(name, str):
            check_model_name(name)
    if teacher == BM25_NAME and config.rerank is None and config.strategy in ("margin", "absolute"):
        raise ConfigError(
            f"strategy {config.strategy} is made for cosines, BM25 scores have no upper end",
            where="strategy",
            expected="percent_of_positive or top_k",
        )


def settled_teacher(
    teacher: str | Encoder,
    model: str | None,
    dtype: PrecisionChoice | None,
    work: Path | None,
    engine: Engine,
) -> Encoder | Loader:
    """Settle how a named teacher computes; one process of several takes the GPU of its number."""
    if not isinstance(teacher, str):
        return teacher
    if teacher == BM25_NAME:
        return Loader(teacher)
    import torch

    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    assert work is not None, "a named teacher has a folder"
    endpoint = is_endpoint(teacher)
    return Loader(teacher, None if endpoint else settled_dtype(teacher, dtype, work, engine), model)


def settled_dtype(
    teacher: str, dtype: PrecisionChoice | None, work: Path, engine: Engine
) -> Precision | None:
    """Settle the type of the teacher's weights, for all runs that share a work folder alike."""
    if is_settled(dtype):
        return dtype
    mine: list[Precision | None] = []

    def settle() -> Precision | None:
        mine.append(settle_for(engine, teacher, dtype))
        return mine[-1]

    kept = cast(Precision, remembered(work, "dtype", settle))
    return kept if mine else settle_dtype(teacher, dtype, begun=kept)
