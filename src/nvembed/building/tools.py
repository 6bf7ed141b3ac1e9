"""What the builds of several sets share, made when it is first needed."""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path
from typing import cast, get_args

from nvembed.building.contamination import Contamination, EvaluationText
from nvembed.building.evaluation_texts import evaluation_texts
from nvembed.core.dtypes import Precision, PrecisionChoice
from nvembed.data.build_config import BuildConfig
from nvembed.data.built_sets import MANIFEST, read_manifest
from nvembed.encoding.endpoint import is_endpoint
from nvembed.evaluation.tasks import load_tasks
from nvembed.mining.teachers import BM25_NAME


class Tools:
    """Evaluation texts of a build, and the type of its teacher's weights.

    Args:
        build: the settings.
        base_dir: folder of the recipe.
        place: where the sets go.
    """

    def __init__(self, build: BuildConfig, base_dir: Path, place: Path) -> None:
        self._build = build
        self._base_dir = base_dir
        self._place = place

    @cached_property
    def teacher_dtype(self) -> PrecisionChoice:
        """Settled for all sets at once: that of sets that are built already, if there are any."""
        mine = self._build.mine
        assert mine is not None
        if mine.teacher == BM25_NAME or is_endpoint(mine.teacher):
            return mine.dtype
        from nvembed.kernels.precision import settle_precision

        return settle_precision(mine.dtype, begun=self._begun(), option="build.mine.dtype=float32")

    def _begun(self) -> Precision | None:
        for file in sorted(self._place.glob(f"*/{MANIFEST}")):
            manifest = read_manifest(file.parent) or {}
            computing = manifest.get("steps", {}).get("mine", {}).get("computing") or {}
            if computing.get("dtype") in get_args(Precision):
                return cast(Precision, computing["dtype"])
        return None

    @cached_property
    def _texts(self) -> tuple[EvaluationText, ...]:
        folders = [self._base_dir / folder for folder in self._build.tasks]
        return tuple(evaluation_texts(load_tasks(folders)))

    @lru_cache(maxsize=1)  # noqa: B019 - lives as long as the command
    def contamination(self, bm25: float | None) -> Contamination:
        """Finds evaluation texts, with a BM25 threshold where a set has one."""
        return Contamination(self._texts, near=self._build.near, bm25=bm25)
