"""From the scores of runs to arms: means, spread over seeds, and what differs.

All scores are times 100. Letters: A arms, S seeds. Next file: ``training/ablation/report.py``.

Spread is that of training runs with other seeds. It is pooled over the arms: with three seeds an
arm's own spread is hardly known, and arms of one grid differ little in it. Tasks are fixed: nothing
here says that a difference would be found on other tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from nvembed.evaluation.results import TaskResult
from nvembed.evaluation.significance import holm
from nvembed.evaluation.task_files import TASK_TYPES

LEVEL = 0.05
ALL = "mean"
"""The column over all tasks."""


@dataclass(frozen=True)
class ArmScores:
    """The scores of one arm: ``mean`` and each task type → a mean over tasks per finished seed."""

    arm: str
    columns: Mapping[str, tuple[float, ...]]

    @property
    def num_seeds(self) -> int:
        """Finished runs."""
        return len(self.columns[ALL])


@dataclass(frozen=True)
class Contrast:
    """How far an arm, or all arms with a value of an axis, lie from what they are compared with.

    ``p`` is two-sided and adjusted for the number of contrasts (Holm); ``None`` with too few seeds.
    """

    difference: float  # of the means, positive where it is better than the baseline
    p: float | None

    @property
    def stands_out(self) -> bool:
        """Whether chance of the seeds does not explain it."""
        return self.p is not None and self.p < LEVEL


def arm_scores(arm: str, results_of_seeds: Sequence[Mapping[str, TaskResult]]) -> ArmScores:
    """Average the main scores of every seed over all tasks and over those of each type.

    An undefined score (all vectors alike) counts as 0.
    """
    columns: dict[str, list[float]] = {ALL: []}
    for results in results_of_seeds:
        by_column: dict[str, list[float]] = {}
        for result in results.values():
            for column in (ALL, result.type):
                by_column.setdefault(column, []).append(100 * (result.main_score or 0.0))
        for column, scores in by_column.items():
            columns.setdefault(column, []).append(sum(scores) / len(scores))
    order = [ALL, *(kind for kind in TASK_TYPES if kind in columns)]
    return ArmScores(arm, {column: tuple(columns[column]) for column in order})


def mean_and_spread(scores: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (of a sample); no deviation of a single score."""
    spread = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
    return float(np.mean(scores)), spread


def pooled_spread(arms: Sequence[ArmScores], column: str = ALL) -> tuple[float, int]:
    """Standard deviation over seeds, pooled over arms, and its degrees of freedom."""
    squares, freedom = 0.0, 0
    for arm in arms:
        scores = arm.columns[column]
        if len(scores) > 1:
            squares += float(np.var(scores, ddof=1)) * (len(scores) - 1)
            freedom += len(scores) - 1
    return (math.sqrt(squares / freedom) if freedom else 0.0), freedom


def arm_contrasts(
    arms: Sequence[ArmScores], baseline: str, column: str = ALL
) -> dict[str, Contrast]:
    """Compare every arm with the baseline: t tests with the pooled spread, Holm over the arms."""
    by_name = {arm.arm: arm.columns[column] for arm in arms if arm.num_seeds}
    if baseline not in by_name:
        return {}
    base = by_name.pop(baseline)
    weights = {name: 1 / len(scores) + 1 / len(base) for name, scores in by_name.items()}
    differences = {name: float(np.mean(scores) - np.mean(base)) for name, scores in by_name.items()}
    return _contrasts(differences, weights, arms, column)


def value_contrasts(
    arms: Sequence[ArmScores],
    values: Mapping[str, Mapping[str, str]],
    axis: str,
    reference: str,
    column: str = ALL,
) -> dict[str, Contrast]:
    """Compare the values of one axis, averaged over all else: the arms that have both values."""
    means = {arm.arm: (arm.columns[column]) for arm in arms if arm.num_seeds}
    places = {
        (values[name][axis], _elsewhere(values[name], axis)): scores
        for name, scores in means.items()
    }
    differences, weights = {}, {}
    for value in dict.fromkeys(value for value, _ in places):
        pairs = [
            (scores, places[reference, place])
            for (other, place), scores in places.items()
            if other == value and (reference, place) in places
        ]
        if value == reference or not pairs:
            continue
        count = len(pairs)
        differences[value] = float(np.mean([np.mean(a) - np.mean(b) for a, b in pairs]))
        weights[value] = sum(1 / len(a) + 1 / len(b) for a, b in pairs) / count**2
    return _contrasts(differences, weights, arms, column)


def smallest_visible(arms: Sequence[ArmScores], column: str = ALL) -> float | None:
    """Difference of two arms that would just stand out, were it the only comparison."""
    spread, freedom = pooled_spread(arms, column)
    counts = [arm.num_seeds for arm in arms if arm.num_seeds]
    if not freedom or not counts:
        return None
    return float(stats.t.ppf(1 - LEVEL / 2, freedom)) * spread * math.sqrt(2 / min(counts))


def _elsewhere(values: Mapping[str, str], axis: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, value) for name, value in values.items() if name != axis)


def _contrasts(
    differences: Mapping[str, float],
    weights: Mapping[str, float],
    arms: Sequence[ArmScores],
    column: str,
) -> dict[str, Contrast]:
    spread, freedom = pooled_spread(arms, column)
    if not freedom or not spread:
        return {name: Contrast(value, None) for name, value in differences.items()}
    p_values = [
        2 * float(stats.t.sf(abs(value) / (spread * math.sqrt(weights[name])), freedom))
        for name, value in differences.items()
    ]
    adjusted = holm(p_values)
    return {
        name: Contrast(value, p)
        for (name, value), p in zip(differences.items(), adjusted, strict=True)
    }
