"""What ``nvembed data build`` can be told: the key ``build`` of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from nvembed.core.config import StrictModel
from nvembed.core.dtypes import PrecisionChoice
from nvembed.data.mining_config import MiningConfig


class BuildMining(MiningConfig):
    """Hard negatives for the retrieval, NLI and STS sets; the other keys are those of mining.

    Args:
        teacher: what scores the candidates: folder (relative to the recipe) or hub id of a model,
            address of an OpenAI-compatible endpoint, or ``bm25``.
        teacher_model: name of the model at an endpoint.
        dtype: of the teacher's weights, see ``nvembed.encoding.encoder.load_encoder``.
        datasets: names of the sets to mine; None is all of these kinds.
    """

    teacher: str = Field(min_length=1)
    teacher_model: str | None = None
    dtype: PrecisionChoice = "auto"
    datasets: tuple[str, ...] | None = Field(default=None, min_length=1)


class BuildConfig(StrictModel):
    """How the data sets of a recipe are made into training files.

    Args:
        folder: where they go, one folder per set; relative to the recipe.
        max_refused: share of the rows of a set that may be bad; above it the set is refused.
        tasks: folders of local evaluation tasks, or of several, whose texts must not be trained on;
            relative to the recipe.
        near: Jaccard similarity of pairs of words from which a training text counts as one of an
            evaluation task; None compares equal texts only.
        bm25: name of a set → BM25 similarity in (0, 1] (the lower share of two texts in each
            other, ``building/similar_texts.py``) from which a text of the set counts as that of a
            task (the paper did this for Emotion and AmazonCounterfactual).
        mine: hard negatives; None leaves the sets with the negatives that they have.
        rows_per_shard: records in a Parquet file.
    """

    folder: str = Field(min_length=1)
    max_refused: float = Field(default=0.01, ge=0, le=1)
    tasks: tuple[str, ...] = ()
    near: float | None = Field(default=0.6, gt=0, le=1)
    bm25: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(default={})
    mine: BuildMining | None = None
    rows_per_shard: int = Field(default=100_000, ge=1)
