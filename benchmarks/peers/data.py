"""The steps of a comparison: the same texts in the same order for every side.

No document comes twice in a step, so that a side which de-duplicates has no advantage and all
losses are one number; what that leaves out is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nvembed.core.files import read_jsonl


@dataclass(frozen=True)
class Pair:
    """A query with a document that answers it, and all that do."""

    query: str
    positive: str
    answers: frozenset[str]


@dataclass(frozen=True)
class Row:
    """A query, its positive and its negatives."""

    query: str
    positive: str
    negatives: tuple[str, ...]


@dataclass(frozen=True)
class Steps:
    """Rows of all steps, one step after the other.

    Args:
        rows: ``steps * batch_size`` rows.
        put_off: how often a query had to wait for a later step, because its query or its document
            was in the step already.
    """

    rows: tuple[Row, ...]
    put_off: int

    def columns(self) -> dict[str, list[str]]:
        """One list per column."""
        count = len(self.rows[0].negatives)
        return {
            "query": [row.query for row in self.rows],
            "positive": [row.positive for row in self.rows],
            **{f"negative_{n + 1}": [r.negatives[n] for r in self.rows] for n in range(count)},
        }


def read_pairs(paths: Sequence[Path]) -> list[Pair]:
    """Queries with their first positive, from retrieval files; a query that comes again is left."""
    pairs: dict[str, Pair] = {}
    for path in paths:
        for _, record in read_jsonl(path):
            positives = record["positive"]
            answers = [positives] if isinstance(positives, str) else positives
            pair = Pair(record["query"], answers[0], frozenset(answers))
            pairs.setdefault(pair.query, pair)
    return list(pairs.values())


def plan_steps(
    pairs: Sequence[Pair], *, steps: int, batch_size: int, num_negatives: int, seed: int
) -> Steps:
    """Choose the rows of every step; negatives are random other documents.

    Args:
        pairs: to draw from; walked in shuffled order, again from the start when they are used up.
        steps: optimizer updates.
        batch_size: queries per step.
        num_negatives: per query.
        seed: decides everything.

    Raises:
        ValueError: there are too few documents for a step without repetition.
    """
    rng = np.random.default_rng(seed)
    documents = sorted({document for pair in pairs for document in pair.answers})
    if len(documents) < batch_size * (1 + num_negatives):
        raise ValueError(
            f"{batch_size} queries with 1 + {num_negatives} documents need "
            f"{batch_size * (1 + num_negatives)} different ones, the data have {len(documents)}"
        )
    stream = _endless(len(pairs), rng)
    waiting: list[int] = []
    rows: list[Row] = []
    put_off = 0
    for _ in range(steps):
        chosen, waiting = _choose(pairs, stream, waiting, batch_size)
        put_off += len(waiting)
        positives = {pair.positive for pair in chosen}
        # Documents that answer any query of the step are no negatives of it.
        answers = {answer for pair in chosen for answer in pair.answers} | {p.query for p in chosen}
        order = rng.permutation(len(documents)).tolist()
        free = [documents[n] for n in order if documents[n] not in answers]
        if len(free) < batch_size * num_negatives:  # a step of nearly all documents
            known = set(free) | positives
            free += [documents[n] for n in order if documents[n] not in known]
        negatives = iter(free)
        rows += [
            Row(pair.query, pair.positive, tuple(next(negatives) for _ in range(num_negatives)))
            for pair in chosen
        ]
    return Steps(tuple(rows), put_off)


def _endless(count: int, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.permutation(count).tolist()


def _choose(
    pairs: Sequence[Pair], stream: Iterator[int], waiting: list[int], batch_size: int
) -> tuple[list[Pair], list[int]]:
    """Queries of one step, those that waited first, and those that wait now."""
    chosen: list[Pair] = []
    seen: set[str] = set()
    later: list[int] = []
    tried = 0
    while len(chosen) < batch_size:
        index = waiting[tried] if tried < len(waiting) else next(stream)
        tried += 1
        if tried > 20 * len(pairs):
            raise ValueError(f"no {batch_size} queries with different documents in the data")
        if pairs[index].positive in seen or pairs[index].query in seen:
            later.append(index)
            continue
        seen |= {pairs[index].positive, pairs[index].query}
        chosen.append(pairs[index])
    return chosen, later + waiting[tried:]
