"""What a recipe reads: nothing of it may be replaced by what is made with the recipe."""

from __future__ import annotations

from pathlib import Path

from nvembed.data.sources.config import local_sources
from nvembed.training.config import TrainConfig


def recipe_inputs(config: TrainConfig, base_dir: Path, recipe: Path | None = None) -> list[Path]:
    """The files and folders that building and training read; names of the hub lead nowhere.

    Args:
        config: the recipe.
        base_dir: its folder.
        recipe: its file.
    """
    found = [] if recipe is None else [recipe]
    for dataset in config.datasets:
        found += local_sources(dataset, base_dir)
    names = [config.model.backbone]
    names += config.evaluation.tasks if config.evaluation else ()
    names += config.build.tasks if config.build else ()
    mining = [stage.mine for stage in config.stages]
    if config.build is not None and config.build.mine is not None:
        names.append(config.build.mine.teacher)
        mining.append(config.build.mine)
    names += [mine.rerank for mine in mining if mine is not None and mine.rerank is not None]
    # Some of them are looked for beside the recipe, some where the command runs.
    return [*found, *(base_dir / name for name in names), *map(Path, names)]


def training_inputs(config: TrainConfig, base_dir: Path, recipe: Path | None = None) -> list[Path]:
    """What training reads: as ``recipe_inputs``, and the built sets where there are some."""
    found = recipe_inputs(config, base_dir, recipe)
    if config.build is not None:
        folder = base_dir / config.build.folder
        found += [folder / dataset.name for dataset in config.datasets]
    return found
