from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvembed.text.packing import Segments, flatten, plan_packs
from nvembed.text.tokens import TokenizedText

lengths_lists = st.lists(st.integers(1, 60), max_size=80)


@given(lengths_lists, st.integers(1, 100))
def test_packs_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    packs = plan_packs(lengths, budget)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    for pack in packs:
        assert sum(lengths[row] for row in pack) <= budget or len(pack) == 1
    in_order = [lengths[row] for pack in packs for row in pack]
    assert in_order == sorted(lengths, reverse=True)


@given(lengths_lists, st.integers(60, 200))
def test_neighbouring_packs_could_not_be_joined(lengths: list[int], budget: int) -> None:
    packs = plan_packs(lengths, budget)
    for first, second in pairwise(packs):
        assert sum(lengths[row] for row in first) + lengths[second[0]] > budget


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.data())
def test_flat_batch_holds_the_texts_and_nothing_else(lengths: list[int], data) -> None:
    texts = [
        TokenizedText(tuple(100 * row + i for i in range(n)), data.draw(st.integers(0, n - 1)))
        for row, n in enumerate(lengths)
    ]
    flat = flatten(texts)
    assert flat.token_ids_T.shape == (sum(lengths),)
    bounds = flat.segments.cu_seqlens.tolist()
    assert bounds[-1] == sum(lengths)
    for segment, row in enumerate(flat.order):
        part = slice(bounds[segment], bounds[segment + 1])
        text = texts[row]
        assert tuple(flat.token_ids_T[part].tolist()) == text.ids
        assert flat.position_ids_T[part].tolist() == list(range(len(text)))
        expected = [position >= text.pool_start for position in range(len(text))]
        assert flat.pool_mask_T[part].tolist() == expected


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_runs_cover_the_pack(lengths: list[int]) -> None:
    segments = Segments.of_lengths(lengths)
    covered = [n for _, count, n in segments.runs() for _ in range(count)]
    assert covered == lengths
    position = 0
    for first, count, length in segments.runs():
        assert first == position
        position += count * length
    neighbours = [length for _, _, length in segments.runs()]
    assert all(a != b for a, b in pairwise(neighbours))


def test_nothing_to_flatten_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one text"):
        flatten([])
    with pytest.raises(ValueError, match="at least one token"):
        flatten([TokenizedText((), 0)])
    with pytest.raises(ValueError, match="budget"):
        plan_packs([1], 0)


def test_moving_keeps_the_boundaries() -> None:
    flat = flatten([TokenizedText((5, 6), 1)]).to(torch.device("cpu"))
    assert flat.segments.lengths == (2,)
    assert flat.order == (0,)
