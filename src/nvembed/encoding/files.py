"""Files of texts to files of vectors.

In: what ``encoding/reading.py`` reads; out: a float32 ``.npy`` matrix, one row per text in the
same order (or fewer dimensions, 8 bits or 1 bit: ``encoding/outputs.py``), and beside it the ids
where the lines have them. Memory is bounded by a window of texts, not by the file. Next file:
``encoding/file_search.py``.
"""

from __future__ import annotations

import glob
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import cast, get_args

import numpy as np

from nvembed.core.dtypes import Precision, PrecisionChoice
from nvembed.core.errors import ConfigError, DataError
from nvembed.core.files import tidy, write_json
from nvembed.core.ownership import NEW, check_outputs, remove, remove_named
from nvembed.core.reporting import ProgressBar, Rates, progress
from nvembed.core.store import STORED, write_array
from nvembed.core.text_files import STDIN, STDIN_NAME, ending_of, stdin_bytes
from nvembed.data.sources.config import Column
from nvembed.encoding.embed import EncodeOptions, Job, embed, windows
from nvembed.encoding.encoder import Encoder, computed_fingerprint
from nvembed.encoding.outputs import (
    ENCODE,
    TABLES,
    OutputFormat,
    OutputPrecision,
    Parts,
    check_output,
    value_ranges,
    write_vectors,
)
from nvembed.encoding.reading import Document, Skipped, input_files, read_documents
from nvembed.encoding.workers import Engine, Loader, settle_for
from nvembed.model.settings import LongTexts

_BESIDE = {
    "ids": ".ids.json",
    "ranges": ".ranges.npy",
    "spans": ".spans.npy",
    "record": ".run.json",
}


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
        dtype: of the model's weights; ``None`` is what they were saved in.
    """

    output: Path
    ids: Path | None
    rows: int
    dimension: int
    ranges: Path | None = None
    skipped: Skipped | None = None
    dtype: Precision | None = None


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

    The whole input is checked before the model is loaded. The output appears under its name only
    when it is complete; until then what is done lies in ``<output>.parts`` beside it, from where a
    run that was killed goes on, if the model is given by name, in the type it was begun with.
    ``<output>.run.json`` says how the vectors were made.

    Args:
        model: folder or hub id, or an encoder that is loaded already.
        input: see ``nvembed.encoding.reading.read_documents``.
        output: ``.npy`` (ids go to ``<output>.ids.json``, a list in row order), or a ``.parquet``
            file or ``.lance`` table with the columns ``id`` (the place of a text without one) and
            ``embedding``.
        task: with an instruction the texts are queries, without they are documents.
        columns: where ``text`` and ``id`` are found, see ``read_documents``.
        dtype: of the model's weights, see ``load_encoder``.
        form: of the vectors; ``None`` is all dimensions in float32. The ranges of 8-bit numbers go
            to ``<output>.ranges.npy``.
        keep_going: leave lines out that cannot be used, and count them.
        long: what becomes of texts beyond the model's limit. Late chunking writes a vector per
            chunk, with the ids ``id#0``, ``id#1`` …, and the characters of each: in
            ``<output>.spans.npy`` ``(N, 2)``, or the columns ``start`` and ``end``.
        processes: share out the texts, each with a GPU where there are some.
        engine: ``ray`` embeds on the workers of a Ray cluster.

    Raises:
        DataError: a line cannot be used, or there is none.
        ConfigError: the output is an input or lies in one, something is there that encode did not
            make, vectors have fewer dimensions than asked for, or a table is wanted of numbers
            that are not float32.
        ModelError: the model cannot be loaded or gives vectors that are no numbers.
        UserError: the output cannot be written (no space, no permission).
    """
    form, long = form or OutputFormat(), long or LongTexts()
    paths = [input] if isinstance(input, Path) else list(input)
    input_files(paths)  # one that is not there is told first
    folder = output.with_name(f"{output.name}.parts")
    name = model if isinstance(model, str) else None
    outputs = [output, *_beside(output).values()]
    check_outputs(outputs, made_by=ENCODE, inputs=[*paths, name], places=[folder])
    check_output(output, form.precision)
    if not isinstance(model, str) and (processes > 1 or engine == "ray"):
        raise ConfigError("other processes load the model by its name", expected="a name")
    with ExitStack() as stack:
        skipped = Skipped()
        stdin = stack.enter_context(_spooled()) if STDIN in map(str, paths) else None
        # Ids only: the texts are read again, window by window.
        documents = partial(
            read_documents, paths, columns=columns, keep_going=keep_going, stdin=stdin
        )
        with_ids, names = _names(documents(skipped=skipped))
        if not names:
            names = [STDIN_NAME if str(path) == STDIN else str(path) for path in paths]
            raise DataError("the file holds no texts", where=", ".join(names))
        options = EncodeOptions(
            "document" if task is None else "query", task, form.truncate_dim, long
        )
        for path in outputs:
            tidy(path.parent, glob.escape(path.name))  # of a run that was killed
        source: Encoder | Loader
        if isinstance(model, str):
            settled = _settled(model, dtype, folder, engine)
            source = Loader(model, settled)
        else:  # nothing names its state: its parts are of no use later
            folder = stack.enter_context(_folder_for_now(output))
            source, settled = model, None
        with progress(len(names), "encode") as bar:
            work = _Parts(documents, options, folder, source, bar)
            embed(work.missing(), source, options, work.made, processes=processes, engine=engine)
        work.check(len(names))
        parts = Parts(work.paths, names, chunked=long.way == "late")
        rows, dimension = parts.shape
        write_vectors(parts, output, form.precision)
        beside = _write_beside(parts, output, form.precision, with_ids=with_ids)
        record = output.with_name(output.name + _BESIDE["record"])
        write_json(record, _record(model, settled, task), ENCODE)
        remove_named(folder, STORED)
    return EncodedFile(
        output, beside.get("ids"), rows, dimension, beside.get("ranges"), skipped, settled
    )


def _names(documents: Iterator[Document]) -> tuple[bool, list[str]]:
    """Whether texts have ids (all or none), and these, or their places."""
    with_ids: bool | None = None
    names = []
    for document in documents:
        if with_ids is None:
            with_ids = document.id is not None
        elif with_ids is not (document.id is not None):
            raise DataError(
                "this line has no id, others have" if with_ids else "only some lines have an id",
                where=document.place,
                expected="an id on every line or on none",
            )
        names.append(document.place if document.id is None else document.id)
    return bool(with_ids), names


class _Parts:
    """The parts of an output: those that are there are counted, the others are to be made."""

    def __init__(
        self,
        documents: Callable[[], Iterator[Document]],
        options: EncodeOptions,
        folder: Path,
        model: Encoder | Loader,
        bar: ProgressBar,
    ) -> None:
        identity = (
            computed_fingerprint(model.name, model.dtype) if isinstance(model, Loader) else ""
        )
        texts = (document.text for document in documents())
        self.paths: list[Path] = []
        self._jobs = windows(texts, folder, identity, options)
        self._texts = 0
        self._bar, self._rates = bar, Rates()

    def missing(self) -> Iterator[Job]:
        for job in self._jobs:
            self.paths.append(job.path)
            self._texts += len(job.texts)
            if job.path.is_file():
                self._bar.advance(len(job.texts))
            else:
                yield job

    def made(self, texts: int, tokens: int | None) -> None:
        counts = {"texts": texts} if tokens is None else {"texts": texts, "tokens": tokens}
        self._bar.advance(texts, **self._rates.add(**counts))

    def check(self, count: int) -> None:
        if self._texts != count:
            raise DataError(
                f"the input changed while it was read ({count} texts, then {self._texts})"
            )


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


def _record(model: str | Encoder, dtype: Precision | None, task: str | None) -> dict[str, object]:
    from nvembed.kernels.precision import computing_record

    name = model if isinstance(model, str) else type(model).__name__
    return {"model": name, "task": task, "computing": computing_record(dtype)}


def _write_beside(
    parts: Parts, output: Path, precision: OutputPrecision, *, with_ids: bool
) -> dict[str, Path]:
    """Write what a matrix does not hold; files of an earlier run would belong to other vectors."""
    paths = _beside(output)
    for path in paths.values():
        remove(path)
    written = {}
    if ending_of(output) not in TABLES:
        if with_ids or parts.chunked:
            write_json(paths["ids"], parts.names, ENCODE)
            written["ids"] = paths["ids"]
        if parts.chunked:
            spans = np.concatenate([part.spans for _, part in parts])
            write_array(paths["spans"], spans, ENCODE)
        if precision in ("int8", "uint8"):
            write_array(paths["ranges"], value_ranges(parts), ENCODE)
            written["ranges"] = paths["ranges"]
    return written


def _beside(output: Path) -> dict[str, Path]:
    """The files that may lie beside an output."""
    return {name: output.with_name(output.name + end) for name, end in _BESIDE.items()}


@contextmanager
def _folder_for_now(output: Path) -> Iterator[Path]:
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.", suffix=NEW) as folder:
        yield Path(folder)


@contextmanager
def _spooled() -> Iterator[Path]:
    """Standard input as a file, since the input is read twice."""
    with NamedTemporaryFile(prefix="stdin-") as file, stdin_bytes() as stream:
        shutil.copyfileobj(stream, file)
        file.flush()
        yield Path(file.name)
