"""Evaluation: tasks scored in memory, or from names to files, in one or several processes.

Files: ``results.json`` after every task, ``results.run.json`` (what it was made with),
``results.items/`` (for ``nvembed compare``) and ``results.mteb/`` (mteb's own format). What an
earlier evaluation left of other tasks is deleted, and finished tasks are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from nvembed.core.arguments import Precision
from nvembed.core.errors import ConfigError, UserError
from nvembed.core.files import alone_in, read_json_object, write_json
from nvembed.core.outputs import check_ending
from nvembed.core.ownership import check_outputs, remove
from nvembed.core.reporting import hold_note, release_notes
from nvembed.core.runs import describe_environment
from nvembed.evaluation import results
from nvembed.evaluation.encoders import CachedEncoder, SharedEncoder, shared_encoder
from nvembed.evaluation.results import EVALUATE, Items, TaskResult, UnreachableTaskError
from nvembed.evaluation.tasks import LocalTask, task_hash
from nvembed.interop.model_folder import check_model_name, find_gguf, model_fingerprint
from nvembed.model.encoder import Encoder, computed_fingerprint

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

    from nvembed.evaluation.mteb_adapter import MtebEncoder
    from nvembed.evaluation.reference import InstructionSource

_SHOWN_FINGERPRINT = 12
_SHOWN_FROM = 2.0  # seconds of a task from which on its score is told at once
BM25_NAME = "bm25"
"""The name under which BM25 is evaluated like a model."""

Engine = Literal["local", "mteb"]
"""Who scores local tasks."""

OnResult = Callable[[str, TaskResult], None]
TaskOutcome = tuple[TaskResult, Items | None]


# --- Scores in memory -----------------------------------------------------------------------------


def evaluate(
    encoder: Encoder, tasks: Iterable[LocalTask], *, on_result: OnResult | None = None
) -> dict[str, TaskResult]:
    """Score an encoder on tasks, one after the other.

    Args:
        encoder: the model.
        tasks: read by ``load_tasks``.
        on_result: called with name and result as soon as a task is finished.

    Raises:
        ModelError: the encoder gives vectors of another shape or that are not finite.
        UserError: scikit-learn or scipy is not installed.
    """
    found: dict[str, TaskResult] = {}
    for task in tasks:
        found[task.name], _ = score_task(task, encoder)
        if on_result is not None:
            on_result(task.name, found[task.name])
    return found


def evaluate_bm25(tasks: Iterable[LocalTask]) -> dict[str, TaskResult]:
    """Score BM25 on those of the tasks that are retrieval with nDCG@10; the others are left out."""
    return {task.name: score_task(task, None)[0] for task in tasks if fits_bm25(task)}


def fits_bm25(task: LocalTask) -> bool:
    """Whether BM25 has a score for it."""
    return task.type == "Retrieval" and task.main_score == "ndcg_at_10"


def score_task(task: LocalTask, encoder: Encoder | None, engine: Engine = "local") -> TaskOutcome:
    """Score an encoder on one task; see ``evaluate``. ``None`` is BM25, on a task that fits it."""
    started = time.perf_counter()
    try:
        if encoder is not None and engine == "mteb":
            from nvembed.evaluation.mteb_adapter import score

            scores, items = score(task, encoder), None
        else:
            from nvembed.evaluation.local_scores import score_bm25, score_local

            scores, items = score_bm25(task) if encoder is None else score_local(task, encoder)
    except ModuleNotFoundError as error:
        raise UserError(
            f"evaluation needs the package {error.name!r}",
            hint="Install it with: pip install 'nvembed[eval]'",
        ) from error
    seconds = round(time.perf_counter() - started, 2)
    main = scores[task.main_score]
    return TaskResult(task.type, task.main_score, main, seconds, scores), items


# --- Scores on disk -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What all tasks of an evaluation share."""

    model: str
    output: Path  # of the results; the other files lie beside it
    dtype: Precision | None = None  # of the weights; ``None`` as saved
    instructions: InstructionSource = "paper"  # of mteb's tasks; local ones bring their own
    cache: Path | None = None  # folder of the vectors
    engine: Engine = "local"

    @property
    def fingerprint(self) -> str:
        """The model as it is loaded: its files or commit, and the number type."""
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
    """What came out: results by task, and of tasks without one the reason."""

    results: dict[str, TaskResult] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def earlier_precision(output: Path) -> Precision | None:
    """Return the number type of earlier results, as measuring it again may give another one."""
    value = _earlier_record(output).get("dtype") if output.is_file() else None
    return cast(Precision, value) if value in get_args(Precision) else None


def check_session(settings: Settings, inputs: Iterable[Path] = ()) -> None:
    """Refuse a model that is not there, and results that would replace something of the user's."""
    if settings.model != BM25_NAME:
        check_model_name(settings.model)
    output = settings.output
    if output.is_dir():
        raise ConfigError("is a folder", where=str(output), expected="a file name")
    check_outputs(
        [output, results.run_file(output), results.items_folder(output), settings.mteb_folder],
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

    ``resume`` keeps what the output holds, which is refused where it was made otherwise. A task of
    mteb without data is named in ``failed``; with ``keep_going`` every task that has no score is.
    """
    output, items_at = settings.output, results.items_folder(settings.output)
    check_ending(output, (".json",))
    check_session(settings, [task.folder for task in local])
    with alone_in(items_at, needed=False) as alone:
        if not alone:
            raise UserError(
                "another process is evaluating into this file",
                where=str(output),
                hint="Wait for its end, or choose another --output",
            )
        try:
            return _run_session(settings, local, hub, processes, resume, keep_going)
        finally:
            with suppress(OSError):
                items_at.rmdir()  # where no task has items


def _run_session(
    settings: Settings,
    local: Sequence[LocalTask],
    hub: Sequence[AbsTask],
    processes: int,
    resume: bool,
    keep_going: bool,
) -> Evaluation:
    output, items_at = settings.output, results.items_folder(settings.output)
    jobs: dict[str, LocalTask | AbsTask] = {task.name: task for task in local}
    for task in hub:
        if task.metadata.name in jobs:
            raise ConfigError(f"a local task and one of mteb are called {task.metadata.name!r}")
        jobs[task.metadata.name] = task
    record, found = _record(settings, jobs), Evaluation()
    if resume and output.exists():
        _continue_record(output, record)
        found.results = results.read_results(output)

    def write() -> None:
        run = {**record, "failed": found.failed, "environment": describe_environment()}
        # The record goes first: results without one could not be gone on with.
        write_json(results.run_file(output), run, EVALUATE)
        results.write_results(output, found.results, EVALUATE)

    todo = {name: job for name, job in jobs.items() if name not in found.results}
    for name, outcome in _outcomes(settings, todo, processes, keep_going=keep_going):
        if isinstance(outcome, str):
            found.failed[name] = outcome
            continue
        result, items = outcome
        if not found.results:
            remove(output)  # old scores never stand beside new items
        results.keep_items(items_at, found.results)
        if items is not None:
            results.write_items(items_at, name, items, EVALUATE)
        found.results[name] = result
        for path in settings.mteb_folder.glob("results/*/*/*.json"):
            # What the results do not hold must not reach a leaderboard.
            if path.name != "model_meta.json" and path.stem not in found.results:
                remove(path)
        write()
        if result.seconds > _SHOWN_FROM and result.main_score is not None:
            score = f"{result.main_score_name} {100 * result.main_score:.2f}"
            scored = sum(each in found.results for each in jobs)  # the file may hold others too
            done = f"{scored} of {len(jobs)} tasks, {result.seconds:,.0f} s"
            hold_note(f"{name}: {score} ({done})")
            release_notes()
    write()
    return found


def _outcomes(
    settings: Settings,
    jobs: Mapping[str, LocalTask | AbsTask],
    processes: int,
    *,
    keep_going: bool,
) -> Iterator[tuple[str, TaskOutcome | str]]:
    """Do one task after the other; a text says why one could not be done."""
    if not jobs:
        return
    if settings.model == BM25_NAME:
        for name, job in jobs.items():
            if isinstance(job, LocalTask) and fits_bm25(job):
                yield name, score_task(job, None)
            else:
                yield name, "BM25 scores local Retrieval tasks with ndcg_at_10 alone"
        return
    loaded: AbstractContextManager[Encoder]
    if processes > 1:
        loaded = shared_encoder(settings.model, settings.dtype, processes)
    else:
        from nvembed.model.encoder import load_encoder

        loaded = nullcontext(load_encoder(settings.model, settings.dtype))
    with loaded as bare:
        encoder, hub = bare, None
        if settings.cache is not None:
            length = getattr(bare, "max_seq_length", None)
            key = f"{computed_fingerprint(settings.fingerprint, settings.dtype)}-{length}"
            encoder = CachedEncoder(bare, settings.cache, key)
        for name, job in jobs.items():
            outcome: TaskOutcome | str
            try:
                if isinstance(job, LocalTask):
                    outcome = score_task(job, encoder, settings.engine)
                else:
                    from nvembed.evaluation.hub import score_hub

                    hub = hub or _hub_encoder(settings, bare, encoder)
                    outcome = score_hub(job, hub, settings.mteb_folder, EVALUATE), None
            except UserError as error:
                if not (keep_going or isinstance(error, UnreachableTaskError)):
                    raise
                outcome = str(error)
            yield name, outcome


def _hub_encoder(settings: Settings, bare: Encoder, encoder: Encoder) -> MtebEncoder:
    from nvembed.evaluation.hub import describe_model, hub_encoder

    describe = partial(describe_model, settings.model, revision=settings.revision)
    meta = bare.ask(describe) if isinstance(bare, SharedEncoder) else describe(bare)
    return hub_encoder(encoder, meta, settings.instructions)


def _commit(model: str) -> str | None:
    """Of a hub id that was downloaded; ``None`` for folders."""
    if Path(model).exists() or find_gguf(model):
        return None
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):
        path = try_to_load_from_cache(model, "config.json")
        if isinstance(path, str):
            return Path(path).parent.name
    return None


# --- The record of what results were made with ----------------------------------------------------


def _record(settings: Settings, jobs: Mapping[str, LocalTask | AbsTask]) -> dict[str, Any]:
    instructions, data = {}, {}
    for name, job in jobs.items():
        if isinstance(job, LocalTask):
            instructions[name], data[name] = job.instruction, task_hash(job)
        else:
            from nvembed.evaluation.hub import hub_instruction

            instructions[name] = hub_instruction(job.metadata, settings.instructions)
    computing = None
    if settings.model != BM25_NAME:
        from nvembed.kernels.machine import computing_record

        computing = computing_record(settings.dtype)
    return {
        "model": settings.model,
        "revision": settings.revision,
        "dtype": settings.dtype,
        "computing": computing,
        "instructions": instructions,
        "data": data,
    }


def _earlier_record(output: Path) -> dict[str, Any]:
    return read_json_object(results.run_file(output), "the record of the evaluation to go on with")


def _continue_record(output: Path, record: dict[str, Any]) -> None:
    """Refuse to mix results of two models or of other data; take over what earlier tasks say."""
    earlier = {"data": {}, **_earlier_record(output)}  # earlier versions recorded no data

    def refuse_other(what: str, before: object, now: object) -> None:
        if before != now:
            raise ConfigError(
                f"holds results with the {what} {before!r}, not {now!r}",
                where=str(output),
                hint="Choose another --output, or replace them with --start-over",
            )

    for key in ("model", "revision", "dtype"):
        refuse_other(key, earlier.get(key), record[key])
    for key, expected in (("instructions", "instructions by task"), ("data", "digests by task")):
        before: Any = earlier.get(key)
        if not isinstance(before, dict):
            refuse_other(key, before, expected)
        for name in before.keys() & record[key].keys():
            if key == "instructions":
                refuse_other(f"instruction of {name}", before[name], record[key][name])
            elif before[name] != record[key][name]:
                raise ConfigError(
                    f"the task {name} has other data than when it was scored",
                    where=str(output),
                    hint="Put them back, choose another --output, or replace it with --start-over",
                )
        record[key] = before | record[key]
