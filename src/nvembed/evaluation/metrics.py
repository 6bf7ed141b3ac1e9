"""The metrics of mteb over arrays: correlations, pairs, classification and clustering.

Functions that take ``weights_BN`` give the metric of B resamples at once, an item counted as often
as its weight says: ``significance.py`` needs that. Rankings are in ``ranking_metrics.py``.

Letters: N items (texts or pairs), B resamples, D width of the vectors, E experiments, C classes, G
gold labels, K clusters, S texts of a sample, T thresholds.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# mteb's settings of classification and clustering.
EXPERIMENTS = 10
SAMPLES_PER_LABEL = 8
SAMPLE_TEXTS = 16_384
SEED = 42

PAIR_METRICS = ("accuracy", "f1", "precision", "recall", "ap")


def run_starts(ranked_N: NDArray[np.generic]) -> NDArray[np.int64]:
    """Return where each run of equal values begins in sorted values."""
    return np.flatnonzero(np.r_[True, ranked_N[1:] != ranked_N[:-1]])


# --- correlations ---------------------------------------------------------------------------------


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
    starts = run_starts(ranked)
    group_N = np.empty(len(order), dtype=np.int64)
    group_N[order] = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(order)]))

    def ranks(weights_BN: Floats) -> Floats:
        sizes = np.add.reduceat(weights_BN[:, order], starts, axis=1)
        middles = np.cumsum(sizes, axis=1) - (sizes - 1) / 2  # equal values share the middle rank
        ranks_BN: Floats = middles[:, group_N]
        return ranks_BN

    return ranks


# --- pairs ----------------------------------------------------------------------------------------


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
        self._starts = run_starts(ranked)
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


# --- classification -------------------------------------------------------------------------------


def undersample(labels: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Choose the training texts of every experiment, as mteb does with its seed.

    Each experiment shuffles the order of the one before with the same seed, and takes the first
    texts of each label.
    """
    order = np.arange(len(labels))
    chosen = []
    for _ in range(EXPERIMENTS):
        np.random.RandomState(SEED).shuffle(order)
        by_label = np.argsort(labels[order], kind="stable")
        ranked = labels[order][by_label]
        starts = run_starts(ranked)
        sizes = np.diff(np.r_[starts, len(ranked)])
        nth = np.arange(len(ranked)) - np.repeat(starts, sizes)
        chosen.append(order[np.sort(by_label[nth < SAMPLES_PER_LABEL])])
    return chosen


def predict(
    train_vectors: NDArray[np.float32],
    train_labels: NDArray[np.int64],
    test_vectors: NDArray[np.float32],
) -> NDArray[np.int64]:
    """Fit mteb's logistic regression and return the labels that it gives the test texts."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=100, random_state=SEED)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=ConvergenceWarning)
        model.fit(train_vectors, train_labels)
    predicted: NDArray[np.int64] = model.predict(test_vectors)
    return predicted


def class_scores(gold_N: NDArray[np.int64], predicted_N: NDArray[np.int64]) -> dict[str, float]:
    """Compute the scores of one experiment; ``ap`` only with two gold classes, one of them 1."""
    count = int(max(gold_N.max(), predicted_N.max())) + 1
    cells = np.bincount(gold_N * count + predicted_N, minlength=count * count)
    confusion_BCC = cells.reshape(1, count, count).astype(np.float64)
    scores = {name: float(values[0]) for name, values in confusion_scores(confusion_BCC).items()}
    classes = np.unique(gold_N)
    if len(classes) == 2 and 1 in classes:
        from sklearn.metrics import average_precision_score

        scores["ap"] = scores["ap_weighted"] = float(
            average_precision_score(gold_N == 1, predicted_N)
        )
    return scores


def confusion_scores(confusion_BCC: Floats) -> dict[str, Floats]:
    """Compute accuracy, F1, precision and recall (macro and weighted) of confusion matrices.

    Args:
        confusion_BCC: how often gold class (rows) got which prediction (columns). A class that is
            neither gold nor predicted does not count in a macro average.
    """
    right_BC = np.diagonal(confusion_BCC, axis1=1, axis2=2)
    gold_BC, predicted_BC = confusion_BCC.sum(axis=2), confusion_BCC.sum(axis=1)
    counted_B = (gold_BC + predicted_BC > 0).sum(axis=1)
    total_B = gold_BC.sum(axis=1)
    found = {"accuracy": right_BC.sum(axis=1) / total_B}
    for name, per_class_BC in (
        ("f1", 2 * right_BC / np.maximum(gold_BC + predicted_BC, 1.0)),
        ("precision", right_BC / np.maximum(predicted_BC, 1.0)),
        ("recall", right_BC / np.maximum(gold_BC, 1.0)),
    ):
        found[name] = per_class_BC.sum(axis=1) / counted_B
        found[f"{name}_weighted"] = (per_class_BC * gold_BC).sum(axis=1) / total_B
    return found


# --- clustering -----------------------------------------------------------------------------------


def cluster(
    vectors_ND: NDArray[np.float32], num_clusters: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield of each experiment the texts drawn (with replacement) and the clusters they got.

    Sampling, k-means and seeds are mteb's.
    """
    from sklearn.cluster import MiniBatchKMeans

    draw = random.Random(SEED)
    for _ in range(EXPERIMENTS):
        texts_S = np.array(draw.choices(range(len(vectors_ND)), k=SAMPLE_TEXTS))
        model = MiniBatchKMeans(num_clusters, batch_size=512, n_init=1, random_state=SEED)
        yield texts_S, model.fit_predict(vectors_ND[texts_S]).astype(np.int64)


def cluster_scores(gold_S: NDArray[np.int64], clusters_S: NDArray[np.int64]) -> dict[str, float]:
    """Compute V-measure and adjusted mutual information of one experiment."""
    from sklearn.metrics.cluster import adjusted_mutual_info_score, v_measure_score

    return {
        "v_measure": float(v_measure_score(gold_S, clusters_S)),
        "ami": float(adjusted_mutual_info_score(gold_S, clusters_S)),
    }


def v_measures(counts_BGK: Floats) -> Floats:
    """Compute the V-measure of contingency tables: texts by gold label and cluster."""
    shares = counts_BGK / counts_BGK.sum(axis=(1, 2), keepdims=True)
    gold_B = _entropy(shares.sum(axis=2))
    clusters_B = _entropy(shares.sum(axis=1))
    mutual_B = gold_B + clusters_B - _entropy(shares.reshape(len(shares), -1))
    # The harmonic mean of mutual/gold and mutual/clusters; two single groups agree wholly.
    both_B = gold_B + clusters_B
    return np.where(both_B > 0, 2 * mutual_B / np.where(both_B > 0, both_B, 1.0), 1.0)


def _entropy(shares_BX: Floats) -> Floats:
    logs = np.log(np.where(shares_BX > 0, shares_BX, 1.0))
    found: Floats = -(shares_BX * logs).sum(axis=1)
    return found
