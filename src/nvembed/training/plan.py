"""The plan of a step: which texts go through the model together, and what is kept between.

A plan is made of lengths alone, so it can be made without a model; ``training/step.py`` carries it
out, ``training/dry_run/`` counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nvembed.core.errors import TrainingError
from nvembed.data.batch import ContrastiveBatch, needed_texts, select_queries
from nvembed.text.packing import plan_groups, share_packs
from nvembed.training.objective import Objective


@dataclass(frozen=True, slots=True)
class StepSettings:
    """What is the same in all steps of a stage.

    Args:
        objective: the loss.
        coupled: in-batch negatives make every query depend on all documents.
        pack_tokens: tokens per forward.
        graph_tokens: tokens whose graphs a process holds at once.
    """

    objective: Objective
    coupled: bool
    pack_tokens: int
    graph_tokens: int


@dataclass(frozen=True, slots=True)
class PassPlan:
    """Queries whose texts are embedded, contrasted and sent back before the next ones.

    Args:
        part: the queries and who stands against whom.
        rows: the step's texts that they need, in the order of ``part.texts``.
        shares: per process its packs, as places in ``rows``.
        sizes: tokens of each of these packs.
        kept: how many packs, from the first on, are held with their graphs; the others are embedded
            twice. As many in all processes: sharded weights are gathered by all of them together.
    """

    part: ContrastiveBatch
    rows: Sequence[int]
    shares: list[list[list[int]]]
    sizes: list[list[int]]
    kept: int

    def tokens(self, rank: int) -> int:
        """Tokens that a process embeds, once."""
        return sum(self.sizes[rank])

    def kept_tokens(self, rank: int) -> int:
        """Those whose graphs it holds at once."""
        return sum(self.sizes[rank][: self.kept])

    def recomputed_tokens(self, rank: int) -> int:
        """Those that it embeds twice."""
        return sum(self.sizes[rank][self.kept :])


def plan_step(
    batch: ContrastiveBatch, lengths: Sequence[int], settings: StepSettings, num_processes: int
) -> list[PassPlan]:
    """Cut a step into passes, and each pass into packs.

    A step with in-batch negatives is one pass. Without them queries do not touch each other: there
    are as many passes of whole queries as it takes to hold the graphs of each.

    Args:
        batch: the step.
        lengths: tokens of its texts.
        settings: of the stage.
        num_processes: how many share the step.

    Raises:
        TrainingError: a pack needs more memory than there is.
    """
    room = settings.graph_tokens * num_processes
    if settings.coupled or sum(lengths) <= room:
        return [_plan_pass(batch, range(len(lengths)), lengths, settings, num_processes)]
    # Texts that groups share are embedded once in each; that is cheaper than everything twice.
    groups = plan_groups(needed_texts(batch), lengths, room)
    parts = (select_queries(batch, group) for group in groups)
    return [
        _plan_pass(part, rows.tolist(), [lengths[row] for row in rows], settings, num_processes)
        for part, rows in parts
    ]


def recomputed_share(passes: Sequence[PassPlan], rank: int) -> float:
    """Share of a process's tokens that are embedded twice."""
    embedded = sum(each.tokens(rank) for each in passes)
    return sum(each.recomputed_tokens(rank) for each in passes) / max(1, embedded)


def _plan_pass(
    part: ContrastiveBatch,
    rows: Sequence[int],
    lengths: Sequence[int],
    settings: StepSettings,
    num_processes: int,
) -> PassPlan:
    shares = share_packs(lengths, settings.pack_tokens, num_processes)
    sizes = [[sum(lengths[row] for row in pack) for pack in share] for share in shares]
    _require_room(part, shares, sizes, lengths, settings.graph_tokens)
    kept = min(_first_that_fit(own, settings.graph_tokens) for own in sizes)
    return PassPlan(part, rows, shares, sizes, kept)


def _first_that_fit(sizes: Sequence[int], room: int) -> int:
    """How many packs, from the first on, fit together."""
    return int(np.searchsorted(np.cumsum(sizes), room, side="right"))


def _require_room(
    part: ContrastiveBatch,
    shares: Sequence[Sequence[Sequence[int]]],
    sizes: Sequence[Sequence[int]],
    lengths: Sequence[int],
    graph_tokens: int,
) -> None:
    for share, own in zip(shares, sizes, strict=True):
        for pack, size in zip(share, own, strict=True):
            if size > graph_tokens:
                longest = max(pack, key=lambda row: lengths[row])
                raise TrainingError(
                    f"a pack of {size:,} tokens does not fit: its longest text has "
                    f"{lengths[longest]:,} tokens ({part.texts[longest][1][:40]!r}), and memory "
                    f"holds the graph of {graph_tokens:,}",
                    where="memory_gb, pack_tokens",
                    hint="Lower pack_tokens or model.max_tokens, raise memory_gb, or set "
                    "activation_checkpointing=true",
                )
