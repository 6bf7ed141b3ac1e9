"""What mining found, in numbers and in a few samples to read.

The number that matters is how many negatives may be positives that nobody labelled: of those a
teacher scores nearly as high as the labelled positive, many are. Shares are given for what was
mined and for what the nearest documents, without any rule, would have been.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
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
    """One record as it came out.

    Args:
        query: of the record; of two the first.
        positive: the positive with the lowest score.
        negatives: mined ones.
        refused: what stood among the nearest and was refused by the rule: read whether these
            answer the query.
    """

    query: str
    positive: ScoredText
    negatives: tuple[ScoredText, ...]
    refused: tuple[ScoredText, ...]


@dataclass(frozen=True, slots=True)
class NearPositive:
    """How many negatives score at least so much of their positive's score.

    Args:
        of_positive: part of the positive's score.
        mined: part of the mined negatives at or above it; ``None`` where there are none.
        nearest: the same of as many nearest documents, taken without any rule.
    """

    of_positive: float
    mined: float | None
    nearest: float | None


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


@dataclass(slots=True)
class Tally:
    """The numbers of a report while they grow, block after block."""

    records: int = 0
    given_kept: int = 0
    given_dropped: int = 0
    near_duplicates: int = 0
    samples: list[MiningSample] = field(default_factory=list)
    _positive_sum: float = 0.0
    _negative_sum: float = 0.0
    _candidates: int = 0
    _rejected: int = 0
    _fewer: int = 0
    _none: int = 0
    _not_found: int = 0
    _mined: int = 0
    _nearest: int = 0
    _mined_above: list[int] = field(default_factory=lambda: [0] * len(SHARES_OF_POSITIVE))
    _nearest_above: list[int] = field(default_factory=lambda: [0] * len(SHARES_OF_POSITIVE))

    def count(
        self,
        positive_scores_C: NDArray[np.float32],
        scores_CN: NDArray[np.float32],
        *,
        eligible: NDArray[np.bool_],
        passed: NDArray[np.bool_],
        taken: NDArray[np.bool_],
        naive: NDArray[np.bool_],
    ) -> None:
        """Count candidates; the marks are ``(C, N)`` like their scores."""
        self._positive_sum += float(positive_scores_C.sum(dtype=np.float64))
        self._negative_sum += float(scores_CN[taken].sum(dtype=np.float64))
        self._candidates += int(eligible.sum())
        self._rejected += int((eligible & ~passed).sum())
        self._mined += int(taken.sum())
        self._nearest += int(naive.sum())
        for marks, above in ((taken, self._mined_above), (naive, self._nearest_above)):
            case, _ = np.nonzero(marks)
            positive, score = positive_scores_C[case], scores_CN[marks]
            for number, share in enumerate(SHARES_OF_POSITIVE):
                # Of a positive below 0 as far below it as the share is below 1.
                level = positive - np.float32(1.0 - share) * np.abs(positive)
                above[number] += int((score >= level).sum())

    def count_records(
        self, totals_C: NDArray[np.int64], *, wanted: int, found: NDArray[np.bool_]
    ) -> None:
        """Count records by the negatives they have now and whether their positive was found."""
        self.records += len(totals_C)
        self._fewer += int((totals_C < wanted).sum())
        self._none += int((totals_C == 0).sum())
        self._not_found += int((~found).sum())

    def report(self, *, documents: int) -> MiningReport:
        """Return the numbers so far; there must be a record."""
        near_positive = tuple(
            NearPositive(
                share,
                mined / self._mined if self._mined else None,
                nearest / self._nearest if self._nearest else None,
            )
            for share, mined, nearest in zip(
                SHARES_OF_POSITIVE, self._mined_above, self._nearest_above, strict=True
            )
        )
        return MiningReport(
            records=self.records,
            documents=documents,
            negatives=self._mined,
            given_kept=self.given_kept,
            given_dropped=self.given_dropped,
            mean_positive_score=self._positive_sum / self.records,
            mean_negative_score=self._negative_sum / self._mined if self._mined else None,
            share_with_fewer=self._fewer / self.records,
            share_with_none=self._none / self.records,
            share_positive_not_found=self._not_found / self.records,
            candidates=self._candidates,
            share_rejected=self._rejected / max(self._candidates, 1),
            near_duplicates=self.near_duplicates,
            near_positive=near_positive,
            samples=tuple(self.samples),
        )
