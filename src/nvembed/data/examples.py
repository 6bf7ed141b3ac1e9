"""Examples: what one query is trained on, and how sources draw. Next file: ``data/convert.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Example:
    """One query with what it is trained on.

    Args:
        query: the query text, without instruction.
        positive: the document that answers it.
        negatives: documents that do not; fewer than asked for where the data has no more.
        known_positives: all texts known to answer the query; never used against it.
        labels: all classes of the query, where there are classes; a document of any of them never
            stands against it.
        instruction: goes before the query, and before the documents if ``symmetric``.
        symmetric: query and documents are texts of one sort.
        dataset: name of the source.
        positive_labels: all classes of the positive, where there are classes.
        negative_labels: all classes of each negative, in their order, where there are classes.
        further_positives: other positives to train on, each in a row of the loss of its own.
        positive_scores: a teacher's scores of the positive and the further ones, where there are
            any.
        negative_scores: a teacher's scores of the negatives.
    """

    query: str
    positive: str
    negatives: tuple[str, ...]
    known_positives: tuple[str, ...]
    labels: tuple[str, ...]
    instruction: str | None
    symmetric: bool
    dataset: str
    positive_labels: tuple[str, ...] = ()
    negative_labels: tuple[tuple[str, ...], ...] = ()
    further_positives: tuple[str, ...] = ()
    positive_scores: tuple[float, ...] = ()
    negative_scores: tuple[float, ...] = ()


class ExampleSource(Protocol):
    """A data set as a sequence of queries, each giving another example with another generator."""

    @property
    def name(self) -> str:
        """Name of the data set in errors, masks and seeds."""
        ...

    @property
    def scored(self) -> bool:
        """Whether any query has a teacher's scores."""
        ...

    def __len__(self) -> int:
        """Count the queries."""
        ...

    def example(
        self, index: int, rng: np.random.Generator, num_negatives: int, num_positives: int = 1
    ) -> Example:
        """Make the example of query ``index``; ``rng`` alone decides what is drawn.

        Args:
            index: number of the query.
            rng: fresh for this example.
            num_negatives: most negatives.
            num_positives: most positives. Only pair records have several; their first one and the
                negatives do not depend on this number.
        """
        ...


def sample(candidates: Sequence[T], count: int, rng: np.random.Generator) -> tuple[T, ...]:
    """Draw up to ``count`` different places of ``candidates`` in random order."""
    size = min(count, len(candidates))
    return tuple(candidates[place] for place in rng.choice(len(candidates), size, replace=False))


def sample_where(
    accept: Callable[[T], bool],
    pool: Sequence[T],
    count: int,
    *,
    num_refused: int,
    rng: np.random.Generator,
) -> tuple[T, ...]:
    """Draw up to ``count`` accepted items without walking the pool.

    Args:
        accept: tells whether an item may be drawn.
        pool: different items.
        count: how many are wanted.
        num_refused: at most so many items of the pool are not accepted; with so many drawn in
            addition, enough are left.
        rng: of the draw.
    """
    drawn = sample(pool, count + num_refused, rng)
    return tuple(item for item in drawn if accept(item))[:count]
