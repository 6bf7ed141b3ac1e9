"""From the scores of runs to arms: means, spread over seeds, and what differs.

Scores are times 100. Letters: A arms, S seeds. The spread is that of training runs with other
seeds, pooled over the arms, since of three seeds it is hardly known. Tasks are fixed: nothing here
says that a difference would be found on other tasks.
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
    """How far an arm, or all arms with a value of an axis, lie from what they are compared with."""

    difference: float  # of the means, positive where it is better than the baseline
    p: float | None  # two-sided, after Holm's correction; ``None`` with too few seeds

    @property
    def stands_out(self) -> bool:
        """Whether chance of the seeds does not explain it."""
        return self.p is not None and self.p < LEVEL


def arm_scores(arm: str, results_of_seeds: Sequence[Mapping[str, TaskResult]]) -> ArmScores:
    """Average each seed's main scores over all tasks and each type; an undefined one is 0."""
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


def pooled_spread(arms: Sequence[ArmScores]) -> tuple[float, int]:
    """Standard deviation over seeds, pooled over arms, and its degrees of freedom."""
    several = [arm.columns[ALL] for arm in arms if arm.num_seeds > 1]
    freedom = sum(len(scores) - 1 for scores in several)
    squares = sum(float(np.var(scores, ddof=1)) * (len(scores) - 1) for scores in several)
    return (math.sqrt(squares / freedom) if freedom else 0.0), freedom


def arm_contrasts(arms: Sequence[ArmScores], baseline: str) -> dict[str, Contrast]:
    """Compare every arm with the baseline: t tests with the pooled spread, Holm over the arms."""
    scores = {arm.arm: arm.columns[ALL] for arm in arms if arm.num_seeds}
    base = scores.pop(baseline, None)
    pairs = {} if base is None else {name: [(own, base)] for name, own in scores.items()}
    return _contrasts(pairs, arms)


def value_contrasts(
    arms: Sequence[ArmScores], values: Mapping[str, Mapping[str, str]], axis: str, reference: str
) -> dict[str, Contrast]:
    """Compare the values of one axis, averaged over all else: the arms that have both values."""
    scores: dict[str, dict[tuple[str, ...], tuple[float, ...]]] = {}
    for arm in arms:
        if arm.num_seeds:
            own = values[arm.arm]
            elsewhere = tuple(value for name, value in own.items() if name != axis)
            scores.setdefault(own[axis], {})[elsewhere] = arm.columns[ALL]
    base = scores.pop(reference, {})
    pairs = {
        value: [(own[place], base[place]) for place in own if place in base]
        for value, own in scores.items()
    }
    return _contrasts({value: found for value, found in pairs.items() if found}, arms)


def smallest_visible(arms: Sequence[ArmScores]) -> float | None:
    """Difference of two arms that would just stand out, were it the only comparison."""
    spread, freedom = pooled_spread(arms)
    if not freedom:
        return None
    fewest = min(arm.num_seeds for arm in arms if arm.num_seeds)
    return float(stats.t.ppf(1 - LEVEL / 2, freedom)) * spread * math.sqrt(2 / fewest)


def _contrasts(
    pairs: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
    arms: Sequence[ArmScores],
) -> dict[str, Contrast]:
    """Mean difference of the pairs (scores, scores of the baseline) of every name."""
    spread, freedom = pooled_spread(arms)
    differences, p_values = [], []
    for of_name in pairs.values():
        difference = float(np.mean([np.mean(own) - np.mean(base) for own, base in of_name]))
        variance = sum(1 / len(own) + 1 / len(base) for own, base in of_name) / len(of_name) ** 2
        differences.append(difference)
        if spread:
            error = spread * math.sqrt(variance)
            p_values.append(2 * float(stats.t.sf(abs(difference) / error, freedom)))
    adjusted = holm(p_values) if spread else [None] * len(differences)
    return dict(zip(pairs, map(Contrast, differences, adjusted), strict=True))
