"""A dry run: what a run would do, found with its own parts and without changing anything.

Data, model, batches, packs and graphs are those of the run; a few steps of every stage go forward
and backward, and no weight is updated. Nothing is written but the token cache. What only the run
itself can know is stood in for: negatives that are not mined yet by random documents
(``stand_ins.py``). Next file: ``rehearsal.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from nvembed.core.errors import ConfigError, UserError
from nvembed.core.runs import RunFolder
from nvembed.data.mixture import Mixture
from nvembed.evaluation.tasks import LocalTask
from nvembed.training.checkpoint import Position, check_recipe, latest_checkpoint, read_position
from nvembed.training.config import TrainConfig, training_inputs
from nvembed.training.distributed import DistributedContext
from nvembed.training.dry_run.findings import DryRun
from nvembed.training.dry_run.rehearsal import Rehearsal
from nvembed.training.metrics import load_evaluation_tasks, tracker_options
from nvembed.training.run_folder import (
    check_folder,
    check_inputs,
    inputs_of,
    is_finished,
    with_settled_precision,
)
from nvembed.training.stages import load_mixtures

Found = TypeVar("Found")


class SeveralError(UserError):
    """Several mistakes at once, each with a line of its own in ``problems``."""

    def __init__(self, problems: Sequence[UserError]) -> None:
        super().__init__(" | ".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


def dry_run(config: TrainConfig, *, base_dir: Path, fresh: bool = False) -> DryRun:
    """Find out what ``train`` with the same arguments would do.

    Raises:
        SeveralError: data, tasks, trackers or the output folder cannot be used.
        UserError: the model cannot be used, or a step does not fit or has no finite loss.
    """
    if (launched := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(
            f"{launched} processes were started",
            where="--dry-run",
            expected="one: it forecasts one process that does all the work",
        )
    run = RunFolder(Path(config.output))
    config, _ = with_settled_precision(config, run, fresh=fresh)
    problems: list[UserError] = []
    inputs = training_inputs(config, base_dir)
    resumed = _noted(problems, lambda: _checkpoint(run, config, inputs, fresh=fresh))
    mixtures = _noted(problems, lambda: load_mixtures(config, base_dir))
    evaluation = config.evaluation
    tasks = _noted(
        problems, lambda: load_evaluation_tasks(evaluation, base_dir) if evaluation else []
    )
    _noted(problems, lambda: tracker_options(config.trackers, run))
    if mixtures is not None and tasks is not None and not fresh:
        _noted(problems, lambda: _check_inputs(run, config, base_dir, mixtures, tasks))
    if problems or mixtures is None or tasks is None:
        raise SeveralError(problems)
    processes = DistributedContext.of_environment()
    position = read_position(resumed) if resumed else Position()
    found = DryRun(
        config,
        position,
        resumed,
        finished=not fresh and is_finished(run),
        replaces=fresh and run.exists,
        device=_device_name(processes.device),
        tasks=tuple(task.name for task in tasks),
    )
    if found.finished:
        return found
    return Rehearsal(found, run, base_dir, mixtures, processes, fresh=fresh).play()


def _checkpoint(
    run: RunFolder, config: TrainConfig, inputs: Sequence[Path], *, fresh: bool
) -> Path | None:
    """What the run would go on from; refuses a folder that the run would refuse."""
    check_folder(run, config, fresh=fresh, inputs=inputs)
    if fresh or not run.exists:
        return None
    checkpoint = latest_checkpoint(run.checkpoints)
    if checkpoint is not None:
        check_recipe(checkpoint, config.model_dump(mode="json"))
    return checkpoint


def _check_inputs(
    run: RunFolder,
    config: TrainConfig,
    base_dir: Path,
    mixtures: Sequence[Mixture],
    tasks: Sequence[LocalTask],
) -> None:
    """Refuse what the run would refuse, of one that goes on or is finished."""
    if run.exists and run.has_results and run.inputs.exists():
        check_inputs(run, inputs_of(config, base_dir, mixtures, tasks))


def _noted(problems: list[UserError], find: Callable[[], Found]) -> Found | None:
    """What ``find`` finds; its error is kept, so that the next question can be asked too."""
    try:
        return find()
    except UserError as error:
        problems.append(error)
        return None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
