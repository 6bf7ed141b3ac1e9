"""What a dry run finds: plain numbers, printed by ``report.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nvembed.training.checkpoint import Position
from nvembed.training.config import StageConfig, TrainConfig
from nvembed.training.dry_run.memory import TrainingMemory


@dataclass(frozen=True, slots=True)
class DataForecast:
    """A data set in a stage.

    Attributes:
        name: of the set.
        kind: of its records.
        queries: that it gives.
        share: of the stage's slots, by the weights.
        used: slots that it fills in the steps of the stage.
        negatives: own negatives drawn per query, mean.
        without: share of its queries that have none.
        to_mine: whether they are mined first, and these are their stand-ins.
    """

    name: str
    kind: str
    queries: int
    share: float
    used: int
    negatives: float
    without: float
    to_mine: bool


@dataclass(frozen=True, slots=True)
class MiningForecast:
    """What the teacher of a set embeds: numbers of texts, and seconds estimated from a sample."""

    dataset: str
    queries: int
    documents: int
    seconds: float


@dataclass(frozen=True, slots=True)
class BatchForecast:
    """The batches of a stage, from a sample of them; means unless said otherwise.

    Attributes:
        sampled: batches looked at.
        texts: different ones of a step.
        most_texts: of any step.
        tokens: of them.
        most_tokens: of any step.
        full: share of the texts that reach the limit of tokens, and are cut or just fit.
        duplicates: share of the texts that are embedded once for several places.
        negatives: effective negatives per query.
        packs: of a step.
        fill: tokens of a pack as a share of ``pack_tokens``.
        passes: groups of queries that a step goes in.
        recomputed: share of the tokens that are embedded twice.
        most_kept: tokens whose graphs are held at once, in any step.
        most_pack: tokens of the largest pack.
        most_scores: most queries times documents.
    """

    sampled: int
    texts: float
    most_texts: int
    tokens: float
    most_tokens: int
    full: float
    duplicates: float
    negatives: float
    packs: float
    fill: float
    passes: float
    recomputed: float
    most_kept: int
    most_pack: int
    most_scores: int


@dataclass(frozen=True, slots=True)
class StageForecast:
    """A stage, or what is left of it.

    Attributes:
        config: its part of the recipe.
        steps: that are left.
        data: its sets.
        mining: sets that are mined before it.
        batches: its steps.
        evaluations: on the way and at its end.
        seconds_per_step: forward and backward.
    """

    config: StageConfig
    steps: int
    data: tuple[DataForecast, ...]
    mining: tuple[MiningForecast, ...]
    batches: BatchForecast
    evaluations: int
    seconds_per_step: float

    @property
    def mining_seconds(self) -> float:
        """Of all sets."""
        return sum(each.seconds for each in self.mining)

    @property
    def seconds(self) -> float:
        """Of all steps, without mining and evaluation."""
        return self.seconds_per_step * self.steps

    @property
    def tokens(self) -> float:
        """Of all steps."""
        return self.batches.tokens * self.steps


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a run would do.

    Attributes:
        config: with settled precision.
        position: from where it goes on.
        resumed: the checkpoint it goes on from; ``None`` for a new run.
        finished: the run is over, nothing is left to do.
        replaces: an earlier run in the folder would be deleted.
        device: in words.
        tasks: names of the evaluation tasks.
        stages: those that are left.
        memory: of the whole run; ``None`` where it is finished.
    """

    config: TrainConfig
    position: Position
    resumed: Path | None
    finished: bool
    replaces: bool
    device: str
    tasks: tuple[str, ...] = ()
    stages: tuple[StageForecast, ...] = ()
    memory: TrainingMemory | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the run would do, and its owner may not want; a line each."""
        found = [line for stage in self.stages for line in _stage_warnings(stage, self.memory)]
        if self.memory is not None and self.memory.peak > self.memory.free:
            needed, free = self.memory.peak / 1e9, self.memory.free / 1e9
            found.append(
                f"about {needed:.1f} GB are needed and {free:.1f} GB are free: lower memory_gb or "
                "pack_tokens, or train adapters"
            )
        return tuple(found)

    @property
    def seconds(self) -> float:
        """Of steps and mining."""
        return sum(stage.seconds + stage.mining_seconds for stage in self.stages)


def _stage_warnings(stage: StageForecast, memory: TrainingMemory | None) -> list[str]:
    name, batches = stage.config.name, stage.batches
    found = []
    for row in stage.data:
        if row.used and row.without and not stage.config.in_batch_negatives:
            found.append(
                f"{name}: {row.without:.0%} of the queries of {row.name} have no negatives, and "
                "teach nothing without in-batch negatives"
            )
    if memory is not None and batches.recomputed:
        whole = batches.most_tokens * memory.graph.bytes_per_token / 1e9
        found.append(
            f"{name}: {batches.recomputed:.0%} of the tokens are embedded twice; with "
            f"memory_gb={whole:.1f} none would be"
        )
    return found
