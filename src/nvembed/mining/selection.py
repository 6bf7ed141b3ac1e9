"""The choice for one record: which of the nearest documents become its negatives.

In: candidates with their scores, nearest first; out: texts. Counts what it did, for the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nvembed.core.seeding import derive_seed
from nvembed.mining.config import MiningConfig
from nvembed.mining.filters import (
    after_first,
    below_score,
    margin_below_positive,
    percent_of_positive,
)
from nvembed.mining.pool import DocumentPool, text_key, word_overlap, words
from nvembed.mining.report import MiningReport, MiningSample, ScoredText

NUM_SAMPLES = 5
SAMPLE_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Case:
    """One record to mine for.

    Args:
        sides: queries, each with its positives: one side for a pair record; both sentences of an
            STS pair, each the other's positive.
        given: negatives that the record has already.
    """

    sides: tuple[tuple[str, tuple[str, ...]], ...]
    given: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What the search found for a case: document rows, nearest first.

    Args:
        rows: different rows of the pool.
        scores: cosine of each; of two sides the higher one.
        positive_row: the case's positive with the lowest score.
        positive_score: that score.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    positive_row: int
    positive_score: float


@dataclass(slots=True)
class _Tally:
    positive_scores: list[float] = field(default_factory=list)
    negative_scores: list[float] = field(default_factory=list)
    given_kept: int = 0
    given_dropped: int = 0
    with_fewer: int = 0
    with_none: int = 0
    positive_not_found: int = 0
    candidates: int = 0
    rejected: int = 0
    near_duplicates: int = 0
    samples: list[MiningSample] = field(default_factory=list)


class Selector:
    """Chooses negatives case after case, in file order.

    Args:
        config: how to choose.
        pool: the documents; candidates are its rows.
        known: for the key of a query, the rows of everything known to be positive for it.
        num_cases: how many cases there will be; spreads the samples.
    """

    def __init__(
        self,
        config: MiningConfig,
        pool: DocumentPool,
        known: Mapping[str, frozenset[int]],
        num_cases: int,
    ) -> None:
        self._config = config
        self._pool = pool
        self._known = known
        self._sample_every = -(-num_cases // NUM_SAMPLES)
        self._tally = _Tally()

    def choose(self, case: Case, near: Neighbours) -> tuple[str, ...]:
        """Return the negatives of the next case: given ones that stay, then mined ones."""
        forbidden = frozenset().union(*(self._known[text_key(query)] for query, _ in case.sides))
        given = self._given(case, forbidden)
        eligible = ~np.isin(near.rows, list(forbidden.union(given)))
        after_skip = after_first(eligible[None], skip=self._config.skip_top)[0]
        passed = self._passes(near)
        wanted = max(self._config.num_negatives - len(given), 0)
        places = self._pick(np.flatnonzero(after_skip & passed), wanted, near, case, forbidden)
        self._count(near, eligible, passed, num_given=len(given), places=places, case=case)
        return tuple(given.values()) + tuple(self._pool.texts[near.rows[place]] for place in places)

    def report(self) -> MiningReport:
        """Return the numbers of all cases so far."""
        tally, cases = self._tally, len(self._tally.positive_scores)
        mined = len(tally.negative_scores)
        return MiningReport(
            records=cases,
            documents=len(self._pool.texts),
            negatives=mined,
            given_kept=tally.given_kept,
            given_dropped=tally.given_dropped,
            mean_positive_score=float(np.mean(tally.positive_scores)),
            mean_negative_score=float(np.mean(tally.negative_scores)) if mined else None,
            share_with_fewer=tally.with_fewer / cases,
            share_with_none=tally.with_none / cases,
            share_positive_not_found=tally.positive_not_found / cases,
            candidates=tally.candidates,
            share_rejected=tally.rejected / max(tally.candidates, 1),
            near_duplicates=tally.near_duplicates,
            samples=tuple(tally.samples),
        )

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
        positive = np.array([near.positive_score], dtype=np.float32)
        scores, limit = near.scores[None], self._config.limit
        match self._config.strategy:
            case "percent_of_positive":
                keep = percent_of_positive(positive, scores, ratio=limit)
            case "margin":
                keep = margin_below_positive(positive, scores, margin=limit)
            case "absolute":
                keep = below_score(scores, cap=limit)
            case "top_k":
                keep = np.ones_like(scores, dtype=np.bool_)
        return keep.reshape(-1)

    def _pick(
        self,
        places: NDArray[np.intp],
        wanted: int,
        near: Neighbours,
        case: Case,
        forbidden: frozenset[int],
    ) -> list[int]:
        """Take ``wanted`` of the places, nearest first, passing over near duplicates."""
        if wanted == 0 or len(places) == 0:
            return []
        if self._config.sample == "random":
            # Seeded by the record's number, so that no draw depends on how others went.
            number = len(self._tally.positive_scores)
            rng = np.random.default_rng(derive_seed(self._config.seed, "mining", number))
            places = rng.permutation(places[: self._config.sample_from])
        threshold, avoid = self._config.near_duplicate, []
        if threshold is not None:
            texts = [self._pool.texts[row] for row in sorted(forbidden)]
            avoid = [words(text) for text in texts + [query for query, _ in case.sides]]
        taken: list[int] = []
        for place in places.tolist():
            if threshold is not None:
                own = words(self._pool.texts[near.rows[place]])
                if any(word_overlap(own, other) >= threshold for other in avoid):
                    self._tally.near_duplicates += 1
                    continue
            taken.append(place)
            if len(taken) == wanted:
                break
        return sorted(taken)

    def _count(
        self,
        near: Neighbours,
        eligible: NDArray[np.bool_],
        passed: NDArray[np.bool_],
        *,
        num_given: int,
        places: list[int],
        case: Case,
    ) -> None:
        tally, number = self._tally, len(self._tally.positive_scores)
        total = num_given + len(places)
        tally.positive_scores.append(near.positive_score)
        tally.negative_scores += [float(near.scores[place]) for place in places]
        tally.with_fewer += total < self._config.num_negatives
        tally.with_none += total == 0
        tally.positive_not_found += near.positive_row not in near.rows
        tally.candidates += int(eligible.sum())
        tally.rejected += int((eligible & ~passed).sum())
        if number % self._sample_every == 0:
            positive = ScoredText(self._shown(near.positive_row), near.positive_score)
            negatives = tuple(
                ScoredText(self._shown(int(near.rows[place])), float(near.scores[place]))
                for place in places
            )
            query = case.sides[0][0][:SAMPLE_CHARACTERS]
            tally.samples.append(MiningSample(query, positive, negatives))

    def _shown(self, row: int) -> str:
        return self._pool.texts[row][:SAMPLE_CHARACTERS]
