"""Tests between two models, and the intervals of their difference, from the items of a task.

All is drawn from seeds, in blocks of weights: scipy's ``bootstrap`` calls a statistic per resample.
Queries, articles, pairs or test texts are resampled, so intervals tell how far a score moves with
others of the same kind, not with another corpus, training run, seed or choice of training texts.

Letters: N items, B resamples, M models, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nvembed.core.runs import derive_seed
from nvembed.evaluation import metrics
from nvembed.evaluation.metrics import Floats, Statistic
from nvembed.evaluation.results import Items

RESAMPLES = 2000
LEVEL = 0.95
EXACT_SIGNS = 14
"""Up to so many differences all sign flips are gone through; with more, some are drawn."""

_NUMBERS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Difference:
    """The second model's score on a task less the first one's."""

    value: float
    low: float  # its interval, the same items resampled for both models
    high: float
    p: float  # two-sided, that the models are equally good
    resampled_B: Floats


def compare_items(
    first: Items, second: Items, *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Test two models on the same items of one task.

    Means over items (rankings, summaries, accuracy) get a test by sign flips, as if the models had
    been mixed up; others the paired bootstrap: twice the smaller share of resamples beside 0.
    """
    if any(getattr(first, k) != getattr(second, k) for k in ("task_hash", "kind", "score")):
        raise ValueError("items of different tasks cannot be paired")
    scores_M, scores_MB = bootstrap([first, second], resamples, seed)
    resampled_B = scores_MB[1] - scores_MB[0]
    values = _item_values(first), _item_values(second)
    if values[0] is None or values[1] is None:
        p = bootstrap_p(resampled_B)
    else:
        differences_N = values[1] - values[0]
        differences_N = differences_N[np.isfinite(differences_N)]
        p = sign_flip_p(differences_N, resamples=resamples, seed=seed)
    low, high = interval(resampled_B)
    return Difference(float(scores_M[1] - scores_M[0]), low, high, p, resampled_B)


def sign_flip_p(differences_N: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p value of a mean difference of 0, by flipping the signs of the differences."""
    # Drawn flips count the data as they are as one more.
    moved_N = differences_N[differences_N != 0]
    count = len(moved_N)
    if not count:
        return 1.0
    reached = abs(moved_N.sum()) * (1 - 1e-9)  # sums in another order may be rounded otherwise
    if count <= EXACT_SIGNS:
        bits_BN = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        return float((np.abs((2 * bits_BN - 1) @ moved_N) >= reached).mean())
    rng = np.random.default_rng(derive_seed(seed, "signs", count))
    beyond = 0
    for size in _chunks(resamples, count):
        signs_BN = 2.0 * rng.integers(2, size=(size, count), dtype=np.int8) - 1
        beyond += int((np.abs(signs_BN @ moved_N) >= reached).sum())
    return (beyond + 1) / (resamples + 1)


def bootstrap_p(resampled_B: Floats) -> float:
    """Two-sided p value of a difference of 0, from the resampled differences."""
    known_B = resampled_B[np.isfinite(resampled_B)]
    # A resample that is exactly 0 speaks against both sides.
    smaller = min((known_B <= 0).sum(), (known_B >= 0).sum())
    return float(min(1.0, 2 * (smaller + 1) / (len(known_B) + 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values for their number: below 0.05, at most 5 % chance of one false finding."""
    order = np.argsort(p_values, kind="stable")
    raised = np.take(p_values, order) * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return adjusted.tolist()


def mean_difference(differences: Sequence[Difference]) -> tuple[float, float, float]:
    """Average over tasks: mean, low and high for these very tasks, whose items are resampled."""
    mean = float(np.mean([difference.value for difference in differences]))
    return mean, *interval(np.mean([one.resampled_B for one in differences], axis=0))


def interval(values_B: Floats) -> tuple[float, float]:
    """Percentiles of resampled values; NaN where none is defined."""
    known_B = values_B[np.isfinite(values_B)]
    if not len(known_B):
        return float("nan"), float("nan")
    low, high = np.quantile(known_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


# --- resampling -----------------------------------------------------------------------------------


def bootstrap(
    models: Sequence[Items], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Floats, Floats]:
    """Return scores_M, and scores_MB of resamples that are the same for all models."""
    statistics = [_statistic(items) for items in models]
    count = len(models[0])
    rng = np.random.default_rng(derive_seed(seed, "bootstrap", models[0].task_hash))
    parts, cells = [], 0
    if models[0].kind in ("classes", "clusters") and _item_values(models[0]) is None:
        # The numbers of a table of gold labels and answers.
        cells = (max(int(array.max()) for array in models[0].arrays.values()) + 1) ** 2
    for size in _chunks(resamples, max(count, cells)):
        drawn_BN = rng.integers(count, size=(size, count), dtype=np.int32)
        flat = (drawn_BN + np.arange(size)[:, None] * count).ravel()
        weights_BN = np.bincount(flat, minlength=size * count).astype(float).reshape(size, count)
        parts.append(np.stack([statistic(weights_BN) for statistic in statistics]))
    whole_1N = np.ones((1, count))
    scores_M = np.array([statistic(whole_1N)[0] for statistic in statistics])
    return scores_M, np.concatenate(parts, axis=1)


def _chunks(total: int, width: int) -> Iterator[int]:
    size = max(_NUMBERS_AT_ONCE // width, 1)
    for start in range(0, total, size):
        yield min(size, total - start)


def _item_values(items: Items) -> Floats | None:
    """Return values_N whose mean is the score, or ``None`` where it is no mean over items."""
    if items.kind == "values":
        return items.arrays["values_N"].astype(np.float64)
    if items.kind == "classes" and items.score == "accuracy":
        right_EN = items.arrays["predicted_EN"] == items.arrays["gold_N"]
        return right_EN.mean(axis=0)
    return None


def _statistic(items: Items) -> Statistic:
    """Give the function from weights_BN, how often each item counts, to the main scores."""
    arrays, score = items.arrays, items.score
    if (values_N := _item_values(items)) is not None:
        return _mean_of_resamples(values_N)
    if items.kind == "correlation":
        name = "spearman" if score.endswith("spearman") else "pearson"
        return metrics.correlation_of_resamples(name, arrays["gold_N"], arrays["similarities_N"])
    if items.kind == "pairs":
        metric = score.partition("_")[2]
        each = [
            metrics.pairs_of_resamples(metric, s, arrays["gold_N"])
            for s in arrays["similarities_SN"]
        ]
        return lambda weights_BN: np.max([one(weights_BN) for one in each], axis=0)
    if items.kind == "classes":
        tables = _tables(arrays["gold_N"], arrays["predicted_EN"])
        return lambda w_BN: np.mean(
            [metrics.confusion_scores(t)[score] for t in tables(w_BN)], axis=0
        )
    tables = _tables(arrays["gold_N"], arrays["assigned_EN"], arrays["drawn_EN"])
    return lambda w_BN: np.mean([metrics.v_measures(table) for table in tables(w_BN)], axis=0)


def _mean_of_resamples(values_N: Floats) -> Statistic:
    known_N = np.isfinite(values_N)

    def statistic(weights_BN: Floats) -> Floats:
        known_BN = weights_BN[:, known_N]
        with np.errstate(divide="ignore", invalid="ignore"):
            return (known_BN @ values_N[known_N]) / known_BN.sum(axis=1)

    return statistic


def _tables(
    gold_N: NDArray[np.integer],
    answers_EN: NDArray[np.integer],
    counts_EN: NDArray[np.generic] | None = None,
) -> Callable[[Floats], Iterator[Floats]]:
    """From weights_BN to the tables_BCC of gold label and answer, one after the other."""
    from scipy import sparse

    size = int(max(gold_N.max(), answers_EN.max())) + 1
    cells_EN = gold_N.astype(np.int64) * size + answers_EN
    counts_EN = np.ones(cells_EN.shape) if counts_EN is None else counts_EN.astype(np.float64)
    shape = (size * size, len(gold_N))
    cells_by_text = [
        sparse.csr_matrix((counts_N, (cells_N, np.arange(len(gold_N)))), shape=shape)
        for cells_N, counts_N in zip(cells_EN, counts_EN, strict=True)
    ]
    return lambda w_BN: ((one @ w_BN.T).T.reshape(-1, size, size) for one in cells_by_text)
