"""One evaluation from names to files: local folders and tasks of mteb, in one or several processes.

Files: ``results.json`` after every task, ``results.run.json`` (what it was made with),
``results.items/`` (for ``nvembed compare``) and ``results.mteb/`` (mteb's own format). Started
again, it keeps the finished tasks, and takes the vectors of a half finished one from the cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nvembed.core.errors import ConfigError
from nvembed.core.files import write_json
from nvembed.core.progress import progress
from nvembed.core.runs import describe_environment
from nvembed.evaluation.cached import CachedEncoder
from nvembed.evaluation.items import items_folder, write_items
from nvembed.evaluation.results import TaskResult, read_results, write_results
from nvembed.evaluation.run import (
    BM25_NAME,
    TaskOutcome,
    fits_bm25,
    score_bm25,
    score_task,
    task_result,
)
from nvembed.evaluation.tasks import LocalTask, load_task, read_json_object
from nvembed.inference.fingerprint import model_fingerprint
from nvembed.inference.processes import process_pool
from nvembed.inference.protocol import Encoder
from nvembed.model.settings import Precision

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

    from nvembed.evaluation.hub import HubEncoder, InstructionSource

Engine = Literal["local", "mteb"]

_SHOWN_FINGERPRINT = 12


@dataclass(frozen=True)
class Settings:
    """What all tasks of an evaluation share.

    Attributes:
        model: folder or hub id.
        output: the file of the results; the other files lie beside it.
        dtype: of the weights, ``None`` as saved.
        instructions: of tasks of mteb; local tasks bring their own.
        cache: folder of the vectors, ``None`` keeps none.
        engine: who scores local tasks.
    """

    model: str
    output: Path
    dtype: Precision | None = None
    instructions: InstructionSource = "paper"
    cache: Path | None = None
    engine: Engine = "local"

    @property
    def fingerprint(self) -> str:
        """Of the model as it is loaded: its files, or a hub id's commit, and the number type."""
        if self.model == BM25_NAME:
            return BM25_NAME
        return model_fingerprint(self.model, self.dtype, _commit(self.model))

    @property
    def revision(self) -> str:
        """Commit of a hub model, else a part of the fingerprint."""
        return _commit(self.model) or self.fingerprint[:_SHOWN_FINGERPRINT]

    @property
    def mteb_folder(self) -> Path:
        """Where the files in mteb's format lie."""
        return self.output.with_suffix(".mteb")


@dataclass
class Evaluation:
    """What came out.

    Attributes:
        results: by task.
        failed: tasks without a result, and why.
    """

    results: dict[str, TaskResult] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def run_session(
    settings: Settings,
    local: Sequence[LocalTask] = (),
    hub: Sequence[AbsTask] = (),
    *,
    processes: int = 1,
    resume: bool = True,
) -> Evaluation:
    """Evaluate a model and keep every finished task on disk.

    A task of mteb whose data cannot be loaded is passed over and named in ``failed``.

    Args:
        settings: of all tasks.
        local: read by ``load_tasks``.
        hub: of ``find_hub_tasks``.
        processes: share out the tasks, each with a GPU where there are some.
        resume: keep what ``settings.output`` holds.

    Raises:
        ConfigError: the output holds results of another model, revision or instruction.
        ModelError: the model cannot be loaded or its vectors cannot be used.
    """
    if settings.output.is_dir():
        raise ConfigError("is a folder", where=str(settings.output), expected="a file name")
    jobs: dict[str, LocalTask | AbsTask] = {task.name: task for task in local}
    for task in hub:
        if task.metadata.name in jobs:
            raise ConfigError(f"a local task and one of mteb are called {task.metadata.name!r}")
        jobs[task.metadata.name] = task
    record = _record(settings, jobs)
    found = Evaluation()
    if resume and settings.output.exists():
        _check_record(settings.output, record)
        found.results = read_results(settings.output)
    todo = [job for name, job in jobs.items() if name not in found.results]
    write = settings.output, record
    with progress(len(todo), "tasks", shown=processes > 1) as bar:
        for name, outcome in _outcomes(settings, todo, processes):
            bar.advance(task=name)
            if isinstance(outcome, str):
                found.failed[name] = outcome
                continue
            found.results[name], items = outcome
            if items is not None:
                write_items(items_folder(settings.output), name, items)
            _write(*write, found)
    _write(*write, found)
    return found


_Outcome = TaskOutcome | str


def _outcomes(
    settings: Settings, jobs: Sequence[LocalTask | AbsTask], processes: int
) -> Iterator[tuple[str, _Outcome]]:
    if not jobs:
        return
    if settings.model == BM25_NAME:
        for job in jobs:
            if isinstance(job, LocalTask) and fits_bm25(job):
                yield _name(job), score_bm25(job)
            else:
                yield _name(job), "BM25 scores local Retrieval tasks with ndcg_at_10 alone"
        return
    if processes == 1:
        worker = _Worker(settings)
        for job in jobs:
            yield _name(job), worker.outcome(job)
        return
    with process_pool(min(processes, len(jobs)), _start_worker, settings) as pool:
        # A folder is read again there: its texts need not go through a pipe.
        futures = {
            pool.submit(_outcome_in_worker, job.folder if isinstance(job, LocalTask) else job): job
            for job in jobs
        }
        for future in as_completed(futures):
            yield _name(futures[future]), future.result()


class _Worker:
    """A loaded model that does one task after the other."""

    def __init__(self, settings: Settings) -> None:
        from nvembed.inference.load import load_encoder

        self._settings = settings
        self._encoder: Encoder = load_encoder(settings.model, settings.dtype)
        self._bare = self._encoder
        if settings.cache is not None:
            length = getattr(self._encoder, "max_seq_length", None)
            key = f"{settings.fingerprint}-{length}"
            self._encoder = CachedEncoder(self._encoder, settings.cache, key)
        self._hub: HubEncoder | None = None

    def outcome(self, job: LocalTask | AbsTask) -> _Outcome:
        """Score a task; a text says why that was not possible."""
        if isinstance(job, LocalTask):
            return self._score_local(job)
        from nvembed.evaluation.hub import (
            HubEncoder,
            UnreachableTaskError,
            describe_model,
            score_hub,
        )

        settings = self._settings
        if self._hub is None:
            meta = describe_model(settings.model, self._bare, settings.revision)
            self._hub = HubEncoder(self._encoder, meta, settings.instructions)
        try:
            return score_hub(job, self._hub, settings.mteb_folder), None
        except UnreachableTaskError as error:
            return str(error)

    def _score_local(self, task: LocalTask) -> TaskOutcome:
        if self._settings.engine == "local":
            return score_task(task, self._encoder)
        from nvembed.evaluation.mteb_adapter import score

        started = time.perf_counter()
        return task_result(task, score(task, self._encoder), started), None


_own_worker: _Worker | None = None


def _start_worker(settings: Settings) -> None:
    """Load the model in a worker process."""
    global _own_worker
    _own_worker = _Worker(settings)


def _outcome_in_worker(job: Path | AbsTask) -> _Outcome:
    assert _own_worker is not None
    return _own_worker.outcome(load_task(job) if isinstance(job, Path) else job)


def _name(job: LocalTask | AbsTask) -> str:
    return job.name if isinstance(job, LocalTask) else job.metadata.name


def _commit(model: str) -> str | None:
    """Of a hub id that was downloaded; ``None`` for folders."""
    if Path(model).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):
        path = try_to_load_from_cache(model, "config.json")
        if isinstance(path, str):
            return Path(path).parent.name
    return None


def _record(settings: Settings, jobs: Mapping[str, LocalTask | AbsTask]) -> dict[str, object]:
    instructions: dict[str, str | None] = {}
    for name, job in jobs.items():
        if isinstance(job, LocalTask):
            instructions[name] = job.instruction
        else:
            from nvembed.evaluation.hub import hub_instruction

            instructions[name] = hub_instruction(job.metadata, settings.instructions)
    return {
        "model": settings.model,
        "revision": settings.revision,
        "dtype": settings.dtype,
        "instructions": instructions,
    }


def _check_record(output: Path, record: dict[str, object]) -> None:
    """Refuse to mix the results of two models; take over the instructions of earlier tasks."""
    earlier = read_json_object(_run_file(output), "the record of the evaluation to go on with")
    for key in ("model", "revision", "dtype"):
        if earlier.get(key) != record[key]:
            raise _mixed(output, key, earlier.get(key), record[key])
    before, now = earlier.get("instructions"), record["instructions"]
    if not isinstance(before, dict):
        raise _mixed(output, "instructions", before, "instructions by task")
    assert isinstance(now, dict)
    for name in before.keys() & now.keys():
        if before[name] != now[name]:
            raise _mixed(output, f"instruction of {name}", before[name], now[name])
    record["instructions"] = before | now


def _mixed(output: Path, what: str, earlier: object, now: object) -> ConfigError:
    return ConfigError(
        f"holds results with the {what} {earlier!r}, not {now!r}",
        where=str(output),
        hint="Choose another --output, or replace them with --start-over",
    )


def _write(output: Path, record: Mapping[str, object], found: Evaluation) -> None:
    # The record goes first: results without one could not be gone on with.
    run = {**record, "failed": found.failed, "environment": describe_environment()}
    write_json(_run_file(output), run)
    write_results(output, found.results)


def _run_file(output: Path) -> Path:
    return output.with_name(f"{output.stem}.run.json")
