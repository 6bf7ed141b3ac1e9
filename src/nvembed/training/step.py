"""One training step up to the gradients: packs → embeddings → loss → back through the packs.

The loss sees embeddings and no graph. Packs beyond the memory are embedded again on the way back
with the same dropout, so any batch has the gradients of one big graph (GradCache, arXiv
2101.06983). Without in-batch negatives groups of whole queries go one by one instead. Parameter
gradients are this process's partial sums. U unique texts, N texts of a pack, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nvembed.core.errors import TrainingError
from nvembed.core.runs import derive_seed
from nvembed.data.batch import ContrastiveBatch, effective_negatives, needed_texts, select_queries
from nvembed.model.embedder import NVEmbed
from nvembed.model.packing import plan_groups, share_packs
from nvembed.model.packs import pack_features
from nvembed.model.tokens import TokenizedText
from nvembed.training.contrastive_loss import (
    ContrastiveStatistics,
    Objective,
    ScoreSums,
    evaluate_objective,
)
from nvembed.training.distributed import FILLER, DistributedContext
from nvembed.training.teacher_states import TeacherStates


@dataclass(frozen=True, slots=True)
class StepSettings:
    """What is the same in all steps of a stage."""

    objective: Objective
    coupled: bool  # in-batch negatives make every query depend on all documents
    pack_tokens: int  # per forward
    activation_budget: int  # tokens whose graphs a process holds at once
    states: TeacherStates | None = None


@dataclass(frozen=True, slots=True)
class PassPlan:
    """Queries that are contrasted together; ``kept`` packs hold graphs, alike in all processes."""

    part: ContrastiveBatch
    rows: Sequence[int]  # the step's texts that it needs, in the order of ``part.texts``
    shares: list[list[list[int]]]  # per process its packs, as places in ``rows``
    sizes: list[list[int]]  # tokens of each of these packs
    kept: int


def plan_step(
    batch: ContrastiveBatch, lengths: Sequence[int], settings: StepSettings, num_processes: int
) -> list[PassPlan]:
    """Cut a step into passes (one, where queries are coupled), and each pass into packs."""
    room = settings.activation_budget * num_processes
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
    embedded = sum(sum(each.sizes[rank]) for each in passes)
    return sum(sum(each.sizes[rank][each.kept :]) for each in passes) / max(1, embedded)


def _plan_pass(
    part: ContrastiveBatch,
    rows: Sequence[int],
    lengths: Sequence[int],
    settings: StepSettings,
    num_processes: int,
) -> PassPlan:
    room = settings.activation_budget
    shares = share_packs(lengths, settings.pack_tokens, num_processes)
    sizes = [[sum(lengths[row] for row in pack) for pack in share] for share in shares]
    for share, own in zip(shares, sizes, strict=True):
        for pack, size in zip(share, own, strict=True):
            if size > room:
                longest = max(pack, key=lambda row: lengths[row])
                raise TrainingError(
                    f"a pack of {size:,} tokens does not fit: its longest text has "
                    f"{lengths[longest]:,} tokens ({part.texts[longest][1][:40]!r}), and memory "
                    f"holds the graph of {room:,}",
                    where="memory_gb, pack_tokens",
                    hint="Lower pack_tokens or model.max_tokens, raise memory_gb, or set "
                    "activation_checkpointing=true",
                )
    kept = min(int(np.searchsorted(np.cumsum(own), room, side="right")) for own in sizes)
    return PassPlan(part, rows, shares, sizes, kept)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step found; the gradients lie in the parameters."""

    loss: float
    parts: dict[str, float]  # of the loss, by name
    statistics: ContrastiveStatistics
    effective_negatives: float  # mean number of negatives per query
    num_tokens: int  # of all texts of the step, on all processes
    num_texts: int  # unique ones
    duplicates: float  # share of the texts that stood in the batch more than once
    recomputed: float  # share of this process's tokens that were embedded twice

    def to_row(self) -> dict[str, Any]:
        """Its numbers as a row of metrics has them."""
        return {
            "loss": self.loss,
            "parts": self.parts,
            "positive_similarity": self.statistics.positive_similarity,
            "margin": self.statistics.margin,
            "accuracy": self.statistics.accuracy,
            "effective_negatives": self.effective_negatives,
            "texts": self.num_texts,
            "tokens": self.num_tokens,
            "padding": 0.0,
            "duplicates": self.duplicates,
            "recomputed": self.recomputed,
        }


def contrastive_step(
    model: NVEmbed,
    batch: ContrastiveBatch,
    texts: Sequence[TokenizedText],
    settings: StepSettings,
    processes: DistributedContext,
    *,
    seed: int,
    log_temperature: Tensor | None = None,
    projection: Tensor | None = None,
) -> StepResult:
    """Add this process's part of the batch's gradient to the ``.grad`` of the parameters.

    The seed is that of dropout; a loss that is not finite is a FloatingPointError, not sent back.
    """
    lengths = [len(text) for text in texts]
    total_weight = batch.labelled
    loss, sums, parts = 0.0, ScoreSums(), dict[str, float]()
    plans = plan_step(batch, lengths, settings, processes.count)
    teaching = _Teaching.of(settings, plans)
    for number, plan in enumerate(plans):
        own = [texts[row] for row in plan.rows]
        pass_ = _Pass(model, own, plan, processes, seed, number, teaching)
        embedding_UD = pass_.embed()
        evaluated = evaluate_objective(
            settings.objective,
            embedding_UD,
            plan.part,
            total_weight=total_weight,
            log_temperature=log_temperature,
            projection=projection,
        )
        if teaching is not None:  # alike in all processes, and before anything is sent back
            evaluated.parts["states"] = sum(processes.of_all(pass_.missing))
        if not math.isfinite(evaluated.loss):
            raise FloatingPointError(evaluated.loss)
        gradient_UD = evaluated.gradient_UD.to(embedding_UD.dtype)
        pass_.backward(gradient_UD, last=number == len(plans) - 1)
        loss += evaluated.loss
        parts |= {name: parts.get(name, 0.0) + part for name, part in evaluated.parts.items()}
        sums += evaluated.sums
    return StepResult(
        loss=loss,
        parts=parts,
        statistics=sums.means(),
        effective_negatives=effective_negatives(batch),
        num_tokens=sum(lengths),
        num_texts=len(texts),
        duplicates=1 - len(texts) / batch.mentioned,
        recomputed=recomputed_share(plans, processes.rank),
    )


@dataclass(frozen=True, slots=True)
class _Teaching:
    """States of tokens that the model is drawn to."""

    states: TeacherStates
    tokens: int  # that the model reads in the step, in all processes

    @classmethod
    def of(cls, settings: StepSettings, plans: Sequence[PassPlan]) -> _Teaching | None:
        if settings.states is None:
            return None
        return cls(settings.states, sum(sum(own) for plan in plans for own in plan.sizes))

    def distance(self, texts: Sequence[TokenizedText], hidden_TD: Tensor) -> Tensor:
        """The part of the loss that a pack has."""
        return self.states.distance(texts, hidden_TD) / self.tokens


class _Pass:
    """Texts on their way through the model: forward in packs, then backward in packs."""

    def __init__(
        self,
        model: NVEmbed,
        texts: Sequence[TokenizedText],
        plan: PassPlan,
        processes: DistributedContext,
        seed: int,
        number: int,
        teaching: _Teaching | None,
    ) -> None:
        self.teaching = teaching
        self.model, self.texts, self.plan, self.processes = model, texts, plan, processes
        self.seed = derive_seed(seed, number, processes.rank)
        self.packs = plan.shares[processes.rank]
        self.missing = 0.0  # of the teacher's states, in this process
        self._graphs: list[tuple[Tensor, Tensor | None]] = []

    def embed(self) -> Tensor:
        """Embeddings ``(U, D)`` of all texts, on every process, without graph."""
        found = []
        for index in range(len(self.packs)):
            with nullcontext() if index < self.plan.kept else torch.no_grad():
                embedding_ND, missing = self._pack(index)
            if index < self.plan.kept:
                self._graphs.append((embedding_ND, missing))
            if missing is not None:
                self.missing += float(missing.detach())
            found.append(embedding_ND.detach())
        counts = [sum(len(pack) for pack in share) for share in self.plan.shares]
        stacked_UD = self.processes.gather_rows(torch.cat(found), counts)
        order = [row for share in self.plan.shares for pack in share for row in pack]
        return torch.empty_like(stacked_UD).index_copy_(
            0, torch.tensor(order, device=stacked_UD.device), stacked_UD
        )

    def backward(self, gradient_UD: Tensor, *, last: bool) -> None:
        """Send the gradient of the embeddings back; after the ``last`` pass nothing follows."""
        for index, pack in enumerate(self.packs):
            # A graph is let go once it was gone through.
            ends = self._graphs.pop(0) if index < self.plan.kept else self._pack(index)
            embedding_ND, missing = ends
            rows = torch.tensor(pack, dtype=torch.int64, device=gradient_UD.device)
            final = last and index == len(self.packs) - 1
            with self.processes.syncing(self.model, last=final):
                if missing is None or not missing.requires_grad:
                    torch.autograd.backward(embedding_ND, gradient_UD[rows])
                else:
                    torch.autograd.backward([embedding_ND, missing], [gradient_UD[rows], None])

    def _pack(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Embed one pack, and hold its states against a teacher's; dropout is always the same."""
        torch.manual_seed(derive_seed(self.seed, index))
        texts = [self.texts[row] for row in self.packs[index]]
        # An empty pack runs too: sharded weights want equally many forwards in all processes.
        features = pack_features(self.model, texts or [FILLER])
        embedding_ND, missing = features["sentence_embedding"][: len(texts)], None
        if self.teaching is not None and texts:
            missing = self.teaching.distance(texts, features["token_embeddings"])
        return embedding_ND, missing
