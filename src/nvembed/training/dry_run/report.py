"""A dry run on the terminal: data, steps and time by stage, memory, and the verdict last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nvembed.training.dry_run.findings import DryRun, StageForecast, TrainingMemory


def print_dry_run(found: DryRun) -> None:
    """Print it to stdout."""
    console = Console(highlight=False)
    console.print(_heading(found))
    blocks: list[Table | Text] = [_data(stage) for stage in found.stages]
    if found.stages:
        blocks.append(_steps(found.stages, found.config.pack_tokens))
    if found.memory is not None:
        blocks.append(_memory(found.memory))
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
    numbers = ("queries", "share", "used", "epochs", "negatives")
    table = _table(stage.config.name, "kind", right=numbers)
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


def _steps(stages: Sequence[StageForecast], pack_tokens: int) -> Table:
    """A column per stage, and one for all where there are several."""
    several = ["all"] if len(stages) > 1 else []
    table = _table("steps", right=[*(stage.config.name for stage in stages), *several])

    def row(
        name: str,
        cell: Callable[[StageForecast], str],
        total: Callable[[StageForecast], float] | None = None,
        shown: Callable[[float], str] = lambda value: f"{value:,}",
    ) -> None:
        whole = "" if total is None else shown(sum(map(total, stages)))
        table.add_row(name, *map(cell, stages), *([whole] if several else []))

    def coupled(stage: StageForecast) -> bool:
        return stage.config.in_batch_negatives

    row("steps", lambda s: f"{s.steps:,}", lambda s: s.steps)
    row("queries per step", lambda s: f"{s.config.batch_size:,}")
    row("negatives per query", lambda s: f"{s.batches.negatives:,.1f}")
    row("texts per step", lambda s: f"{s.batches.texts:,.0f}")
    row("  at most", lambda s: f"{s.batches.most_texts:,}")
    row("  given more than once", lambda s: f"{s.batches.duplicates:.1%}")
    row("  at the limit of tokens", lambda s: f"{s.batches.full:.1%}")
    row("tokens per step", lambda s: f"{s.batches.tokens:,.0f}")
    row("  at most", lambda s: f"{s.batches.most_tokens:,}")
    row("  embedded twice", lambda s: f"{s.batches.recomputed:.0%}" if coupled(s) else "–")
    row("packs per step", lambda s: f"{s.batches.packs:.1f}")
    row(f"  full, of {pack_tokens:,} tokens", lambda s: f"{s.batches.fill:.0%}")
    row("groups per step", lambda s: "–" if coupled(s) else f"{s.batches.passes:.1f}")
    row("evaluations", lambda s: f"{s.evaluations:,}", lambda s: s.evaluations)
    table.add_section()
    row("seconds per step", lambda s: _digits(s.seconds_per_step))
    row("tokens per second", lambda s: f"{s.batches.tokens / s.seconds_per_step:,.0f}")
    row("tokens", lambda s: _amount(s.tokens), lambda s: s.tokens, _amount)
    row("time of the steps", lambda s: duration(s.seconds), lambda s: s.seconds, duration)
    if any(stage.mining for stage in stages):

        def mining(stage: StageForecast) -> str:
            return duration(stage.mining_seconds) if stage.mining else "–"

        row("mining before", mining, lambda s: s.mining_seconds, duration)
    return table


def _memory(memory: TrainingMemory) -> Table:
    table = _table("memory at most", right=[""])
    table.add_column("", ratio=1)
    graph, share = memory.graph, memory.trained / memory.elements
    budget = f"the budget of {_size(graph.budget_bytes)} holds {graph.tokens:,} tokens"
    for name, size, remark in (
        ("weights", memory.weights, f"{_amount(memory.elements)} parameters"),
        ("gradients", memory.gradients, f"{_amount(memory.trained)} are trained: {share:.1%}"),
        ("optimizer", memory.optimizer, ""),
        ("graphs", memory.graphs, f"{graph.bytes_per_token / 1e3:,.0f} kB per token; {budget}"),
        ("one pack", memory.pack, "while it is computed"),
        ("loss", memory.loss, ""),
    ):
        table.add_row(name, _size(size), Text(remark, style="dim"))
    table.add_section()
    taken = "taken by the steps of this dry run, which had no optimizer"
    table.add_row("sum", _size(memory.counted), "")
    table.add_row("measured", _size(memory.measured), Text(taken, style="dim"))
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
        notes.append(f"Counted in {sampled}. Time is that of forward and backward, not of updates.")
    if found.tasks:
        notes.append(f"Evaluated on {', '.join(found.tasks)}; the time of it is not known.")
    if found.memory is not None:
        notes.append("Python and its libraries need memory besides.")
    return notes


def _verdict(found: DryRun) -> Text:
    if found.finished:
        return Text("✓ the run is finished: nothing to do (--fresh starts over)", "bold green")
    assert found.memory is not None
    without = ", evaluation not counted" if any(s.evaluations for s in found.stages) else ""
    size = f"at most {_size(found.memory.peak)} of {_size(found.memory.free)} free"
    line = f"about {duration(found.seconds)}{without}; {size}"
    fits = found.memory.peak <= found.memory.free
    return Text(f"✓ {line}", "bold green") if fits else Text(f"✗ {line}", "bold red")


def _table(*left: str, right: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    sides: list[tuple[Sequence[str], Literal["left", "right"]]] = [(left, "left"), (right, "right")]
    for names, side in sides:
        for name in names:
            table.add_column(name, justify=side, no_wrap=True)
    return table


def _digits(value: float) -> str:
    """Three digits, none of them behind the point from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _amount(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{_digits(value / size)} {unit}"
    return f"{value:,.0f}"


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def duration(seconds: float) -> str:
    """In the two units that matter."""
    if seconds < 90:
        return f"{_digits(seconds)} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"
