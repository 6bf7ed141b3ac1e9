"""Built data sets, as training sees them: their settings, their manifest, their place.

    <folder>/<set>/part-00000.parquet …   records, see ``data/record_shards.py``
                   manifest.json          settings, counts, checksums
                   refused.jsonl          bad rows: place and problem
                   contaminated.jsonl     records that hold evaluation texts

Where a recipe has a ``build`` section, training reads what ``nvembed data build`` wrote, after
comparing the settings of the manifest with those of the recipe. Contents are not compared:
the command does that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nvembed.core.errors import DataError
from nvembed.data.build_config import BuildConfig, BuildMining
from nvembed.data.sources import DatasetConfig

FORMAT = 1
MANIFEST = "manifest.json"
MINED_KINDS = ("retrieval", "nli", "sts")
# Keys of a data set that decide nothing about its records.
_NOT_OF_THE_BUILD = {"name", "weight", "stages", "note"}


def mining_of(dataset: DatasetConfig, build: BuildConfig) -> BuildMining | None:
    """How a set is mined; None where it is not."""
    mine = build.mine
    if mine is None or dataset.kind not in MINED_KINDS:
        return None
    return mine if mine.datasets is None or dataset.name in mine.datasets else None


def set_settings(dataset: DatasetConfig, build: BuildConfig) -> dict[str, Any]:
    """Everything in a recipe that decides what a built set holds, as plain data."""
    mine = mining_of(dataset, build)
    # The instruction is read by the teacher alone.
    left_out = _NOT_OF_THE_BUILD if mine else _NOT_OF_THE_BUILD | {"instruction"}
    against = {
        "tasks": list(build.tasks),
        "near": build.near,
        "bm25": build.bm25.get(dataset.name),
    }
    return {
        "format": FORMAT,
        "source": dataset.model_dump(mode="json", exclude=left_out),
        "max_refused": build.max_refused,
        "decontaminate": against if build.tasks else None,
        "mine": mine and mine.model_dump(mode="json", exclude={"datasets"}),
        "rows_per_shard": build.rows_per_shard,
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a built set; None where there is no set, or one that is not whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        shards = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
        whole = all((folder / name).stat().st_size == size for name, size in shards.items())
        whole &= all(isinstance(manifest[key], dict) for key in ("settings", "inputs", "steps"))
        whole &= all(isinstance(manifest[key], str) for key in ("name", "kind"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return manifest if whole and shards else None


def different_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Key paths of settings at which two of them differ."""
    found: list[str] = []
    for key in dict.fromkeys((*old, *new)):
        one, other = old.get(key), new.get(key)
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            found += different_keys(one, other, f"{prefix}{key}.")
        else:
            found.append(prefix + key)
    return found


def training_datasets(
    datasets: Sequence[DatasetConfig], build: BuildConfig | None, base_dir: Path
) -> tuple[DatasetConfig, ...]:
    """The data sets of a run, each with its built shards in place of its source.

    Args:
        datasets: those of the recipe; without a ``build`` section they come back as they are.
        build: that section.
        base_dir: folder of the recipe.

    Raises:
        DataError: a set is not built, or was built from other settings; names all of them. Or sets
            are on the hub and the recipe does not build any.
    """
    if build is None:
        if away := [dataset.name for dataset in datasets if dataset.path is None]:
            raise DataError(
                f"{', '.join(away)}: on the hub, and the recipe has no `build` section",
                where="datasets",
                hint="Add one, as in `build: {folder: data}`, and run `nvembed data build RECIPE`",
            )
        return tuple(datasets)
    folder = (base_dir / build.folder).absolute()
    problems: list[str] = []
    found: list[DatasetConfig] = []
    for dataset in datasets:
        manifest = read_manifest(folder / dataset.name)
        if manifest is None:
            problems.append(f"{dataset.name} is not built")
        elif keys := different_keys(manifest["settings"], set_settings(dataset, build)):
            problems.append(f"{dataset.name} was built with another {', '.join(keys)}")
        else:
            found.append(dataset.with_file(folder / dataset.name))
    if problems:
        raise DataError(
            "; ".join(problems),
            where=str(folder),
            expected="the data sets of the recipe",
            hint="Run `nvembed data build RECIPE`, with the same key=value changes",
        )
    return tuple(found)
