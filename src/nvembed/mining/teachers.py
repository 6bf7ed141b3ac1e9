"""Teachers: who says which documents are near to a query.

In: a name (folder, hub id, address or ``bm25``) or an encoder; out: a ranking. With a work folder
everything is computed into files there, and by all processes that share it. Next: ``ranking.py``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from nvembed.core.dtypes import Precision, PrecisionChoice
from nvembed.core.errors import ConfigError
from nvembed.core.reporting import progress
from nvembed.core.store import claims, key_of, remembered
from nvembed.data.mining_config import MiningConfig
from nvembed.encoding.embed import EncodeOptions, InputType, Job, embed, encode_texts
from nvembed.encoding.encoder import Encoder, computed_fingerprint, settle_dtype
from nvembed.encoding.endpoint import is_endpoint
from nvembed.encoding.workers import Engine, Loader, settle_for
from nvembed.interop.fingerprint import model_fingerprint
from nvembed.mining.pool import Pool
from nvembed.mining.ranking import (
    BM25Ranking,
    Ranking,
    Reranking,
    VectorRanking,
    Vectors,
    load_cross_encoder,
)
from nvembed.mining.selection import Query

# Texts of a file. What a killed process loses is less than one; 64 MB at a width of 4,096.
SHARD_TEXTS = 4096
BM25_NAME = "bm25"


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts of one input type; ``own_tasks`` has the instructions of single texts, by row."""

    texts: Sequence[str]
    input_type: InputType
    task: str | None
    description: str
    own_tasks: Mapping[int, str] = field(default_factory=dict)


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


def _fingerprint(teacher: Loader) -> str:
    """What its vectors are kept under."""
    name = model_fingerprint if is_endpoint(teacher.name) else computed_fingerprint
    return name(teacher.name, teacher.dtype, teacher.endpoint_model)


def _embed_in_memory(batch: Batch, encoder: Encoder) -> Vectors:
    vectors_ND = encode_texts(
        encoder,
        batch.texts,
        side=batch.input_type,
        task=batch.task,
        description=batch.description,
        own_tasks=batch.own_tasks,
    )
    return Vectors([vectors_ND], max(len(batch.texts), 1))


def _embed_to_files(batch: Batch, teacher: Loader, work: Path, engine: Engine) -> list[Path]:
    """Embed what no file holds yet; several processes may do so at once."""
    identity = _fingerprint(teacher)
    numbers = range(-(-len(batch.texts) // SHARD_TEXTS))
    paths = [_shard(batch, number, work, identity).path for number in numbers]
    options = EncodeOptions(batch.input_type, batch.task)
    with progress(len(batch.texts), batch.description) as bar, claims(paths) as missing:
        bar.advance(sum(path.is_file() for path in paths) * SHARD_TEXTS)
        jobs = (_shard(batch, number, work, identity) for number in missing)
        embed(jobs, teacher, options, lambda texts, _: bar.advance(texts), engine=engine)
    return paths


def _shard(batch: Batch, number: int, work: Path, identity: str) -> Job:
    """The texts of one file, with the instructions of their own."""
    start = number * SHARD_TEXTS
    texts = batch.texts[start : start + SHARD_TEXTS]
    rows = range(start, start + len(texts))
    own = {row - start: batch.own_tasks[row] for row in rows if row in batch.own_tasks}
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    key = key_of(identity, batch.input_type, batch.task, digest.hexdigest(), *sorted(own.items()))
    return Job(texts, work / f"vectors-{key}.npy", own)


def rank_in_memory(search: Search, encoder: Encoder, config: MiningConfig) -> Ranking:
    """Rank with an encoder that is loaded; vectors stay in memory.

    Raises:
        ModelError: the encoder, or the cross-encoder, cannot be used.
    """
    queries, documents = (_embed_in_memory(batch, encoder) for batch in search.batches())
    ranking = VectorRanking(queries, documents, search.depth(config))
    return _reranked(ranking, search, config)


def rank_in_files(
    search: Search, teacher: Loader, config: MiningConfig, work: Path, engine: Engine
) -> Ranking:
    """Rank with vectors that lie in files, made where they are missing.

    Raises:
        ModelError: the teacher, or the cross-encoder, cannot be used.
        UserError: the disk is full, or ray is not installed.
    """
    queries, documents = (
        _embed_to_files(batch, teacher, work, engine) for batch in search.batches()
    )
    keys = [path.name for path in (*queries, *documents)]
    ranking = VectorRanking(
        Vectors(queries, SHARD_TEXTS), Vectors(documents, SHARD_TEXTS), search.depth(config)
    )
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
        mine.append(settle_for(engine, teacher, dtype))
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
