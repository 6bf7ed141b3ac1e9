"""A grid of training runs: what its file says, and one ``TrainConfig`` per arm and seed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, StringConstraints, model_validator

from nvembed.core.config import StrictModel, load_config
from nvembed.core.errors import ConfigError, UserError
from nvembed.training.config import TrainConfig

_ORDER = "stage_order"
# Names become folder names; "+" joins them.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Settings = dict[str, Any]
Axis = Annotated[dict[Name, Settings], Field(min_length=1)]


class PaperRows(StrictModel):
    """Rows (arm → row) of a published ``table``, by its name in ``evaluation/reference``."""

    table: str = Field(min_length=1)
    rows: dict[str, str] = Field(min_length=1)


class GridConfig(StrictModel):
    """A grid: every combination of one value per axis is an arm, run once per seed.

    Args:
        recipe: file of the training runs; relative to the grid file.
        output: folder of the runs and the report; relative to the working directory.
        title: heading of the report; ``None`` is the names of the output folder and the recipe.
        settings: keys of the recipe with the values they have in every arm, as ``a.b.0.c: value``.
            A stage or data set can be named instead of counted (``datasets.banking77.weight``).
        without: data sets of the recipe that no arm uses, by name; they go before the settings.
        axes: axis → value → settings, as above. An axis' settings apply after those of the axes
            before it. The key ``stage_order`` lists which stages of the recipe run, by number, in
            which order; data sets move with their stages. Only an axis may have it, and it applies
            before the other keys of the axes.
        leave_out: combinations that are not run: each names values of some axes.
        seeds: each arm is run with each; spread and significance are over them.
        baseline: the arm that others are compared with, a value per axis; ``None`` is the first
            value of every axis.
        tasks: folders of local tasks, or of several; relative to the grid file.
        task_names: only these tasks; ``None`` is all.
        keep_models: keep the trained models. Off, an arm leaves its scores, metrics and logs.
        paper: published numbers that belong to arms; ``None`` is none.
    """

    recipe: str = Field(min_length=1)
    output: str = Field(min_length=1)
    title: str | None = None
    settings: Settings = Field(default_factory=dict)
    without: tuple[str, ...] = ()
    axes: dict[Name, Axis] = Field(min_length=1)
    leave_out: tuple[dict[str, str], ...] = ()
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 1, 2), min_length=1)
    baseline: dict[str, str] | None = None
    tasks: tuple[str, ...] = Field(min_length=1)
    task_names: tuple[str, ...] | None = None
    keep_models: bool = False
    paper: tuple[PaperRows, ...] = ()

    @model_validator(mode="after")
    def _values_are_known(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds holds a seed twice")
        for number, left_out in enumerate(self.leave_out):
            self._check_values(f"leave_out.{number}", left_out)
        if self.baseline is not None:
            self._check_values("baseline", self.baseline)
            if missing := [axis for axis in self.axes if axis not in self.baseline]:
                raise ValueError(f"baseline has no value for {', '.join(missing)}")
        arms = self.arms()
        if not arms:
            raise ValueError("leave_out leaves no arm")
        if self.baseline_arm not in arms:
            raise ValueError(f"leave_out takes away the baseline {self.baseline_arm}")
        for paper in self.paper:
            if unknown := [arm for arm in paper.rows if arm not in arms]:
                raise ValueError(f"paper names {', '.join(unknown)}, which is no arm")
        return self

    def _check_values(self, where: str, values: Mapping[str, str]) -> None:
        for axis, value in values.items():
            if axis not in self.axes:
                raise ValueError(f"{where} names {axis!r}, which is no axis")
            if value not in self.axes[axis]:
                raise ValueError(f"{where} names {value!r}, which is no value of {axis}")

    def arms(self) -> dict[str, dict[str, str]]:
        """List the arms: name → value per axis, the first axis slowest."""
        found = {}
        for values in itertools.product(*self.axes.values()):
            arm = dict(zip(self.axes, values, strict=True))
            if not any(left_out.items() <= arm.items() for left_out in self.leave_out):
                found["+".join(values)] = arm
        return found

    @property
    def baseline_arm(self) -> str:
        """Name of the arm that others are compared with."""
        chosen = self.baseline or {axis: next(iter(values)) for axis, values in self.axes.items()}
        return "+".join(chosen[axis] for axis in self.axes)


@dataclass(frozen=True, eq=False)
class Run:
    """One arm, whose values are joined by ``+``, with one seed."""

    arm: str
    seed: int
    folder: Path  # of the run and its scores
    config: TrainConfig  # resolved

    @property
    def results(self) -> Path:
        """File of the scores; a run that has it is finished."""
        return self.folder / "results.json"


def grid_runs(grid: GridConfig, base_dir: Path) -> list[Run]:
    """List all runs, seeds outermost; the ConfigError names every arm that cannot be run."""
    recipe = base_dir / grid.recipe
    common = [*_left_out(grid.without, recipe), *_overrides(grid.settings)]
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
            overrides += _overrides(_reordered(base.model_dump(mode="json"), part[_ORDER]))
            base = load_config(TrainConfig, recipe, overrides)
    for part in parts:
        overrides += _overrides({key: part[key] for key in part if key != _ORDER})
    return load_config(TrainConfig, recipe, overrides)


def _left_out(names: Sequence[str], recipe: Path) -> list[str]:
    """The data sets of a recipe but for some, as an override."""
    if not names:
        return []
    datasets = load_config(TrainConfig, recipe).model_dump(mode="json")["datasets"]
    known = [dataset["name"] for dataset in datasets]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(
            f"{', '.join(unknown)}: no data set of the recipe",
            where="without",
            expected=f"some of {', '.join(known)}",
        )
    return _overrides({"datasets": [each for each in datasets if each["name"] not in names]})


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]  # JSON is YAML


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
