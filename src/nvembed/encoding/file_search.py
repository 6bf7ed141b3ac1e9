"""Search a file of documents with one query: exact, no index to build, vectors cached."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nvembed.core.arguments import PrecisionChoice
from nvembed.core.cache import cache_folder, expanded
from nvembed.core.errors import ConfigError, DataError, UserError
from nvembed.core.store import read_array, write_array
from nvembed.data.config import Column
from nvembed.data.reading import read_documents
from nvembed.model.bulk import encode_texts, encode_window
from nvembed.model.encoder import (
    Encoder,
    check_task,
    computed_fingerprint,
    load_encoder,
    settle_dtype,
)


@dataclass(frozen=True, slots=True)
class Hit:
    """One result: rank from 1, cosine, the line's id where it has one, the text with its title."""

    rank: int
    score: float
    id: str | None
    text: str


def search_file(
    model: str | Encoder,
    documents: Path,
    query: str,
    *,
    task: str | None,
    top_k: int,
    columns: Mapping[str, Column] | None = None,
    dtype: PrecisionChoice | None = None,
    cache: Path | Literal["default"] | None = "default",
) -> list[Hit]:
    """Find the texts of a file that are nearest to a query.

    Args:
        model: folder or hub id, or an encoder that is loaded already (whose vectors are not cached,
            since nothing tells two encoders apart).
        documents: a file or a folder; see ``read_documents``.
        query: what to look for.
        task: the query's instruction; ``None`` is no instruction.
        top_k: number of hits, at least 1; fewer come back from a smaller file.
        columns: where text and id are found, see ``read_documents``.
        dtype: type of the weights, see ``load_encoder``.
        cache: folder of the cached vectors, by default that of the package (``core/cache.py``),
            ``None`` keeps none. Nothing is ever removed from it.

    Returns:
        Hits by falling score, equal scores in file order.

    Raises:
        ConfigError: the query is empty or ``top_k`` below 1.
        DataError: a line of the file cannot be used, or it has none.
        ModelError: the model cannot be loaded or gives vectors that are no numbers.
    """
    _check(model, query, task, top_k)
    rows = list(read_documents([documents], columns=columns, keep_going=None))
    if not rows:
        raise DataError("the file holds no texts", where=str(documents))
    texts = [row.text for row in rows]
    # Once: cached vectors and the query's are of one type.
    settled = settle_dtype(model, dtype) if isinstance(model, str) else None
    encoder = load_encoder(model, settled) if isinstance(model, str) else model
    query_vector = encode_window(encoder, [query], side="query", task=task)[0]
    if isinstance(model, str) and cache is not None:
        own = cache != "default"
        folder = expanded(Path(cache), where=str(cache)) if own else cache_folder("search")
        digest = hashlib.sha256(computed_fingerprint(model, settled).encode())
        for content in map(str.encode, texts):
            digest.update(len(content).to_bytes(8, "little") + content)
        vectors = _document_vectors(encoder, texts, folder / f"{digest.hexdigest()}.npy")
    else:
        vectors = encode_texts(encoder, texts, side="document")
    scores = vectors @ query_vector
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [
        Hit(rank, float(scores[row]), rows[row].id, rows[row].text)
        for rank, row in enumerate(order.tolist(), start=1)
    ]


def _check(model: str | Encoder, query: str, task: str | None, top_k: int) -> None:
    """Refuse what cannot be searched, before anything is read."""
    if not query.strip():
        raise ConfigError("the query is empty", where="query", expected="a text")
    if top_k < 1:
        raise ConfigError(f"{top_k} hits asked for", where="top_k", expected="at least 1")
    if isinstance(model, str):
        check_task(model, task)


def _document_vectors(encoder: Encoder, texts: list[str], cached: Path) -> NDArray[np.float32]:
    with suppress(DataError):  # not there, or damaged: then it is computed and written again
        known = read_array(cached)
        if known.shape == (len(texts), encoder.dimension) and known.dtype == np.float32:
            return known
    vectors = encode_texts(encoder, texts, side="document")
    with suppress(OSError, UserError):  # a home folder that cannot be written stops no search
        write_array(cached, vectors)
    return vectors
