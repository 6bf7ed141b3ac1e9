"""Which of the nearest documents become negatives of a block of records, and the report of it.

The number of the report that matters is how many negatives may be positives that nobody labelled:
of those a teacher scores nearly as high as the labelled positive, many are.

Letters: C cases, N candidates of each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed.core.runs import derive_seed
from nvembed.data.config import MiningConfig, Strategy
from nvembed.mining.corpus import Corpus, nearly_equal, words
from nvembed.mining.ranking import NOTHING, Rows, Scores

NUM_SAMPLES = 5
SAMPLE_CHARACTERS = 200
_FEW = 16  # rows that are sooner compared one by one

Marks = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Case:
    """One record to mine for."""

    # Queries with their positives: one of a pair record; both sentences of an STS pair.
    sides: tuple[tuple[str, tuple[str, ...]], ...]
    given: tuple[str, ...]  # negatives that the record has already
    instruction: str | None = None  # the record's own, in place of that of its set


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What the search found for some cases: different documents, nearest first."""

    rows_CN: Rows  # of the corpus; ``NOTHING`` where there are fewer
    scores_CN: Scores  # of two sides the higher one
    positive_rows_C: Rows  # the positive with the lowest score of each case
    positive_scores_C: Scores


@dataclass(frozen=True, slots=True)
class Mined:
    """The negatives of a case, given ones that stay in front."""

    negatives: tuple[str, ...]
    rows: tuple[int, ...]  # of the corpus
    positive_scores: tuple[float, ...] = ()  # where they are to be written
    negative_scores: tuple[float, ...] = ()


class Selector:
    """Chooses negatives block after block; ``known`` has the rows of all positives by query."""

    def __init__(
        self,
        config: MiningConfig,
        corpus: Corpus,
        known: Mapping[str, frozenset[int]],
        num_cases: int,
    ) -> None:
        self._config, self._corpus, self._known = config, corpus, known
        self._sample_every = -(-num_cases // NUM_SAMPLES)
        self._counts: defaultdict[str, Any] = defaultdict(int)
        self._samples: list[MiningSample] = []

    def report(self) -> MiningReport:
        """Return the numbers of all cases so far, of which there must be one."""
        counts = self._counts
        records, mined, nearest = counts["records"], counts["mined"], counts["nearest"]
        reached = zip(
            SHARES_OF_POSITIVE,
            [count / mined if mined else None for count in counts["mined_reaching"].tolist()],
            [count / nearest if nearest else None for count in counts["nearest_reaching"].tolist()],
            strict=True,
        )
        return MiningReport(
            records=records,
            documents=len(self._corpus.texts),
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
            samples=tuple(self._samples),
        )

    def choose(self, cases: Sequence[Case], near: Neighbours) -> list[Mined]:
        """Return the negatives of the next cases."""
        config, positive_C, scores_CN = self._config, near.positive_scores_C, near.scores_CN
        forbidden = [
            frozenset().union(*(self._known[query] for query, _ in case.sides)) for case in cases
        ]
        given = [self._given(case, rows) for case, rows in zip(cases, forbidden, strict=True)]
        eligible_CN = near.rows_CN != NOTHING
        for number, rows_N in enumerate(near.rows_CN):
            refused = [*forbidden[number], *given[number]]
            if len(refused) > _FEW:
                eligible_CN[number] &= ~np.isin(rows_N, refused)
            else:
                for row in refused:
                    eligible_CN[number] &= rows_N != row
        passed_CN = passes(config.strategy, config.limit, positive_C, scores_CN)
        allowed_CN = passed_CN & after_first(eligible_CN, skip=config.skip_top)
        wanted_C = np.array([max(config.num_negatives - len(own), 0) for own in given])
        taken_CN = self._take(allowed_CN, wanted_C, near, cases, forbidden)
        naive_CN = first_of(eligible_CN, wanted_C)
        self._sample(cases, near, taken_CN, naive_CN & ~passed_CN)
        num_negatives_C = np.array([len(own) for own in given]) + taken_CN.sum(axis=1)
        found_C = (near.rows_CN == near.positive_rows_C[:, None]).any(axis=1)
        self._count(
            records=len(cases),
            positive_score=float(positive_C.sum(dtype=np.float64)),
            negative_score=float(scores_CN[taken_CN].sum(dtype=np.float64)),
            candidates=int(eligible_CN.sum()),
            rejected=int((eligible_CN & ~passed_CN).sum()),
            mined=int(taken_CN.sum()),
            mined_reaching=reaching(positive_C, scores_CN, taken_CN),
            nearest=int(naive_CN.sum()),
            nearest_reaching=reaching(positive_C, scores_CN, naive_CN),
            with_fewer=int((num_negatives_C < config.num_negatives).sum()),
            with_none=int((num_negatives_C == 0).sum()),
            not_found=int((~found_C).sum()),
        )
        mined = []
        for own, rows_N, taken_N in zip(given, near.rows_CN, taken_CN, strict=True):
            new = rows_N[taken_N].tolist()
            texts = (*own.values(), *(self._corpus.texts[row] for row in new))
            mined.append(Mined(texts, (*own, *new)))
        return mined

    def _count(self, **counts: Any) -> None:
        for name, count in counts.items():
            self._counts[name] += count

    def _given(self, case: Case, forbidden: frozenset[int]) -> dict[int, str]:
        """Return the given negatives that stay, by row, in the record's own spelling."""
        kept: dict[int, str] = {}
        if self._config.given == "keep":
            for text in case.given:
                row = self._corpus.find(text)
                if row is not None and row not in forbidden:
                    kept.setdefault(row, text)
            self._count(given_kept=len(kept), given_dropped=len(case.given) - len(kept))
        return kept

    def _take(
        self,
        candidates_CN: Marks,
        wanted_C: Rows,
        near: Neighbours,
        cases: Sequence[Case],
        forbidden: Sequence[frozenset[int]],
    ) -> Marks:
        """Take of each case's candidates as many as it wants."""
        config = self._config
        if config.sample == "top" and config.near_duplicate is None:
            return first_of(candidates_CN, wanted_C)
        taken_CN = np.zeros_like(candidates_CN)
        for number, wanted in enumerate(wanted_C.tolist()):
            places = np.flatnonzero(candidates_CN[number])
            if not wanted or not len(places):
                continue
            if config.sample == "random":
                # Seeded by the record's number, so that no draw depends on how others went.
                seed = derive_seed(config.seed, "mining", self._counts["records"] + number)
                places = np.random.default_rng(seed).permutation(places[: config.sample_from])
            new = self._not_near(places, near.rows_CN[number], cases[number], forbidden[number])
            taken_CN[number, [place for place, _ in zip(new, range(wanted), strict=False)]] = True
        return taken_CN

    def _not_near(
        self, places: Rows, rows_N: Rows, case: Case, forbidden: frozenset[int]
    ) -> Iterable[int]:
        """Pass over places whose text is nearly a known positive or the query."""
        threshold, texts = self._config.near_duplicate, self._corpus.texts
        if threshold is None:
            yield from places.tolist()
            return
        known = [texts[row] for row in sorted(forbidden)] + [query for query, _ in case.sides]
        avoid = [words(text) for text in known]
        for place in places.tolist():
            text = texts[int(rows_N[place])]
            if any(nearly_equal(text, other, threshold) for other in avoid):
                self._count(near_duplicates=1)
            else:
                yield place

    def _sample(
        self, cases: Sequence[Case], near: Neighbours, taken_CN: Marks, refused_CN: Marks
    ) -> None:
        def scored(rows: Rows, scores: Scores) -> tuple[ScoredText, ...]:
            return tuple(
                ScoredText(self._corpus.texts[row][:SAMPLE_CHARACTERS], score)
                for row, score in zip(rows.tolist(), scores.tolist(), strict=True)
            )

        first = -self._counts["records"] % self._sample_every
        for number in range(first, len(cases), self._sample_every):
            of = slice(number, number + 1)
            (positive,) = scored(near.positive_rows_C[of], near.positive_scores_C[of])
            rows_N, scores_N = near.rows_CN[number], near.scores_CN[number]
            negatives, refused = (
                scored(rows_N[marks_CN[number]], scores_N[marks_CN[number]])
                for marks_CN in (taken_CN, refused_CN)
            )
            query = cases[number].sides[0][0][:SAMPLE_CHARACTERS]
            self._samples.append(MiningSample(query, positive, negatives, refused))


# --- Rules: which candidates may be negatives -----------------------------------------------------


def passes(strategy: Strategy, limit: float, positive_scores_C: Scores, scores_CN: Scores) -> Marks:
    """Keep candidates clearly worse than the positive, by a rule of NV-Retriever (2407.15831)."""
    match strategy:
        case "percent_of_positive":
            # Below 0 the ceiling would rise above the positive itself, so nothing is kept there.
            ceiling_C = np.where(positive_scores_C > 0.0, limit * positive_scores_C, -np.inf)
        case "margin":
            ceiling_C = positive_scores_C - limit
        case "absolute":
            ceiling_C = np.full_like(positive_scores_C, limit)
        case "top_k":
            return np.ones_like(scores_CN, dtype=np.bool_)
    return np.less(scores_CN, ceiling_C[:, None])


def after_first(eligible_CN: Marks, *, skip: int) -> Marks:
    """Keep all but the first ``skip``: Top-K shifted by N of NV-Retriever (best N: 10)."""
    return np.logical_and(eligible_CN, np.cumsum(eligible_CN, axis=1) > skip)


def first_of(eligible_CN: Marks, wanted_C: Rows) -> Marks:
    """Keep the first ``wanted`` eligible candidates of each case."""
    count_CN = np.cumsum(eligible_CN, axis=1, dtype=np.int32)
    return np.logical_and(eligible_CN, count_CN <= wanted_C[:, None])


# --- The report -----------------------------------------------------------------------------------

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
    """Which part of the negatives scores at least so much of their positive's score, if any."""

    of_positive: float
    mined: float | None
    nearest: float | None  # of as many nearest documents, taken without any rule


@dataclass(frozen=True, slots=True)
class MiningReport:
    """The outcome of a run."""

    records: int  # that negatives were sought for
    documents: int  # different texts that were searched
    negatives: int  # all records together
    given_kept: int  # that the records had before and keep
    given_dropped: int  # left out for being equal to a positive or the query
    mean_positive_score: float  # of several positives the lowest counts
    mean_negative_score: float | None  # of mined ones
    share_with_fewer: float  # of the records, than asked for
    share_with_none: float  # of the records, no negative at all
    # Of the records, no positive among the documents looked at: raise ``search_depth`` where large.
    share_positive_not_found: float
    candidates: int  # looked at, neither known positive nor query nor given
    share_rejected: float  # of the candidates, by the strategy's rule
    near_duplicates: int  # candidates that are nearly a known positive or the query
    near_positive: tuple[NearPositive, ...]
    samples: tuple[MiningSample, ...]  # spread over the file

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
