"""Searches of a database by plain code: brute force, words by the list, fusion of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def nearest(ids: Sequence[str], vectors: np.ndarray, query: np.ndarray) -> list[tuple[str, float]]:
    """All ids with their cosines, best first, equal ones by id."""
    scored = [
        (id, float(sum(float(a) * float(b) for a, b in zip(row, query, strict=True))))
        for id, row in zip(ids, vectors, strict=True)
    ]
    return sorted(scored, key=lambda pair: (-round(pair[1], 6), pair[0]))


def fuse(rankings: Sequence[Sequence[str]], constant: int = 60) -> list[tuple[str, float]]:
    """Reciprocal-rank fusion, best first, equal ones by id."""
    totals = []
    for id in {id for ranking in rankings for id in ranking}:
        total = sum(1 / (constant + 1 + r.index(id)) for r in rankings if id in r)
        totals.append((id, total))
    return sorted(totals, key=lambda pair: (-round(pair[1], 12), pair[0]))
