"""A dry run on the terminal: data, steps and time by stage, memory, and the verdict last."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nvembed.training.dry_run.findings import DryRun, StageForecast
from nvembed.training.dry_run.memory import TrainingMemory

_Cell = Callable[[StageForecast], str]


def print_dry_run(found: DryRun) -> None:
    """Print it to stdout."""
    console = Console(highlight=False)
    console.print(_heading(found))
    for stage in found.stages:
        console.print()
        console.print(_data(stage))
    if found.stages:
        console.print()
        console.print(_steps(found.stages, found.config.pack_tokens))
    if found.memory is not None:
        console.print()
        console.print(_memory(found.memory))
    notes = _notes(found)
    if notes:
        console.print()
        console.print(Text("\n".join(notes), style="dim"))
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
    table = _table()
    table.add_column(stage.config.name, no_wrap=True)
    table.add_column("kind", no_wrap=True)
    for name in ("queries", "share", "used", "epochs", "negatives"):
        table.add_column(name, justify="right", no_wrap=True)
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
        table.add_section()
        queries, used = sum(row.queries for row in stage.data), sum(row.used for row in stage.data)
        table.add_row(
            f"{len(stage.data)} sets", "", f"{queries:,}", "", f"{used:,}", f"{used / queries:.2f}"
        )
    return table


def _steps(stages: Sequence[StageForecast], pack_tokens: int) -> Table:
    """A column per stage, and one for all where there are several."""
    table = _table()
    table.add_column("steps", no_wrap=True)
    for stage in stages:
        table.add_column(stage.config.name, justify="right", no_wrap=True)
    several = len(stages) > 1
    if several:
        table.add_column("all", justify="right", no_wrap=True)

    def row(name: str, cell: _Cell, whole: str = "") -> None:
        table.add_row(name, *map(cell, stages), *([whole] if several else []))

    row("steps", lambda s: f"{s.steps:,}", f"{sum(s.steps for s in stages):,}")
    row("queries per step", lambda s: f"{s.config.batch_size:,}")
    row("negatives per query", lambda s: f"{s.batches.negatives:,.1f}")
    row("texts per step", lambda s: f"{s.batches.texts:,.0f}")
    row("  at most", lambda s: f"{s.batches.most_texts:,}")
    row("  given more than once", lambda s: f"{s.batches.duplicates:.1%}")
    row("  at the limit of tokens", lambda s: f"{s.batches.full:.1%}")
    row("tokens per step", lambda s: f"{s.batches.tokens:,.0f}")
    row("  at most", lambda s: f"{s.batches.most_tokens:,}")
    row("  embedded twice", lambda s: f"{s.batches.recomputed:.0%}" if _coupled(s) else "–")
    row("packs per step", lambda s: f"{s.batches.packs:.1f}")
    row(f"  full, of {pack_tokens:,} tokens", lambda s: f"{s.batches.fill:.0%}")
    row("groups per step", lambda s: "–" if _coupled(s) else f"{s.batches.passes:.1f}")
    row("evaluations", lambda s: f"{s.evaluations:,}", f"{sum(s.evaluations for s in stages):,}")
    table.add_section()
    row("seconds per step", lambda s: _digits(s.seconds_per_step))
    row("tokens per second", lambda s: f"{s.batches.tokens / s.seconds_per_step:,.0f}")
    row("tokens", lambda s: _count(s.tokens), _count(sum(s.tokens for s in stages)))
    row(
        "time of the steps", lambda s: duration(s.seconds), duration(sum(s.seconds for s in stages))
    )
    if any(stage.mining for stage in stages):
        total = sum(stage.mining_seconds for stage in stages)
        row(
            "mining before",
            lambda s: duration(s.mining_seconds) if s.mining else "–",
            duration(total),
        )
    return table


def _coupled(stage: StageForecast) -> bool:
    return stage.config.in_batch_negatives


def _memory(memory: TrainingMemory) -> Table:
    table = _table()
    table.add_column("memory at most", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", ratio=1)
    graph = memory.graph
    share = memory.trained / memory.elements
    rows = [
        ("weights", memory.weights, f"{_count(memory.elements)} parameters"),
        ("gradients", memory.gradients, f"{_count(memory.trained)} are trained: {share:.1%}"),
        ("optimizer", memory.optimizer, ""),
        (
            "graphs",
            memory.graphs,
            f"{graph.bytes_per_token / 1e3:,.0f} kB per token; the budget of "
            f"{_size(graph.budget_bytes)} holds {graph.tokens:,} tokens",
        ),
        ("one pack", memory.pack, "while it is computed"),
        ("loss", memory.loss, ""),
    ]
    for name, size, remark in rows:
        table.add_row(name, _size(size), Text(remark, style="dim"))
    table.add_section()
    taken = "taken by the steps of this dry run, which had no optimizer"
    table.add_row("sum", _size(memory.counted), "")
    table.add_row("measured", _size(memory.measured), Text(taken, style="dim"))
    return table


def _notes(found: DryRun) -> list[str]:
    notes = []
    for stage in found.stages:
        if stage.mining:
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
    fits = found.memory.peak <= found.memory.free
    size = f"at most {_size(found.memory.peak)} of {_size(found.memory.free)} free"
    line = f"about {duration(found.seconds)}{without}; {size}"
    return Text(f"✓ {line}", "bold green") if fits else Text(f"✗ {line}", "bold red")


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))


def _digits(value: float) -> str:
    """Three digits, none of them behind the point from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _count(value: float) -> str:
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
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} days {hours % 24} h"
