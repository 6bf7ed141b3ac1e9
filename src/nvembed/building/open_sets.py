"""What a path or a recipe names: sets that can be looked into."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nvembed.building.build import BuildableRecipe, default_folder
from nvembed.core.errors import ConfigError, DataError
from nvembed.data.built_sets import MANIFEST, read_manifest, read_shards
from nvembed.data.config import DatasetConfig
from nvembed.data.records import BadRow, Converted, Kind
from nvembed.data.sources.opening import open_dataset

_RECIPE = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class OpenSet:
    """A set to be read once; the rows raise ``SourceError`` where the source cannot be opened."""

    name: str
    kind: Kind
    rows: Iterable[Converted | BadRow]


def open_sets(
    path: Path, given: DatasetConfig | None, read_recipe: Callable[[Path], BuildableRecipe]
) -> Iterator[OpenSet]:
    """Find the sets at a path.

    Args:
        path: a recipe, whose sets are taken as built where they are, else from their sources; the
            folder of a built set, or of several; or a file of records.
        given: how to read a file; None where its kind was not said.
        read_recipe: reads a recipe; called for one alone.

    Raises:
        DataError: there is nothing of that sort, or a source cannot be opened.
        ConfigError: a file whose kind was not said.
    """
    if path.suffix in _RECIPE:
        yield from _of_recipe(path, read_recipe(path))
    elif path.is_dir():
        folders = sorted(file.parent for file in path.glob(f"*/{MANIFEST}"))
        if (path / MANIFEST).is_file():
            folders = [path]
        if not folders:
            raise DataError("no built data set here", where=str(path), expected=f"a {MANIFEST}")
        for folder in folders:
            manifest = read_manifest(folder)
            if manifest is None:
                raise DataError("the set is not whole", where=str(folder), hint="Build it again")
            yield OpenSet(manifest["name"], manifest["kind"], read_shards(folder, manifest["kind"]))
    elif given is None:
        raise ConfigError(
            "the kind of the records is missing",
            where="--kind",
            expected="retrieval, nli, sts, classification or clustering",
        )
    else:
        yield OpenSet(given.name, given.kind, open_dataset(given, base_dir=Path()).rows)


def _of_recipe(path: Path, config: BuildableRecipe) -> Iterator[OpenSet]:
    built = path.parent / (config.build.folder if config.build else default_folder(path))
    for dataset in config.datasets:
        folder = built / dataset.name
        manifest = read_manifest(folder)
        if manifest is not None and manifest["kind"] == dataset.kind:
            yield OpenSet(
                f"{dataset.name} (built)", dataset.kind, read_shards(folder, dataset.kind)
            )
        else:
            rows = _when_asked(dataset, path.parent)
            yield OpenSet(dataset.name, dataset.kind, rows)


def _when_asked(dataset: DatasetConfig, base_dir: Path) -> Iterator[Converted | BadRow]:
    """Open a source when its first row is asked for, so that others can be read without it."""
    yield from open_dataset(dataset, base_dir=base_dir).rows
