from __future__ import annotations

import random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvembed.core.runs import capture_rng, derive_seed, restore_rng, seed_everything


def test_derived_seeds_never_change():
    # Recorded values: a different derivation would change every published run.
    assert derive_seed(0) == 7520536977032167579
    assert derive_seed(1, "data", 3) == 7569909234710156120


@given(st.integers(), st.lists(st.text("aß", max_size=3) | st.integers(), max_size=3))
def test_derived_seed_has_63_bits(seed, names):
    assert 0 <= derive_seed(seed, *names) < 2**63


def test_derived_seeds_differ():
    variants = [
        (0,),
        (1,),
        (0, "a"),
        (0, "b"),
        (0, "a", "b"),
        (0, "ab"),
        (0, 1),
        (0, "1"),
        (0, 1, 1),
    ]
    assert len({derive_seed(*variant) for variant in variants}) == len(variants)


def draw() -> list[float]:
    return [random.random(), random.gauss(), np.random.normal(), torch.rand(()).item()]


def test_captured_state_replays_the_same_numbers():
    seed_everything(5)
    draw()  # an odd number of normal draws leaves a cached one in numpy and python
    state = capture_rng()
    first = draw() + draw()
    assert draw() + draw() != first
    restore_rng(state)
    assert draw() + draw() == first


def test_seed_everything():
    seed_everything(1)
    first = draw()
    seed_everything(1)
    assert draw() == first
    seed_everything(2)
    assert all(a != b for a, b in zip(draw(), first, strict=True))
