"""Files of texts to files of vectors.

In: JSONL or JSONL.gz with a text per line; out: a float32 ``.npy`` matrix, one row per line in the
same order (or fewer dimensions, 8 bits or 1 bit: ``inference/outputs.py``), and beside it the ids
where the lines have them. Memory is bounded by a window of texts, not by the file. Next file:
``inference/search.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import ConfigError, DataError
from nvembed.core.files import atomic_path, read_jsonl, write_json
from nvembed.core.progress import progress
from nvembed.inference.encoding import WINDOW_TEXTS, Side, encode_window
from nvembed.inference.load import load_encoder
from nvembed.inference.outputs import OutputFormat, OutputPrecision, quantize_file, shorten
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
    """What ``encode_file`` wrote.

    Attributes:
        output: the vectors.
        ids: file of the ids where the lines had them.
        rows: number of vectors.
        dimension: of a vector, before bits are packed.
        ranges: file of the ranges of ``int8`` and ``uint8``.
    """

    output: Path
    ids: Path | None
    rows: int
    dimension: int
    ranges: Path | None = None


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
    form: OutputFormat | None = None,
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
        dtype: of the model's weights, see ``load_encoder``.
        form: of the vectors; ``None`` is all dimensions in float32. The ranges of 8-bit numbers go
            to ``<output>.ranges.npy``.

    Raises:
        DataError: a line cannot be used, or the file has none.
        ConfigError: the output is the input, or the vectors have fewer dimensions than asked for.
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
    form = form or OutputFormat()
    dimension = _dimension(encoder, form)
    job = _Job(encoder, input, task, field, len(ids), dimension)
    ids_path, ranges_path = (output.with_name(output.name + end) for end in _BESIDE)
    ranges = _write_output(job, output, form.precision)
    # Files of an earlier run would belong to other vectors.
    ids_path.unlink(missing_ok=True)
    ranges_path.unlink(missing_ok=True)
    if ids[0] is not None:
        write_json(ids_path, ids)
    if ranges is not None:
        np.save(ranges_path, ranges)
    return EncodedFile(
        output=output,
        ids=None if ids[0] is None else ids_path,
        rows=len(ids),
        dimension=dimension,
        ranges=None if ranges is None else ranges_path,
    )


_BESIDE = (".ids.json", ".ranges.npy")


@dataclass(frozen=True, slots=True)
class _Job:
    """What is encoded; ``rows`` and ``dimension`` are the shape of the matrix."""

    encoder: Encoder
    input: Path
    task: str | None
    field: str | None
    rows: int
    dimension: int


def _dimension(encoder: Encoder, form: OutputFormat) -> int:
    width = encoder.dimension
    wanted = width if form.truncate_dim is None else form.truncate_dim
    if not 1 <= wanted <= width:
        raise ConfigError(
            f"{wanted} dimensions asked for",
            where="truncate_dim",
            expected=f"1 to {width}, the width of the model",
        )
    return wanted


def _write_output(
    job: _Job, output: Path, precision: OutputPrecision
) -> NDArray[np.float32] | None:
    """Write the vectors, quantised by way of a temporary file; returns the ranges if any."""
    with atomic_path(output) as temporary:
        if precision == "float32":
            _write_vectors(job, temporary)
            return None
        with NamedTemporaryFile(dir=output.parent, prefix=f".{output.name}.") as full:
            _write_vectors(job, Path(full.name))
            return quantize_file(Path(full.name), temporary, precision)


def _write_vectors(job: _Job, path: Path) -> None:
    texts = (row.text for row in read_texts(job.input, job.field))
    header = {"descr": "<f4", "fortran_order": False, "shape": (job.rows, job.dimension)}
    side: Side = "document" if job.task is None else "query"
    written = 0
    # Written in sequence and not through a memory map, in which a full disk kills the process.
    with open(path, "wb") as file, progress(job.rows, "encode") as bar:
        np.lib.format.write_array_header_1_0(file, header)
        while window := list(islice(texts, WINDOW_TEXTS)):
            vectors = encode_window(job.encoder, window, side=side, task=job.task)
            short = (
                vectors if job.dimension == vectors.shape[1] else shorten(vectors, job.dimension)
            )
            file.write(short.astype("<f4", order="C", copy=False).tobytes())
            written += len(window)
            bar.advance(len(window))
    if written != job.rows:
        raise DataError(
            f"the file changed while it was read ({job.rows} texts, then {written})",
            where=str(job.input),
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
