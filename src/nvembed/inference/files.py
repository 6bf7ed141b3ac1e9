"""Files of texts to files of vectors.

In: what ``inference/reading.py`` reads; out: a float32 ``.npy`` matrix, one row per text in the
same order (or fewer dimensions, 8 bits or 1 bit: ``inference/outputs.py``), and beside it the ids
where the lines have them. Memory is bounded by a window of texts, not by the file. Next file:
``inference/search.py``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import ConfigError, DataError, UserError
from nvembed.core.files import atomic_path, tidy, write_json
from nvembed.core.progress import progress
from nvembed.inference.encoding import WINDOW_TEXTS, Side, encode_window
from nvembed.inference.fingerprint import model_fingerprint
from nvembed.inference.load import load_encoder
from nvembed.inference.outputs import OutputFormat, OutputPrecision, quantize_file, shorten
from nvembed.inference.protocol import Encoder
from nvembed.inference.reading import STDIN, Document, Skipped, input_files, read_documents
from nvembed.model.settings import PrecisionChoice


@dataclass(frozen=True, slots=True)
class EncodedFile:
    """What ``encode_file`` wrote.

    Attributes:
        output: the vectors.
        ids: file of the ids where the lines had them.
        rows: number of vectors.
        dimension: of a vector, before bits are packed.
        ranges: file of the ranges of ``int8`` and ``uint8``.
        skipped: bad lines that were left out.
    """

    output: Path
    ids: Path | None
    rows: int
    dimension: int
    ranges: Path | None = None
    skipped: Skipped | None = None


def encode_file(
    model: str | Encoder,
    input: Path | Sequence[Path],
    output: Path,
    *,
    task: str | None,
    field: str | None = None,
    dtype: PrecisionChoice | None = None,
    form: OutputFormat | None = None,
    id_field: str | None = None,
    keep_going: bool = False,
) -> EncodedFile:
    """Embed every text of a file, of several, of a folder or of stdin.

    The whole input is checked before the model is loaded. The output appears under its name only
    when it is complete; until then what is done lies in ``<output>.parts`` beside it, from where a
    run that was killed goes on, if the model is given by name.

    Args:
        model: folder or hub id, or an encoder that is loaded already.
        input: see ``nvembed.inference.reading.read_documents``.
        output: ``.npy`` (ids go to ``<output>.ids.json``, a list in row order) or ``.parquet`` with
            the columns ``id`` (the place of a text without one) and ``embedding``.
        task: with an instruction the texts are queries, without they are documents.
        field: key of the text; ``None`` is ``text`` with the title in front.
        dtype: of the model's weights, see ``load_encoder``.
        form: of the vectors; ``None`` is all dimensions in float32. The ranges of 8-bit numbers go
            to ``<output>.ranges.npy``.
        id_field: key of the id; ``None`` is ``_id`` or ``id``.
        keep_going: leave lines out that cannot be used, and count them.

    Raises:
        DataError: a line cannot be used, or there is none.
        ConfigError: the output is an input, vectors have fewer dimensions than asked for, or
            Parquet is wanted of numbers that are not float32.
        ModelError: the model cannot be loaded or gives vectors that are no numbers.
        UserError: the output cannot be written (no space, no permission).
    """
    form = form or OutputFormat()
    paths = [input] if isinstance(input, Path) else list(input)
    if output.resolve() in [path.resolve() for path in input_files(paths)]:
        raise ConfigError("output and input are the same file", where=str(output))
    if output.suffix == ".parquet" and form.precision != "float32":
        raise ConfigError(
            f"{form.precision} in Parquet", where=str(output), expected="float32, or a .npy file"
        )
    with ExitStack() as stack:
        skipped = Skipped()
        paths = [stack.enter_context(_spooled()) if str(p) == STDIN else p for p in paths]
        # Ids only: the texts are read again, window by window.
        documents = partial(
            read_documents, paths, text_key=field, id_key=id_field, keep_going=keep_going
        )
        ids = list(_checked_ids(documents(skipped=skipped)))
        if not ids:
            names = ", ".join(map(str, paths))
            raise DataError("the file holds no texts", where=names, expected=_expected(field))
        encoder = load_encoder(model, dtype) if isinstance(model, str) else model
        dimension = _dimension(encoder, form)
        identity = model_fingerprint(model, dtype) if isinstance(model, str) else None
        job = _Job(encoder, documents, task, len(ids), dimension, identity)
        ids_path, ranges_path = (output.with_name(output.name + end) for end in _BESIDE)
        ranges = _write_output(job, output, form.precision)
    # Files of an earlier run would belong to other vectors.
    ids_path.unlink(missing_ok=True)
    ranges_path.unlink(missing_ok=True)
    with_ids = ids[0] is not None and output.suffix != ".parquet"
    if with_ids:
        write_json(ids_path, ids)
    if ranges is not None:
        np.save(ranges_path, ranges)
    return EncodedFile(
        output=output,
        ids=ids_path if with_ids else None,
        rows=len(ids),
        dimension=dimension,
        ranges=None if ranges is None else ranges_path,
        skipped=skipped,
    )


def _checked_ids(documents: Iterator[Document]) -> Iterator[str | None]:
    """The ids; either all texts have one or none."""
    with_ids: bool | None = None
    for document in documents:
        if with_ids is None:
            with_ids = document.id is not None
        elif with_ids is not (document.id is not None):
            raise DataError(
                "this line has no id, others have" if with_ids else "only some lines have an id",
                where=document.place,
                expected='"_id" or "id" on every line or on none',
            )
        yield document.id


@contextmanager
def _spooled() -> Iterator[Path]:
    """Stdin as a file, since the input is read twice."""
    stream = sys.stdin.buffer
    beginning = stream.read(1 << 16)
    ending = ".jsonl" if beginning.lstrip().startswith(b"{") else ".txt"
    with NamedTemporaryFile(prefix="stdin-", suffix=ending) as file:
        file.write(beginning)
        shutil.copyfileobj(stream, file)
        file.flush()
        yield Path(file.name)


_BESIDE = (".ids.json", ".ranges.npy")


@dataclass(frozen=True, slots=True)
class _Job:
    """What is encoded; ``rows`` and ``dimension`` are the shape of the matrix.

    ``identity`` names the state of the model, None where nothing does: then no work is kept.
    """

    encoder: Encoder
    documents: Callable[[], Iterator[Document]]
    task: str | None
    rows: int
    dimension: int
    identity: str | None


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
    parts = output.with_name(f"{output.name}.parts")
    if output.parent.is_dir():
        tidy(output.parent, output.name)  # of a run that was killed
    ranges = None
    with atomic_path(output) as temporary:
        if output.suffix == ".parquet":
            _write_parquet(job, temporary, parts)
        elif precision == "float32":
            _write_vectors(job, temporary, parts)
        else:
            with NamedTemporaryFile(dir=output.parent, prefix=f".{output.name}.") as full:
                _write_vectors(job, Path(full.name), parts)
                ranges = quantize_file(Path(full.name), temporary, precision)
    shutil.rmtree(parts, ignore_errors=True)
    return ranges


def _write_vectors(job: _Job, path: Path, parts: Path) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (job.rows, job.dimension)}
    # Written in sequence and not through a memory map, in which a full disk kills the process.
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for _, vectors in _windows(job, parts):
            file.write(vectors.astype("<f4", order="C", copy=False).tobytes())


def _write_parquet(job: _Job, path: Path, parts: Path) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("pyarrow is not installed", hint="pip install 'nvembed[data]'") from error
    vector = pyarrow.list_(pyarrow.float32(), job.dimension)
    schema = pyarrow.schema([("id", pyarrow.string()), ("embedding", vector)])
    with pyarrow.parquet.ParquetWriter(path, schema) as file:
        for window, vectors in _windows(job, parts):
            ids = [document.id or document.place for document in window]
            numbers = pyarrow.array(vectors.reshape(-1), pyarrow.float32())
            column = pyarrow.FixedSizeListArray.from_arrays(numbers, job.dimension)
            file.write_table(pyarrow.table([pyarrow.array(ids), column], schema=schema))


def _windows(job: _Job, parts: Path) -> Iterator[tuple[list[Document], NDArray[np.float32]]]:
    """Yield a window of documents with its vectors, of the final width, until all are done."""
    documents = job.documents()
    done, started = 0, time.monotonic()
    with progress(job.rows, "encode") as bar:
        while window := list(islice(documents, WINDOW_TEXTS)):
            yield window, _vectors(job, [document.text for document in window], parts)
            done += len(window)
            bar.advance(len(window), **{"texts/s": done / (time.monotonic() - started)})
    if done != job.rows:
        raise DataError(
            f"the input changed while it was read ({job.rows} texts, then {done})",
            where=window[0].place if window else None,
        )


def _vectors(job: _Job, texts: list[str], parts: Path) -> NDArray[np.float32]:
    """Embed a window, or take what a run that was killed has left of it."""
    known = None
    if job.identity is not None:
        settings = json.dumps([job.identity, job.task, job.dimension, texts])
        known = parts / f"{hashlib.sha256(settings.encode()).hexdigest()[:32]}.npy"
        if known.is_file():
            kept: NDArray[np.float32] = np.load(known)
            return kept
    side: Side = "document" if job.task is None else "query"
    vectors = encode_window(job.encoder, texts, side=side, task=job.task)
    if job.dimension != vectors.shape[1]:
        vectors = shorten(vectors, job.dimension)
    if known is not None:
        with atomic_path(known) as temporary, open(temporary, "wb") as file:
            np.save(file, vectors)
    return vectors


def _expected(field: str | None) -> str:
    return f'{{"{field or "text"}": text}} on every line'
