from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvembed.model.packing import Segments, flatten, plan_groups, plan_packs, share_packs
from nvembed.model.tokens import TokenizedText
from oracles.packing import best_fit_decreasing, next_fit_decreasing

lengths_lists = st.lists(st.integers(1, 60), max_size=80)


@given(lengths_lists, st.integers(1, 100))
def test_packs_are_best_fit_decreasing(lengths: list[int], budget: int) -> None:
    packs = plan_packs(lengths, budget)
    assert packs == best_fit_decreasing(lengths, budget)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    for pack in packs:
        assert sum(lengths[row] for row in pack) <= budget or len(pack) == 1
        assert [lengths[row] for row in pack] == sorted((lengths[r] for r in pack), reverse=True)
    assert len(packs) <= len(next_fit_decreasing(lengths, budget))


def test_short_texts_fill_the_gaps() -> None:
    lengths = [6, 3, 6, 4, 4, 3, 12]
    assert plan_packs(lengths, 10) == [[6], [0, 3], [2, 4], [1, 5]]
    assert next_fit_decreasing([6, 6, 4, 4], 10) == [[0], [1, 2], [3]]
    assert plan_packs([6, 6, 4, 4], 10) == [[0, 2], [1, 3]]
    assert plan_packs([], 10) == []


def test_many_texts_are_planned_quickly() -> None:
    # Long texts leave twenty thousand packs with little room, all of which stay in question.
    lengths = [9_000 + row % 1000 for row in range(20_000)] + [1] * 10_000
    started = time.perf_counter()
    packs = plan_packs(lengths, 10_000)
    assert time.perf_counter() - started < 2
    assert len(packs) == 20_000


@given(lengths_lists, st.integers(1, 100), st.integers(1, 5))
def test_shares_are_even_and_equal_in_number(
    lengths: list[int], budget: int, num_processes: int
) -> None:
    shares = share_packs(lengths, budget, num_processes)
    assert len(shares) == num_processes
    assert len({len(packs) for packs in shares}) == 1
    rows = [row for packs in shares for pack in packs for row in pack]
    assert sorted(rows) == list(range(len(lengths)))
    loads = []
    for packs in shares:
        own = [row for pack in packs for row in pack]
        loads.append(sum(lengths[row] for row in own))
        for pack in packs:
            assert sum(lengths[row] for row in pack) <= budget or len(pack) == 1
            assert [lengths[r] for r in pack] == sorted((lengths[r] for r in pack), reverse=True)
        if [] in packs:  # only where there are more packs than texts
            assert max(map(len, packs)) <= 1
    # Whoever got the longest load got its last text when it had the least.
    assert max(loads) - min(loads) <= max(lengths, default=0)
    # No process runs more forwards than the one that needs most of them.
    plans = [plan_packs([lengths[r] for p in packs for r in p], budget) for packs in shares]
    assert len(shares[0]) == max(map(len, plans))
    if num_processes == 1:
        assert shares == [plan_packs(lengths, budget)]


def test_shares_of_few_texts() -> None:
    assert share_packs([5, 4, 3, 3, 2], 6, 2) == [[[0], [3]], [[1, 4], [2]]]
    assert share_packs([9, 2, 1, 5], 9, 2) == [[[0]], [[3, 1, 2]]]
    assert share_packs([9, 4, 3, 2, 1], 6, 2) == [[[0], [4]], [[1, 3], [2]]]
    # The second could do with one pack and splits it; here the first has nothing to split.
    assert share_packs([4, 3, 3, 2, 1], 6, 2) == [[[0, 3], [4]], [[1], [2]]]
    assert share_packs([5, 3, 3, 5, 9], 7, 3) == [[[4], []], [[0], [1]], [[3], [2]]]
    assert share_packs([3], 8, 3) == [[[0]], [[]], [[]]]
    assert share_packs([], 8, 2) == [[], []]


@given(st.data(), st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(1, 80))
def test_groups_are_runs_of_queries_as_long_as_the_budget_allows(
    data: st.DataObject, lengths: list[int], budget: int
) -> None:
    needs = st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=5)
    rows_of_query = data.draw(st.lists(needs, max_size=10))

    def tokens(queries: list[int]) -> int:
        return sum(lengths[row] for row in {row for q in queries for row in rows_of_query[q]})

    groups = plan_groups(rows_of_query, lengths, budget)
    assert [q for group in groups for q in group] == list(range(len(rows_of_query)))
    for group in groups:
        assert group
        assert tokens(group) <= budget or len(group) == 1
    for group, following in pairwise(groups):
        assert tokens([*group, following[0]]) > budget


def test_shared_texts_of_a_group_count_once() -> None:
    assert plan_groups([[0, 1], [2, 1, 1], [3, 0]], [4, 4, 2, 3], 10) == [[0, 1], [2]]
    assert plan_groups([[0, 0]], [4], 2) == [[0]]
    assert plan_groups([], [4], 2) == []


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
    with pytest.raises(ValueError, match="budget"):
        plan_groups([[0]], [1], 0)
    with pytest.raises(ValueError, match="one process"):
        share_packs([1], 1, 0)


def test_moving_keeps_the_boundaries() -> None:
    flat = flatten([TokenizedText((5, 6), 1)]).to(torch.device("cpu"))
    assert flat.segments.lengths == (2,)
    assert flat.order == (0,)
