"""Drawing texts from a pool, and the weights by which data sets are drawn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
Rng = np.random.Generator


def tempered_weights(
    sizes: Sequence[int], weights: Sequence[float | None], temperature: float
) -> list[float]:
    """Weights of sets by their sizes; given ones (not None) are left as they are.

    Sets without a weight share the sum of their sizes in proportion to ``size ** (1 / T)``. At 1
    these are the sizes themselves; a higher temperature moves queries from large sets to small
    ones, and neither to nor from the sets whose weight is given.
    """
    assert temperature >= 1
    by_size = [size for size, weight in zip(sizes, weights, strict=True) if weight is None]
    scale = sum(by_size) / sum(size ** (1 / temperature) for size in by_size) if by_size else 1.0
    return [
        weight if weight is not None else scale * size ** (1 / temperature)
        for size, weight in zip(sizes, weights, strict=True)
    ]


def sample(candidates: Sequence[T], count: int, rng: Rng) -> tuple[T, ...]:
    """Draw up to ``count`` different places of ``candidates`` in random order."""
    size = min(count, len(candidates))
    return tuple(candidates[place] for place in rng.choice(len(candidates), size, replace=False))


def sample_where(
    accept: Callable[[T], bool],
    pool: Sequence[T],
    count: int,
    *,
    num_refused: int,
    rng: Rng,
) -> tuple[T, ...]:
    """Draw up to ``count`` accepted items of a pool of different ones, without walking it.

    At most ``num_refused`` are not accepted; with so many drawn in addition, enough are left.
    """
    drawn = sample(pool, count + num_refused, rng)
    return tuple(item for item in drawn if accept(item))[:count]
