"""Files of texts to files of vectors; memory is bounded by a window of texts, not by the file."""

from __future__ import annotations

import glob
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import cast, get_args

import numpy as np

from nvembed.core.arguments import Precision, PrecisionChoice
from nvembed.core.errors import ConfigError, DataError, UserError
from nvembed.core.files import (
    STDIN,
    STDIN_NAME,
    atomic_path,
    ending_of,
    stdin_bytes,
    tidy,
    write_json,
    write_json_values,
)
from nvembed.core.ownership import NEW, check_outputs, remove, remove_named
from nvembed.core.reporting import Rates, progress
from nvembed.core.store import STORED, write_array
from nvembed.data.config import Column
from nvembed.data.instructions import Side
from nvembed.data.reading import Document, Skipped, input_files, read_documents
from nvembed.encoding import outputs
from nvembed.encoding.outputs import ENCODE, OutputFormat, Parts
from nvembed.model.bulk import EncodeOptions, Job, embed, windows
from nvembed.model.encoder import Encoder, check_task, computed_fingerprint
from nvembed.model.settings import LongTexts
from nvembed.model.workers import Engine, Loader, settle_for

_Reader = Callable[..., Iterator[Document]]

# What may lie beside an output.
_BESIDE = {"ids": "ids.json", "ranges": "ranges.npy", "spans": "spans.npy", "record": "run.json"}


@dataclass(frozen=True, slots=True)
class EncodedFile:
    """What ``encode_file`` wrote."""

    output: Path  # the vectors
    ids: Path | None  # file of the ids where the lines had them
    rows: int  # number of vectors
    dimension: int  # of a vector, before bits are packed
    ranges: Path | None = None  # file of the ranges of int8 and uint8
    skipped: Skipped | None = None  # bad lines that were left out
    dtype: Precision | None = None  # of the model's weights; None is what they were saved in


def encode_file(
    model: str | Encoder,
    input: Path | Sequence[Path],
    output: Path,
    *,
    task: str | None,
    columns: Mapping[str, Column] | None = None,
    dtype: PrecisionChoice | None = None,
    form: OutputFormat | None = None,
    keep_going: bool = False,
    long: LongTexts | None = None,
    processes: int = 1,
    engine: Engine = "local",
) -> EncodedFile:
    """Embed every text of a file, of several, of a folder or of stdin.

    The whole input is checked before the model is loaded. The output appears when it is complete;
    until then what is done lies in ``<output>.parts``, from where a run that was killed goes on, in
    the type it was begun with, if the model is given by name. ``<output>.run.json`` says how the
    vectors were made.

    Args:
        model: folder or hub id, or an encoder that is loaded already.
        input: see ``nvembed.data.reading.read_documents``.
        output: ``.npy`` (ids by row go to ``<output>.ids.json``); or a ``.parquet`` file or
            ``.lance`` table with ``id`` (the place of a text without one) and ``embedding``.
        task: with an instruction the texts are queries, without they are documents.
        columns: where ``text`` and ``id`` are found, see ``read_documents``.
        dtype: type of the model's weights, see ``load_encoder``.
        form: width and numbers; ``None`` is all dimensions in float32. Ranges of 8-bit numbers go
            to ``<output>.ranges.npy``.
        keep_going: leave lines out that cannot be used, and count them.
        long: what becomes of texts beyond the model's limit. Late chunking writes a vector per
            chunk, with the ids ``id#0`` …, and its characters to ``<output>.spans.npy`` ``(N, 2)``
            or the columns ``start`` and ``end``.
        processes: share out the texts, each with a GPU where there are some.
        engine: ``ray`` embeds on the workers of a Ray cluster.

    Raises:
        DataError: a line cannot be used, or there is none.
        ConfigError: the output is an input, is not encode's own, or cannot hold such vectors.
        ModelError: the model cannot be loaded or gives vectors that are no numbers.
        UserError: the output cannot be written (no space, no permission).
    """
    form, long, skipped = form or OutputFormat(), long or LongTexts(), Skipped()
    paths = [input] if isinstance(input, Path) else list(input)
    _check(model, paths, output, form.precision, task, processes > 1 or engine == "ray")
    side: Side = "document" if task is None else "query"
    options = EncodeOptions(side, task, form.truncate_dim, long)
    with _reader(paths, columns, keep_going) as read:
        count, with_ids = _count(read(skipped=skipped), paths)
        with _source(model, dtype, output, engine) as (source, folder):
            made = _embed_missing(read, source, options, folder, count, processes, engine)
            parts = Parts(made, lambda: map(_name, read()), chunked=long.way == "late")
            settled = source.dtype if isinstance(source, Loader) else None
            record = _record(model, settled, task)
            ids, ranges = _write(parts, output, form.precision, record, with_ids=with_ids)
    return EncodedFile(output, ids, parts.rows, parts.dimension, ranges, skipped, settled)


def _check(
    model: str | Encoder,
    paths: Sequence[Path],
    output: Path,
    precision: outputs.OutputPrecision,
    task: str | None,
    elsewhere: bool,
) -> None:
    """Refuse what cannot be done, before anything is read or loaded."""
    input_files(paths)  # one that is not there is told first
    name = model if isinstance(model, str) else None
    if name is not None:
        check_task(name, task)
    made = [output, *_beside(output).values()]
    places = [_parts_folder(output)]
    check_outputs(made, made_by=ENCODE, inputs=[*paths, name], places=places)
    outputs.check_output(output, precision)
    if name is None and elsewhere:
        raise ConfigError("other processes load the model by its name", expected="a name")


@contextmanager
def _reader(
    paths: Sequence[Path], columns: Mapping[str, Column] | None, keep_going: bool
) -> Iterator[_Reader]:
    """Give what reads the input: to be counted, window by window, and for the ids."""
    read = partial(read_documents, paths, columns=columns, keep_going=keep_going)
    if STDIN not in map(str, paths):
        yield read
        return
    with NamedTemporaryFile(prefix="stdin-") as file, stdin_bytes() as stream:
        shutil.copyfileobj(stream, file)
        file.flush()
        yield partial(read, stdin=Path(file.name))


def _name(document: Document) -> str:
    return document.place if document.id is None else document.id


def _count(documents: Iterator[Document], paths: Sequence[Path]) -> tuple[int, bool]:
    """Return the number of texts, and whether they have ids (all or none)."""
    with_ids: bool | None = None
    count = 0
    for document in documents:
        if with_ids is None:
            with_ids = document.id is not None
        elif with_ids is not (document.id is not None):
            raise DataError(
                "this line has no id, others have" if with_ids else "only some lines have an id",
                where=document.place,
                expected="an id on every line or on none",
            )
        count += 1
    if not count:
        shown = [STDIN_NAME if str(path) == STDIN else str(path) for path in paths]
        raise DataError("the file holds no texts", where=", ".join(shown))
    return count, bool(with_ids)


@contextmanager
def _source(
    model: str | Encoder, dtype: PrecisionChoice | None, output: Path, engine: Engine
) -> Iterator[tuple[Encoder | Loader, Path]]:
    """Give what embeds, and the folder of its parts, which is deleted when all went well."""
    for path in (output, *_beside(output).values()):
        tidy(path.parent, glob.escape(path.name))  # of a run that was killed
    if isinstance(model, str):
        folder = _parts_folder(output)
        try:
            yield Loader(model, _settled(model, dtype, folder, engine)), folder
        except UserError:
            if not any(folder.glob("*.np?")):  # no part: nothing to go on from
                remove_named(folder, STORED)
            raise
        remove_named(folder, STORED)
        return
    # Nothing names the state of a loaded model: its parts are of no use later.
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.", suffix=NEW) as name:
        yield model, Path(name)


def _settled(
    model: str, dtype: PrecisionChoice | None, folder: Path, engine: Engine
) -> Precision | None:
    """Settle the type of the weights: an output that was begun keeps its own."""
    file = folder / "begun.json"
    begun: object = None
    with suppress(OSError, ValueError, KeyError, TypeError):  # it is new, or the file is damaged
        earlier = json.loads(file.read_text("utf-8"))
        begun = earlier["dtype"] if earlier["model"] == model else None
    known = cast(Precision, begun) if begun in get_args(Precision) else None
    settled = settle_for(engine, model, dtype, known)
    write_json(file, {"model": model, "dtype": settled})
    return settled


def _embed_missing(
    read: _Reader,
    source: Encoder | Loader,
    options: EncodeOptions,
    folder: Path,
    count: int,
    processes: int,
    engine: Engine,
) -> list[Path]:
    """Embed the texts of which no part is there yet, and return the files of all parts."""
    identity = ""
    if isinstance(source, Loader):
        identity = computed_fingerprint(source.name, source.dtype)
    texts = (document.text for document in read())
    paths: list[Path] = []
    rates, found = Rates(), 0
    with progress(count, "encode") as bar:

        def missing() -> Iterator[Job]:
            nonlocal found
            for job in windows(texts, folder, identity, options):
                paths.append(job.path)
                found += len(job.texts)
                if job.path.is_file():
                    bar.advance(len(job.texts))
                else:
                    yield job

        def made(texts: int, tokens: int | None) -> None:
            counts = {"texts": texts} if tokens is None else {"texts": texts, "tokens": tokens}
            bar.advance(texts, **rates.add(**counts))

        embed(missing(), source, options, made, processes=processes, engine=engine)
    if found != count:
        raise DataError(f"the input changed while it was read ({count} texts, then {found})")
    return paths


def _record(model: str | Encoder, dtype: Precision | None, task: str | None) -> dict[str, object]:
    from nvembed.kernels.machine import computing_record

    name = model if isinstance(model, str) else type(model).__name__
    return {"model": name, "task": task, "computing": computing_record(dtype)}


def _write(
    parts: Parts,
    output: Path,
    precision: outputs.OutputPrecision,
    record: dict[str, object],
    *,
    with_ids: bool,
) -> tuple[Path | None, Path | None]:
    """Write the vectors, then what a matrix does not hold; return the files of ids and ranges."""
    paths = _beside(output)
    matrix = ending_of(output) not in outputs.TABLES
    has_ids = matrix and (with_ids or parts.chunked)
    has_ranges = precision in ("int8", "uint8")
    with ExitStack() as last:
        if has_ids:  # the input is read for them: it may have changed
            temporary = last.enter_context(atomic_path(paths["ids"], ENCODE))
            write_json_values(temporary, chain.from_iterable(parts.names()))
        outputs.write_vectors(parts, output, precision)
        for path in paths.values():
            remove(path)  # those of an earlier run would belong to other vectors
    if matrix and parts.chunked:
        write_array(paths["spans"], np.concatenate([part.spans for part in parts]), ENCODE)
    if has_ranges:
        write_array(paths["ranges"], outputs.value_ranges(parts), ENCODE)
    write_json(paths["record"], record, ENCODE)
    return paths["ids"] if has_ids else None, paths["ranges"] if has_ranges else None


def _beside(output: Path) -> dict[str, Path]:
    return {name: output.with_name(f"{output.name}.{end}") for name, end in _BESIDE.items()}


def _parts_folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.parts")
