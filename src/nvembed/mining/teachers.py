"""Teachers: who says which documents are near to a query.

In: a name (folder, hub id, address or ``bm25``) or an encoder; out: a ranking. With a work folder
everything is computed into files there, and by all processes that share it. Next: ``ranking.py``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from nvembed.core.arguments import Precision, PrecisionChoice
from nvembed.core.errors import ConfigError
from nvembed.core.reporting import progress
from nvembed.core.store import claims, key_of, remembered
from nvembed.data.config import MiningConfig
from nvembed.encoding.embed import EncodeOptions, Job, embed, encode_texts
from nvembed.encoding.encoder import Encoder, computed_fingerprint, is_endpoint, settle_dtype
from nvembed.encoding.workers import Engine, Loader, settle_for
from nvembed.interop.model_folder import model_fingerprint
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

    ``tasks`` are the instructions of queries that have none of their own, and of documents. They
    play no part in BM25.
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
    """Refuse what does not go together, naming the option."""
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
    if dtype != "auto":
        return dtype
    mine: list[Precision | None] = []

    def settle() -> Precision | None:
        mine.append(settle_for(engine, teacher, dtype))
        return mine[-1]

    kept = cast(Precision, remembered(work, "dtype", settle))
    return kept if mine else settle_dtype(teacher, dtype, begun=kept)
