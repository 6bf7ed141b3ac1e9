"""What mining found, in numbers and in a few samples to read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ScoredText:
    """A text with the teacher's score for it, shortened for reading."""

    text: str
    score: float


@dataclass(frozen=True, slots=True)
class MiningSample:
    """One record as it came out: the positive with the lowest score and the mined negatives."""

    query: str
    positive: ScoredText
    negatives: tuple[ScoredText, ...]


@dataclass(frozen=True, slots=True)
class MiningReport:
    """The outcome of a run.

    Args:
        records: records that negatives were sought for.
        documents: different texts in the pool.
        negatives: mined negatives, all records together.
        given_kept: negatives that the records had before and keep.
        given_dropped: given negatives that were left out for being equal to a positive or the
            query.
        mean_positive_score: mean over the records of the positive's score (the lowest of several).
        mean_negative_score: mean over the mined negatives; ``None`` where there are none.
        share_with_fewer: part of the records that got fewer negatives than asked for.
        share_with_none: part of the records that have no negative at all.
        share_positive_not_found: part of the records whose positive is not among the documents
            looked at; where large, raise ``search_depth`` or take a better teacher.
        candidates: near documents looked at that are neither known positive nor query nor given.
        share_rejected: part of the candidates that the strategy's rule refused.
        near_duplicates: candidates refused for being nearly a known positive or the query.
        samples: a few records, spread over the file.
    """

    records: int
    documents: int
    negatives: int
    given_kept: int
    given_dropped: int
    mean_positive_score: float
    mean_negative_score: float | None
    share_with_fewer: float
    share_with_none: float
    share_positive_not_found: float
    candidates: int
    share_rejected: float
    near_duplicates: int
    samples: tuple[MiningSample, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)
