"""Runs a grid: each arm in a process of its own, several at once, finished ones skipped.

Several commands may work on one grid: a run is held by its process, the others pass it over. A run
that breaks does not stop the others; started again, the grid goes on where it was.

``outcome.json`` in the folder of a run: state, cost and error. ``results.json``: its scores.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter

from nvembed.core.arguments import Precision, PrecisionChoice
from nvembed.core.background import end_with_parent
from nvembed.core.cache import digest_of
from nvembed.core.config import load_config
from nvembed.core.errors import ConfigError, DataError, UserError
from nvembed.core.files import alone_in, os_errors, write_json
from nvembed.core.ownership import check_outputs, check_overlaps, mark_growing, refuse_foreign
from nvembed.core.reporting import progress
from nvembed.core.runs import RunFolder
from nvembed.evaluation.results import EVALUATE
from nvembed.evaluation.tasks import load_tasks
from nvembed.training.ablation.grid import Run
from nvembed.training.config import TrainConfig, recipe_differences, training_inputs
from nvembed.training.run_folder import changed_inputs, read_inputs_of, what_decides_inputs

_OTHER_FOLDER = "Choose another output folder, or delete the folder of the arm"
ABLATE = "ablate"
_OUTCOME, _LOG = "outcome.json", "arm.log"
_BUSY = 75  # exit code: another process holds the run
State = Literal["finished", "failed", "open"]


@dataclass(frozen=True)
class Outcome:
    """Where a run stands and what it cost; ``open`` is not finished, started or not."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    state: State
    error: str | None = None  # one line
    training_seconds: float = 0.0  # wall time of its steps
    evaluation_seconds: float = 0.0
    tokens: int = 0  # trained on, over all steps
    loss: float | None = None  # mean of the last ten steps of the last stage
    tasks: dict[str, str] | None = None  # name → digest of those it was scored on


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write ``outcome.json``, atomically."""
    write_json(folder / _OUTCOME, dataclasses.asdict(outcome), ABLATE)


def read_outcome(run: Run) -> Outcome:
    """Read where a run stands; one that never ended is ``open``."""
    try:
        return TypeAdapter(Outcome).validate_json((run.folder / _OUTCOME).read_bytes())
    except (OSError, ValueError):  # ValidationError is one
        return Outcome("open")


def training_cost(folder: Path) -> tuple[float, int, float | None]:
    """Sum up ``metrics.jsonl``: seconds, tokens, and the loss at the end."""
    rows = RunFolder(folder).read_metrics()
    try:
        steps = {(row["stage"], row["step"]): row for row in rows if "loss" in row}
        if not steps:
            return 0.0, 0, None
        final = [row["loss"] for (stage, _), row in steps.items() if stage == rows[-1]["stage"]]
        return (
            sum(row["seconds"] for row in steps.values()),
            sum(row["tokens"] for row in steps.values()),
            sum(final[-10:]) / len(final[-10:]),
        )
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise DataError(
            "not the metrics of a run",
            where=str(RunFolder(folder).metrics),
            expected="stage, step, loss, seconds and tokens in every row of a step",
            hint="Delete the folder of the arm to run it again",
        ) from error


def begun_precision(run: Run) -> Precision | None:
    """Return the type that a run computes in, settled when it began; None where it has not."""
    file = RunFolder(run.folder).config
    precision = load_config(TrainConfig, file).precision if file.is_file() else "auto"
    return None if precision == "auto" else precision


def check_same(run: Run) -> None:
    """Make sure that a finished run is the one that the grid asks for."""
    file = RunFolder(run.folder).config
    if not file.is_file():
        return
    # The precision is settled when a run starts.
    earlier = load_config(TrainConfig, file)
    wanted = _with_precision(run, earlier.precision).config
    before, now = earlier.model_dump(mode="json"), wanted.model_dump(mode="json")
    if different := recipe_differences(before, now):
        raise ConfigError(
            f"arm {run.arm} was run with another configuration: {'; '.join(different)}",
            where=str(file),
            hint=_OTHER_FOLDER,
        )


def check_inputs(run: Run, inputs: Mapping[str, str], tasks: Mapping[str, str]) -> None:
    """Make sure that a finished run was made from what there is now, and scored on it."""
    scored = read_outcome(run).tasks or {}
    changed = changed_inputs(RunFolder(run.folder), inputs)
    changed += [f"task {name}" for name in tasks if scored.get(name, tasks[name]) != tasks[name]]
    if changed:
        raise ConfigError(
            f"arm {run.arm} with seed {run.seed} is finished, and changed since: "
            f"{', '.join(changed)}",
            where=str(run.folder),
            hint=_OTHER_FOLDER,
        )


@dataclass(frozen=True)
class GridJob:
    """What all runs of a grid share."""

    base_dir: Path  # that the paths of the recipe are relative to
    task_folders: Sequence[Path]
    task_names: Sequence[str] | None = None  # None is all
    processes: int = 1  # runs at once, among which the machine's cores are shared out
    keep_models: bool = False  # and checkpoints, of finished runs


def run_grid(
    runs: Sequence[Run], job: GridJob, on_done: Callable[[Run, Outcome], None] | None = None
) -> list[Outcome]:
    """Run what is not finished, and return how every run stands; ``on_done`` gets ended ones."""
    _check_outputs(runs, job)
    tasks = load_tasks(job.task_folders, job.task_names)
    digests = {task.name: digest_of(task.folder) for task in tasks}
    inputs: dict[str, dict[str, str]] = {}
    for run in runs:
        check_same(run)
        if read_outcome(run).state == "finished":
            # Most arms are trained on the same data, which may take long to read.
            if (key := what_decides_inputs(run.config)) not in inputs:
                inputs[key] = read_inputs_of(run.config, job.base_dir)
            check_inputs(run, inputs[key], digests)
    todo = with_one_precision([r for r in runs if read_outcome(r).state != "finished"], runs)
    with progress(len(runs), "runs") as bar:
        bar.advance(len(runs) - len(todo))
        for run, outcome in _ended_runs(todo, job, digests):
            bar.advance(1)
            if outcome is not None and on_done is not None:
                on_done(run, outcome)
    return [read_outcome(run) for run in runs]


def _ended_runs(
    todo: Sequence[Run], job: GridJob, tasks: dict[str, str]
) -> Iterator[tuple[Run, Outcome | None]]:
    """Run in processes, and yield each run that ends, without outcome if another had it."""
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(todo))
    working: dict[int, tuple[SpawnProcess, Run]] = {}
    try:
        while waiting or working:
            while waiting and len(working) < job.processes:
                run = waiting.pop()
                if read_outcome(run).state == "finished":  # by another command meanwhile
                    yield run, None
                    continue
                process = context.Process(target=_work, args=(run, job, tasks))
                process.start()
                working[process.sentinel] = (process, run)
            # Nothing to wait for where other commands have finished all the rest.
            for sentinel in wait(list(working)) if working else ():
                assert isinstance(sentinel, int)
                process, run = working.pop(sentinel)
                process.join()
                yield run, _ended(run, process.exitcode)
    finally:
        for process, _ in working.values():
            process.terminate()  # training writes a checkpoint and stops
        for process, _ in working.values():
            process.join()


def with_one_precision(todo: Sequence[Run], runs: Sequence[Run]) -> list[Run]:
    """Settle ``precision: auto`` for all runs at once: arms that differ in it do not compare."""
    if not any(run.config.precision == "auto" for run in todo):
        return list(todo)
    from nvembed.kernels.machine import settle_precision

    chosen = {run.folder for run in runs if run.config.precision == "auto"}
    begun = next((p for run in runs if run.folder in chosen and (p := begun_precision(run))), None)
    settled = settle_precision("auto", begun=begun, option="precision=float32")
    # A run that was begun for itself keeps its type; it could not go on in another.
    return [_with_precision(run, begun_precision(run) or settled) for run in todo]


def _with_precision(run: Run, precision: PrecisionChoice) -> Run:
    update = {"precision": precision} if run.config.precision == "auto" else {}
    return replace(run, config=run.config.model_copy(update=update))


def _check_outputs(runs: Sequence[Run], job: GridJob) -> None:
    """Refuse to begin where a run would replace something of the user's."""
    for run in runs:
        if read_outcome(run).state == "finished":
            continue
        inputs = [*training_inputs(run.config, job.base_dir), *job.task_folders]
        files = [run.folder / _OUTCOME, run.folder / _LOG]
        check_outputs(files, made_by=ABLATE, inputs=inputs)
        check_outputs([run.results], made_by=EVALUATE, inputs=inputs)
        folder, stages = RunFolder(run.folder), [stage.name for stage in run.config.stages]
        check_overlaps(folder.written(stages), inputs)
        folder.refuse_foreign(stages)


def _ended(run: Run, exit_code: int | None) -> Outcome:
    if exit_code == _BUSY:
        return Outcome("open", error="another process is at work on it")
    outcome = read_outcome(run)
    if exit_code == 0 or outcome.state == "failed":
        return outcome
    what = f"killed by signal {-exit_code}" if exit_code and exit_code < 0 else f"exit {exit_code}"
    outcome = Outcome("failed", error=f"the process of the run ended: {what}")
    write_outcome(run.folder, outcome)
    return outcome


def _work(run: Run, job: GridJob, tasks: dict[str, str]) -> None:
    """Do one run in a process of its own, unless another has it or has just finished it."""
    # Training writes a checkpoint and stops.
    end_with_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        log = run.folder / _LOG
        refuse_foreign(log, ABLATE)
        with alone_in(run.folder) as alone:
            if not alone:
                sys.exit(_BUSY)
            if read_outcome(run).state == "finished":
                sys.exit(0)
            with os_errors("cannot write", log):
                mark_growing(log, ABLATE)
            outcome = _logged(run, job, tasks)
            if outcome.state == "finished" and not job.keep_models:
                RunFolder(run.folder).remove_models()
    except UserError as error:  # of the lock
        outcome = Outcome("failed", error=str(error))
        write_outcome(run.folder, outcome)
    sys.exit(0 if outcome.state == "finished" else 1)


def _logged(run: Run, job: GridJob, tasks: dict[str, str]) -> Outcome:
    """Train and score; what is printed goes to ``arm.log``, errors end in ``outcome.json``."""
    os.environ["NVEMBED_PROGRESS"] = "0"
    with (run.folder / _LOG).open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            outcome = _train_and_score(run, job, tasks)
        except UserError as error:
            outcome = Outcome("failed", error=str(error))
        except Exception as error:
            traceback.print_exc()
            outcome = Outcome("failed", error=f"{type(error).__name__}: {error}".splitlines()[0])
        write_outcome(run.folder, outcome)
    return outcome


def _train_and_score(run: Run, job: GridJob, tasks: dict[str, str]) -> Outcome:
    import torch

    from nvembed.evaluation.session import Settings, run_session
    from nvembed.training.trainer import train

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // job.processes))
    model = train(run.config, base_dir=job.base_dir)
    started = time.monotonic()
    dtype = load_config(TrainConfig, RunFolder(run.folder).config).precision
    assert dtype != "auto"  # training has settled it
    settings = Settings(model=str(model), output=run.results, dtype=dtype)
    run_session(settings, load_tasks(job.task_folders, list(tasks)))
    seconds, tokens, loss = training_cost(run.folder)
    return Outcome("finished", None, seconds, time.monotonic() - started, tokens, loss, tasks)
