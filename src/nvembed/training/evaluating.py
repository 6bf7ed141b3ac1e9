"""Evaluation during training: scores on local tasks, early stopping, the best weights kept.

A stage is evaluated every so many updates and after its last one. What is compared is the mean of
the main scores; the best is that of the stage, and its weights are put back when the stage ends.
The state (``Best``) is plain data and goes into ``Position.extra`` of every checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from nvembed.core.errors import TrainingError, UserError
from nvembed.core.seeding import capture_rng, restore_rng
from nvembed.evaluation.run import evaluate
from nvembed.evaluation.tasks import LocalTask, load_tasks
from nvembed.model.embedder import NVEmbed
from nvembed.training.checkpoint import Parameters, restore_weights, save_weights
from nvembed.training.config import EvaluationConfig
from nvembed.training.optim import evaluation_weights
from nvembed.training.processes import Processes

BEST = "best"
"""Folder of the best weights beside the checkpoints."""


@dataclass(frozen=True)
class Best:
    """What the evaluations of a stage have come to.

    Attributes:
        score: highest mean so far; ``None`` before the first.
        step: update of the run after which it was reached.
        since: evaluations after that one, none of them better.
    """

    score: float | None = None
    step: int | None = None
    since: int = 0

    def after(self, score: float | None, step: int) -> Self:
        """With one more evaluation; an equal or undefined score is no improvement."""
        if score is not None and (self.score is None or score > self.score):
            return type(self)(score, step, 0)
        return type(self)(self.score, self.step, self.since + 1)

    def to_json(self) -> dict[str, Any]:
        """For ``Position.extra``."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any] | None) -> Self:
        """Back from there; ``None`` is the start of a stage.

        Raises:
            TrainingError: it is not what ``to_json`` gave.
        """
        best = cls()
        if values:
            try:
                best = cls(**values)
            except TypeError as error:
                raise _not_of_an_evaluation() from error
        numbers = isinstance(best.score, int | float | None) and isinstance(best.step, int | None)
        if not numbers or not isinstance(best.since, int):
            raise _not_of_an_evaluation()
        return best


def _not_of_an_evaluation() -> TrainingError:
    return TrainingError(
        "the newest checkpoint does not say how the evaluations went",
        hint="Delete it to go on from the one before, or start over with --fresh",
    )


@dataclass(frozen=True)
class Scores:
    """Main scores by task; ``mean`` is undefined where one of them is."""

    tasks: Mapping[str, float | None]

    @property
    def mean(self) -> float | None:
        """Of all tasks, each counting the same."""
        defined = [score for score in self.tasks.values() if score is not None]
        return math.fsum(defined) / len(defined) if len(defined) == len(self.tasks) else None


def load_evaluation_tasks(config: EvaluationConfig, base_dir: Path) -> list[LocalTask]:
    """Read the tasks of a recipe, before a model is loaded.

    Args:
        config: names the folders.
        base_dir: folder of the recipe.

    Raises:
        DataError: a folder is missing or a task cannot be used.
        UserError: scikit-learn is not installed.
    """
    if find_spec("sklearn") is None:
        raise UserError(
            "evaluation during training needs the package 'scikit-learn'",
            where="evaluation",
            hint="Install it with: pip install 'nvembed[eval]'",
        )
    return load_tasks([base_dir / folder for folder in config.tasks])


def evaluation_is_due(config: EvaluationConfig, stage_step: int, steps: int) -> bool:
    """Whether to evaluate after so many updates of a stage."""
    return stage_step % config.every == 0 or stage_step == steps


def should_stop(config: EvaluationConfig, best: Best) -> bool:
    """Whether the stage ends here; asked before each update, also of a run that goes on."""
    return config.patience is not None and best.since >= config.patience


def evaluate_model(model: NVEmbed, tasks: Sequence[LocalTask], processes: Processes) -> Scores:
    """Scores of a model in training, which goes on as if nothing had been asked.

    All processes call it. Where each holds the whole model they share out the tasks; where weights
    are sharded all do all of them together, since every forward needs every process.

    Args:
        model: as it computes in training: under the autocast of the caller.
        tasks: to score it on.
        processes: of the run.
    """
    modes = [(module, module.training) for module in model.modules()]
    rng = capture_rng()  # the first evaluation imports mteb, which draws random numbers
    own = tasks if processes.sharded else tasks[processes.rank :: processes.count]
    try:
        results = evaluate(model, own) if own else {}
    finally:
        restore_rng(rng)
        _restore_modes(modes)
    # Through one list for all: a last bit must not make processes decide differently.
    scores: dict[str, float | None] = {}
    for of_process in processes.of_all({name: row.main_score for name, row in results.items()}):
        scores = {**of_process, **scores}
    return Scores({task.name: scores[task.name] for task in tasks})


def evaluate_step(
    model: NVEmbed,
    trained: Parameters,
    optimizer: torch.optim.Optimizer,
    tasks: Sequence[LocalTask],
    config: EvaluationConfig,
    best: Best,
    *,
    step: int,
    folder: Path,
    processes: Processes,
) -> tuple[Best, dict[str, Any]]:
    """Evaluate after an update, and keep the weights where they are the best so far.

    Args:
        model: in training.
        trained: its trained parameters, see ``trained_parameters``.
        optimizer: whose averaged weights are evaluated where it has them.
        tasks: from ``load_evaluation_tasks``.
        config: of the run.
        best: of the stage so far.
        step: updates done in the run.
        folder: of the checkpoints.
        processes: of the run.

    Returns:
        The new best, and the ``evaluation`` of a row of metrics.
    """
    with evaluation_weights(optimizer):
        scores = evaluate_model(model, tasks, processes)
        best = best.after(scores.mean, step)
        if config.keep_best and best.step == step:
            save_weights(folder / BEST, trained, processes)
    row = {
        "tasks": dict(scores.tasks),
        "mean": scores.mean,
        "best": best.score,
        "best_step": best.step,
    }
    return best, row


def put_back_best(
    trained: Parameters, config: EvaluationConfig, best: Best, *, step: int, folder: Path
) -> bool:
    """Give the model the best weights of the stage that ends; tell whether they were others.

    The parameters must be where the optimizer evaluates them (``averaged_weights``).
    """
    if not config.keep_best or best.step in (None, step):
        return False
    restore_weights(folder / BEST, trained)
    return True


def _restore_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
