"""Many texts through a model: the one bulk embedder, in memory or to a store of artifacts.

    texts → jobs (one artifact each) → windows of one instruction → prefetch: tokenised
          → the model, here or in workers → write-behind: checked and written

No model can hand vectors of the wrong shape or with NaN to any user of it. A file is named after
all its vectors depend on, so a run that was killed goes on with what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import astuple, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nvembed.core.background import prefetch, write_behind
from nvembed.core.errors import ConfigError, ModelError
from nvembed.core.reporting import Rates, hold_note, progress, release_notes
from nvembed.core.store import read_arrays, write_array, write_arrays
from nvembed.data.instructions import Side
from nvembed.model.encoder import Encoder, shorten
from nvembed.model.settings import LongTexts, Work
from nvembed.model.tokens import batches
from nvembed.model.workers import Engine, Loader, Pool, process_pool, ray_pool

if TYPE_CHECKING:
    from nvembed.kernels.machine import ThreadWatch

# Texts per call of the encoder: enough for it to sort by length, few enough to show progress.
WINDOW_TEXTS = 1024

_Arriving = Callable[[], NDArray[np.float32]]
_Made = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """How texts are embedded: all that vectors depend on, besides model and text."""

    input_type: Side
    task: str | None = None
    truncate_dim: int | None = None  # keep the first dimensions, at length 1; None keeps all
    long: LongTexts = field(default_factory=LongTexts)

    def width(self, encoder: Encoder) -> int:
        """Numbers in a vector; a ConfigError where the model has fewer than are wanted."""
        width = encoder.dimension
        wanted = width if self.truncate_dim is None else self.truncate_dim
        if not 1 <= wanted <= width:
            raise ConfigError(
                f"{wanted} dimensions asked for",
                where="truncate_dim",
                expected=f"1 to {width}, the width of the model",
            )
        return wanted


@dataclass(frozen=True, slots=True)
class Job:
    """Texts whose vectors lie in one file: ``.npz`` holds a whole ``Part``, ``.npy`` its vectors.

    ``own_tasks`` has, by its row, the instruction of a text that has one of its own.
    """

    texts: Sequence[str]
    path: Path
    own_tasks: Mapping[int, str] = field(default_factory=dict)


class Part(NamedTuple):
    """What comes out of a job."""

    vectors: NDArray[np.generic]  # (N, D)
    spans: NDArray[np.int64]  # (N, 2), characters of chunks; empty where a text has one vector
    counts: NDArray[np.int64]  # vectors per text


def save_part(path: Path, part: Part) -> None:
    """Write a part, whole or not at all."""
    if path.suffix == ".npy":
        write_array(path, part.vectors)
    else:
        write_arrays(path, part._asdict())


def read_part(path: Path) -> Part:
    """Read a part; a DataError where it is damaged."""
    return Part(*read_arrays(path, *Part._fields))


def encode_window(
    encoder: Encoder, texts: Sequence[str], *, side: Side, task: str | None = None
) -> NDArray[np.float32]:
    """Embed a few texts in one call; a ModelError where the vectors are of no use to anybody."""
    encode = encoder.encode_query if side == "query" else encoder.encode_document
    vectors = np.asarray(encode(texts, task=task), dtype=np.float32)
    _check_vectors(vectors, (len(texts), encoder.dimension), texts)
    return vectors


def encode_texts(
    encoder: Encoder,
    texts: Sequence[str],
    *,
    side: Side,
    task: str | None = None,
    description: str = "encode",
    own_tasks: Mapping[int, str] | None = None,
) -> NDArray[np.float32]:
    """Embed all texts into memory, with a progress bar: ``(len(texts), encoder.dimension)``."""
    job, rates = Job(texts, Path(), own_tasks or {}), Rates()
    vectors = np.empty((len(texts), encoder.dimension), dtype=np.float32)
    with progress(len(texts), description) as bar:
        for window in _launched([job], encoder, EncodeOptions(side, task)):
            vectors[window.rows] = window.part(encoder.dimension).vectors
            bar.advance(len(window.rows), **rates.add(texts=len(window.rows)))
    return vectors


def embed(
    missing: Iterable[Job],
    model: Encoder | Loader,
    options: EncodeOptions,
    made: _Made,
    *,
    processes: int = 1,
    engine: Engine = "local",
) -> None:
    """Embed the texts of jobs and write their files; without jobs no model is loaded.

    Workers load a ``Loader`` themselves. ``made`` is told how many texts were embedded, and how
    many tokens that were, if anybody counts them.
    """
    jobs = iter(missing)
    if (first := next(jobs, None)) is None:
        return
    jobs = chain([first], jobs)
    if engine == "ray" or processes > 1:
        assert isinstance(model, Loader)
        with ray_pool(model) if engine == "ray" else process_pool(processes, model) as pool:
            _embed_in_workers(jobs, pool, options, made)
    else:
        _embed_here(jobs, model.encoder if isinstance(model, Loader) else model, options, made)


def _embed_here(jobs: Iterable[Job], encoder: Encoder, options: EncodeOptions, made: _Made) -> None:
    width, watch = options.width(encoder), _watch(encoder)
    done: list[tuple[_Window, Part]] = []

    def write(window: _Window) -> None:
        done.append((window, window.part(width)))
        if sum(len(each.rows) for each, _ in done) == len(window.job.texts):
            save_part(window.job.path, _joined(done))
            done.clear()
        made(len(window.rows), window.work.tokens)
        if watch is not None and (line := watch.look()) is not None:
            hold_note(line)
            release_notes()

    write_behind(_launched(jobs, encoder, options), write)


def _watch(encoder: Encoder) -> ThreadWatch | None:
    """What tells of busy CPUs, where the model computes on them."""
    if getattr(getattr(encoder, "device", None), "type", None) != "cpu":
        return None
    from nvembed.kernels.machine import ThreadWatch  # torch, which an endpoint does not need

    return ThreadWatch(remedy="start it with OMP_NUM_THREADS={}")


def _embed_in_workers(jobs: Iterable[Job], pool: Pool, options: EncodeOptions, made: _Made) -> None:
    """Only as many jobs are read ahead as keep all workers busy; this process writes the files."""
    running: dict[Future[tuple[Part, int | None]], Job] = {}

    def collect() -> None:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job = running.pop(future)
            part, tokens = future.result()
            save_part(job.path, part)
            release_notes()  # a model has been loaded
            made(len(job.texts), tokens)

    for job in jobs:
        running[pool.submit(embed_job, job, options)] = job
        if len(running) >= 2 * pool.size:
            collect()
    while running:
        collect()


def embed_job(encoder: Encoder, job: Job, options: EncodeOptions) -> tuple[Part, int | None]:
    """Embed the texts of one job; also tells how many tokens the model has read."""
    width = options.width(encoder)
    done = [(window, window.part(width)) for window in _launched([job], encoder, options)]
    tokens = [window.work.tokens for window, _ in done]
    return _joined(done), None if None in tokens else sum(filter(None, tokens))


# --- Windows --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Window:
    """Rows of a job with one instruction, on their way through the model."""

    job: Job
    rows: list[int]
    work: Work
    arriving: _Arriving | None = None

    def part(self, width: int) -> Part:
        """Wait for the vectors and check them."""
        assert self.arriving is not None
        vectors, spans = self.arriving(), self.work.spans
        counts = [1] * len(self.rows) if spans is None else list(map(len, spans))
        _check_vectors(vectors, (sum(counts), width), [self.job.texts[row] for row in self.rows])
        flat = np.array([span for mine in spans or () for span in mine], dtype=np.int64)
        return Part(vectors, flat.reshape(-1, 2), np.array(counts, dtype=np.int64))


def _launched(jobs: Iterable[Job], encoder: Encoder, options: EncodeOptions) -> Iterator[_Window]:
    """Run the model on window after window, the next of which is tokenised meanwhile."""

    def prepared() -> Iterator[_Window]:
        for job in jobs:
            for task, rows in _rows_by_task(job, options.task):
                work = _prepare(encoder, [job.texts[row] for row in rows], task, options)
                yield _Window(job, rows, work)

    for window in prefetch(prepared()):
        window.arriving = window.work.launch()
        yield window


def _rows_by_task(job: Job, task: str | None) -> Iterator[tuple[str | None, list[int]]]:
    by_task: dict[str | None, list[int]] = {}
    for row in range(len(job.texts)):
        by_task.setdefault(job.own_tasks.get(row, task), []).append(row)
    for own, rows in by_task.items():
        for start in range(0, len(rows), WINDOW_TEXTS):
            yield own, rows[start : start + WINDOW_TEXTS]


def _joined(done: Sequence[tuple[_Window, Part]]) -> Part:
    """Put the windows of a job in the order of its rows."""
    parts = [part for _, part in done]
    if len(parts) == 1:
        return parts[0]
    assert all(window.work.spans is None for window, _ in done), "chunked jobs are one window"
    vectors = np.concatenate([part.vectors for part in parts])
    order = np.concatenate([np.array(window.rows) for window, _ in done])
    vectors[order] = vectors.copy()
    return Part(vectors, parts[0].spans, np.ones(len(vectors), dtype=np.int64))


def windows(
    texts: Iterable[str], folder: Path, identity: str, options: EncodeOptions
) -> Iterator[Job]:
    """Cut texts into jobs of one window each; ``identity`` is the fingerprint of the model."""
    how = (options.input_type, options.task, options.truncate_dim, *astuple(options.long))
    for window in batches(texts, WINDOW_TEXTS):
        key = hashlib.sha256(json.dumps([identity, *how, window]).encode()).hexdigest()
        yield Job(window, folder / f"{key[:32]}.npz")


def _prepare(
    encoder: Encoder, texts: Sequence[str], task: str | None, options: EncodeOptions
) -> Work:
    """Do what can be done before the model is free: an ``NVEmbed`` tokenises."""
    width, side, long = options.width(encoder), options.input_type, options.long
    if (prepare := getattr(encoder, "prepare", None)) is not None:
        cut = options.truncate_dim
        return prepare(texts, side=side, task=task, truncate_dim=cut, long=long)
    if long.way != "cut":
        raise ConfigError(
            f"this model cannot read long texts by {long.way!r}",
            where="long",
            hint="NVEmbed models and bare language models can; others cut",
        )

    def launch() -> _Arriving:
        vectors = encode_window(encoder, texts, side=side, task=task)
        if width != vectors.shape[1]:
            vectors = shorten(vectors, width)
        return lambda: vectors

    return Work(launch)


def _check_vectors(
    vectors: NDArray[np.float32], expected: tuple[int, int], texts: Sequence[str]
) -> None:
    """Refuse vectors that nobody could use; one of the texts is named."""
    if vectors.shape != expected:
        raise ModelError(f"the model gave vectors of shape {vectors.shape}", expected=str(expected))
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        text = texts[min(int(bad[0]), len(texts) - 1)]
        raise ModelError(
            f"the model gave NaN or infinity for {len(bad)} of {len(vectors)} texts, "
            f"the first is {text[:60]!r}",
            hint="Load it in float32; if that does not help, the weights are damaged",
        )
