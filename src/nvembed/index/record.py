"""What a database remembers of how its vectors were made, and the check that it still holds."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nvembed.core.config import StrictModel
from nvembed.core.dtypes import Precision, PrecisionChoice
from nvembed.core.errors import ConfigError, ModelError
from nvembed.encoding.embed import encode_window
from nvembed.encoding.encoder import Encoder, load_encoder, settle_dtype
from nvembed.encoding.outputs import shorten
from nvembed.interop.fingerprint import contents_fingerprint

# Texts whose vectors are kept: an encoder that gives others is not the one of the database.
_PROBE = ("how do I sort a list?", "The moon turns around the earth.", "bread 42")
# Of their cosines: another dtype or machine stays above, another model below.
_SAME = 0.99


class DatabaseRecord(StrictModel):
    """How the vectors of a database were made.

    Attributes:
        layout: version of the table's columns.
        model: folder (absolute) or hub id; None for an encoder that was handed over.
        fingerprint: of the model's files, see ``contents_fingerprint``.
        dimension: width of the vectors, possibly the first of a wider model.
        task: instruction of queries that bring none.
        probe: vectors of a few fixed texts.
        dtype: of the weights, for all documents that are ever added; None where it is not known.
    """

    layout: Literal[1] = 1
    model: str | None
    fingerprint: str | None
    dimension: int
    task: str | None
    probe: tuple[tuple[float, ...], ...]
    dtype: Precision | None = None


def new_record(
    model: str | Encoder,
    encoder: Encoder,
    *,
    task: str | None,
    truncate_dim: int | None,
    dtype: Precision | None = None,
) -> DatabaseRecord:
    """Describe an encoder, with weights of a settled type.

    Raises:
        ConfigError: more dimensions are wanted than it has.
    """
    if truncate_dim is not None and not 1 <= truncate_dim <= encoder.dimension:
        raise ConfigError(
            f"{truncate_dim} dimensions asked for",
            where="truncate_dim",
            expected=f"1 to {encoder.dimension}, the width of the model",
        )
    dimension = truncate_dim or encoder.dimension
    name = None
    if isinstance(model, str):
        name = str(Path(model).resolve()) if Path(model).is_dir() else model
    return DatabaseRecord(
        model=name,
        fingerprint=contents_fingerprint(name) if name else None,
        dimension=dimension,
        task=task,
        probe=tuple(tuple(row) for row in _probe(encoder, dimension).tolist()),
        dtype=dtype,
    )


def recorded_encoder(
    record: DatabaseRecord, model: str | Encoder | None, dtype: PrecisionChoice | None, where: str
) -> Encoder:
    """Load the model of a database, or check that the one given is the same.

    Args:
        record: of the database.
        model: where the model lies now, or an encoder; None is where it lay.
        dtype: of the weights, see ``load_encoder``; ``auto`` is that of the database's documents.
        where: the database, for errors.

    Raises:
        ModelError: it is another model, or cannot be loaded.
    """
    if model is not None and not isinstance(model, str):
        check_encoder(record, model, where)
        return model
    name = model or record.model
    if name is None:
        raise ModelError("the database does not know its model", where=where, expected="--model")
    if record.model is not None and not Path(name).is_dir() and Path(record.model).is_absolute():
        raise ModelError(
            f"its model is no longer at {name}" if model is None else f"no folder {name}",
            where=where,
            hint="Say where it lies now: --model FOLDER",
        )
    if record.fingerprint is not None and contents_fingerprint(name) != record.fingerprint:
        raise _another(where, f"{name} is not the model, or no longer the state of it,")
    encoder = load_encoder(name, settle_dtype(name, dtype, begun=record.dtype))
    check_encoder(record, encoder, where)
    return encoder


def check_encoder(record: DatabaseRecord, encoder: Encoder, where: str) -> None:
    """Refuse an encoder whose vectors are not those of the database.

    Raises:
        ModelError: it is another.
    """
    if encoder.dimension < record.dimension:
        raise _another(where, f"a model of width {encoder.dimension} is not the one")
    cosines = (_probe(encoder, record.dimension) * np.array(record.probe)).sum(axis=1)
    if cosines.min() < _SAME:
        raise _another(
            where, f"test texts get other vectors (cosine {cosines.min():.3f}): not the model"
        )


def _another(where: str, message: str) -> ModelError:
    return ModelError(
        f"{message} that this database was made with",
        where=where,
        hint="Give the right one with --model, or index the documents into a new database",
    )


def first_dimensions(vectors: NDArray[np.float32], dimension: int) -> NDArray[np.float32]:
    """Shorten unit vectors ``(N, D)``; those of the width wanted stay as they are, to the bit."""
    return vectors if vectors.shape[1] == dimension else shorten(vectors, dimension)


def _probe(encoder: Encoder, dimension: int) -> NDArray[np.float32]:
    return shorten(encode_window(encoder, _PROBE, side="document"), dimension)
