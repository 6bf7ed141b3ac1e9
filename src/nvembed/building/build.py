"""All data sets of a recipe, one after the other: ``nvembed data build``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from nvembed.building.hard_negatives import teacher_name
from nvembed.building.set_build import BUILD, BuildContext, SetBuild, set_places
from nvembed.core.errors import ConfigError, UserError
from nvembed.core.files import alone_in
from nvembed.core.ownership import check_outputs, check_overlaps
from nvembed.data.built_sets import read_manifest, set_settings
from nvembed.data.config import BuildConfig, DatasetConfig
from nvembed.mining.ranking import check_teacher

if TYPE_CHECKING:
    from rich.console import Console

_FOLDER_NAME = re.compile(r"\w[\w .+-]*")
# Columns of the table that a build ends with, of the counts of a set's steps; None: not done.
_COLUMNS: dict[str, Callable[[dict[str, Any]], int | None]] = {
    "read": lambda steps: steps["read"]["in"],
    "refused": lambda steps: steps["read"]["refused"] + steps["select"]["unusable_classes"],
    "duplicates": lambda steps: steps["distinct"]["in"] - steps["distinct"]["out"],
    "contaminated": lambda steps: (
        (clean := steps.get("decontaminate")) and clean["in"] - clean["out"]
    ),
    "not used": lambda steps: steps["select"]["beyond_cap"],
    "mined": lambda steps: (mine := steps.get("mine")) and mine["negatives"],
    "written": lambda steps: steps["select"]["out"],
}


@dataclass(frozen=True, slots=True)
class SetOutcome:
    """What became of a set: its manifest, also where it was built before, or why it failed."""

    name: str
    state: Literal["built", "unchanged", "failed"]
    manifest: dict[str, Any] | None
    error: UserError | None = None


class BuildableRecipe(Protocol):
    """What a build reads of a recipe; ``TrainConfig`` has it."""

    @property
    def datasets(self) -> tuple[DatasetConfig, ...]:
        """The sets."""

    @property
    def build(self) -> BuildConfig | None:
        """How they are built; ``None`` is the defaults."""

    def input_paths(self, base_dir: Path, recipe: Path | None = None) -> list[Path]:
        """Files and folders that the recipe reads, which a build must not write to."""


def default_folder(recipe: Path) -> str:
    """Where the sets of a recipe without a ``build`` section go, relative to the recipe."""
    return f"data/{recipe.stem}"


def build_recipe(
    config: BuildableRecipe,
    *,
    base_dir: Path,
    folder: str,
    keep_going: bool = False,
    log: Callable[[str], None] = lambda line: None,
    recipe: Path | None = None,
) -> list[SetOutcome]:
    """Build the sets that are not built yet, or from something else.

    A build that was stopped, at any moment, goes on when started again, to the same bytes.

    Args:
        config: the recipe, a ``TrainConfig``.
        base_dir: its folder.
        folder: where sets go if the recipe has no ``build`` section; relative to ``base_dir``.
        keep_going: go on with the next set where one fails.
        log: told one line per set.
        recipe: file of the recipe, which must not be among what is written.

    Returns:
        The outcome of every set, in order. There are failed ones only with ``keep_going``.

    Raises:
        ConfigError: a set has a name that no folder can have, mining is set up wrongly, or
            something would be lost that a build did not make or that it reads.
        UserError: a set cannot be built.
    """
    build = config.build or BuildConfig(folder=folder)
    for dataset in config.datasets:
        if _FOLDER_NAME.fullmatch(dataset.name) is None:
            raise ConfigError(
                f"the data set {dataset.name!r} cannot be a folder",
                where="datasets.name",
                expected="letters, digits, _, -, +, . and blanks",
            )
    if build.mine is not None:
        teacher = teacher_name(build.mine.teacher, base_dir)
        check_teacher(teacher, build.mine.teacher_model, build.mine, "local")
    context = BuildContext(build, base_dir, (base_dir / build.folder).absolute())
    _check_outputs(config.datasets, context, config.input_paths(base_dir, recipe))
    outcomes = []
    with alone_in(context.folder) as alone:
        if not alone:
            raise UserError(
                "another build is at work here", where=str(context.folder), hint="Wait for its end"
            )
        for number, dataset in enumerate(config.datasets, start=1):
            label = f"[{number}/{len(config.datasets)}] {dataset.name}"
            outcomes.append(_build_one(dataset, context, label, keep_going, log))
    return outcomes


def _check_outputs(
    datasets: Sequence[DatasetConfig], context: BuildContext, inputs: Sequence[Path]
) -> None:
    """Refuse to begin where a set would replace something of the user's."""
    written = []
    for dataset in datasets:
        target, refused, steps = set_places(context.folder, dataset.name)
        check_overlaps([target, refused, steps], inputs)
        written.append(refused)
        # What is built already is not written again, whatever was added to it.
        manifest = read_manifest(target) or {}
        if manifest.get("settings") != set_settings(dataset, context.build):
            written.append(target)
    check_outputs(written, made_by=BUILD)


def _build_one(
    dataset: DatasetConfig,
    context: BuildContext,
    label: str,
    keep_going: bool,
    log: Callable[[str], None],
) -> SetOutcome:
    try:
        build = SetBuild(dataset, context)
        if (manifest := build.finished_manifest()) is not None:
            return SetOutcome(dataset.name, "unchanged", manifest)
        log(label)
        return SetOutcome(dataset.name, "built", build.run())
    except UserError as error:
        if not keep_going:
            raise
        log(f"{label}: failed: {error}")
        return SetOutcome(dataset.name, "failed", None, error)


def print_outcomes(outcomes: Sequence[SetOutcome], console: Console) -> None:
    """Print one row of numbers per set and a sum."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("data set", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    table.add_column("state")
    sums: Counter[str] = Counter()
    for outcome in outcomes:
        steps = outcome.manifest and outcome.manifest["steps"]
        numbers = {name: steps and count(steps) for name, count in _COLUMNS.items()}
        cells = ["–" if number is None else f"{number:,}" for number in numbers.values()]
        table.add_row(outcome.name, *cells, outcome.state)
        sums.update({name: number or 0 for name, number in numbers.items()})
    if len(outcomes) > 1:
        table.add_section()
        table.add_row("all", *(f"{sums[name]:,}" for name in _COLUMNS), "")
    console.print(table)
