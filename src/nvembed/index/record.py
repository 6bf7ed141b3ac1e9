"""What a database remembers of how its vectors were made, and the check that it still holds."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nvembed.core.arguments import Precision, PrecisionChoice
from nvembed.core.config import StrictModel
from nvembed.core.errors import ModelError
from nvembed.encoding.embed import EncodeOptions, encode_window
from nvembed.encoding.encoder import Encoder, load_encoder, prompts_of, settle_dtype, shorten
from nvembed.interop.model_folder import contents_fingerprint
from nvembed.text.instructions import read_task

# Texts whose vectors are kept: an encoder that gives others is not the one of the database.
_PROBE = ("how do I sort a list?", "The moon turns around the earth.", "bread 42")
# Of their cosines: another dtype or machine stays above, another model below.
_SAME = 0.99


class DatabaseRecord(StrictModel):
    """How the vectors of a database were made."""

    layout: Literal[1] = 1  # version of the table's columns
    model: str | None  # folder (absolute) or hub id; None for an encoder that was handed over
    fingerprint: str | None  # of the model's files, see ``contents_fingerprint``
    dimension: int  # width of the vectors, possibly the first of a wider model
    task: str | None  # instruction of queries that bring none
    probe: tuple[tuple[float, ...], ...]  # vectors of ``_PROBE``
    dtype: Precision | None = None  # of the weights, for all documents; None where not known


def new_record(
    model: str | Encoder, task: str | None, truncate_dim: int | None, dtype: PrecisionChoice | None
) -> tuple[DatabaseRecord, Encoder]:
    """Load the model of a new database, with weights of a settled type, and describe it."""
    name, settled = None, None
    if isinstance(model, str):
        settled = settle_dtype(model, dtype)
        name = str(Path(model).resolve()) if Path(model).is_dir() else model
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

    ``model`` is where it lies now, or an encoder; None is where it lay. A ``dtype`` of ``auto`` is
    that of the database's documents. Errors name the database, ``where``.
    """

    def another(message: str) -> ModelError:
        return ModelError(
            f"{message} that this database was made with",
            where=where,
            hint="Give the right one with --model, or index the documents into a new database",
        )

    if model is None or isinstance(model, str):
        name = model or record.model
        if name is None:
            raise ModelError(
                "the database does not know its model", where=where, expected="--model"
            )
        if (
            record.model is not None
            and not Path(name).is_dir()
            and Path(record.model).is_absolute()
        ):
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
