"""Metrics to TensorBoard, Weights & Biases or trackio, through accelerate's trackers.

What goes there are the numbers of ``metrics.jsonl`` and the recipe, nothing else. ``metrics.jsonl``
is written in any case.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import (
    ProjectConfiguration,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)

from nvembed.core.errors import ConfigError
from nvembed.core.runs import RunFolder
from nvembed.training.config import TrackerKind

PROJECT = "nvembed"
"""Under this name trackers group the runs."""


def tracker_options(kinds: Sequence[TrackerKind], run: RunFolder) -> dict[str, Any]:
    """What ``Accelerator(…)`` must be told for these trackers.

    Raises:
        ConfigError: the package of one is not installed.
    """
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
    """Begin to track a run, or go on tracking it.

    Args:
        accelerator: made with ``tracker_options``.
        run: its folder; a run that goes on is the same one to the tracker, one started over is not.
        recipe: the configuration as plain data.
        step: updates done so far; rows of later ones, from before the run was stopped, are dropped
            by TensorBoard.
    """
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
