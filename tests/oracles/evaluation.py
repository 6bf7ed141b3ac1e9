"""Metrics and tests of evaluation by slow, plain code over lists."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence


def ranking_metrics(grades: Sequence[int], relevant: Sequence[int], cut: int) -> dict[str, float]:
    """One query: the grades of its results, best first, and of all that is relevant to it."""
    top = list(grades)[:cut]
    found = [place for place, grade in enumerate(top, start=1) if grade > 0]
    dcg = sum(grade / math.log2(place + 1) for place, grade in enumerate(top, start=1))
    best = sorted(relevant, reverse=True)[:cut]
    ideal = sum(grade / math.log2(place + 1) for place, grade in enumerate(best, start=1))
    return {
        "ndcg": dcg / ideal,
        "map": sum((n + 1) / place for n, place in enumerate(found)) / len(relevant),
        "recall": len(found) / len(relevant),
        "precision": len(found) / cut,
        "hit_rate": 1.0 if found else 0.0,
        "mrr": 1 / found[0] if found else 0.0,
    }


def average_precision(scores: Sequence[float], labels: Sequence[int]) -> float:
    """Mean over the positives of the precision at their own threshold."""
    precisions = []
    for score, label in zip(scores, labels, strict=True):
        if label == 1:
            above = [other for value, other in zip(scores, labels, strict=True) if value >= score]
            precisions.append(sum(above) / len(above))
    return sum(precisions) / len(precisions)


def best_over_thresholds(
    scores: Sequence[float],
    labels: Sequence[int],
    metric: Callable[[Sequence[int], Sequence[int]], float],
) -> float:
    """The best of a metric of (predicted, labels), cutting between two different scores."""
    values = sorted(set(scores))
    return max(
        (metric([int(s >= value) for s in scores], labels) for value in values[1:]), default=0.0
    )


def accuracy(predicted: Sequence[int], labels: Sequence[int]) -> float:
    return sum(p == label for p, label in zip(predicted, labels, strict=True)) / len(labels)


def f1(predicted: Sequence[int], labels: Sequence[int]) -> float:
    right = sum(p and label for p, label in zip(predicted, labels, strict=True))
    return 2 * right / (sum(predicted) + sum(labels))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Share of all sign flips whose sum is at least as far from 0."""
    observed = abs(sum(differences)) - 1e-12
    flips = list(itertools.product((-1, 1), repeat=len(differences)))
    sums = [abs(sum(s * d for s, d in zip(flip, differences, strict=True))) for flip in flips]
    return sum(value >= observed for value in sums) / len(flips)


def repeated(values: Sequence[float], weights: Sequence[int]) -> list[float]:
    """Each value as often as its weight says."""
    return [v for v, weight in zip(values, weights, strict=True) for _ in range(weight)]
