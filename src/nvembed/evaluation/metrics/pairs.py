"""Similarities of pairs, and how well they tell pairs with label 1 from those with 0.

Letters: N pairs, D width of the vectors, B resamples, T thresholds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PAIR_METRICS = ("accuracy", "f1", "precision", "recall", "ap")


def pair_similarities(
    first_ND: NDArray[np.float32], second_ND: NDArray[np.float32]
) -> dict[str, Floats]:
    """Compute mteb's five similarities of each pair; the larger, the more alike.

    They are rounded as mteb's, since ties decide: ``similarity`` is torch's cosine, ``cosine``
    sklearn's, and both distances are negative.
    """
    import torch
    from sklearn.metrics import pairwise

    with torch.inference_mode():
        units = [
            torch.nn.functional.normalize(torch.from_numpy(vectors), dim=1)
            for vectors in (first_ND, second_ND)
        ]
        similarity_N = (units[0] * units[1]).sum(dim=-1).numpy()
    found = {
        "similarity": similarity_N,
        "cosine": 1 - pairwise.paired_cosine_distances(first_ND, second_ND),
        "manhattan": -pairwise.paired_manhattan_distances(first_ND, second_ND),
        "euclidean": -pairwise.paired_euclidean_distances(first_ND, second_ND),
        "dot": np.array([np.dot(a, b) for a, b in zip(first_ND, second_ND, strict=True)]),
    }
    return {name: values.astype(np.float64) for name, values in found.items()}


def pair_metrics(similarities_N: Floats, labels_N: NDArray[np.int64]) -> dict[str, float]:
    """Compute accuracy, F1 (with its precision and recall) at the best threshold, and AP.

    A threshold lies between two different similarities; that all pairs get one label is no
    threshold, as in mteb.
    """
    whole = np.ones((1, len(labels_N)))
    true_BT, false_BT, _ = _Thresholds(similarities_N, labels_N).counts(whole)
    true_T, false_T = true_BT[0], false_BT[0]
    positives, negatives = true_T[-1], false_T[-1]
    ap = float(_average_precision(true_BT, false_BT)[0])
    true_T, false_T = true_T[:-1], false_T[:-1]
    if not len(true_T):
        return {"accuracy": 0.0, "f1": 0.0, "precision": 0.0, "recall": 0.0, "ap": ap}
    accuracy_T = (true_T + negatives - false_T) / len(labels_N)
    f1_T = 2 * true_T / (true_T + false_T + positives)
    best = int(f1_T.argmax())
    return {
        "accuracy": float(accuracy_T.max()),
        "f1": float(f1_T[best]),
        "precision": float(true_T[best] / (true_T[best] + false_T[best])),
        "recall": float(true_T[best] / positives),
        "ap": ap,
    }


def pairs_of_resamples(
    metric: str, similarities_N: Floats, labels_N: NDArray[np.int64]
) -> Callable[[Floats], Floats]:
    """Give a function from weights_BN to the ``accuracy``, ``f1`` or ``ap`` of each resample.

    NaN where a resample has no pair with label 1 or none with 0.
    """
    thresholds = _Thresholds(similarities_N, labels_N)

    def statistic(weights_BN: Floats) -> Floats:
        true_BT, false_BT, used_BT = thresholds.counts(weights_BN)
        positives_B1, negatives_B1 = true_BT[:, -1:], false_BT[:, -1:]
        with np.errstate(divide="ignore", invalid="ignore"):
            if metric == "ap":
                found_B = _average_precision(true_BT, false_BT)
            else:
                if metric == "accuracy":
                    totals_B1 = positives_B1 + negatives_B1
                    found_BT = (true_BT + negatives_B1 - false_BT) / totals_B1
                else:
                    found_BT = 2 * true_BT / (true_BT + false_BT + positives_B1)
                found_B = np.where(used_BT, found_BT, 0.0).max(axis=1)
        both_B = (positives_B1[:, 0] > 0) & (negatives_B1[:, 0] > 0)
        return np.where(both_B, found_B, np.nan)

    return statistic


class _Thresholds:
    """Pairs by falling similarity, equal ones together: what is above each of T thresholds."""

    def __init__(self, similarities_N: Floats, labels_N: NDArray[np.int64]) -> None:
        self._order = np.argsort(-similarities_N, kind="stable")
        ranked = similarities_N[self._order]
        self._starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
        self._labels = labels_N[self._order]

    def counts(self, weights_BN: Floats) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """Count pairs with label 1 and with 0 above each threshold; the last is below all pairs.

        The third result tells the thresholds that have pairs of the resample on both sides.
        """
        ranked_BN = weights_BN[:, self._order]
        true_BT = np.add.reduceat(ranked_BN * (self._labels == 1), self._starts, axis=1)
        false_BT = np.add.reduceat(ranked_BN * (self._labels != 1), self._starts, axis=1)
        true_BT, false_BT = np.cumsum(true_BT, axis=1), np.cumsum(false_BT, axis=1)
        above_BT = true_BT + false_BT
        return true_BT, false_BT, (above_BT > 0) & (above_BT < above_BT[:, -1:])


def _average_precision(true_BT: Floats, false_BT: Floats) -> Floats:
    steps_BT = np.diff(true_BT, axis=1, prepend=0.0)
    precision_BT = true_BT / np.maximum(true_BT + false_BT, 1.0)
    found_B: Floats = (steps_BT * precision_BT).sum(axis=1) / true_BT[:, -1]
    return found_B
