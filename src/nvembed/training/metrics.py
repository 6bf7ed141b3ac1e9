"""Evaluation during training, early stopping, whether a loss moves, and trackers of numbers.

A stage is evaluated every so many updates and after its last one. What is compared is the mean of
the main scores; the best is that of the stage, and its weights are put back when the stage ends.
The state (``Best``) is plain data and goes into ``Position.extra`` of every checkpoint.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator, utils

from nvembed.core.errors import ConfigError, TrainingError, UserError
from nvembed.core.runs import RunFolder, capture_rng, restore_rng
from nvembed.evaluation.results import TaskResult
from nvembed.evaluation.session import evaluate, evaluate_bm25
from nvembed.evaluation.tasks import LocalTask, load_tasks
from nvembed.model.embedder import NVEmbed
from nvembed.training.checkpoint import Parameters, restore_weights, save_weights
from nvembed.training.config import EvaluationConfig, TrackerKind, TrainConfig
from nvembed.training.distributed import DistributedContext

PROJECT = "nvembed"  # under which trackers group the runs
BEST = "best"  # folder of the best weights
WINDOW = 10  # steps at the beginning of a stage, and as many after its warm-up, that are compared
_LITTLE = 0.05  # of the loss: less is no movement

Columns = dict[str, dict[str, TaskResult]]


def tracker_options(kinds: Sequence[TrackerKind], run: RunFolder) -> dict[str, Any]:
    """What ``Accelerator(…)`` must be told for these trackers."""
    for kind in kinds:
        if not getattr(utils, f"is_{kind}_available")():
            package = "'nvembed[trackers]'" if kind == "tensorboard" else kind
            raise ConfigError(
                f"the tracker {kind} needs a package that is not installed",
                where="trackers",
                hint=f"Install it with: pip install {package}",
            )
    if not kinds:
        return {}
    project = utils.ProjectConfiguration(str(run.path), logging_dir=str(run.path / "tensorboard"))
    return {"log_with": list(kinds), "project_config": project}


def start_trackers(
    accelerator: Accelerator, run: RunFolder, recipe: Mapping[str, Any], *, step: int
) -> None:
    """Begin to track a run, or go on; its identity is that of its folder and first start."""
    place = run.path.resolve()
    identity = hashlib.sha256(f"{place} {run.read_env()['started']}".encode()).hexdigest()[:16]
    common = {"config": dict(recipe), "resume": "allow"}
    accelerator.init_trackers(
        PROJECT,
        init_kwargs={
            "tensorboard": {"purge_step": step + 1} if step else {},
            # To trackio the name is the identity.
            "trackio": {**common, "name": f"{place.name}-{identity[:8]}"},
            "wandb": {**common, "name": place.name, "id": identity, "dir": str(run.path)},
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


@dataclass(frozen=True)
class Best:
    """What the evaluations of a stage have come to."""

    score: float | None = None  # highest mean so far
    step: int | None = None  # update of the run after which it was reached
    since: int = 0  # evaluations after that one, none of them better

    def after(self, score: float | None, step: int) -> Self:
        """With one more evaluation; an equal or undefined score is no improvement."""
        if score is not None and (self.score is None or score > self.score):
            return type(self)(score, step, 0)
        return type(self)(self.score, self.step, self.since + 1)

    @classmethod
    def from_json(cls, values: Mapping[str, Any] | None) -> Self:
        """Back from ``Position.extra``; ``None`` is the start of a stage."""
        try:
            best = cls(**(values or {}))
            numbers = isinstance(best.score, int | float | None), isinstance(best.step, int | None)
            if not all(numbers) or not isinstance(best.since, int):
                raise TypeError
        except TypeError as error:
            raise TrainingError(
                "the newest checkpoint does not say how the evaluations went",
                hint="Delete it to go on from the one before, or start over with --fresh",
            ) from error
        return best


def load_evaluation_tasks(config: EvaluationConfig, base_dir: Path) -> list[LocalTask]:
    """Read the tasks of a recipe, before a model is loaded."""
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
) -> dict[str, float | None]:
    """Main scores by task of a model in training; all processes call it.

    Each does a share of the tasks, or all of them together where weights are sharded.
    """
    modes = [(module, module.training) for module in model.modules()]
    rng = capture_rng()  # the first evaluation imports mteb, which draws random numbers
    own = tasks if processes.sharded else tasks[processes.rank :: processes.count]
    try:
        results = evaluate(model, own) if own else {}
    finally:
        restore_rng(rng)
        for module, training in modes:
            module.training = training
    # Through one list for all: a last bit must not make processes decide differently.
    scores: dict[str, float | None] = {}
    for of_process in processes.of_all({name: row.main_score for name, row in results.items()}):
        scores = {**of_process, **scores}
    return {task.name: scores[task.name] for task in tasks}


def mean_score(scores: Mapping[str, float | None]) -> float | None:
    """The mean of all tasks, each counting the same; undefined where one of them is."""
    defined = [score for score in scores.values() if score is not None]
    return math.fsum(defined) / len(defined) if len(defined) == len(scores) else None


@contextmanager
def evaluation_weights(optimizer: Any) -> Iterator[None]:
    """Evaluate or save inside; after it the parameters are back, bit for bit."""
    if not hasattr(optimizer, "eval"):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


@dataclass(frozen=True)
class Evaluation:
    """Evaluations of a run; the best weights of a stage lie in a folder beside the checkpoints."""

    config: EvaluationConfig
    tasks: Sequence[LocalTask]
    checkpoints: Path
    processes: DistributedContext

    def scores(self, model: NVEmbed) -> dict[str, Any]:
        """Scores of the model as it is, and their mean."""
        scores = evaluate_model(model, self.tasks, self.processes)
        return {"tasks": scores, "mean": mean_score(scores)}

    def step(
        self,
        model: NVEmbed,
        trained: Parameters,
        optimizer: torch.optim.Optimizer,
        best: Best,
        step: int,
    ) -> tuple[Best, dict[str, Any]]:
        """Evaluate after an update; return the best so far, and what goes to the row of metrics."""
        with evaluation_weights(optimizer):
            scores = self.scores(model)
            best = best.after(scores["mean"], step)
            if self.config.keep_best and best.step == step:
                save_weights(self.checkpoints / BEST, trained, self.processes)
        return best, {**scores, "best": best.score, "best_step": best.step}

    def put_back(self, trained: Parameters, best: Best, step: int) -> bool:
        """Give the model the stage's best weights, from the average; tell if they are others."""
        if not self.config.keep_best or best.step in (None, step):
            return False
        restore_weights(self.checkpoints / BEST, trained)
        return True


def run_scores(config: TrainConfig, base_dir: Path) -> Columns:
    """Main scores by task: before training, after each stage, and of BM25 on retrieval tasks.

    A stage has those of the weights that it ended with. Without evaluation there are none.
    """
    if config.evaluation is None:
        return {}
    tasks, columns = load_evaluation_tasks(config.evaluation, base_dir), Columns()
    run, keep_best = RunFolder(Path(config.output)), config.evaluation.keep_best
    for name, scores in run.read_evaluations(keep_best=keep_best).items():
        columns[name] = {
            task.name: TaskResult(task.type, task.main_score, scores.get(task.name), 0.0, {})
            for task in tasks
        }
    bm25 = evaluate_bm25(tasks) if columns else {}
    return columns | ({"BM25": bm25} if bm25 else {})


def movement(losses: Sequence[float]) -> int:
    """Whether the last losses are below the first (-1), above them (1), or neither (0).

    They differ if their means do by two standard errors, or by a twentieth: what the spread hides
    is no alarm.
    """
    first, last = losses[:WINDOW], losses[-WINDOW:]
    mean, moved = statistics.fmean(first), statistics.fmean(last) - statistics.fmean(first)
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / WINDOW)
    if moved < 0:
        return -1 if -moved > min(2 * error, _LITTLE * abs(mean)) else 0
    return 1 if moved > max(2 * error, _LITTLE * abs(mean)) else 0
