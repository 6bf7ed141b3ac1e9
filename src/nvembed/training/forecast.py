"""What a dry run finds, forecasts of data, steps and memory; and how a terminal shows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nvembed.core.reporting import byte_size
from nvembed.model.settings import shown_rate
from nvembed.training.checkpoint import Position
from nvembed.training.config import StageConfig, TrainConfig
from nvembed.training.model import ActivationBudget
from nvembed.training.stage_mining import PlannedMining
from nvembed.training.stages import peak_rate
from nvembed.training.teacher import TeacherStandIn


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
    mining: tuple[PlannedMining, ...]
    mining_seconds: float  # of all sets
    teacher: TeacherStandIn | None
    batches: BatchForecast
    evaluations: int
    seconds_per_step: float

    @property
    def seconds(self) -> float:
        """Of all steps, without what comes before them and evaluation."""
        return self.seconds_per_step * self.steps

    @property
    def teacher_seconds(self) -> float:
        """Of embedding what the teacher has not embedded yet."""
        return self.teacher.seconds if self.teacher else 0.0

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

    config: TrainConfig  # with settled precision and learning rates
    position: Position
    resumed: Path | None  # the checkpoint it goes on from
    finished: bool
    replaces: bool  # an earlier run in the folder would be deleted
    device: str
    tasks: tuple[str, ...] = ()
    stages: tuple[StageForecast, ...] = ()
    memory: TrainingMemory | None = None
    rates: str | None = None  # what learning rates the recipe left open, and what they become

    @property
    def seconds(self) -> float:
        """Of steps and what comes before them."""
        before = sum(stage.mining_seconds + stage.teacher_seconds for stage in self.stages)
        return before + sum(stage.seconds for stage in self.stages)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the run would do, and its owner may not want; a line each."""
        found = []
        for stage in self.stages:
            name, batches = stage.config.name, stage.batches
            idle = [
                f"{row.name} ({row.without:.0%})" for row in stage.data if row.used and row.without
            ]
            alone = stage.config.contrastive is not None and not stage.config.in_batch_negatives
            if idle and alone:
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


# --- On the terminal ------------------------------------------------------------------------------


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
    whole, tenths, share = "{:,.0f}".format, "{:,.1f}".format, "{:.1%}".format
    rows: list[tuple[str, Callable[[float], str], Callable[[StageForecast], float], bool]] = [
        ("steps", whole, lambda s: s.steps, True),
        ("learning rate", shown_rate, lambda s: peak_rate(s.config), False),
        ("queries per step", whole, lambda s: s.config.batch_size, False),
        ("negatives per query", tenths, lambda s: s.batches.negatives, False),
        ("texts per step", whole, lambda s: s.batches.texts, False),
        ("  at most", whole, lambda s: s.batches.most_texts, False),
        ("  given more than once", share, lambda s: s.batches.duplicates, False),
        ("  at the limit of tokens", share, lambda s: s.batches.full, False),
        ("tokens per step", whole, lambda s: s.batches.tokens, False),
        ("  at most", whole, lambda s: s.batches.most_tokens, False),
        ("  embedded twice", "{:.0%}".format, lambda s: s.batches.recomputed, False),
        ("evaluations", whole, lambda s: s.evaluations, True),
        ("seconds per step", _digits, lambda s: s.seconds_per_step, False),
        ("tokens per second", whole, lambda s: s.batches.tokens / s.seconds_per_step, False),
        ("tokens", _amount, lambda s: s.tokens, True),
        ("time of the steps", duration, lambda s: s.seconds, True),
    ]

    def some(seconds: float) -> str:
        return duration(seconds) if seconds else "–"

    if any(stage.mining for stage in stages):
        rows.append(("mining before", some, lambda s: s.mining_seconds, True))
    if any(stage.teacher for stage in stages):
        rows.append(
            (
                "teacher before",
                lambda t: duration(t) if t else "–",
                lambda s: s.teacher_seconds,
                True,
            )
        )
    for name, shown, value, has_sum in rows:
        values = [value(stage) for stage in stages]
        total = [shown(sum(values)) if has_sum else ""] if several else []
        table.add_row(name, *map(shown, values), *total, end_section=name == "evaluations")
    return table


def _notes(found: DryRun) -> list[str]:
    notes = [f"{found.rates[0].upper()}{found.rates[1:]}."] if found.rates else []
    for stage in (stage for stage in found.stages if stage.mining):
        queries = sum(len(each.queries) for each in stage.mining)
        documents = sum(len(each.documents) for each in stage.mining)
        names = ", ".join(each.dataset for each in stage.mining)
        notes.append(
            f"* mined before {stage.config.name} for {queries:,} queries among {documents:,} "
            f"documents of {names}; random documents stand in for them here."
        )
    for stage in found.stages:
        if stage.config.losses != {"contrastive": 1.0}:
            weights = (f"{weight:g} {name}" for name, weight in stage.config.losses.items())
            notes.append(f"The loss of {stage.config.name}: {' + '.join(weights)}.")
        if stage.teacher is not None:
            notes.append(
                f"{stage.teacher.missing:,} texts are embedded by {stage.teacher.settings.name} "
                f"({stage.teacher.dimension} wide) before {stage.config.name}; random vectors "
                "stand in for its own here."
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
