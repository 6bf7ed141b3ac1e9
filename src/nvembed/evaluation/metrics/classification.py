"""mteb's classification: logistic regressions on a few texts of each label, and their scores.

Letters: N test texts, E experiments, C classes, B resamples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

EXPERIMENTS = 10
SAMPLES_PER_LABEL = 8
SEED = 42
_MAX_ITERATIONS = 100


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
        starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
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
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=_MAX_ITERATIONS, random_state=SEED)
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
