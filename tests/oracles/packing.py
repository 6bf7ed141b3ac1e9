"""Packing by its rules, slowly."""

from __future__ import annotations

from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Look at every pack for every text."""
    packs: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        best = None
        for pack in packs:
            filled = sum(lengths[r] for r in pack)
            fits = filled + lengths[row] <= budget
            if fits and (best is None or filled > sum(lengths[r] for r in best)):
                best = pack
        if best is None:
            best = []
            packs.append(best)
        best.append(row)
    return packs


def next_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Fill one pack after the other."""
    packs: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if not packs or sum(lengths[r] for r in packs[-1]) + lengths[row] > budget:
            packs.append([])
        packs[-1].append(row)
    return packs
