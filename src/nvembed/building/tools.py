"""What the builds of several sets share, made when it is first needed."""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path

from nvembed.building.contamination import Contamination, EvaluationText
from nvembed.building.evaluation_texts import evaluation_texts
from nvembed.evaluation.tasks import load_tasks
from nvembed.training.build_config import BuildConfig


class Tools:
    """Evaluation texts of a build.

    Args:
        build: the settings.
        base_dir: folder of the recipe.
    """

    def __init__(self, build: BuildConfig, base_dir: Path) -> None:
        self._build = build
        self._base_dir = base_dir

    @cached_property
    def _texts(self) -> tuple[EvaluationText, ...]:
        folders = [self._base_dir / folder for folder in self._build.tasks]
        return tuple(evaluation_texts(load_tasks(folders)))

    @lru_cache(maxsize=1)  # noqa: B019 - lives as long as the command
    def contamination(self, bm25: float | None) -> Contamination:
        """Finds evaluation texts, with a BM25 threshold where a set has one."""
        return Contamination(self._texts, near=self._build.near, bm25=bm25)
