"""A diagnosis: its parts as plain data, without torch, and how it is printed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from nvembed.model.memory import MemoryForecast

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
class Diagnosis:
    """Everything that ``nvembed doctor`` has to say about a model."""

    model: str
    description: str
    findings: tuple[Finding, ...]
    samples: tuple[Sample, ...]
    placement: tuple[Placement, ...]
    memory: tuple[MemoryForecast, ...]
    memory_formula: str

    @property
    def healthy(self) -> bool:
        """No finding is a problem; warnings may be there."""
        return all(finding.status != "problem" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Plain data, with ``healthy`` in it."""
        memory = [{**asdict(each), "total": each.total} for each in self.memory]
        return {"healthy": self.healthy, **asdict(self), "memory": memory}


_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "bold red")}
_POOLED = {True: Text("✓", "green"), False: Text("–", "dim"), None: Text("?")}
_LETTERS = (
    ". T: tokens at once (encode packs texts up to a budget), D: hidden width, Q and K: of queries "
    "and keys over all heads, I: of the MLP. Python and its libraries come on top."
)
_table = partial(Table, box=box.SIMPLE_HEAD, pad_edge=False, expand=True, show_edge=False)


def print_diagnosis(diagnosis: Diagnosis, *, as_json: bool = False) -> None:
    """Print it to stdout: tables with the verdict last, or one JSON object."""
    if as_json:
        print(json.dumps(diagnosis.as_json(), ensure_ascii=False, indent=2))
        return
    title = Text.assemble((diagnosis.model, "bold"), "  ", diagnosis.description)
    parts: list[Text | Table | str] = [title, "", _findings(diagnosis), ""]
    if samples := [sample for sample in diagnosis.samples if sample.tokens]:
        parts += [_samples(samples), ""]
    if diagnosis.memory:
        formula = Text(diagnosis.memory_formula + _LETTERS, style="dim")
        parts += [_memory(diagnosis), formula, ""]
    console = Console(highlight=False)
    for part in [*parts, _verdict(diagnosis)]:
        console.print(part)


def _findings(diagnosis: Diagnosis) -> Table:
    table = _table(Column(width=1), Column("property", no_wrap=True), Column("found", ratio=1))
    for finding in diagnosis.findings:
        mark, style = _MARKS[finding.status]
        found = Text(finding.message)
        if finding.advice and finding.status != "ok":
            found.append(f"\n→ {finding.advice}", style=style)
        table.add_row(Text(mark, style=style), finding.name, found)
    return table


def _samples(samples: list[Sample]) -> Table:
    """One row per run of tokens with the same role and mark."""
    table = _table(
        Column("sample", no_wrap=True),
        Column("part", no_wrap=True),
        Column("tokens", ratio=1),
        Column("pooled", justify="center"),
    )
    for sample in samples:
        side = f"{sample.side} ({len(sample.tokens)} tokens)"
        for (role, pooled), run in groupby(sample.tokens, key=lambda t: (t.role, t.pooled)):
            tokens = Text(" ").join(Text(token.text) for token in run)
            tokens.style = "green" if pooled else "dim"
            table.add_row(side, role, tokens, _POOLED[pooled])
            side = ""
    return table


def _memory(diagnosis: Diagnosis) -> Table:
    headings = ("tokens at once", "weights", "activations", "total")
    numbers = [Column(heading, justify="right") for heading in headings]
    table = _table(Column("memory to encode", no_wrap=True), *numbers)
    for row in diagnosis.memory:
        sizes = (row.weights, row.activations, row.total)
        table.add_row(f"in {row.dtype}", f"{row.tokens:,}", *map(_size, sizes))
    for part in diagnosis.placement:
        name = f"now: {part.module}, {part.dtype} on {part.device}"
        table.add_row(Text(name, style="dim"), "", Text(_size(part.bytes), style="dim"), "", "")
    return table


def _verdict(diagnosis: Diagnosis) -> Text:
    found = [finding.status for finding in diagnosis.findings]
    problems, warnings = (
        f"{found.count(status)} {status}{'' if found.count(status) == 1 else 's'}"
        for status in ("problem", "warning")
    )
    if not diagnosis.healthy:
        return Text(f"✗ {problems}, {warnings}", "bold red")
    return Text(f"✓ no problem, {warnings}" if "warning" in found else "✓ healthy", "bold green")


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
