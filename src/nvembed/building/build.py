"""All data sets of a recipe, one after the other: ``nvembed data build``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from nvembed.building.mining import teacher_name
from nvembed.building.one_set import (
    BUILD,
    SetJob,
    build_set,
    finished_manifest,
    refused_file,
    steps_folder,
)
from nvembed.building.tools import Tools
from nvembed.core.cache import content_hash, digest_of
from nvembed.core.errors import ConfigError, UserError
from nvembed.core.files import alone_in
from nvembed.core.ownership import check_outputs, check_overlaps
from nvembed.data.build_config import BuildConfig
from nvembed.data.built_sets import mining_of, read_manifest, set_settings
from nvembed.data.config import DatasetConfig, local_sources
from nvembed.interop.fingerprint import contents_fingerprint
from nvembed.mining.teachers import check_teacher

_FOLDER_NAME = re.compile(r"\w[\w .+-]*")


@dataclass(frozen=True, slots=True)
class SetOutcome:
    """What became of a set.

    Args:
        name: of the set.
        state: ``unchanged`` was built before from the same settings and inputs.
        manifest: what it holds; None where it failed.
        error: why it failed.
    """

    name: str
    state: Literal["built", "unchanged", "failed"]
    manifest: dict[str, Any] | None
    error: UserError | None = None


class BuildableRecipe(Protocol):
    """What a build reads of a recipe; ``TrainConfig`` has it."""

    @property
    def datasets(self) -> tuple[DatasetConfig, ...]:
        """The sets."""
        ...

    @property
    def build(self) -> BuildConfig | None:
        """How they are built; ``None`` is the defaults."""
        ...

    def input_paths(self, base_dir: Path, recipe: Path | None = None) -> list[Path]:
        """Files and folders that the recipe reads, which a build must not write to."""
        ...


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
    place = (base_dir / build.folder).absolute()
    _check_outputs(config.datasets, build, place, config.input_paths(base_dir, recipe))
    with alone_in(place) as alone:
        if not alone:
            raise UserError(
                "another build is at work here", where=str(place), hint="Wait for its end"
            )
        return list(_outcomes(config.datasets, build, place, base_dir, keep_going, log))


def _check_outputs(
    datasets: Sequence[DatasetConfig], build: BuildConfig, place: Path, inputs: Sequence[Path]
) -> None:
    """Refuse to begin where a set would replace something of the user's."""
    targets = [place / dataset.name for dataset in datasets]
    refused = [refused_file(place, dataset.name) for dataset in datasets]
    steps = [steps_folder(place, dataset.name) for dataset in datasets]
    check_overlaps([*targets, *refused, *steps], inputs)
    # What is built already is not written again, whatever was added to it.
    new = [
        target
        for target, dataset in zip(targets, datasets, strict=True)
        if (manifest := read_manifest(target)) is None
        or manifest.get("settings") != set_settings(dataset, build)
    ]
    check_outputs([*new, *refused], made_by=BUILD)


def _outcomes(
    datasets: Sequence[DatasetConfig],
    build: BuildConfig,
    place: Path,
    base_dir: Path,
    keep_going: bool,
    log: Callable[[str], None],
) -> Iterator[SetOutcome]:
    """Build one set after the other."""
    tools = Tools(build, base_dir, place)
    shared = _SharedInputs(build, base_dir)
    for number, dataset in enumerate(datasets, start=1):
        label = f"[{number}/{len(datasets)}] {dataset.name}"
        try:
            job = SetJob(dataset, build, place, base_dir, shared.of_set(dataset))
            manifest = finished_manifest(job)
            if manifest is not None:
                yield SetOutcome(dataset.name, "unchanged", manifest)
                continue
            log(label)
            yield SetOutcome(dataset.name, "built", build_set(job, tools))
        except UserError as error:
            if not keep_going:
                raise
            log(f"{label}: failed: {error}")
            yield SetOutcome(dataset.name, "failed", None, error)


class _SharedInputs:
    """Hashes of what is read; those of tasks and teacher are taken once."""

    def __init__(self, build: BuildConfig, base_dir: Path) -> None:
        self._build = build
        self._base_dir = base_dir
        self._known: dict[str, str | None] = {}

    def of_set(self, dataset: DatasetConfig) -> dict[str, str | None]:
        files = local_sources(dataset, self._base_dir)
        mined = mining_of(dataset, self._build) is not None
        found = {
            "source": content_hash(*map(digest_of, files)) if files else None,
            "tasks": self._once("tasks", self._tasks),
            "teacher": self._once("teacher", self._teacher) if mined else None,
        }
        if mined and (reranker := self._once("reranker", self._reranker)) is not None:
            found["reranker"] = reranker
        return found

    def _once(self, name: str, make: Callable[[], str | None]) -> str | None:
        if name not in self._known:
            self._known[name] = make()
        return self._known[name]

    def _tasks(self) -> str | None:
        folders = [digest_of(self._base_dir / name) for name in self._build.tasks]
        return content_hash(*folders) if folders else None

    def _teacher(self) -> str | None:
        assert self._build.mine is not None
        folder = Path(teacher_name(self._build.mine.teacher, self._base_dir))
        return contents_fingerprint(str(folder)) if folder.is_dir() else None

    def _reranker(self) -> str | None:
        assert self._build.mine is not None
        folder = Path(self._build.mine.rerank or "")
        known = self._build.mine.rerank is not None and folder.is_dir()
        return contents_fingerprint(str(folder)) if known else None
