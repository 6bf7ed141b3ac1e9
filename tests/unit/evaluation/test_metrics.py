"""The metrics against slow plain code, and their resampled forms against repeating the items."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from nvembed.evaluation.metrics import (
    CUTS,
    class_scores,
    confusion_scores,
    correlation_of_resamples,
    order_with_ties,
    pair_metrics,
    pairs_of_resamples,
    ranking_values,
    undersample,
    v_measures,
)
from oracles import evaluation as oracle


@pytest.mark.parametrize("seed", range(6))
def test_ranking_metrics(seed: int) -> None:
    rng = np.random.default_rng(seed)
    width = int(rng.integers(1, 40))
    grades = rng.integers(0, 3, size=(12, width)) * (rng.random((12, width)) < 0.3)
    grades[0] = 0  # nothing found
    # Some relevant documents are not among the results.
    relevant = [np.array([*row[row > 0], *rng.integers(1, 4, size=2)]) for row in grades]
    values = ranking_values(grades, relevant)
    for query, row in enumerate(grades.tolist()):
        for cut in CUTS:
            expected = oracle.ranking_metrics(row, relevant[query].tolist(), cut)
            found = {name: values[f"{name}_at_{cut}"][query] for name in expected}
            assert found == pytest.approx(expected, abs=1e-12)
    assert values["ndcg_at_10"][0] == 0


def test_a_perfect_ranking_has_one_everywhere() -> None:
    values = ranking_values(np.array([[3, 2, 1, 0]]), [np.array([1, 3, 2])])
    assert values["ndcg_at_3"] == values["map_at_3"] == values["recall_at_3"] == 1
    assert values["recall_at_1"] == pytest.approx(1 / 3)


def test_ties_go_to_the_higher_rank() -> None:
    order = order_with_ties(np.array([[0.5, 0.9, 0.5, 0.5]]), np.array([[1, 0, 3, 2]]))
    assert order.tolist() == [[1, 2, 3, 0]]


@pytest.mark.parametrize("seed", range(6))
def test_pair_metrics(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 12, size=30) / 7  # with ties
    labels = (rng.random(30) < 0.4).astype(np.int64)
    labels[:2] = 0, 1
    found = pair_metrics(scores, labels)
    plain = scores.tolist(), labels.tolist()
    assert found["ap"] == pytest.approx(oracle.average_precision(*plain))
    assert found["accuracy"] == oracle.best_over_thresholds(*plain, oracle.accuracy)
    assert found["f1"] == pytest.approx(oracle.best_over_thresholds(*plain, oracle.f1))
    # Precision and recall are those of the threshold with the best F1.
    p, r = found["precision"], found["recall"]
    assert found["f1"] == pytest.approx(2 * p * r / (p + r))


def test_equal_similarities_have_no_threshold() -> None:
    found = pair_metrics(np.zeros(4), np.array([0, 1, 1, 1]))
    assert found == {"accuracy": 0, "f1": 0, "precision": 0, "recall": 0, "ap": 0.75}


@pytest.mark.parametrize("seed", range(4))
def test_resampled_metrics_are_those_of_repeated_items(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 8, size=25).astype(float)
    y = x + rng.normal(size=25).round(1) * 3
    labels = (rng.random(25) < 0.5).astype(np.int64)
    weights = rng.multinomial(25, [1 / 25] * 25, size=5)
    w = weights.astype(float)
    spearman, pearson = (correlation_of_resamples(n, x, y)(w) for n in ("spearman", "pearson"))
    ap, f1, accuracy = (pairs_of_resamples(name, y, labels)(w) for name in ("ap", "f1", "accuracy"))
    for row, counts in enumerate(weights.tolist()):
        own_x, own_y = oracle.repeated(x, counts), oracle.repeated(y, counts)
        own_labels = [int(label) for label in oracle.repeated(labels, counts)]
        assert spearman[row] == pytest.approx(stats.spearmanr(own_x, own_y)[0])
        assert pearson[row] == pytest.approx(stats.pearsonr(own_x, own_y)[0])
        assert ap[row] == pytest.approx(oracle.average_precision(own_y, own_labels))
        best = oracle.best_over_thresholds
        assert f1[row] == pytest.approx(best(own_y, own_labels, oracle.f1))
        assert accuracy[row] == pytest.approx(best(own_y, own_labels, oracle.accuracy))


def test_a_constant_side_has_no_correlation() -> None:
    weights = np.array([[1.0, 1, 1], [3, 0, 0]])
    sides = np.array([1.0, 2, 3]), np.array([1.0, 3, 2])
    found = correlation_of_resamples("spearman", *sides)(weights)
    assert found[0] == pytest.approx(0.5)
    assert np.isnan(found[1])


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@pytest.mark.parametrize("classes", [2, 5])
def test_class_scores_equal_sklearn(classes: int) -> None:
    rng = np.random.default_rng(classes)
    gold, predicted = rng.integers(classes, size=(2, 60))
    predicted[predicted == classes - 1] = 0  # one class is never predicted
    found = class_scores(gold, predicted)
    assert found["accuracy"] == sklearn_metrics.accuracy_score(gold, predicted)
    for name in ("f1", "precision", "recall"):
        function = getattr(sklearn_metrics, f"{name}_score")
        assert found[name] == pytest.approx(function(gold, predicted, average="macro"))
        expected = function(gold, predicted, average="weighted")
        assert found[f"{name}_weighted"] == pytest.approx(expected)
    assert ("ap" in found) == (classes == 2)


def test_a_class_that_does_not_occur_does_not_count() -> None:
    table = np.zeros((1, 3, 3))
    table[0, 0, 0], table[0, 1, 1] = 4, 2
    assert confusion_scores(table)["f1"].tolist() == [1.0]


def test_training_texts_are_eight_of_each_label() -> None:
    labels = np.random.default_rng(0).integers(3, size=100)
    chosen = undersample(labels)
    assert len(chosen) == 10
    assert all(np.bincount(labels[rows]).tolist() == [8, 8, 8] for rows in chosen)
    assert len({tuple(rows) for rows in chosen}) == 10


def test_v_measures_equal_sklearn() -> None:
    rng = np.random.default_rng(0)
    gold, found = rng.integers(4, size=(2, 80))
    found = np.where(rng.random(80) < 0.5, gold, found)
    table = np.zeros((1, 4, 4))
    np.add.at(table[0], (gold, found), 1)
    expected = sklearn_metrics.v_measure_score(gold, found)
    assert v_measures(table)[0] == pytest.approx(expected)
    assert v_measures(np.array([[[5.0, 0], [0, 0]]])).tolist() == [1.0]
