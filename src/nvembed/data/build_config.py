"""The key ``build`` of a recipe, and what the miner can be told."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nvembed.core.arguments import PrecisionChoice
from nvembed.core.config import StrictModel

Strategy = Literal["percent_of_positive", "margin", "absolute", "top_k"]

# NV-Retriever's best setting of each rule (arXiv 2407.15831).
DEFAULT_THRESHOLDS: dict[Strategy, float] = {
    "percent_of_positive": 0.95,
    "margin": 0.05,
    "absolute": 0.7,
}


class MiningConfig(StrictModel):
    """How negatives are chosen among the documents nearest to a query.

    Args:
        strategy: rule by which a near document may be a negative. ``percent_of_positive``: its
            score is below ``threshold`` times the positive's; ``margin``: below the positive's
            minus ``threshold``; ``absolute``: below ``threshold``; ``top_k``: no rule.
        threshold: limit of the strategy; ``None`` is 0.95, 0.05 or 0.7 in that order.
        num_negatives: negatives wanted per record, given ones that are kept included (paper: 7).
        search_depth: how many of the nearest documents are looked at. A query whose positive is
            found further down than this may get no negatives under the first two rules. Deep costs
            little: with hashed bags of words as a (weak) teacher, 31 % of the queries of SQuAD got
            none at a depth of 100, 10 % at 500, in the same time.
        skip_top: how many of the nearest documents that are no known positive are passed over.
        sample: ``top`` takes the nearest of those left, ``random`` draws from them.
        sample_from: ``random`` draws from this many of the nearest left (NV-Retriever: 4 from the
            top 10 is best); ``None`` draws from all.
        seed: decides the draw, which depends on this and on the place of a record alone.
        near_duplicate: a candidate that shares at least this part of its words (intersection over
            union) with a known positive or the query is refused; ``None`` refuses equal texts only.
        given: whether a record's own negatives stay, in front of the mined ones, or make way for
            them.
        write_scores: give pair records (retrieval, NLI) the teacher's cosines of their positives
            and negatives, for distillation; False also takes scores away that a record had, since
            they belong to its old negatives.
        rerank: folder or hub id of a cross-encoder whose scores replace the teacher's, of positives
            and candidates, for the rule, the order and ``write_scores``; ``None`` uses none. The
            positive rules want scores above 0, as those of models that end in a sigmoid.
        rerank_depth: how many of the nearest it scores; the others are no candidates then.
    """

    strategy: Strategy = "percent_of_positive"
    threshold: float | None = None
    num_negatives: Annotated[int, Field(ge=1)] = 7
    search_depth: Annotated[int, Field(ge=1)] = 1000
    skip_top: Annotated[int, Field(ge=0)] = 0
    sample: Literal["top", "random"] = "top"
    sample_from: Annotated[int, Field(ge=1)] | None = None
    seed: int = 0
    near_duplicate: Annotated[float, Field(gt=0.0, le=1.0)] | None = 0.9
    given: Literal["keep", "replace"] = "keep"
    write_scores: bool = False
    rerank: str | None = None
    rerank_depth: Annotated[int, Field(ge=1)] = 50

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        limit, threshold = self.limit, f"threshold is {self.limit:g}"
        if self.strategy == "top_k" and self.threshold is not None:
            raise ValueError("threshold has no meaning for strategy top_k; leave it out")
        if self.strategy == "percent_of_positive" and not 0.0 < limit <= 1.0:
            raise ValueError(f"{threshold}, percent_of_positive takes (0, 1]")
        if self.strategy == "margin" and not 0.0 <= limit <= 2.0:
            raise ValueError(f"{threshold}, margin takes 0 to 2")
        if self.strategy == "absolute" and not -1.0 <= limit <= 1.0 and self.rerank is None:
            raise ValueError(f"{threshold}, absolute takes a cosine, -1 to 1")
        if self.sample_from is not None and self.sample == "top":
            raise ValueError("sample_from has no meaning for sample top; leave it out")
        if self.sample_from is not None and self.sample_from < self.num_negatives:
            raise ValueError(
                f"sample_from is {self.sample_from}, below num_negatives ({self.num_negatives})"
            )
        return self

    @property
    def limit(self) -> float:
        """The threshold in force; 0 for ``top_k``, which has none."""
        if self.threshold is not None:
            return self.threshold
        return DEFAULT_THRESHOLDS.get(self.strategy, 0.0)


class BuildMining(MiningConfig):
    """Hard negatives for the retrieval, NLI and STS sets; the other keys are those of mining.

    Args:
        teacher: what scores the candidates: folder (relative to the recipe) or hub id of a model,
            address of an OpenAI-compatible endpoint, or ``bm25``.
        teacher_model: name of the model at an endpoint.
        dtype: type of the teacher's weights, see ``encoding/encoder.py``.
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
