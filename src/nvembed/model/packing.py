"""Packing: many tokenised texts, one flat batch, no padding.

    a a a    b b    c c c    ---->    a a a c c c b b      positions 0 1 2 0 1 2 0 1

Segments are ordered by falling length, so that attention can treat equal lengths as one block.
Next file: ``model/packs.py``. Letters: T tokens of the pack, N segments (texts).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from nvembed.model.tokens import TokenizedText


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the texts of a flat batch begin and end."""

    cu_seqlens: Tensor  # int32 (N + 1,) on the device of the tokens: starts of the segments, then T
    lengths: tuple[int, ...]  # for grouping without waiting for the device

    def runs(self) -> list[tuple[int, int, int]]:
        """Neighbours of equal length as ``(first token, number of segments, length)``."""
        runs: list[tuple[int, int, int]] = []
        start = 0
        for length in self.lengths:
            if runs and runs[-1][2] == length:
                first, count, _ = runs[-1]
                runs[-1] = (first, count + 1, length)
            else:
                runs.append((start, 1, length))
            start += length
        return runs

    @classmethod
    def of_lengths(
        cls, lengths: Sequence[int], device: torch.device | str | None = None
    ) -> Segments:
        """Build from lengths (tokens per segment, each at least 1)."""
        starts = [0, *accumulate(lengths)]
        return cls(torch.tensor(starts, dtype=torch.int32, device=device), tuple(lengths))


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """The one batch type: every text of a pack, end to end."""

    token_ids_T: Tensor  # int64
    position_ids_T: Tensor  # int64, from 0 in every segment
    pool_mask_T: Tensor  # bool, True where a token is pooled
    segments: Segments
    order: tuple[int, ...]  # order[n] is the row of what was flattened that became segment n

    def to(self, device: torch.device | str) -> FlatBatch:
        """Copy to a device."""
        return FlatBatch(
            self.token_ids_T.to(device),
            self.position_ids_T.to(device),
            self.pool_mask_T.to(device),
            Segments(self.segments.cu_seqlens.to(device), self.segments.lengths),
            self.order,
        )


def flatten(texts: Sequence[TokenizedText]) -> FlatBatch:
    """Lay tokenised texts end to end, longest first."""
    if not texts or not all(len(text) for text in texts):
        raise ValueError("a flat batch needs at least one text and at least one token per text")
    order = _long_to_short(list(map(len, texts)))
    chosen = [texts[row] for row in order]
    lengths = [len(text) for text in chosen]
    pool_start_N = torch.tensor([text.pool_start for text in chosen])
    lengths_N = torch.tensor(lengths)
    starts_N = lengths_N.cumsum(0) - lengths_N
    position_ids_T = torch.arange(sum(lengths)) - starts_N.repeat_interleave(lengths_N)
    return FlatBatch(
        token_ids_T=torch.tensor(list(chain.from_iterable(text.ids for text in chosen))),
        position_ids_T=position_ids_T,
        pool_mask_T=position_ids_T >= pool_start_N.repeat_interleave(lengths_N),
        segments=Segments.of_lengths(lengths),
        order=tuple(order),
    )


def plan_packs(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Share texts out to packs of at most ``budget`` tokens: best fit decreasing, ``n log n``.

    A pack is a list of row numbers, from long texts to short ones. A text longer than the budget
    gets its own.
    """
    if budget < 1:
        raise ValueError(f"a pack needs a budget of at least one token, got {budget}")
    packs: list[list[int]] = []
    # Packs by the room they have. There are at most ``budget`` different rooms, however many packs.
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for row in _long_to_short(lengths):
        place = bisect_left(rooms, lengths[row])
        if place == len(rooms):
            packs.append([])
            room, pack = budget, len(packs) - 1
        else:
            room = rooms[place]
            pack = heapq.heappop(with_room[room])
            if not with_room[room]:
                del with_room[room], rooms[place]
        packs[pack].append(row)
        room -= lengths[row]
        if room <= 0:
            continue
        if room not in with_room:
            insort(rooms, room)
        heapq.heappush(with_room.setdefault(room, []), pack)
    return packs


def share_packs(lengths: Sequence[int], budget: int, num_processes: int) -> list[list[list[int]]]:
    """Plan packs for several processes: even in tokens, equal in number.

    Processes that share weights must run equally many forwards: large packs are split, and where
    texts are too few there are empty packs.
    """
    if num_processes < 1:
        raise ValueError(f"texts need at least one process, got {num_processes}")
    rows_of: list[list[int]] = [[] for _ in range(num_processes)]
    loads = [(0, process) for process in range(num_processes)]  # equal loads: the first process
    for row in _long_to_short(lengths):
        tokens, process = loads[0]
        rows_of[process].append(row)
        heapq.heapreplace(loads, (tokens + lengths[row], process))
    shares = [
        [[rows[place] for place in pack] for pack in plan_packs([lengths[r] for r in rows], budget)]
        for rows in rows_of
    ]
    most = max(map(len, shares))
    return [_split_packs(packs, lengths, most) for packs in shares]


def plan_groups(
    rows_of_query: Sequence[Sequence[int]], lengths: Sequence[int], budget: int
) -> list[list[int]]:
    """Cut the queries of a step, in their order, into groups whose texts fit a budget.

    ``rows_of_query`` are the texts that each query needs, which count once in a group. A query that
    needs more than the budget is a group of its own.
    """
    if budget < 1:
        raise ValueError(f"a group needs a budget of at least one token, got {budget}")
    groups: list[list[int]] = []
    held: set[int] = set()
    tokens = 0
    for query, rows in enumerate(rows_of_query):
        added = sum(lengths[row] for row in set(rows) - held)
        if not groups or tokens + added > budget:
            groups.append([])
            held, tokens = set(), 0
            added = sum(lengths[row] for row in set(rows))
        groups[-1].append(query)
        held.update(rows)
        tokens += added
    return groups


def _long_to_short(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))


def _split_packs(packs: list[list[int]], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Split the largest packs that can be split until there are ``count``; fill up with none."""
    packs = list(packs)
    while len(packs) < count:
        sizes = [sum(lengths[row] for row in pack) if len(pack) > 1 else 0 for pack in packs]
        if not any(sizes):
            packs.append([])
            continue
        largest = sizes.index(max(sizes))
        halves: tuple[list[int], list[int]] = ([], [])
        tokens = [0, 0]
        for row in packs[largest]:
            half = tokens.index(min(tokens))
            halves[half].append(row)
            tokens[half] += lengths[row]
        packs[largest : largest + 1] = halves
    return packs
