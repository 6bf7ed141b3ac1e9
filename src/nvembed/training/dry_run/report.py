"""What a dry run finds, and how the terminal shows it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nvembed.core.reporting import byte_size
from nvembed.training.checkpoint import Position
from nvembed.training.config import StageConfig, TrainConfig
from nvembed.training.model import ActivationBudget


@dataclass(frozen=True, slots=True)
class DataForecast:
    """A data set in a stage."""

    name: str
    kind: str
    queries: int
    share: float  # of the stage's slots, by the weights
    used: int  # slots that it fills in the steps of the stage
    negatives: float  # own ones drawn per query, mean
    without: float  # share of its queries that have none
    to_mine: bool  # they are mined first, and these are their stand-ins


@dataclass(frozen=True, slots=True)
class MiningForecast:
    """What the teacher of a set embeds, and the seconds of it, estimated from a sample."""

    dataset: str
    queries: int
    documents: int
    seconds: float


@dataclass(frozen=True, slots=True)
class BatchForecast:
    """The steps of a stage, from a sample of its batches: means, and the ``most`` of any step."""

    sampled: int
    texts: float  # different ones
    most_texts: int
    tokens: float
    most_tokens: int
    full: float  # share of the texts that reach the limit of tokens, and are cut or just fit
    duplicates: float  # share of the texts that are embedded once for several places
    negatives: float  # effective ones per query
    recomputed: float  # share of the tokens that are embedded twice


@dataclass(frozen=True, slots=True)
class StageForecast:
    """A stage, or what is left of it; evaluations are those on the way and at its end."""

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
class TrainingMemory:
    """Bytes of one process; ``elements`` and ``trained`` are numbers of parameters."""

    elements: int
    trained: int
    graph: ActivationBudget
    peak: int  # most that model, optimizer and steps took, beyond what the process held before
    free: int  # on the device before the model was loaded


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a run would do; ``stages`` are those that are left."""

    config: TrainConfig  # with settled precision
    position: Position
    resumed: Path | None  # the checkpoint it goes on from
    finished: bool
    replaces: bool  # an earlier run in the folder would be deleted
    device: str
    tasks: tuple[str, ...] = ()
    stages: tuple[StageForecast, ...] = ()
    memory: TrainingMemory | None = None

    @property
    def seconds(self) -> float:
        """Of steps and mining."""
        return sum(stage.seconds + stage.mining_seconds for stage in self.stages)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the run would do, and its owner may not want; a line each."""
        found = []
        for stage in self.stages:
            name, batches = stage.config.name, stage.batches
            idle = [
                f"{row.name} ({row.without:.0%})" for row in stage.data if row.used and row.without
            ]
            if idle and not stage.config.in_batch_negatives:
                found.append(
                    f"{name}: there are queries without negatives, which teach nothing without "
                    f"in-batch negatives: {', '.join(idle)}"
                )
            if self.memory is not None and batches.recomputed:
                whole = batches.most_tokens * self.memory.graph.bytes_per_token
                found.append(
                    f"{name}: {batches.recomputed:.0%} of the tokens are embedded twice; with "
                    f"memory_gb={math.ceil(whole / 1e8) / 10:.1f} none would be"
                )
        if self.memory is not None and self.memory.peak > self.memory.free:
            needed, free = self.memory.peak / 1e9, self.memory.free / 1e9
            found.append(
                f"about {needed:.1f} GB are needed and {free:.1f} GB are free: lower memory_gb or "
                "pack_tokens, or train adapters"
            )
        return tuple(found)


def print_dry_run(found: DryRun) -> None:
    """Print it to stdout."""
    console = Console(highlight=False)
    console.print(_heading(found))
    blocks: list[Table | Text] = [_data(stage) for stage in found.stages]
    if found.stages:
        blocks.append(_steps(found.stages))
    if notes := _notes(found):
        blocks.append(Text("\n".join(notes), style="dim"))
    for block in blocks:
        console.print()
        console.print(block)
    console.print()
    for line in found.warnings:
        console.print(Text(f"! {line}", style="yellow"))
    console.print(_verdict(found))


def _heading(found: DryRun) -> Text:
    config = found.config
    if found.finished:
        state = "finished"
    elif found.resumed is not None:
        state = f"goes on after step {found.position.step:,}"
    else:
        state = "replaces the run that is there" if found.replaces else "a new run"
    how = f"{state}; seed {config.seed}, {config.precision}, one process on {found.device}"
    return Text.assemble((config.output, "bold"), "  ", how)


def _data(stage: StageForecast) -> Table:
    table = _table((stage.config.name, "kind"), ("queries", "share", "used", "epochs", "negatives"))
    for row in stage.data:
        table.add_row(
            row.name,
            row.kind,
            f"{row.queries:,}",
            f"{row.share:.1%}",
            f"{row.used:,}",
            f"{row.used / row.queries:.2f}",
            f"{row.negatives:.1f}{' *' if row.to_mine else ''}",
        )
    if len(stage.data) > 1:
        queries, used = sum(row.queries for row in stage.data), sum(row.used for row in stage.data)
        table.add_section()
        name, epochs = f"{len(stage.data)} sets", f"{used / queries:.2f}"
        table.add_row(name, "", f"{queries:,}", "", f"{used:,}", epochs)
    return table


def _steps(stages: Sequence[StageForecast]) -> Table:
    """Show a column per stage, and one for all where there are several."""
    several = len(stages) > 1
    table = _table(("steps",), [*(s.config.name for s in stages), *(["all"] if several else [])])

    def row(name: str, cells: Sequence[str], total: str = "") -> None:
        table.add_row(name, *cells, *([total] if several else []))

    mining = sum(s.mining_seconds for s in stages)
    row("steps", [f"{s.steps:,}" for s in stages], f"{sum(s.steps for s in stages):,}")
    row("queries per step", [f"{s.config.batch_size:,}" for s in stages])
    row("negatives per query", [f"{s.batches.negatives:,.1f}" for s in stages])
    row("texts per step", [f"{s.batches.texts:,.0f}" for s in stages])
    row("  at most", [f"{s.batches.most_texts:,}" for s in stages])
    row("  given more than once", [f"{s.batches.duplicates:.1%}" for s in stages])
    row("  at the limit of tokens", [f"{s.batches.full:.1%}" for s in stages])
    row("tokens per step", [f"{s.batches.tokens:,.0f}" for s in stages])
    row("  at most", [f"{s.batches.most_tokens:,}" for s in stages])
    row("  embedded twice", [f"{s.batches.recomputed:.0%}" for s in stages])
    evaluations = [s.evaluations for s in stages]
    row("evaluations", [f"{count:,}" for count in evaluations], f"{sum(evaluations):,}")
    table.add_section()
    row("seconds per step", [_digits(s.seconds_per_step) for s in stages])
    row("tokens per second", [f"{s.batches.tokens / s.seconds_per_step:,.0f}" for s in stages])
    row("tokens", [_amount(s.tokens) for s in stages], _amount(sum(s.tokens for s in stages)))
    seconds = [s.seconds for s in stages]
    row("time of the steps", list(map(duration, seconds)), duration(sum(seconds)))
    if mining:
        shown = [duration(s.mining_seconds) if s.mining else "–" for s in stages]
        row("mining before", shown, duration(mining))
    return table


def _notes(found: DryRun) -> list[str]:
    notes = []
    for stage in (stage for stage in found.stages if stage.mining):
        queries = sum(each.queries for each in stage.mining)
        documents = sum(each.documents for each in stage.mining)
        names = ", ".join(each.dataset for each in stage.mining)
        notes.append(
            f"* mined before {stage.config.name} for {queries:,} queries among {documents:,} "
            f"documents of {names}; random documents stand in for them here."
        )
    if found.stages:
        sampled = ", ".join(
            f"{s.batches.sampled} of {s.steps:,} batches of {s.config.name}" for s in found.stages
        )
        notes.append(f"Counted in {sampled}. Time and memory are those of a few steps.")
    if found.tasks:
        notes.append(f"Evaluated on {', '.join(found.tasks)}; the time of it is not known.")
    if (memory := found.memory) is not None:
        share = memory.trained / memory.elements
        notes.append(
            f"{_amount(memory.trained)} of {_amount(memory.elements)} parameters are trained "
            f"({share:.1%}). Graphs take {memory.graph.bytes_per_token / 1e3:,.0f} kB per token: "
            f"the budget of {memory.graph.budget_bytes / 1e9:,.1f} GB holds "
            f"{memory.graph.tokens:,} tokens."
        )
    return notes


def _verdict(found: DryRun) -> Text:
    if found.finished:
        return Text("✓ the run is finished: nothing to do (--fresh starts over)", "bold green")
    assert found.memory is not None
    without = ", evaluation not counted" if any(s.evaluations for s in found.stages) else ""
    peak, free = found.memory.peak, found.memory.free
    line = f"about {duration(found.seconds)}{without}; {byte_size(peak)} of {byte_size(free)} free"
    return Text(f"✓ {line}", "bold green") if peak <= free else Text(f"✗ {line}", "bold red")


def _table(left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    sides: list[tuple[Sequence[str], Literal["left", "right"]]] = [(left, "left"), (right, "right")]
    for names, side in sides:
        for name in names:
            table.add_column(name, justify=side, no_wrap=True)
    return table


def _digits(value: float) -> str:
    """Show three digits, none of them behind the point from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _amount(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{_digits(value / size)} {unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Show a time in the two units that matter."""
    if seconds < 90:
        return f"{_digits(seconds)} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"
