"""Means, spread and tests over seeds, against scipy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from nvembed.evaluation.results import TaskResult
from nvembed.evaluation.task_files import TaskType
from nvembed.training.ablation.statistics import (
    ALL,
    ArmScores,
    arm_contrasts,
    arm_scores,
    mean_and_spread,
    pooled_spread,
    smallest_visible,
    value_contrasts,
)


def arm(name: str, *scores: float) -> ArmScores:
    return ArmScores(name, {ALL: scores})


def result(kind: TaskType, score: float | None) -> TaskResult:
    return TaskResult(kind, "x", score, 1.0, {"x": score})


def test_a_seed_is_averaged_over_tasks_not_types() -> None:
    first = {"a": result("STS", 0.2), "b": result("STS", 0.4), "c": result("Retrieval", 0.9)}
    second = {"a": result("STS", None), "b": result("STS", 0.6), "c": result("Retrieval", 0.3)}
    scores = arm_scores("x", [first, second])
    assert list(scores.columns) == [ALL, "Retrieval", "STS"]
    assert scores.columns[ALL] == pytest.approx((50, 30))
    assert scores.columns["STS"] == pytest.approx((30, 30))
    assert mean_and_spread(scores.columns[ALL]) == pytest.approx((40, np.sqrt(200)))
    assert mean_and_spread((4.0,)) == (4.0, None)


def test_two_arms_are_the_t_test_of_equal_variances() -> None:
    a, b = (30.0, 31.0, 33.0), (34.0, 33.5, 35.0)
    found = arm_contrasts([arm("a", *a), arm("b", *b)], "a")
    assert found["b"].difference == pytest.approx(np.mean(b) - np.mean(a))
    assert found["b"].p == pytest.approx(stats.ttest_ind(a, b).pvalue)


def test_the_spread_is_pooled_and_p_values_are_holm_adjusted() -> None:
    rng = np.random.default_rng(0)
    arms = [arm(str(i), *rng.normal(i, 1, size=3)) for i in range(4)]
    spread, freedom = pooled_spread(arms)
    variances = [np.var(a.columns[ALL], ddof=1) for a in arms]
    assert (spread, freedom) == (pytest.approx(np.sqrt(np.mean(variances))), 8)
    found = arm_contrasts(arms, "0")
    base = np.mean(arms[0].columns[ALL])
    plain = {
        a.arm: 2 * stats.t.sf(abs(np.mean(a.columns[ALL]) - base) / (spread * np.sqrt(2 / 3)), 8)
        for a in arms[1:]
    }
    ordered = sorted(plain, key=plain.__getitem__)
    assert found[ordered[0]].p == pytest.approx(min(1, 3 * plain[ordered[0]]))
    visible = smallest_visible(arms)
    assert visible == pytest.approx(stats.t.ppf(0.975, 8) * spread * np.sqrt(2 / 3))


def test_an_axis_is_averaged_over_the_arms_that_have_both_values() -> None:
    values = {
        "x+p": {"a": "x", "b": "p"},
        "y+p": {"a": "y", "b": "p"},
        "x+q": {"a": "x", "b": "q"},
        "y+q": {"a": "y", "b": "q"},
        "y+r": {"a": "y", "b": "r"},
    }
    arms = [
        arm("x+p", 10, 12),
        arm("y+p", 14, 16),
        arm("x+q", 20, 21),
        arm("y+q", 21, 22),
        arm("y+r", 99, 99),
    ]
    found = value_contrasts(arms, values, "a", "x")
    assert set(found) == {"y"}
    assert found["y"].difference == pytest.approx((4 + 1) / 2)
    spread, freedom = pooled_spread(arms)
    error = spread * np.sqrt((0.5 + 0.5) * 2 / 4)
    assert found["y"].p == pytest.approx(2 * stats.t.sf(2.5 / error, freedom))


def test_one_seed_tells_no_spread_and_a_missing_baseline_no_difference() -> None:
    single = [arm("a", 1.0), arm("b", 2.0)]
    assert arm_contrasts(single, "a")["b"].p is None
    assert smallest_visible(single) is None
    assert arm_contrasts([arm("a"), arm("b", 1.0, 2.0)], "a") == {}


def test_equal_arms_rarely_stand_out() -> None:
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(400):
        arms = [arm(str(i), *rng.normal(0, 1, size=3)) for i in range(6)]
        found += any(contrast.stands_out for contrast in arm_contrasts(arms, "0").values())
    assert 2 <= found <= 32  # at most 5 % of 400, within chance
