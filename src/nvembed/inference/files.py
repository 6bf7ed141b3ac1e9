"""Files of texts to files of vectors.

In: JSONL or JSONL.gz with a text per line; out: a float32 ``.npy`` matrix, one row per line in the
same order, and beside it the ids where the lines have them. Memory is bounded by a window of texts,
not by the file. Next file: ``inference/search.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from nvembed.core.errors import ConfigError, DataError
from nvembed.core.files import atomic_path, read_jsonl, write_json
from nvembed.core.progress import progress
from nvembed.inference.encoding import WINDOW_TEXTS, Side, encode_window
from nvembed.inference.load import load_encoder
from nvembed.inference.protocol import Encoder
from nvembed.model.settings import PrecisionChoice


@dataclass(frozen=True, slots=True)
class TextRow:
    """One line of a file of texts."""

    line: int
    text: str
    id: str | None


@dataclass(frozen=True, slots=True)
class EncodedFile:
    """What ``encode_file`` wrote; ``ids`` is the file of ids where the lines had them."""

    output: Path
    ids: Path | None
    rows: int
    dimension: int


def read_texts(path: str | Path, field: str | None = None) -> Iterator[TextRow]:
    """Read the texts of a JSONL or JSONL.gz file, line by line.

    Without ``field`` the text is the key ``text``, with the ``title`` in front where there is one
    (the BEIR layout). The id is the key ``_id`` or ``id``; either all lines have one or none.

    Raises:
        DataError: at the first line whose text is missing, no text, or empty, whose id is neither
            text nor integer, or that has an id where the first line has none (or the other way
            round).
    """
    with_ids: bool | None = None
    for line, row in read_jsonl(path):
        where = f"{path}:{line}"
        text_row = TextRow(line, _row_text(row, field, where), _row_id(row, where))
        if with_ids is None:
            with_ids = text_row.id is not None
        elif with_ids is not (text_row.id is not None):
            raise DataError(
                "this line has no id, others have" if with_ids else "only some lines have an id",
                where=where,
                expected='"_id" or "id" on every line or on none',
            )
        yield text_row


def encode_file(
    model: str | Encoder,
    input: Path,
    output: Path,
    *,
    task: str | None,
    field: str | None = None,
    dtype: PrecisionChoice | None = None,
) -> EncodedFile:
    """Embed every text of a file.

    The whole input is checked before the model is loaded. The output appears under its name only
    when it is complete.

    Args:
        model: folder or hub id, or an encoder that is loaded already.
        input: JSONL or JSONL.gz; see ``read_texts``.
        output: the ``.npy`` file; ids go to ``<output>.ids.json``, a list in row order.
        task: with an instruction the texts are queries, without they are documents.
        field: key of the text; ``None`` is ``text`` with the title in front.
        dtype: of the model's weights, see ``load_encoder``; the vectors are float32 in any case.

    Raises:
        DataError: a line cannot be used, or the file has none.
        ConfigError: the output is the input.
        ModelError: the model cannot be loaded or gives vectors that are no numbers.
        UserError: the output cannot be written (no space, no permission).
    """
    if output.resolve() == input.resolve():
        raise ConfigError("output and input are the same file", where=str(output))
    # Ids only: the texts are read again, window by window.
    ids = [row.id for row in read_texts(input, field)]
    if not ids:
        raise DataError("the file holds no texts", where=str(input), expected=_expected(field))
    encoder = load_encoder(model, dtype) if isinstance(model, str) else model
    _write_vectors(encoder, input, output, len(ids), task=task, field=field)
    ids_path = output.with_name(output.name + ".ids.json")
    if ids[0] is None:
        # One of an earlier run would belong to other vectors.
        ids_path.unlink(missing_ok=True)
        return EncodedFile(output, None, len(ids), encoder.dimension)
    write_json(ids_path, ids)
    return EncodedFile(output, ids_path, len(ids), encoder.dimension)


def _write_vectors(
    encoder: Encoder, input: Path, output: Path, rows: int, *, task: str | None, field: str | None
) -> None:
    texts = (row.text for row in read_texts(input, field))
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, encoder.dimension)}
    side: Side = "document" if task is None else "query"
    written = 0
    with atomic_path(output) as temporary, progress(rows, "encode") as bar:
        # Written in sequence and not through a memory map, in which a full disk kills the process.
        with open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            while window := list(islice(texts, WINDOW_TEXTS)):
                vectors = encode_window(encoder, window, side=side, task=task)
                file.write(vectors.astype("<f4", order="C", copy=False).tobytes())
                written += len(window)
                bar.advance(len(window))
        if written != rows:
            raise DataError(
                f"the file changed while it was read ({rows} texts, then {written})",
                where=str(input),
            )


def _row_text(row: dict[str, Any], field: str | None, where: str) -> str:
    key = field or "text"
    text = row.get(key)
    if not isinstance(text, str):
        message = f'"{key}" is not a text' if key in row else f'no key "{key}"'
        raise DataError(message, where=where, expected=_expected(field))
    title = row.get("title") if field is None else None
    if isinstance(title, str) and title.strip():
        text = f"{title} {text}".strip()
    if not text.strip():
        raise DataError(f'"{key}" is empty', where=where, expected="a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair; no tokenizer takes it.
        raise DataError(f'"{key}" holds half a character (a lone surrogate)', where=where) from None
    return text


def _row_id(row: dict[str, Any], where: str) -> str | None:
    value = row.get("_id", row.get("id"))
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError("the id is neither text nor integer", where=where)
    return str(value)


def _expected(field: str | None) -> str:
    return f'{{"{field or "text"}": text}} on every line'
