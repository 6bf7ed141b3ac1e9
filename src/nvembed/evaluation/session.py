"""One evaluation from names to files: local folders and tasks of mteb, in one or several processes.

Files: ``results.json`` after every task, ``results.run.json`` (what it was made with),
``results.items/`` (for ``nvembed compare``) and ``results.mteb/`` (mteb's own format). The results
say which tasks there are: what an earlier evaluation left of others is deleted. Started again, it
keeps the finished tasks, and takes the vectors of a half finished one from the cache.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from nvembed.core.dtypes import Precision
from nvembed.core.errors import ConfigError, UserError
from nvembed.core.files import write_json
from nvembed.core.ownership import check_outputs, remove
from nvembed.core.runs import describe_environment
from nvembed.core.text_files import check_ending, read_json_object
from nvembed.encoding.encoder import Encoder, computed_fingerprint
from nvembed.evaluation.cached import CachedEncoder
from nvembed.evaluation.results import (
    EVALUATE,
    TaskResult,
    items_folder,
    keep_items,
    read_results,
    task_hash,
    write_items,
    write_results,
)
from nvembed.evaluation.run import (
    BM25_NAME,
    TaskOutcome,
    fits_bm25,
    score_bm25,
    score_task,
    task_result,
)
from nvembed.evaluation.shared import SharedEncoder
from nvembed.evaluation.tasks import LocalTask
from nvembed.interop.fingerprint import model_fingerprint

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

    from nvembed.evaluation.hub import HubEncoder
    from nvembed.evaluation.reference import InstructionSource

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


def earlier_precision(output: Path) -> Precision | None:
    """Return the number type of the results that are there: what ``auto`` has to go on with.

    Measured once more on a busy machine, it may come out otherwise.

    Raises:
        DataError: there are results, and no record of what they were made with.
    """
    if not output.is_file():
        return None
    value = _earlier_record(output).get("dtype")
    return cast(Precision, value) if value in get_args(Precision) else None


def check_session(settings: Settings, inputs: Iterable[Path] = ()) -> None:
    """Refuse to evaluate where the results would replace something of the user's.

    ``inputs`` are the folders of the tasks.

    Raises:
        ConfigError: the output is a folder, lies in the model or a task, or something is there
            that no evaluation made, or that was changed since.
    """
    output = settings.output
    if output.is_dir():
        raise ConfigError("is a folder", where=str(output), expected="a file name")
    check_outputs(
        [output, _run_file(output), items_folder(output), settings.mteb_folder],
        made_by=EVALUATE,
        inputs=[settings.model, *inputs],
        places=[] if settings.cache is None else [settings.cache],
    )


def run_session(
    settings: Settings,
    local: Sequence[LocalTask] = (),
    hub: Sequence[AbsTask] = (),
    *,
    processes: int = 1,
    resume: bool = True,
    keep_going: bool = False,
) -> Evaluation:
    """Evaluate a model and keep every finished task on disk.

    A task of mteb whose data cannot be loaded is passed over and named in ``failed``.

    Args:
        settings: of all tasks.
        local: read by ``load_tasks``.
        hub: of ``find_hub_tasks``.
        processes: share out the texts of each task, each with a GPU where there are some.
        resume: keep what ``settings.output`` holds.
        keep_going: name local tasks that cannot be scored in ``failed``, and score the others.

    Raises:
        ConfigError: the output holds results of another model, revision or instruction.
        ModelError: the model cannot be loaded or its vectors cannot be used.
    """
    check_ending(settings.output, (".json",))
    check_session(settings, [task.folder for task in local])
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
    for name, outcome in _outcomes(settings, todo, processes, keep_going=keep_going):
        if isinstance(outcome, str):
            found.failed[name] = outcome
            continue
        result, items = outcome
        if not found.results:
            remove(settings.output)  # old scores never stand beside new items
        keep_items(items_folder(settings.output), found.results)
        if items is not None:
            write_items(items_folder(settings.output), name, items, EVALUATE)
        found.results[name] = result
        _keep_mteb_files(settings, found.results)
        _write(settings, record, found)
    _write(settings, record, found)
    return found


_Outcome = TaskOutcome | str


def _outcomes(
    settings: Settings,
    jobs: Sequence[LocalTask | AbsTask],
    processes: int,
    *,
    keep_going: bool,
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
    with _loaded(settings, processes) as encoder:
        scorer = _Scorer(settings, encoder)
        for job in jobs:
            try:
                outcome = scorer.outcome(job)
            except UserError as error:
                if not keep_going:
                    raise
                outcome = str(error)
            yield _name(job), outcome


@contextmanager
def _loaded(settings: Settings, processes: int) -> Iterator[Encoder]:
    if processes > 1:
        with SharedEncoder(settings.model, settings.dtype, processes) as shared:
            yield shared
    else:
        from nvembed.encoding.encoder import load_encoder

        yield load_encoder(settings.model, settings.dtype)


class _Scorer:
    """Does one task after the other."""

    def __init__(self, settings: Settings, encoder: Encoder) -> None:
        self._settings = settings
        self._encoder = self._bare = encoder
        if settings.cache is not None:
            length = getattr(encoder, "max_seq_length", None)
            key = f"{computed_fingerprint(settings.fingerprint, settings.dtype)}-{length}"
            self._encoder = CachedEncoder(encoder, settings.cache, key)
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
            describe = partial(describe_model, settings.model, revision=settings.revision)
            bare = self._bare
            meta = bare.ask(describe) if isinstance(bare, SharedEncoder) else describe(bare)
            self._hub = HubEncoder(self._encoder, meta, settings.instructions)
        try:
            return score_hub(job, self._hub, settings.mteb_folder, EVALUATE), None
        except UnreachableTaskError as error:
            return str(error)

    def _score_local(self, task: LocalTask) -> TaskOutcome:
        if self._settings.engine == "local":
            return score_task(task, self._encoder)
        from nvembed.evaluation.mteb_adapter import score

        started = time.perf_counter()
        return task_result(task, score(task, self._encoder), started), None


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
        "computing": _computing(settings),
        "instructions": instructions,
        "data": {name: task_hash(job) for name, job in jobs.items() if isinstance(job, LocalTask)},
    }


def _computing(settings: Settings) -> dict[str, Any] | None:
    if settings.model == BM25_NAME:
        return None
    from nvembed.kernels.precision import computing_record

    return computing_record(settings.dtype)


def _earlier_record(output: Path) -> dict[str, Any]:
    return read_json_object(_run_file(output), "the record of the evaluation to go on with")


def _check_record(output: Path, record: dict[str, object]) -> None:
    """Refuse to mix results of two models or of other data; take over what earlier tasks say."""
    earlier = _earlier_record(output)
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
    scored, data = earlier.get("data", {}), record["data"]  # earlier versions recorded none
    assert isinstance(data, dict)
    if not isinstance(scored, dict):
        raise _mixed(output, "data", scored, "digests by task")
    for name in scored.keys() & data.keys():
        if scored[name] != data[name]:
            raise ConfigError(
                f"the task {name} has other data than when it was scored",
                where=str(output),
                hint="Put them back, choose another --output, or replace it with --start-over",
            )
    record["data"] = scored | data


def _mixed(output: Path, what: str, earlier: object, now: object) -> ConfigError:
    return ConfigError(
        f"holds results with the {what} {earlier!r}, not {now!r}",
        where=str(output),
        hint="Choose another --output, or replace them with --start-over",
    )


def _keep_mteb_files(settings: Settings, names: Collection[str]) -> None:
    """Delete those of other tasks: what the results do not hold must not reach a leaderboard."""
    for path in settings.mteb_folder.glob("results/*/*/*.json"):
        if path.name != "model_meta.json" and path.stem not in names:
            remove(path)


def _write(settings: Settings, record: Mapping[str, object], found: Evaluation) -> None:
    # The record goes first: results without one could not be gone on with.
    run = {**record, "failed": found.failed, "environment": describe_environment()}
    write_json(_run_file(settings.output), run, EVALUATE)
    write_results(settings.output, found.results, EVALUATE)


def _run_file(output: Path) -> Path:
    return output.with_name(f"{output.stem}.run.json")
