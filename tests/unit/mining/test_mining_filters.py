from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.mining.selection import after_first, passes
from oracles import mining as oracle

SEEDS = st.integers(0, 10_000)


def _scores(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    # Sixteenths, negative ones too: products and differences below stay clear of the thresholds.
    positive = rng.integers(-16, 17, 6) / 16
    return positive.astype(np.float32), (rng.integers(-16, 17, (6, 9)) / 16).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
@pytest.mark.parametrize(
    ("strategy", "threshold"),
    [
        ("percent_of_positive", 0.95),
        ("percent_of_positive", 0.6),
        ("margin", 0.05),
        ("margin", 0.0),
        ("absolute", 0.7),
        ("absolute", -0.3),
    ],
)
def test_rules_equal_loops(strategy: str, threshold: float, seed: int) -> None:
    positive, scores = _scores(seed)
    keep = passes(strategy, threshold, positive, scores)
    expected = [
        [oracle.passes(strategy, threshold, float(p), float(s)) for s in row]
        for p, row in zip(positive, scores, strict=True)
    ]
    assert keep.tolist() == expected


def test_percent_by_hand() -> None:
    positive = np.array([0.8, 0.0, -0.5], dtype=np.float32)
    scores = np.array([[0.9, 0.77, 0.75, -1.0]] * 3, dtype=np.float32)
    # 0.95 * 0.8 = 0.76; a positive at or below 0 keeps nothing, not even what is far below it.
    expected = [[False, False, True, True], [False] * 4, [False] * 4]
    assert passes("percent_of_positive", 0.95, positive, scores).tolist() == expected


@pytest.mark.parametrize(
    ("strategy", "threshold", "positive"),
    [("percent_of_positive", 1.0, 0.5), ("margin", 0.25, 0.75), ("absolute", 0.5, 0.0)],
)
def test_equal_to_the_threshold_is_refused(strategy, threshold, positive) -> None:
    scores = np.array([[0.5]], dtype=np.float32)
    assert not passes(strategy, threshold, np.array([positive], np.float32), scores)[0, 0]


@settings(max_examples=60, deadline=None)
@given(
    eligible=st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=5),
    skip=st.integers(0, 8),
)
def test_after_first_equals_loops(eligible: list[list[bool]], skip: int) -> None:
    keep = after_first(np.array(eligible), skip=skip)
    assert keep.tolist() == [oracle.after_first(row, skip) for row in eligible]
