"""The metrics of mteb over arrays: rankings, correlations, pairs, classes and clusters.

Functions of ``weights_BN`` give the metric of B resamples at once, which scipy and sklearn do not.

Letters: N items (texts or pairs), Q queries, K results per query, B resamples, D width of the
vectors, C classes, G gold labels, K clusters, R rates, T thresholds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Statistic = Callable[[Floats], Floats]
"""From weights_BN to one value per resample."""

# mteb's settings: ranks of rankings; experiments of classification and clustering.
CUTS = (1, 3, 5, 10, 20, 100, 1000)
TOP_K = max(CUTS)
EXPERIMENTS = 10
SAMPLES_PER_LABEL = 8
SEED = 42

_RATES = np.linspace(0, 1, 11)[:-1]


def _runs(values_N: NDArray[np.generic]) -> tuple[Ints, Ints, Ints]:
    """Give the order that sorts values, where runs of equal ones begin in it, and their sizes."""
    order = np.argsort(values_N, kind="stable")
    ranked = values_N[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    return order, starts, np.diff(np.r_[starts, len(order)])


# --- rankings, as pytrec_eval and mteb define them ------------------------------------------------


def order_with_ties(scores_QK: Floats, tie_ranks_QK: Ints) -> Ints:
    """Give the order of each row: by falling score, then by falling tie rank."""
    return np.lexsort((-tie_ranks_QK, -scores_QK), axis=1)


def ranking_values(grades_QK: Ints, relevant: Sequence[Ints]) -> dict[str, Floats]:
    """Compute nDCG (gain is the grade), MAP, recall, precision, hit rate and MRR at ``CUTS``."""
    # ``relevant``: per query the grades above 0 of all judged documents, found or not.
    width = max([grades_QK.shape[1], *map(len, relevant)])
    found_QK, ideal_QK = np.zeros((2, len(relevant), width))
    found_QK[:, : grades_QK.shape[1]] = grades_QK
    for row, grades in enumerate(relevant):
        ideal_QK[row, : len(grades)] = np.sort(grades)[::-1]
    places_K = np.arange(1, width + 1)
    dcg_QK, ideal_dcg_QK = (
        np.cumsum(gains_QK / np.log2(places_K + 1), axis=1) for gains_QK in (found_QK, ideal_QK)
    )
    ideal_dcg_QK[ideal_dcg_QK == 0.0] = 1.0  # nothing is relevant: 0 of 0 is 0, as in trec_eval
    hit_QK = found_QK > 0
    hits_QK = np.cumsum(hit_QK, axis=1)
    precisions_QK = np.cumsum(np.where(hit_QK, hits_QK / places_K, 0.0), axis=1)
    counts_Q = np.array([max(len(grades), 1) for grades in relevant])
    first_Q = np.where(hit_QK.any(axis=1), hit_QK.argmax(axis=1) + 1, np.inf)
    values: dict[str, Floats] = {}
    for cut in CUTS:
        last = min(cut, width) - 1
        values |= {
            f"ndcg_at_{cut}": dcg_QK[:, last] / ideal_dcg_QK[:, last],
            f"map_at_{cut}": precisions_QK[:, last] / counts_Q,
            f"recall_at_{cut}": hits_QK[:, last] / counts_Q,
            f"precision_at_{cut}": hits_QK[:, last] / cut,
            f"hit_rate_at_{cut}": (hits_QK[:, last] > 0).astype(np.float64),
            f"mrr_at_{cut}": np.where(first_Q <= cut, 1.0 / first_Q, 0.0),
        }
    return values


def ranking_scores(values: Mapping[str, Floats], scores: Sequence[Floats]) -> dict[str, float]:
    """Sum up ``ranking_values`` as mteb does; nAUC is how well ``scores`` tell when to abstain."""
    found: dict[str, float] = {}
    for name, values_Q in values.items():
        mean = sum(values_Q.tolist()) / len(values_Q)
        # mteb rounds the means of what pytrec_eval gives, and not its own MRR.
        found[name] = mean if name.startswith("mrr") else round(mean, 5)
    found["accuracy"] = found["recall_at_1"]
    ranked = [np.sort(scores_K)[::-1] for scores_K in scores]
    confidences = {
        "max": [s[0] if len(s) else 0.0 for s in ranked],
        "std": [float(np.std(s)) if len(s) else 0.0 for s in ranked],
        "diff1": [s[0] - s[1] if len(s) > 1 else 0.0 for s in ranked],
    }
    runs = {name: _runs(np.array(confidence)) for name, confidence in confidences.items()}
    for name, values_Q in values.items():
        if name.startswith("hit_rate"):
            continue
        # The area between the curve and a flat one, as a share of what the best order would have.
        best_R = _abstention_curve(values_Q, *_runs(values_Q))
        flat = best_R[0] * (_RATES[-1] - _RATES[0])
        best = np.trapezoid(best_R, _RATES) - flat
        for confidence, run in runs.items():
            area = np.trapezoid(_abstention_curve(values_Q, *run), _RATES) - flat
            found[f"nauc_{name}_{confidence}"] = float(area / best) if best else float("nan")
    return found


def _abstention_curve(values_Q: Floats, order: Ints, starts: Ints, sizes: Ints) -> Floats:
    """Mean of what is left when the least confident share R of the queries is left out."""
    ranked = np.repeat(np.add.reduceat(values_Q[order], starts) / sizes, sizes)
    count = len(ranked)
    return np.array([ranked[min(round(rate * count), count - 1) :].mean() for rate in _RATES])


# --- correlations ---------------------------------------------------------------------------------


def correlations(gold_N: Floats, found_N: Floats) -> tuple[float, float]:
    """Return Pearson's and Spearman's correlation; NaN where one side is constant."""
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pearson, spearman = stats.pearsonr(gold_N, found_N), stats.spearmanr(gold_N, found_N)
    return float(pearson[0]), float(spearman[0])


def correlation_of_resamples(name: str, gold_N: Floats, found_N: Floats) -> Statistic:
    """Give the ``pearson`` or ``spearman`` of resamples, whose ranks are made anew for each."""
    if name == "pearson":
        return lambda weights_BN: _weighted_pearson(gold_N[None], found_N[None], weights_BN)
    gold, found = _ranks_of_resamples(gold_N), _ranks_of_resamples(found_N)
    return lambda weights_BN: _weighted_pearson(gold(weights_BN), found(weights_BN), weights_BN)


def _weighted_pearson(x_BN: Floats, y_BN: Floats, weights_BN: Floats) -> Floats:
    total_B1 = weights_BN.sum(axis=1, keepdims=True)
    x_BN = x_BN - (weights_BN * x_BN).sum(axis=1, keepdims=True) / total_B1
    y_BN = y_BN - (weights_BN * y_BN).sum(axis=1, keepdims=True) / total_B1
    xy_B, xx_B, yy_B = (
        np.einsum("bn,bn,bn->b", weights_BN, a_BN, b_BN)
        for a_BN, b_BN in ((x_BN, y_BN), (x_BN, x_BN), (y_BN, y_BN))
    )
    squares_B = xx_B * yy_B
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(squares_B > 0, xy_B / np.sqrt(squares_B), np.nan)


def _ranks_of_resamples(values_N: Floats) -> Statistic:
    order, starts, sizes = _runs(values_N)
    group_N = np.empty(len(order), dtype=np.int64)
    group_N[order] = np.repeat(np.arange(len(starts)), sizes)

    def ranks(weights_BN: Floats) -> Floats:
        counts = np.add.reduceat(weights_BN[:, order], starts, axis=1)
        middles = np.cumsum(counts, axis=1) - (counts - 1) / 2  # equal values share the middle rank
        return middles[:, group_N]

    return ranks


# --- pairs ----------------------------------------------------------------------------------------


def pair_similarities(
    first_ND: NDArray[np.float32], second_ND: NDArray[np.float32]
) -> dict[str, Floats]:
    """Compute mteb's five similarities of each pair, rounded as its are, since ties decide."""
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


# A threshold lies between two different similarities: one label for all is none, as in mteb.
# Of pairs with label 1 and with 0 above each threshold; the last is below all pairs.
_AT_THRESHOLDS: dict[str, Callable[[Floats, Floats], Floats]] = {
    "accuracy": lambda true, false: (true + false[:, -1:] - false) / (true + false)[:, -1:],
    "f1": lambda true, false: 2 * true / (true + false + true[:, -1:]),
}


def pair_metrics(similarities_N: Floats, labels_N: Ints) -> dict[str, float]:
    """Compute accuracy, F1 (with its precision and recall) at the best threshold, and AP."""
    counts = _counts_above_thresholds(similarities_N, labels_N)
    true_BT, false_BT, used_BT = counts(np.ones((1, len(labels_N))))
    accuracy_T, f1_T = (
        np.where(used_BT, of(true_BT, false_BT), 0.0)[0] for of in _AT_THRESHOLDS.values()
    )
    best = int(f1_T.argmax())
    true = float(true_BT[0, best]) if used_BT.any() else 0.0
    return {
        "accuracy": float(accuracy_T.max()),
        "f1": float(f1_T[best]),
        "precision": true / float(true_BT[0, best] + false_BT[0, best]),
        "recall": true / float(true_BT[0, -1]),
        "ap": float(_average_precision(true_BT, false_BT)[0]),
    }


def pairs_of_resamples(metric: str, similarities_N: Floats, labels_N: Ints) -> Statistic:
    """Give the ``accuracy``, ``f1`` or ``ap`` of resamples; NaN without both labels."""
    counts = _counts_above_thresholds(similarities_N, labels_N)

    def statistic(weights_BN: Floats) -> Floats:
        true_BT, false_BT, used_BT = counts(weights_BN)
        with np.errstate(divide="ignore", invalid="ignore"):
            if metric == "ap":
                found_B = _average_precision(true_BT, false_BT)
            else:
                found_BT = _AT_THRESHOLDS[metric](true_BT, false_BT)
                found_B = np.where(used_BT, found_BT, 0.0).max(axis=1)
        return np.where((true_BT[:, -1] > 0) & (false_BT[:, -1] > 0), found_B, np.nan)

    return statistic


def _counts_above_thresholds(
    similarities_N: Floats, labels_N: Ints
) -> Callable[[Floats], tuple[Floats, Floats, NDArray[np.bool_]]]:
    """Give true_BT, false_BT, and which thresholds have pairs of the resample on both sides."""
    order, starts, _ = _runs(-similarities_N)
    is_one_N = labels_N[order] == 1

    def counts(weights_BN: Floats) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        ranked_BN = weights_BN[:, order]
        true_BT, false_BT = (
            np.cumsum(np.add.reduceat(ranked_BN * wanted_N, starts, axis=1), axis=1)
            for wanted_N in (is_one_N, ~is_one_N)
        )
        above_BT = true_BT + false_BT
        return true_BT, false_BT, (above_BT > 0) & (above_BT < above_BT[:, -1:])

    return counts


def _average_precision(true_BT: Floats, false_BT: Floats) -> Floats:
    steps_BT = np.diff(true_BT, axis=1, prepend=0.0)
    precision_BT = true_BT / np.maximum(true_BT + false_BT, 1.0)
    return (steps_BT * precision_BT).sum(axis=1) / true_BT[:, -1]


# --- classes --------------------------------------------------------------------------------------


def undersample(labels: Ints) -> list[Ints]:
    """Choose the training texts of every experiment, as mteb does with its seed."""
    order = np.arange(len(labels))
    chosen = []
    for _ in range(EXPERIMENTS):
        np.random.RandomState(SEED).shuffle(order)
        by_label, starts, sizes = _runs(labels[order])
        nth = np.arange(len(order)) - np.repeat(starts, sizes)
        chosen.append(order[np.sort(by_label[nth < SAMPLES_PER_LABEL])])
    return chosen


def class_scores(gold_N: Ints, predicted_N: Ints) -> dict[str, float]:
    """Compute the scores of one experiment; ``ap`` only with two gold classes, one of them 1."""
    count = int(max(gold_N.max(), predicted_N.max())) + 1
    cells = np.bincount(gold_N * count + predicted_N, minlength=count * count)
    confusion_BCC = cells.reshape(1, count, count).astype(np.float64)
    scores = {name: float(values[0]) for name, values in confusion_scores(confusion_BCC).items()}
    classes = np.unique(gold_N)
    if len(classes) == 2 and 1 in classes:
        from sklearn.metrics import average_precision_score

        ap = float(average_precision_score(gold_N == 1, predicted_N))
        scores["ap"] = scores["ap_weighted"] = ap
    return scores


def confusion_scores(confusion_BCC: Floats) -> dict[str, Floats]:
    """Compute accuracy, F1, precision and recall of matrices whose rows are gold."""
    right_BC = np.diagonal(confusion_BCC, axis1=1, axis2=2)
    gold_BC, predicted_BC = confusion_BCC.sum(axis=2), confusion_BCC.sum(axis=1)
    # A class that is neither gold nor predicted counts in no macro average.
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


# --- clusters -------------------------------------------------------------------------------------


def v_measures(counts_BGK: Floats) -> Floats:
    """Compute the V-measure of contingency tables: texts by gold label and cluster."""
    from scipy.special import entr

    shares = counts_BGK / counts_BGK.sum(axis=(1, 2), keepdims=True)
    gold_B, clusters_B = entr(shares.sum(axis=2)).sum(axis=1), entr(shares.sum(axis=1)).sum(axis=1)
    both_B = gold_B + clusters_B
    mutual_B = both_B - entr(shares).sum(axis=(1, 2))
    # The harmonic mean of mutual/gold and mutual/clusters; two single groups agree wholly.
    return np.where(both_B > 0, 2 * mutual_B / np.where(both_B > 0, both_B, 1.0), 1.0)
