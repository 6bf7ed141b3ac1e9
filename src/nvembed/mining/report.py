"""What mining found, in numbers and in a few samples to read.

The number that matters is how many negatives may be positives that nobody labelled: of those a
teacher scores nearly as high as the labelled positive, many are. Shares are given for what was
mined and for what the nearest documents, without any rule, would have been.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHARES_OF_POSITIVE = (0.8, 0.9, 0.95, 1.0)


@dataclass(frozen=True, slots=True)
class ScoredText:
    """A text with the teacher's score for it, shortened for reading."""

    text: str
    score: float


@dataclass(frozen=True, slots=True)
class MiningSample:
    """One record as it came out, with the first of its queries."""

    query: str
    positive: ScoredText  # the one with the lowest score
    negatives: tuple[ScoredText, ...]
    refused: tuple[ScoredText, ...]  # by the rule, of the nearest: read whether these answer


@dataclass(frozen=True, slots=True)
class NearPositive:
    """Which part of the negatives scores at least so much of their positive's score.

    Of the mined ones, and of as many nearest documents, taken without any rule; ``None`` where
    there are none.
    """

    of_positive: float
    mined: float | None
    nearest: float | None


@dataclass(frozen=True, slots=True)
class MiningReport:
    """The outcome of a run.

    Args:
        records: records that negatives were sought for.
        documents: different texts that were searched.
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
        near_positive: by part of the positive's score, how many negatives reach it.
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
    near_positive: tuple[NearPositive, ...]
    samples: tuple[MiningSample, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)


def reaching(
    positive_scores_C: NDArray[Any], scores_CN: NDArray[Any], marks_CN: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Count, for each of ``SHARES_OF_POSITIVE``, the marked scores that reach it."""
    case, _ = np.nonzero(marks_CN)
    positive, score = positive_scores_C[case], scores_CN[marks_CN]
    # Of a positive below 0 as far below it as the share is below 1.
    levels = (positive - np.float32(1.0 - share) * np.abs(positive) for share in SHARES_OF_POSITIVE)
    return np.array([(score >= level).sum() for level in levels])


def report_of(
    counts: Mapping[str, Any], samples: Iterable[MiningSample], *, documents: int
) -> MiningReport:
    """Make the report of what ``selection.Selector`` has counted; there must be a record."""
    records, mined, nearest = counts["records"], counts["mined"], counts["nearest"]
    reached = zip(
        SHARES_OF_POSITIVE,
        [count / mined if mined else None for count in counts["mined_reaching"].tolist()],
        [count / nearest if nearest else None for count in counts["nearest_reaching"].tolist()],
        strict=True,
    )
    return MiningReport(
        records=records,
        documents=documents,
        negatives=mined,
        given_kept=counts["given_kept"],
        given_dropped=counts["given_dropped"],
        mean_positive_score=counts["positive_score"] / records,
        mean_negative_score=counts["negative_score"] / mined if mined else None,
        share_with_fewer=counts["with_fewer"] / records,
        share_with_none=counts["with_none"] / records,
        share_positive_not_found=counts["not_found"] / records,
        candidates=counts["candidates"],
        share_rejected=counts["rejected"] / max(counts["candidates"], 1),
        near_duplicates=counts["near_duplicates"],
        near_positive=tuple(NearPositive(*row) for row in reached),
        samples=tuple(samples),
    )
