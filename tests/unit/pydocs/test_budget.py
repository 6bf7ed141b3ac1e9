"""The time: how it becomes steps."""

from __future__ import annotations

import pytest

from pydocs.budget import (
    STAGE1_SHARE,
    TRUST,
    StepTimes,
    plan_steps,
    training_seconds,
)


@pytest.mark.parametrize("seconds", [300.0, 1000.0, 7200.0])
def test_steps_fill_the_time_in_the_shares(seconds: float) -> None:
    times = StepTimes(1.7, 2.3)
    steps = plan_steps(seconds, times, 10)
    first, second = steps.stage1 * times.stage1, steps.stage2 * times.stage2
    assert seconds - 1.7 - 2.3 < first + second <= seconds
    assert first / (first + second) == pytest.approx(STAGE1_SHARE, abs=0.02)


@pytest.mark.parametrize("seconds", [-100.0, 0.0, 5.0])
def test_never_fewer_than_the_least(seconds: float) -> None:
    steps = plan_steps(seconds, StepTimes(1.0, 1.0), 7)
    assert steps.stage1 == steps.stage2 == 7


def test_what_comes_after_training_is_kept_free() -> None:
    left = training_seconds(500, evaluation=80, mining=60, searching=7, saving=12)
    assert left == pytest.approx(TRUST * (500 - 80 - 60 - 7 - 12))
    assert TRUST < 1
