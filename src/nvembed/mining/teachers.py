"""Teachers: who says which documents are near to a query.

In: a name (folder, hub id, address or ``bm25``) or an encoder; out: a ranking. With a work folder
everything is computed into files there, and by all processes that share it. Next: ``ranking.py``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

from nvembed.core.dtypes import Precision, PrecisionChoice
from nvembed.core.errors import ConfigError
from nvembed.core.store import key_of, remembered
from nvembed.data.mining_config import MiningConfig
from nvembed.encoding.endpoint import EndpointEncoder, is_endpoint
from nvembed.encoding.fingerprint import computed_fingerprint, model_fingerprint
from nvembed.encoding.load import load_encoder, settle_dtype
from nvembed.encoding.protocol import Encoder
from nvembed.mining.pool import Pool
from nvembed.mining.ranking import BM25Ranking, Ranking, VectorRanking
from nvembed.mining.rerank import Reranking, load_cross_encoder
from nvembed.mining.selection import Query
from nvembed.mining.vectors import (
    Batch,
    Vectors,
    embed_in_memory,
    embed_to_files,
    shard_paths,
)

Engine = Literal["local", "ray"]
BM25_NAME = "bm25"


@dataclass(frozen=True, slots=True)
class Search:
    """What is searched: texts of both sides, and how they are embedded.

    Args:
        asked: different queries, each with its own instruction, if it has one.
        pool: the documents.
        query_task: instruction of the queries that have none of their own.
        document_task: of the documents, where the task is symmetric.
    """

    asked: Sequence[Query]
    pool: Pool
    query_task: str | None
    document_task: str | None = None

    @property
    def queries(self) -> list[str]:
        """Return the texts of the queries; one that has several instructions is there for each."""
        return [text for text, _ in self.asked]

    def batches(self) -> tuple[Batch, Batch]:
        """Return queries and documents."""
        own = {row: task for row, (_, task) in enumerate(self.asked) if task is not None}
        return (
            Batch(self.queries, "query", self.query_task, "queries", own),
            Batch(self.pool.texts, "document", self.document_task, "documents"),
        )

    def depth(self, config: MiningConfig) -> int:
        """Return how many documents can be looked at."""
        return min(config.search_depth, len(self.pool.texts))


@dataclass(frozen=True)
class NamedTeacher:
    """A model that can be loaded by name, here and on other machines.

    Args:
        name: folder, hub id or address.
        model: what an endpoint knows it by.
        dtype: of the weights; settled, or ``None`` for what was saved.
    """

    name: str
    model: str | None = None
    dtype: Precision | None = None

    @cached_property
    def fingerprint(self) -> str:
        """What its vectors are kept under."""
        if is_endpoint(self.name):
            return model_fingerprint(self.name, self.dtype, self.model)
        return computed_fingerprint(self.name, self.dtype, self.model)

    @cached_property
    def encoder(self) -> Encoder:
        """The model, loaded when it is first asked for."""
        if is_endpoint(self.name):
            return cast(Encoder, EndpointEncoder(self.name, self.model or ""))
        return load_encoder(self.name, self.dtype)


def rank_in_memory(search: Search, encoder: Encoder, config: MiningConfig) -> Ranking:
    """Rank with an encoder that is loaded; vectors stay in memory.

    Raises:
        ModelError: the encoder, or the cross-encoder, cannot be used.
    """
    queries, documents = (embed_in_memory(batch, encoder) for batch in search.batches())
    ranking = VectorRanking(queries, documents, search.depth(config))
    return _reranked(ranking, search, config)


def rank_in_files(
    search: Search, teacher: NamedTeacher, config: MiningConfig, work: Path, engine: Engine
) -> Ranking:
    """Rank with vectors that lie in files, made where they are missing.

    Raises:
        ModelError: the teacher, or the cross-encoder, cannot be used.
        UserError: the disk is full, or ray is not installed.
    """
    vectors, keys = [], []
    for batch in search.batches():
        paths = shard_paths(batch, work, teacher.fingerprint)
        if engine == "ray":
            from nvembed.mining.ray_engine import embed_by_ray

            embed_by_ray(batch, paths, teacher)
        vectors.append(embed_to_files(batch, paths, teacher))
        keys += [path.name for path in paths]
    queries, documents = cast(tuple[Vectors, Vectors], tuple(vectors))
    ranking = VectorRanking(queries, documents, search.depth(config))
    ranking.search_to_files(len(search.asked), work, keys)
    return _reranked(ranking, search, config, work, keys)


def rank_by_bm25(search: Search, config: MiningConfig) -> Ranking:
    """Rank by the words that query and document share; instructions play no part."""
    ranking = BM25Ranking(search.queries, search.pool.texts, search.depth(config))
    return _reranked(ranking, search, config)


def check_teacher(
    teacher: str | Encoder, model: str | None, config: MiningConfig, engine: Engine
) -> None:
    """Refuse what does not go together.

    Raises:
        ConfigError: naming the option.
    """
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
    if teacher == BM25_NAME and config.rerank is None and config.strategy in ("margin", "absolute"):
        raise ConfigError(
            f"strategy {config.strategy} is made for cosines, BM25 scores have no upper end",
            where="strategy",
            expected="percent_of_positive or top_k",
        )


def settled_dtype(
    teacher: str, dtype: PrecisionChoice | None, work: Path, engine: Engine
) -> Precision | None:
    """Settle the type of the teacher's weights, for all runs that share a work folder alike."""
    if dtype != "auto":
        return dtype
    mine: list[Precision | None] = []

    def settle() -> Precision | None:
        if engine == "ray":
            from nvembed.encoding.ray_data import settle_by_ray

            mine.append(settle_by_ray(dtype))
        else:
            mine.append(settle_dtype(teacher, dtype))
        return mine[-1]

    kept = cast(Precision, remembered(work, "dtype", settle))
    return kept if mine else settle_dtype(teacher, dtype, begun=kept)


def take_device() -> None:
    """Let this process of several on a machine use the GPU of its number, if there are GPUs."""
    import torch

    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def _reranked(
    ranking: Ranking,
    search: Search,
    config: MiningConfig,
    work: Path | None = None,
    keys: Sequence[str] = (),
) -> Ranking:
    name = config.rerank
    if name is None:
        return ranking
    again = Reranking(
        ranking,
        lambda: load_cross_encoder(name),
        search.queries,
        search.pool.texts,
        config.rerank_depth,
    )
    if work is not None:
        again.keep_in(work, key_of(model_fingerprint(name), *keys))
    return again
