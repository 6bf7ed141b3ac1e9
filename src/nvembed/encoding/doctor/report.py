"""A diagnosis: its parts as plain data, without torch, and how it is printed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

Status = Literal["ok", "warning", "problem"]
Role = Literal["BOS", "instruction", "text", "EOS", "special"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One checked property; ``problem``: vectors are wrong or not what NV-Embed means."""

    name: str
    status: Status
    message: str
    advice: str | None = None  # one line on what to do


@dataclass(frozen=True, slots=True)
class SampleToken:
    """One token of a sample text, and whether it is pooled (``None``: cannot be told)."""

    text: str
    role: Role
    pooled: bool | None


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample text as the model sees it."""

    side: Literal["query", "document"]
    tokens: tuple[SampleToken, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the weights of a module are, and in which dtype."""

    module: str
    device: str
    dtype: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Memory:
    """The forecast of encoding a batch, in bytes."""

    dtype: str
    tokens: int
    weights: int
    activations: int
    total: int


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that ``nvembed doctor`` has to say about a model."""

    model: str
    description: str
    findings: tuple[Finding, ...]
    samples: tuple[Sample, ...]
    placement: tuple[Placement, ...]
    memory: tuple[Memory, ...]
    memory_formula: str

    @property
    def healthy(self) -> bool:
        """No finding is a problem; warnings may be there."""
        return all(finding.status != "problem" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Plain data, with ``healthy`` in it."""
        return {"healthy": self.healthy, **asdict(self)}


_MARKS: dict[Status, tuple[str, str]] = {
    "ok": ("✓", "green"),
    "warning": ("!", "yellow"),
    "problem": ("✗", "bold red"),
}


def print_diagnosis(diagnosis: Diagnosis, *, as_json: bool = False) -> None:
    """Print it to stdout: tables with the verdict last, or one JSON object."""
    if as_json:
        print(json.dumps(diagnosis.as_json(), ensure_ascii=False, indent=2))
        return
    console = Console(highlight=False)
    console.print(Text.assemble((diagnosis.model, "bold"), "  ", diagnosis.description))
    console.print()
    console.print(_findings(diagnosis))
    samples = [sample for sample in diagnosis.samples if sample.tokens]
    if samples:
        console.print()
        console.print(_samples(samples))
    if diagnosis.memory:
        console.print()
        console.print(_memory(diagnosis))
        console.print(
            Text(
                f"{diagnosis.memory_formula}. T: tokens at once (encode packs texts up to a "
                "budget), D: hidden width, Q and K: of queries and keys over all heads, I: of the "
                "MLP. Python and its libraries come on top.",
                style="dim",
            )
        )
    console.print()
    console.print(_verdict(diagnosis))


def _findings(diagnosis: Diagnosis) -> Table:
    table = _table()
    table.add_column(width=1)
    table.add_column("property", no_wrap=True)
    table.add_column("found", ratio=1)
    for finding in diagnosis.findings:
        mark, style = _MARKS[finding.status]
        found = Text(finding.message)
        if finding.advice and finding.status != "ok":
            found.append(f"\n→ {finding.advice}", style=style)
        table.add_row(Text(mark, style=style), finding.name, found)
    return table


def _samples(samples: list[Sample]) -> Table:
    """One row per run of tokens with the same role and mark."""
    table = _table()
    table.add_column("sample", no_wrap=True)
    table.add_column("part", no_wrap=True)
    table.add_column("tokens", ratio=1)
    table.add_column("pooled", justify="center")
    for sample in samples:
        side = f"{sample.side} ({len(sample.tokens)} tokens)"
        for (role, pooled), run in groupby(sample.tokens, key=lambda t: (t.role, t.pooled)):
            tokens = Text(" ").join(Text(token.text) for token in run)
            tokens.style = "green" if pooled else "dim"
            mark = {True: Text("✓", "green"), False: Text("–", "dim"), None: Text("?")}[pooled]
            table.add_row(side, role, tokens, mark)
            side = ""
    return table


def _memory(diagnosis: Diagnosis) -> Table:
    table = _table()
    table.add_column("memory to encode", no_wrap=True)
    for heading in ("tokens at once", "weights", "activations", "total"):
        table.add_column(heading, justify="right")
    for row in diagnosis.memory:
        sizes = (row.weights, row.activations, row.total)
        table.add_row(f"in {row.dtype}", f"{row.tokens:,}", *map(_size, sizes))
    for part in diagnosis.placement:
        name = f"now: {part.module}, {part.dtype} on {part.device}"
        table.add_row(Text(name, style="dim"), "", Text(_size(part.bytes), style="dim"), "", "")
    return table


def _verdict(diagnosis: Diagnosis) -> Text:
    problems = sum(finding.status == "problem" for finding in diagnosis.findings)
    warnings = sum(finding.status == "warning" for finding in diagnosis.findings)
    counted = f"{warnings} warning{'' if warnings == 1 else 's'}"
    if problems:
        return Text(f"✗ {problems} problem{'' if problems == 1 else 's'}, {counted}", "bold red")
    return Text(f"✓ no problem, {counted}" if warnings else "✓ healthy", "bold green")


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True, show_edge=False)


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
