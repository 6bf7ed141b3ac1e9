"""What a run measures: a row per step, evaluation with early stopping, and the trackers they go to.

A stage is evaluated every so many updates and after its last one. What is compared is the mean of
the main scores; the best is that of the stage, and its weights are put back when the stage ends.
The state (``Best``) is plain data and goes into ``Position.extra`` of every checkpoint.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.utils import (
    ProjectConfiguration,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)
from torch import nn

from nvembed.core.errors import ConfigError, TrainingError, UserError
from nvembed.core.runs import RunFolder
from nvembed.core.seeding import capture_rng, restore_rng
from nvembed.data.batch import effective_negatives
from nvembed.evaluation.run import evaluate
from nvembed.evaluation.tasks import LocalTask, load_tasks
from nvembed.model.embedder import NVEmbed
from nvembed.training.checkpoint import Parameters, restore_weights, save_weights
from nvembed.training.config import EvaluationConfig, StageConfig, TrackerKind
from nvembed.training.distributed import DistributedContext
from nvembed.training.optim import evaluation_weights
from nvembed.training.stages import DataLoader
from nvembed.training.step import StepResult


def describe(stage: StageConfig, loader: DataLoader) -> str:
    """One line that says what a stage will do."""
    sizes = ", ".join(f"{source.name} {len(source):,}" for source in loader.mixture.sources)
    return (
        f"{stage.name}: {stage.steps:,} steps of {stage.batch_size} queries; "
        f"in-batch negatives {'on' if stage.in_batch_negatives else 'off'}; "
        f"effective negatives per query {effective_negatives(loader.batch(0)):.1f}; data: {sizes}"
    )


def metrics_row(
    stage: StageConfig,
    step: int,
    norm: float,
    share: float,
    temperature: float,
    result: StepResult,
    seconds: float,
) -> dict[str, Any]:
    """The numbers of a step, as they go to ``metrics.jsonl`` and to the trackers."""
    statistics = result.statistics
    return {
        "step": step,
        "stage": stage.name,
        "loss": result.loss,
        "learning_rate": stage.learning_rate * share,
        "grad_norm": norm,
        "temperature": temperature,
        "positive_similarity": statistics.positive_similarity,
        "margin": statistics.margin,
        "accuracy": statistics.accuracy,
        "effective_negatives": result.effective_negatives,
        "texts": result.num_texts,
        "tokens": result.num_tokens,
        "padding": 0.0,
        "duplicates": result.duplicates,
        "recomputed": result.recomputed,
        "seconds": seconds,
        "tokens_per_second": result.num_tokens / seconds,
    }


PROJECT = "nvembed"
"""Under this name trackers group the runs."""


def tracker_options(kinds: Sequence[TrackerKind], run: RunFolder) -> dict[str, Any]:
    """What ``Accelerator(…)`` must be told for these trackers."""
    found = {
        "tensorboard": is_tensorboard_available,
        "trackio": is_trackio_available,
        "wandb": is_wandb_available,
    }
    for kind in kinds:
        if not found[kind]():
            package = "'nvembed[trackers]'" if kind == "tensorboard" else kind
            raise ConfigError(
                f"the tracker {kind} needs a package that is not installed",
                where="trackers",
                hint=f"Install it with: pip install {package}",
            )
    if not kinds:
        return {}
    project = ProjectConfiguration(str(run.path), logging_dir=str(run.path / "tensorboard"))
    return {"log_with": list(kinds), "project_config": project}


def start_trackers(
    accelerator: Accelerator, run: RunFolder, recipe: Mapping[str, Any], *, step: int
) -> None:
    """Begin to track a run, or go on tracking it."""
    name = run.path.resolve().name
    identity = _identity(run)
    common = {"config": dict(recipe), "resume": "allow"}
    accelerator.init_trackers(
        PROJECT,
        init_kwargs={
            "tensorboard": {"purge_step": step + 1} if step else {},
            # To trackio the name is the identity.
            "trackio": {**common, "name": f"{name}-{identity[:8]}"},
            "wandb": {**common, "name": name, "id": identity, "dir": str(run.path)},
        },
    )


def track(accelerator: Accelerator, row: Mapping[str, Any]) -> None:
    """Send the numbers of a row of metrics; does nothing without trackers."""
    accelerator.log(dict(_numbers(row)), step=row["step"])


def _numbers(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Finite numbers by key, those of nested rows by ``outer/inner``; no texts and no gaps."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            continue
        elif math.isfinite(value) and prefix + key != "step":
            yield prefix + key, value


def _identity(run: RunFolder) -> str:
    """The same for all restarts of a run: of its folder and the moment it was started first."""
    started = run.read_env()["started"]
    return hashlib.sha256(f"{run.path.resolve()} {started}".encode()).hexdigest()[:16]


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
        """Back from there; ``None`` is the start of a stage."""
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


def evaluate_model(
    model: NVEmbed, tasks: Sequence[LocalTask], processes: DistributedContext
) -> Scores:
    """Scores of a model in training, which goes on as if nothing had been asked.

    All processes call it. Where each holds the whole model they share out the tasks; where weights
    are sharded all do all of them together, since every forward needs every process.
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
    processes: DistributedContext,
) -> tuple[Best, dict[str, Any]]:
    """Evaluate after an update, and keep the weights where they are the best so far.

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
