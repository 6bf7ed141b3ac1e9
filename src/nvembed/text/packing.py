"""Packing: many tokenised texts, one flat batch, no padding.

    texts (lengths 3, 2, 3)          pack
    a a a                            token_ids_T    a a a c c c b b
    b b                      ---->   cu_seqlens     0     3     6   8
    c c c                            position_ids_T 0 1 2 0 1 2 0 1

Segments of a pack are ordered by falling length, so that equal lengths stand side by side and
attention can treat each run of them as one dense block. ``order`` remembers which text each segment
was. Next file: ``model/embedder.py``.

Letters: T tokens of the pack, N segments (texts) of the pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from nvembed.text.tokens import TokenizedText


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the texts of a flat batch begin and end.

    Attributes:
        cu_seqlens: int32 ``(N + 1,)`` on the device of the tokens: starts of the segments, then T.
        lengths: the same as Python numbers, for grouping without waiting for the device.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    @property
    def max_length(self) -> int:
        """Tokens of the longest segment."""
        return max(self.lengths)

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
    """The one batch type: every text of a pack, end to end.

    Attributes:
        token_ids_T: int64 token ids.
        position_ids_T: int64 positions, from 0 in every segment.
        pool_mask_T: bool, True where a token is pooled.
        segments: boundaries.
        order: ``order[n]`` is the row (of what was flattened) that became segment ``n``.
    """

    token_ids_T: Tensor
    position_ids_T: Tensor
    pool_mask_T: Tensor
    segments: Segments
    order: tuple[int, ...]

    def to(self, device: torch.device | str) -> FlatBatch:
        """Copy to a device."""
        segments = Segments(self.segments.cu_seqlens.to(device), self.segments.lengths)
        return FlatBatch(
            self.token_ids_T.to(device),
            self.position_ids_T.to(device),
            self.pool_mask_T.to(device),
            segments,
            self.order,
        )


def flatten(texts: Sequence[TokenizedText]) -> FlatBatch:
    """Lay tokenised texts end to end, longest first.

    Raises:
        ValueError: no texts, or a text without tokens.
    """
    if not texts or not all(len(text) for text in texts):
        raise ValueError("a flat batch needs at least one text and at least one token per text")
    order = tuple(sorted(range(len(texts)), key=lambda row: (-len(texts[row]), row)))
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
        order=order,
    )


def plan_packs(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Share texts out to packs of at most ``budget`` tokens, filling with neighbours in length.

    Texts are walked from long to short, so a pack holds texts of similar length: attention then
    runs on few dense blocks, and nothing is padded in any case. A text longer than the budget gets
    its own pack.

    Args:
        lengths: tokens of each text.
        budget: tokens a pack may hold.

    Returns:
        Row numbers per pack; every row exactly once.
    """
    if budget < 1:
        raise ValueError(f"a pack needs a budget of at least one token, got {budget}")
    packs: list[list[int]] = []
    room = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if not packs or lengths[row] > room:
            packs.append([])
            room = budget
        packs[-1].append(row)
        room -= lengths[row]
    return packs


def share_packs(lengths, budget, num_processes):
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    shares = []
    for rank in range(num_processes):
        rows = order[rank::num_processes]
        shares.append(
            [[rows[i] for i in pack] for pack in plan_packs([lengths[r] for r in rows], budget)]
        )
    return shares


def plan_groups(needed, lengths, budget):
    groups, texts = [], set()
    for query, rows in enumerate(needed):
        more = texts | set(rows)
        if not groups or sum(lengths[r] for r in more) > budget:
            groups.append([])
            more = set(rows)
        groups[-1].append(query)
        texts = more
    return groups
