"""From a grid to training runs: pure, nothing is started here.

In: a ``GridConfig`` and the recipe it names. Out: one ``TrainConfig`` per arm and seed.
Next file: ``training/ablation/runner.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvembed.core.config import load_config
from nvembed.core.errors import ConfigError, UserError
from nvembed.training.ablation.config import GridConfig
from nvembed.training.config import TrainConfig

_ORDER = "stage_order"


@dataclass(frozen=True, eq=False)
class Run:
    """One arm with one seed.

    Attributes:
        arm: its name, values joined by ``+``.
        seed: of the training run.
        folder: of the run and its scores.
        config: the training run, resolved.
    """

    arm: str
    seed: int
    folder: Path
    config: TrainConfig

    @property
    def results(self) -> Path:
        """File of the scores; a run that has it is finished."""
        return self.folder / "results.json"


def grid_runs(grid: GridConfig, base_dir: Path) -> list[Run]:
    """List all runs, seeds outermost: an interrupted grid has whole rows of its table.

    Args:
        grid: the grid.
        base_dir: folder that ``recipe`` is relative to.

    Raises:
        ConfigError: the recipe, or settings; names every arm that cannot be run.
    """
    recipe = base_dir / grid.recipe
    common = _overrides(grid.settings)
    base = load_config(TrainConfig, recipe, common)
    runs, problems = [], []
    for arm, values in grid.arms().items():
        parts = [grid.axes[axis][value] for axis, value in values.items()]
        try:
            config = _arm_config(parts, recipe, common, base)
        except UserError as error:
            problems.append(f"arm {arm}: {error}")
            continue
        for seed in grid.seeds:
            folder = Path(grid.output) / "arms" / arm / f"seed-{seed}"
            update = {"seed": seed, "output": str(folder)}
            runs.append(Run(arm, seed, folder, config.model_copy(update=update)))
    if problems:
        raise ConfigError("; ".join(problems))
    return sorted(runs, key=lambda run: grid.seeds.index(run.seed))


def _arm_config(
    parts: Sequence[Mapping[str, Any]], recipe: Path, common: Sequence[str], base: TrainConfig
) -> TrainConfig:
    overrides = list(common)
    for part in parts:
        if _ORDER in part:
            shape = _reordered(base.model_dump(mode="json"), part[_ORDER])
            overrides += [_override(key, value) for key, value in shape.items()]
            base = load_config(TrainConfig, recipe, overrides)
    for part in parts:
        overrides += _overrides({key: part[key] for key in part if key != _ORDER})
    return load_config(TrainConfig, recipe, overrides)


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    return [_override(key, value) for key, value in settings.items()]


def _override(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"  # JSON is YAML


def _reordered(base: Mapping[str, Any], order: Any) -> dict[str, Any]:
    """Keep the stages of ``order`` (numbers from 1), in that order, and the data sets they use."""
    stages = base["stages"]
    known = range(1, len(stages) + 1)
    if not isinstance(order, list) or not order or any(number not in known for number in order):
        raise ConfigError(
            f"stage_order is {order!r}", expected=f"a list of stage numbers 1 to {len(stages)}"
        )
    if len(set(order)) < len(order):
        raise ConfigError(f"stage_order {order!r} names a stage twice", expected="each once")
    datasets = []
    for dataset in base["datasets"]:
        kept = [order.index(number) + 1 for number in dataset["stages"] if number in order]
        if kept:
            datasets.append({**dataset, "stages": sorted(kept)})
    return {"stages": [stages[number - 1] for number in order], "datasets": datasets}


def runs_by_arm(runs: Sequence[Run]) -> Iterator[tuple[str, list[Run]]]:
    """Group runs by arm, in the order of first appearance."""
    for arm in dict.fromkeys(run.arm for run in runs):
        yield arm, [run for run in runs if run.arm == arm]
