"""Pearson and Spearman correlations, of the data and of many resamples of it at once.

Letters: N items, B resamples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def correlations(gold_N: Floats, found_N: Floats) -> tuple[float, float]:
    """Return Pearson's and Spearman's correlation; NaN where one side is constant."""
    from scipy import stats

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"scipy\b")
        warnings.filterwarnings("ignore", category=stats.ConstantInputWarning)
        warnings.filterwarnings("ignore", category=stats.NearConstantInputWarning)
        return (
            float(stats.pearsonr(gold_N, found_N)[0]),
            float(stats.spearmanr(gold_N, found_N)[0]),
        )


def weighted_pearson(x_BN: Floats, y_BN: Floats, weights_BN: Floats) -> Floats:
    """Give Pearson's correlation of each resample; NaN where a side is constant."""
    total_B1 = weights_BN.sum(axis=1, keepdims=True)
    x_BN = x_BN - (weights_BN * x_BN).sum(axis=1, keepdims=True) / total_B1
    y_BN = y_BN - (weights_BN * y_BN).sum(axis=1, keepdims=True) / total_B1
    both_B = np.einsum("bn,bn,bn->b", weights_BN, x_BN, y_BN)
    squares_B = np.einsum("bn,bn,bn->b", weights_BN, x_BN, x_BN)
    squares_B = squares_B * np.einsum("bn,bn,bn->b", weights_BN, y_BN, y_BN)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(squares_B > 0, both_B / np.sqrt(squares_B), np.nan)


def pearson_of_resamples(gold_N: Floats, found_N: Floats) -> Callable[[Floats], Floats]:
    """Give a function from weights_BN to Pearson's correlations."""

    def statistic(weights_BN: Floats) -> Floats:
        return weighted_pearson(gold_N[None], found_N[None], weights_BN)

    return statistic


def spearman_of_resamples(gold_N: Floats, found_N: Floats) -> Callable[[Floats], Floats]:
    """Give a function from weights_BN to Spearman's correlations, ranks made anew for each."""
    gold_ranks, found_ranks = _ranks_of_resamples(gold_N), _ranks_of_resamples(found_N)

    def statistic(weights_BN: Floats) -> Floats:
        return weighted_pearson(gold_ranks(weights_BN), found_ranks(weights_BN), weights_BN)

    return statistic


def _ranks_of_resamples(values_N: Floats) -> Callable[[Floats], Floats]:
    order = np.argsort(values_N, kind="stable")
    ranked = values_N[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    group_N = np.empty(len(order), dtype=np.int64)
    group_N[order] = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(order)]))

    def ranks(weights_BN: Floats) -> Floats:
        sizes = np.add.reduceat(weights_BN[:, order], starts, axis=1)
        middles = np.cumsum(sizes, axis=1) - (sizes - 1) / 2  # equal values share the middle rank
        ranks_BN: Floats = middles[:, group_N]
        return ranks_BN

    return ranks
