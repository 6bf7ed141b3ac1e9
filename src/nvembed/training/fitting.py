"""Options of a recipe that its data or its model must allow, checked before the first step."""

from __future__ import annotations

from collections.abc import Sequence

from nvembed.core.errors import ConfigError
from nvembed.data.mixture import Mixture
from nvembed.training.config import TrainConfig


def check_distillation(config: TrainConfig, mixtures: Sequence[Mixture]) -> None:
    """Make sure that a stage that learns from a teacher's scores has some.

    Args:
        config: the run.
        mixtures: of its stages, as their files are before mining.

    Raises:
        ConfigError: no record of the stage has scores; names its data sets.
    """
    kinds = {dataset.name: dataset.kind for dataset in config.datasets}
    for number, (stage, mixture) in enumerate(zip(config.stages, mixtures, strict=True)):
        # Mining gives new scores or takes those away that were there.
        mined = {} if stage.mine is None else dict.fromkeys(("retrieval", "nli"), stage.mine)
        scored = [
            mine.write_scores if (mine := mined.get(kinds[source.name])) else source.scored
            for source in mixture.sources
        ]
        if stage.distillation is not None and not any(scored):
            names = ", ".join(source.name for source in mixture.sources)
            raise ConfigError(
                f"no record of {names} has a teacher's scores",
                where=f"stages.{number}.distillation",
                expected='records with "positive_scores" and "negative_scores"',
                hint="Set mine.write_scores of the stage, or leave distillation out",
            )


def check_widths(config: TrainConfig, width: int) -> None:
    """Make sure that embeddings are as wide as the widths they are cut to.

    Args:
        config: the run.
        width: of the model's embeddings.

    Raises:
        ConfigError: a Matryoshka width is larger; names it.
    """
    for number, stage in enumerate(config.stages):
        for wide in stage.matryoshka or ():
            if wide > width:
                raise ConfigError(
                    f"width {wide} is larger than the model's embeddings",
                    where=f"stages.{number}.matryoshka",
                    expected=f"1 to {width}",
                )
