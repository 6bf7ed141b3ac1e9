"""Search of a database: by vector, or by vector and words together, and a map of what was found."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed.core.arguments import PrecisionChoice
from nvembed.core.errors import ConfigError, ModelError
from nvembed.data.instructions import read_task
from nvembed.index.database import Database, DatabaseRecord, is_database
from nvembed.interop.model_folder import contents_fingerprint, find_gguf
from nvembed.model.bulk import EncodeOptions, encode_window
from nvembed.model.encoder import Encoder, load_encoder, prompts_of, settle_dtype, shorten

# Of reciprocal-rank fusion (Cormack, Clarke, Büttcher 2009); the least number of candidates.
RRF_CONSTANT = 60
RRF_DEPTH = 100


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How to search.

    Attributes:
        task: instruction of the query; None is the database's own, empty is none.
        top_k: number of documents, at least 1.
        where: filter, see ``index/where.py``.
        hybrid: by words as well, the two rankings fused by their ranks.
        exact: compare with every vector even where there is an index.
    """

    task: str | None = None
    top_k: int = 10
    where: str | None = None
    hybrid: bool = False
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """A document that was found."""

    rank: int  # from 1
    id: str
    text: str
    fields: dict[str, Any]  # those that it has, as values of their Arrow types
    cosine: float
    words: float | None  # BM25; None where it was not among the candidates by words
    fused: float | None  # the score that ranks a hybrid search; None of one by vector
    vector: NDArray[np.float32]  # (D,), of length 1


def search_index(
    path: str | Path,
    query: str,
    options: SearchOptions | None = None,
    *,
    model: str | Encoder | None = None,
    dtype: PrecisionChoice | None = "auto",
) -> list[Found]:
    """Find the documents of a database that are nearest to a query.

    Args:
        path: folder of the database.
        query: what to look for.
        options: how to search.
        model: where the model of the database lies now, or the loaded model; None is where it lay.
        dtype: type of the weights; ``auto`` is the type that the database was made in.

    Raises:
        ConfigError: there is no database, or the filter or the query cannot be used.
        ModelError: another model than the database's.
    """
    if not is_database(path):
        expected = "a folder that nvembed index has made"
        hint = "To search a file with a model, give --documents FILE"
        raise ConfigError("no database", where=str(path), expected=expected, hint=hint)
    options = options or SearchOptions()
    database = Database.open(Path(path))
    _check_query(query)  # what is wrong is told before the model is loaded
    database.count(options.where)
    if options.hybrid:
        database.check_words()
    encoder = recorded_encoder(database.record, model, dtype, str(path))
    return search_database(database, encoder, query, options)


def query_vector(
    database: Database, encoder: Encoder, query: str, task: str | None
) -> NDArray[np.float32]:
    """Embed a query as the database wants it: ``(D,)``, of length 1."""
    instruction = database.record.task if task is None else task or None
    made = encode_window(encoder, [query], side="query", task=instruction)
    return first_dimensions(made, database.record.dimension).reshape(-1)


def search_database(
    database: Database, encoder: Encoder, query: str, options: SearchOptions
) -> list[Found]:
    """Find at most ``top_k`` documents, best first, equal ones by id."""
    _check_query(query)
    return find(database, query, query_vector(database, encoder, query, options.task), options)


def _check_query(query: str) -> None:
    if not query.strip():
        raise ConfigError("the query is empty", where="query", expected="a text")


def find(
    database: Database, query: str, vector: NDArray[np.float32], options: SearchOptions
) -> list[Found]:
    """Find documents for a query that is embedded already; see ``search_database``."""
    if options.top_k < 1:
        raise ConfigError(f"{options.top_k} hits asked for", where="top_k", expected="at least 1")
    depth = max(RRF_DEPTH, 2 * options.top_k) if options.hybrid else options.top_k
    near = database.nearest(vector, depth, where=options.where, exact=options.exact)
    rows = {row["id"]: row for row in near}
    words: dict[str, float] = {}
    if options.hybrid:
        by_words = database.by_words(query, depth, where=options.where)
        words = {row["id"]: row.pop("_score") for row in by_words}
        rows |= {row["id"]: row for row in by_words if row["id"] not in rows}
    cosines = {id: float(row["vector"] @ vector) for id, row in rows.items()}
    fused: dict[str, float] = {}
    if options.hybrid:
        nearest = sorted((row["id"] for row in near), key=lambda id: (-cosines[id], id))
        for rank, id in chain(enumerate(nearest, start=1), enumerate(words, start=1)):
            fused[id] = fused.get(id, 0.0) + 1.0 / (RRF_CONSTANT + rank)
    order = sorted(rows, key=lambda id: (-(fused or cosines)[id], id))[: options.top_k]
    found = []
    for rank, id in enumerate(order, start=1):
        text, fields, vector = (rows[id][name] for name in ("text", "fields", "vector"))
        scores = (cosines[id], words.get(id), fused.get(id))
        found.append(Found(rank, id, text, fields, *scores, vector))
    return found


def map_of(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Lay vectors ``(N, D)`` out in the plane of its main components, ``(N, 2)``, within ±1."""
    centred = vectors - vectors.mean(axis=0, dtype=np.float64)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    plane: Any = np.zeros((len(vectors), 2))
    used = min(2, len(sizes))
    plane[:, :used] = (left * sizes)[:, :used]
    plane[np.abs(plane) < 1e-9] = 0.0
    greatest = plane[np.abs(plane).argmax(axis=0), [0, 1]]
    plane *= np.where(greatest < 0, -1.0, 1.0)  # equal input gives equal maps
    widest = float(np.abs(plane).max())
    return np.asarray(plane / widest if widest > 0 else plane, dtype=np.float64)


# --- The model of a database ----------------------------------------------------------------------

# Texts whose vectors are kept: an encoder that gives others is not the one of the database.
_PROBE = ("how do I sort a list?", "The moon turns around the earth.", "bread 42")
# Of their cosines: another dtype or machine stays above, another model below.
_SAME = 0.99


def new_record(
    model: str | Encoder, task: str | None, truncate_dim: int | None, dtype: PrecisionChoice | None
) -> tuple[DatabaseRecord, Encoder]:
    """Load the model of a new database, with weights of a settled type, and describe it."""
    name, settled = None, None
    if isinstance(model, str):
        settled = settle_dtype(model, dtype)
        name = str(Path(model).resolve()) if Path(model).exists() else model
    encoder = load_encoder(model, settled) if isinstance(model, str) else model
    task = read_task(task, prompts_of(encoder))
    dimension = EncodeOptions("document", truncate_dim=truncate_dim).width(encoder)
    record = DatabaseRecord(
        model=name,
        fingerprint=contents_fingerprint(name) if name else None,
        dimension=dimension,
        task=task,
        probe=tuple(tuple(row) for row in _probe(encoder, dimension).tolist()),
        dtype=settled,
    )
    return record, encoder


def recorded_encoder(
    record: DatabaseRecord, model: str | Encoder | None, dtype: PrecisionChoice | None, where: str
) -> Encoder:
    """Load the model of a database, or check that the one given is the same.

    ``model`` is where it lies now; a ``dtype`` of ``auto`` is that of the database's documents.
    """

    def another(message: str) -> ModelError:
        hint = "Give the right one with --model, or index the documents into a new database"
        return ModelError(f"{message} that this database was made with", where=where, hint=hint)

    if model is None or isinstance(model, str):
        name = model or record.model
        if name is None:
            raise ModelError(
                "the database does not know its model", where=where, expected="--model"
            )
        here = Path(name).exists() or find_gguf(name) is not None
        if record.model and Path(record.model).is_absolute() and not here:
            raise ModelError(
                f"its model is no longer at {name}" if model is None else f"no folder {name}",
                where=where,
                hint="Say where it lies now: --model FOLDER",
            )
        if record.fingerprint is not None and contents_fingerprint(name) != record.fingerprint:
            raise another(f"{name} is not the model, or no longer the state of it,")
        model = load_encoder(name, settle_dtype(name, dtype, begun=record.dtype))
    if model.dimension < record.dimension:
        raise another(f"a model of width {model.dimension} is not the one")
    cosine = (_probe(model, record.dimension) * np.array(record.probe)).sum(axis=1).min()
    if cosine < _SAME:
        raise another(f"test texts get other vectors (cosine {cosine:.3f}): not the model")
    return model


def first_dimensions(vectors: NDArray[np.float32], dimension: int) -> NDArray[np.float32]:
    """Shorten unit vectors ``(N, D)``; those of the width wanted stay as they are, to the bit."""
    return vectors if vectors.shape[1] == dimension else shorten(vectors, dimension)


def _probe(encoder: Encoder, dimension: int) -> NDArray[np.float32]:
    return shorten(encode_window(encoder, _PROBE, side="document"), dimension)
