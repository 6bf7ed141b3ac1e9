"""InfoNCE and its statistics, one query and one document at a time, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def info_nce(
    queries: np.ndarray,
    documents: np.ndarray,
    positive: np.ndarray,
    negative: np.ndarray,
    temperature: float,
) -> float:
    total = 0.0
    for b in range(len(queries)):
        scores = candidate_scores(queries, documents, positive, negative, b)
        highest = max(scores) / temperature
        partition = sum(math.exp(score / temperature - highest) for score in scores)
        total += -(scores[0] / temperature - highest - math.log(partition))
    return total / len(queries)


def candidate_scores(
    queries: np.ndarray, documents: np.ndarray, positive: np.ndarray, negative: np.ndarray, b: int
) -> list[float]:
    """Score of the positive, then of each negative, of query b."""
    columns = [int(positive[b])]
    for n in range(len(documents)):
        if negative[b][n] and n != positive[b]:
            columns.append(n)
    return [
        sum(float(queries[b][d]) * float(documents[n][d]) for d in range(queries.shape[1]))
        for n in columns
    ]


def statistics(
    queries: np.ndarray, documents: np.ndarray, positive: np.ndarray, negative: np.ndarray
) -> dict[str, Any]:
    positives, hardest, margins, hits = [], [], [], []
    for b in range(len(queries)):
        first, *others = candidate_scores(queries, documents, positive, negative, b)
        positives.append(first)
        if others:
            hardest.append(max(others))
            margins.append(first - max(others))
            hits.append(first > max(others))
    return {
        "positive_similarity": sum(positives) / len(positives),
        "hardest_negative_similarity": sum(hardest) / len(hardest) if hardest else None,
        "margin": sum(margins) / len(margins) if margins else None,
        "accuracy": sum(hits) / len(hits) if hits else None,
    }
