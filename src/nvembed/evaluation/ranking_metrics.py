"""Metrics of rankings, as pytrec_eval and mteb define them.

In: the grades of each query's results, best first. Out: one value per query and metric, their means
and mteb's nAUC. A document without a judgement has grade 0, as has the padding of short rankings.

Letters: Q queries, K results per query, J judged relevant documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from nvembed.evaluation.metrics import run_starts

CUTS = (1, 3, 5, 10, 20, 100, 1000)
"""The ranks at which mteb cuts."""

TOP_K = max(CUTS)

_ABSTENTION_RATES = np.linspace(0, 1, 11)[:-1]


def order_with_ties(
    scores_QK: NDArray[np.float64], tie_ranks_QK: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Give the order of each row: by falling score, then by falling tie rank."""
    return np.lexsort((-tie_ranks_QK, -scores_QK), axis=1)


def ranking_values(
    grades_QK: NDArray[np.int64], relevant: Sequence[NDArray[np.int64]]
) -> dict[str, NDArray[np.float64]]:
    """Compute every metric for every query.

    Args:
        grades_QK: of the results, best first, at most ``TOP_K``; 0 is not relevant.
        relevant: per query the grades above 0 of all judged documents, found or not. A query that
            has none gets 0 everywhere.

    Returns:
        ``ndcg_at_10`` and the like → values_Q, for nDCG (gain is the grade), MAP, recall,
        precision, hit rate and MRR at each of ``CUTS``.
    """
    num_queries = len(relevant)
    width = max([grades_QK.shape[1], *map(len, relevant)])
    found_QK = np.zeros((num_queries, width))
    found_QK[:, : grades_QK.shape[1]] = grades_QK
    ideal_QK = np.zeros((num_queries, width))
    for row, grades in enumerate(relevant):
        ideal_QK[row, : len(grades)] = np.sort(grades)[::-1]
    discount_K = np.log2(np.arange(2, width + 2))
    dcg_QK = np.cumsum(found_QK / discount_K, axis=1)
    ideal_dcg_QK = np.cumsum(ideal_QK / discount_K, axis=1)
    ideal_dcg_QK[ideal_dcg_QK == 0.0] = 1.0  # nothing is relevant: 0 of 0 is 0, as in trec_eval
    hit_QK = found_QK > 0
    hits_QK = np.cumsum(hit_QK, axis=1)
    places_K = np.arange(1, width + 1)
    precisions_QK = np.cumsum(np.where(hit_QK, hits_QK / places_K, 0.0), axis=1)
    counts_Q = np.array([max(len(grades), 1) for grades in relevant])
    first_Q = np.where(hit_QK.any(axis=1), hit_QK.argmax(axis=1) + 1, np.inf)
    values: dict[str, NDArray[np.float64]] = {}
    for cut in CUTS:
        last = min(cut, width) - 1
        values[f"ndcg_at_{cut}"] = dcg_QK[:, last] / ideal_dcg_QK[:, last]
        values[f"map_at_{cut}"] = precisions_QK[:, last] / counts_Q
        values[f"recall_at_{cut}"] = hits_QK[:, last] / counts_Q
        values[f"precision_at_{cut}"] = hits_QK[:, last] / cut
        values[f"hit_rate_at_{cut}"] = (hits_QK[:, last] > 0).astype(np.float64)
        values[f"mrr_at_{cut}"] = np.where(first_Q <= cut, 1.0 / first_Q, 0.0)
    return values


def ranking_scores(
    values: Mapping[str, NDArray[np.float64]], scores: Sequence[NDArray[np.float64]]
) -> dict[str, float]:
    """Sum up a task as mteb does.

    Args:
        values: of ``ranking_values``.
        scores: per query the similarities of its results.

    Returns:
        Means over queries, rounded where mteb rounds, ``accuracy`` (recall at 1), and nAUC: how
        well the similarities tell on which queries to abstain. NaN where undefined.
    """
    found: dict[str, float] = {}
    for name, values_Q in values.items():
        mean = sum(values_Q.tolist()) / len(values_Q)
        # mteb rounds the means of what pytrec_eval gives, and not its own MRR.
        found[name] = mean if name.startswith("mrr") else round(mean, 5)
    found["accuracy"] = found["recall_at_1"]
    confidences = {name: _Grouped(values_Q) for name, values_Q in _confidences(scores).items()}
    for name, values_Q in values.items():
        if name.startswith("hit_rate"):
            continue
        best_R = _Grouped(values_Q).abstention_curve(values_Q)
        for confidence, grouped in confidences.items():
            found[f"nauc_{name}_{confidence}"] = _nauc(grouped.abstention_curve(values_Q), best_R)
    return found


def _confidences(scores: Sequence[NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    ranked = [np.sort(scores_K)[::-1] for scores_K in scores]
    return {
        "max": np.array([scores_K[0] if len(scores_K) else 0.0 for scores_K in ranked]),
        "std": np.array([float(np.std(s)) if len(s) else 0.0 for s in ranked]),
        "diff1": np.array([s[0] - s[1] if len(s) > 1 else 0.0 for s in ranked]),
    }


class _Grouped:
    """The order of the queries by confidence, equal ones in a group."""

    def __init__(self, confidence_Q: NDArray[np.float64]) -> None:
        self._order = np.argsort(confidence_Q, kind="stable")
        ranked = confidence_Q[self._order]
        self._starts = run_starts(ranked)
        self._sizes = np.diff(np.r_[self._starts, len(ranked)])

    def abstention_curve(self, values_Q: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean of what is left when the least confident share R of the queries is left out."""
        means = np.add.reduceat(values_Q[self._order], self._starts) / self._sizes
        ranked = np.repeat(means, self._sizes)
        count = len(ranked)
        cuts = [min(round(rate * count), count - 1) for rate in _ABSTENTION_RATES]
        return np.array([ranked[cut:].mean() for cut in cuts])


def _nauc(curve_R: NDArray[np.float64], best_R: NDArray[np.float64]) -> float:
    """Area between the curve and a flat one, as a share of what the best order would have."""
    flat = best_R[0] * (_ABSTENTION_RATES[-1] - _ABSTENTION_RATES[0])
    best = np.trapezoid(best_R, _ABSTENTION_RATES)
    if best == flat:
        return float("nan")
    return float((np.trapezoid(curve_R, _ABSTENTION_RATES) - flat) / (best - flat))
