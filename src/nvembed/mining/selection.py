"""The choice for a block of records: which of the nearest documents become their negatives.

In: candidates with their scores, nearest first; out: texts. Counts what it did, for the report.

Letters: C cases, N candidates of each, F refused rows of each, B queries of a rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import ConfigError
from nvembed.core.seeding import derive_seed
from nvembed.data.build_config import MiningConfig
from nvembed.mining.pool import Pool, nearly_equal, words
from nvembed.mining.ranking import NOTHING
from nvembed.mining.report import MiningReport, MiningSample, ScoredText, Tally

NUM_SAMPLES = 5
SAMPLE_CHARACTERS = 200
# Sets up to this size are compared member by member, for all cases at once.
_FEW = 16
_PADDING = NOTHING - 1


Query = tuple[str, str | None]
"""The text of a query, and its own instruction; ``None`` is that of its set."""


@dataclass(frozen=True, slots=True)
class Case:
    """One record to mine for.

    Args:
        sides: queries, each with its positives: one side for a pair record; both sentences of an
            STS pair, each the other's positive.
        given: negatives that the record has already.
        instruction: the record's own, in place of that of its set.
    """

    sides: tuple[tuple[str, tuple[str, ...]], ...]
    given: tuple[str, ...]
    instruction: str | None = None


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What the search found for some cases: document rows, nearest first.

    Args:
        rows_CN: different rows of the pool; ``NOTHING`` where there are fewer.
        scores_CN: score of each; of two sides the higher one.
        positive_rows_C: the positive with the lowest score of each case.
        positive_scores_C: that score.
    """

    rows_CN: NDArray[np.int64]
    scores_CN: NDArray[np.float32]
    positive_rows_C: NDArray[np.int64]
    positive_scores_C: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The negatives of a case, given ones that stay in front, and their rows in the pool."""

    texts: tuple[str, ...]
    rows: tuple[int, ...]


class Selector:
    """Chooses negatives block after block, in file order.

    Args:
        config: how to choose.
        pool: the documents; candidates are its rows.
        known: for every query, the rows of everything known to be positive for it.
        num_cases: how many cases there will be; spreads the samples.
    """

    def __init__(
        self,
        config: MiningConfig,
        pool: Pool,
        known: Mapping[str, frozenset[int]],
        num_cases: int,
    ) -> None:
        self._config = config
        self._pool = pool
        self._known = known
        self._sample_every = -(-num_cases // NUM_SAMPLES)
        self._tally = Tally()

    def choose(self, cases: Sequence[Case], near: Neighbours) -> list[Chosen]:
        """Return the negatives of the next cases."""
        forbidden = [self._forbidden(case) for case in cases]
        given = [self._given(case, rows) for case, rows in zip(cases, forbidden, strict=True)]
        eligible_CN = (near.rows_CN != NOTHING) & ~_among(
            near.rows_CN, [rows.union(own) for rows, own in zip(forbidden, given, strict=True)]
        )
        passed_CN = self._passes(near)
        allowed_CN = after_first(eligible_CN, skip=self._config.skip_top)
        wanted_C = np.array([max(self._config.num_negatives - len(own), 0) for own in given])
        taken_CN = self._take(allowed_CN & passed_CN, wanted_C, near, cases, forbidden)
        naive_CN = first_of(eligible_CN, wanted_C)
        self._sample(cases, near, taken_CN, naive_CN & ~passed_CN)
        num_given = np.array([len(own) for own in given])
        self._tally.count(
            near.positive_scores_C,
            near.scores_CN,
            eligible=eligible_CN,
            passed=passed_CN,
            taken=taken_CN,
            naive=naive_CN,
        )
        self._tally.count_records(
            num_given + taken_CN.sum(axis=1),
            wanted=self._config.num_negatives,
            found=(near.rows_CN == near.positive_rows_C[:, None]).any(axis=1),
        )
        chosen = []
        for own, rows_N, taken_N in zip(given, near.rows_CN, taken_CN, strict=True):
            rows = rows_N[taken_N].tolist()
            texts = (*own.values(), *(self._pool.texts[row] for row in rows))
            chosen.append(Chosen(texts, (*own, *rows)))
        return chosen

    def report(self) -> MiningReport:
        """Return the numbers of all cases so far."""
        return self._tally.report(documents=len(self._pool.texts))

    def _forbidden(self, case: Case) -> frozenset[int]:
        return frozenset().union(*(self._known[query] for query, _ in case.sides))

    def _given(self, case: Case, forbidden: frozenset[int]) -> dict[int, str]:
        """Return the given negatives that stay, by row, in the record's own spelling."""
        if self._config.given == "replace":
            return {}
        kept: dict[int, str] = {}
        for text in case.given:
            row = self._pool.find(text)
            if row is not None and row not in forbidden:
                kept.setdefault(row, text)
        self._tally.given_kept += len(kept)
        self._tally.given_dropped += len(case.given) - len(kept)
        return kept

    def _passes(self, near: Neighbours) -> NDArray[np.bool_]:
        """Apply the strategy's rule to each candidate."""
        positive_C, scores_CN, limit = near.positive_scores_C, near.scores_CN, self._config.limit
        match self._config.strategy:
            case "percent_of_positive":
                return percent_of_positive(positive_C, scores_CN, ratio=limit)
            case "margin":
                return margin_below_positive(positive_C, scores_CN, margin=limit)
            case "absolute":
                return below_score(scores_CN, cap=limit)
            case "top_k":
                return np.ones_like(scores_CN, dtype=np.bool_)

    def _take(
        self,
        candidates_CN: NDArray[np.bool_],
        wanted_C: NDArray[np.int64],
        near: Neighbours,
        cases: Sequence[Case],
        forbidden: Sequence[frozenset[int]],
    ) -> NDArray[np.bool_]:
        """Take of each case's candidates as many as it wants."""
        if self._config.sample == "top" and self._config.near_duplicate is None:
            return first_of(candidates_CN, wanted_C)
        taken_CN = np.zeros_like(candidates_CN)
        for number, (case, rows_N, wanted) in enumerate(
            zip(cases, near.rows_CN, wanted_C.tolist(), strict=True)
        ):
            places = np.flatnonzero(candidates_CN[number])
            if not wanted or not len(places):
                continue
            if self._config.sample == "random":
                # Seeded by the record's number, so that no draw depends on how others went.
                seed = derive_seed(self._config.seed, "mining", self._tally.records + number)
                places = np.random.default_rng(seed).permutation(places[: self._config.sample_from])
            new = self._not_near(places.tolist(), rows_N, case, forbidden[number])
            taken_CN[number, [place for place, _ in zip(new, range(wanted), strict=False)]] = True
        return taken_CN

    def _not_near(
        self,
        places: Iterable[int],
        rows_N: NDArray[np.int64],
        case: Case,
        forbidden: frozenset[int],
    ) -> Iterable[int]:
        """Pass over places whose text is nearly a known positive or the query."""
        threshold = self._config.near_duplicate
        if threshold is None:
            yield from places
            return
        texts = [self._pool.texts[row] for row in sorted(forbidden)]
        avoid = [words(text) for text in texts + [query for query, _ in case.sides]]
        for place in places:
            text = self._pool.texts[int(rows_N[place])]
            if any(nearly_equal(text, other, threshold) for other in avoid):
                self._tally.near_duplicates += 1
            else:
                yield place

    def _sample(
        self,
        cases: Sequence[Case],
        near: Neighbours,
        taken_CN: NDArray[np.bool_],
        refused_CN: NDArray[np.bool_],
    ) -> None:
        first = self._tally.records
        for number in range(-first % self._sample_every, len(cases), self._sample_every):
            scores_N, rows_N = near.scores_CN[number], near.rows_CN[number]
            negatives, refused = (
                tuple(
                    ScoredText(self._shown(row), score)
                    for row, score in zip(rows_N[of].tolist(), scores_N[of].tolist(), strict=True)
                )
                for of in (taken_CN[number], refused_CN[number])
            )
            positive = ScoredText(
                self._shown(int(near.positive_rows_C[number])),
                float(near.positive_scores_C[number]),
            )
            query = cases[number].sides[0][0][:SAMPLE_CHARACTERS]
            self._tally.samples.append(MiningSample(query, positive, negatives, refused))

    def _shown(self, row: int) -> str:
        return self._pool.texts[row][:SAMPLE_CHARACTERS]


def first_of(eligible_CN: NDArray[np.bool_], wanted_C: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Keep the first ``wanted`` eligible candidates of each case."""
    kept_CN: NDArray[np.bool_] = eligible_CN & (
        np.cumsum(eligible_CN, axis=1, dtype=np.int32) <= wanted_C[:, None]
    )
    return kept_CN


def _among(rows_CN: NDArray[np.int64], sets: Sequence[frozenset[int]]) -> NDArray[np.bool_]:
    """Mark the rows that are in the set of their case."""
    found_CN = np.zeros(rows_CN.shape, dtype=np.bool_)
    small_CF = np.full((len(sets), _FEW), _PADDING, dtype=np.int64)
    for number, members in enumerate(sets):
        if len(members) <= _FEW:
            small_CF[number, : len(members)] = list(members)
        else:
            found_CN[number] = np.isin(rows_CN[number], list(members))
    most = max((len(members) for members in sets if len(members) <= _FEW), default=0)
    for refused_C in small_CF.T[:most]:
        found_CN |= rows_CN == refused_C[:, None]
    return found_CN


# --- Rules: which candidates may be negatives -----------------------------------------------------


def percent_of_positive(
    score_positive_B: NDArray[np.float32],
    scores_BN: NDArray[np.float32],
    *,
    ratio: float = 0.95,
) -> NDArray[np.bool_]:
    """Keep the candidates that look clearly worse than the labelled positive.

    A candidate stays when its score is below ``ratio`` times the positive's, so that a positive
    nobody labelled is not taught as a negative. Only meaningful for positive scores above 0: below,
    the threshold would rise above the positive itself, so those rows keep nothing.

    Args:
        score_positive_B: cosine of each query to its positive.
        scores_BN: cosine of each query to each candidate.
        ratio: part of the positive's score, in (0, 1].

    Returns:
        keep_BN.

    Raises:
        ConfigError: ``ratio`` outside (0, 1].

    Source: TopK-PercPos of NV-Retriever (arXiv 2407.15831), 0.95 is that paper's choice and
        NV-Embed-v2's.
    """
    if not 0.0 < ratio <= 1.0:
        raise ConfigError(f"ratio is {ratio:g}", expected="above 0 and at most 1")
    ceiling_B = np.where(score_positive_B > 0.0, ratio * score_positive_B, -np.inf)
    keep_BN: NDArray[np.bool_] = scores_BN < ceiling_B[:, None]
    return keep_BN


def margin_below_positive(
    score_positive_B: NDArray[np.float32],
    scores_BN: NDArray[np.float32],
    *,
    margin: float = 0.05,
) -> NDArray[np.bool_]:
    """Keep the candidates whose score is below the positive's minus ``margin``.

    Raises:
        ConfigError: ``margin`` below 0.

    Source: TopK-MarginPos of NV-Retriever.
    """
    if margin < 0.0:
        raise ConfigError(f"margin is {margin:g}", expected="0 or more")
    keep_BN: NDArray[np.bool_] = scores_BN < (score_positive_B - margin)[:, None]
    return keep_BN


def below_score(scores_BN: NDArray[np.float32], *, cap: float = 0.7) -> NDArray[np.bool_]:
    """Keep the candidates whose score is below ``cap``, whatever the positive's is.

    Source: TopK-Abs of NV-Retriever.
    """
    keep_BN: NDArray[np.bool_] = scores_BN < cap
    return keep_BN


def after_first(eligible_BN: NDArray[np.bool_], *, skip: int) -> NDArray[np.bool_]:
    """Keep the eligible candidates of each query but the first ``skip``.

    Candidates stand nearest first; those that are not eligible are passed over without being
    counted.

    Raises:
        ConfigError: ``skip`` below 0.

    Source: Top-K shifted by N of NV-Retriever (best N: 10).
    """
    if skip < 0:
        raise ConfigError(f"skip is {skip}", expected="0 or more")
    keep_BN: NDArray[np.bool_] = eligible_BN & (np.cumsum(eligible_BN, axis=1) > skip)
    return keep_BN
