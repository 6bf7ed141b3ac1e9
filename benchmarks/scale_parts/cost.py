"""A cost model: what parts took at some sizes, fitted and carried to others. Pure functions.

Every quantity has one of three forms in the number n of documents, with two constants each: a·n^b,
a + b·n, a + b·n·log2(n). Sums have a, b ≥ 0. Errors are relative, so a small size counts as much as
a large one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Form = Literal["power", "line", "line log"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Fit:
    """A quantity as a function of the number of documents."""

    form: Form
    a: float
    b: float

    def at(self, n: float) -> float:
        """The value for n documents."""
        return self.a * n**self.b if self.form == "power" else self.a + self.b * _term(self.form, n)

    def __str__(self) -> str:
        if self.form == "power":
            return f"{self.a:.3g}·n^{self.b:.2f}"
        return f"{self.a:.3g} + {self.b:.3g}·n{'·log2(n)' if self.form == 'line log' else ''}"


def _term(form: Form, n: float) -> float:
    return n * math.log2(n) if form == "line log" else n


def fit(form: Form, sizes: Sequence[float], values: Sequence[float]) -> Fit:
    """Fit by least squares of relative errors (of a power: of logarithms); two sizes at least."""
    if len(set(sizes)) < 2:
        raise ValueError("a fit needs two sizes")
    if form == "power":
        logs = np.log(np.maximum(np.asarray(values, dtype=np.float64), 1e-12))
        b, log_a = np.polyfit(np.log(sizes), logs, 1)
        return Fit(form, float(np.exp(log_a)), float(b))
    y = np.asarray(values, dtype=np.float64)
    weight = 1.0 / np.maximum(np.abs(y), 1e-12)
    columns = np.stack([np.ones(len(y)), [_term(form, n) for n in sizes]], axis=1)
    weighted, wanted = columns * weight[:, None], y * weight
    candidates = [np.linalg.lstsq(weighted, wanted, rcond=None)[0]]
    for only in (0, 1):  # on the border, where the best is beyond it
        column = weighted[:, only]
        best = np.zeros(2)
        best[only] = max(float(column @ wanted / (column @ column)), 0.0)
        candidates.append(best)
    allowed = [each for each in candidates if (each >= 0).all()]
    a, b = min(allowed, key=lambda each: float(((weighted @ each - wanted) ** 2).sum()))
    return Fit(form, float(a), float(b))


def largest(fitted: Fit, limit: float, most: float = 1e15) -> float:
    """How many documents there may be until a quantity is above a limit; infinite beyond most."""
    if fitted.at(most) <= limit:
        return math.inf
    low, high = 0.0, math.log(most)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if fitted.at(math.exp(middle)) <= limit else (low, middle)
    return math.exp(low)


# --- What is fitted -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantity:
    """A number of the record of a part, and its form."""

    part: str
    key: str
    form: Form
    shown: str
    limit: float | None = None  # of one machine; None is no limit of its own
    of_machine: str | None = None  # or what of the machine limits it

    @property
    def name(self) -> tuple[str, str]:
        return self.part, self.key


DAY = 86_400.0
QUANTITIES = (
    Quantity("make", "bytes", "line", "documents, bytes"),
    Quantity("encode", "seconds", "line", "encode, one process", 7 * DAY),
    Quantity("encode", "bytes", "line", "vectors, bytes", None, "disk"),
    Quantity("encode", "peak_anonymous", "line", "encode, memory", None, "memory"),
    Quantity("index", "write_seconds", "power", "index: write", DAY),
    Quantity("index", "vector_index_seconds", "line log", "index of vectors", DAY),
    Quantity("index", "bytes", "line", "database, bytes", None, "disk"),
    Quantity("index", "peak_anonymous", "line", "index, memory", None, "memory"),
    Quantity("search", "exact_p50_ms", "line", "exact search, p50", 1000.0),
    Quantity("search", "approximate_p50_ms", "power", "approximate search, p50", 100.0),
    Quantity("search", "peak_anonymous", "line", "search, memory", None, "memory"),
    Quantity("mine", "seconds", "line", "mining", DAY),
    Quantity("mine", "peak_anonymous", "line", "mining, memory", None, "memory"),
)


def measured(rows: Iterable[Row]) -> dict[tuple[str, str], dict[int, float]]:
    """The numbers of records by quantity and size; of several the last."""
    found: dict[tuple[str, str], dict[int, float]] = {each.name: {} for each in QUANTITIES}
    for row in rows:
        for each in QUANTITIES:
            if row["part"] == each.part and each.key in row:
                found[each.name][int(row["documents"])] = float(row[each.key])
    return found


def fits(rows: Iterable[Row], below: float = math.inf) -> dict[tuple[str, str], Fit]:
    """Fit every quantity that was measured at two sizes or more below a size."""
    made = {}
    known = measured(rows)
    for each in QUANTITIES:
        values = {n: value for n, value in sorted(known[each.name].items()) if n < below}
        if len(values) > 1:
            made[each.name] = fit(each.form, list(values), list(values.values()))
    return made


def predictions(rows: Sequence[Row], target: int) -> list[dict[str, Any]]:
    """What smaller sizes say of a size, beside what was measured there and the relative error."""
    known, found = measured(rows), []
    for each in QUANTITIES:
        if (fitted := fits(rows, below=target).get(each.name)) is None:
            continue
        value, real = fitted.at(target), known[each.name].get(target)
        error = None if real is None else value / real - 1.0
        row = {"quantity": each.shown, "form": str(fitted), "predicted": value}
        found.append(row | {"measured": real, "error": error})
    return found


# --- Tables ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hardware:
    """What encodes, and the machine that holds the database."""

    devices: int = 1
    device_tokens: float | None = None  # tokens/s of a device; None is what was measured here
    device: str = "this machine"
    memory_gb: float = 24.0
    disk_gb: float = 500.0


SIZES = (10**4, 10**5, 10**6, 10**8, 10**9)
EMPTY = "…"  # a cell that no measurement stands behind
_UNITS = (("s", 1.0), ("min", 60.0), ("h", 3600.0), ("days", DAY), ("years", 365 * DAY))


def seconds_shown(seconds: float) -> str:
    """Seconds in the largest unit of which there are two."""
    name, size = [unit for unit in _UNITS if seconds >= 2 * unit[1] or unit == _UNITS[0]][-1]
    return f"{seconds / size:.3g} {name}"


def value_shown(key: str, value: float) -> str:
    """A value with its unit, which the key says."""
    if key.endswith("seconds"):
        return seconds_shown(value)
    if key.endswith("_ms"):
        return f"{value:.3g} ms" if value < 1000 else seconds_shown(value / 1000)
    exponent = min(max(int(math.log10(max(value, 1.0)) // 3), 0), 5)
    return f"{value / 1000**exponent:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[exponent]}"


def cluster_seconds(rows: Iterable[Row], n: int, hardware: Hardware) -> float | None:
    """Encoding on all devices: tokens of n documents over tokens/s, with nothing lost."""
    encoded = [row for row in rows if row["part"] == "encode" and "tokens" in row]
    if not encoded:
        return None
    last = max(encoded, key=lambda row: row["documents"])
    rate = hardware.device_tokens or last["tokens"] / last["seconds"]
    return float(n * last["tokens"] / last["documents"] / (rate * hardware.devices))


def size_table(rows: Sequence[Row], hardware: Hardware) -> str:
    """What every size takes, as Markdown: measured where it was (bold), else carried there."""
    known, fitted = measured(rows), fits(rows)
    lines = [f"| | {' | '.join(f'{n:,}' for n in SIZES)} |", "|---|" + "---|" * len(SIZES)]

    def cell(each: Quantity, n: int) -> str:
        if n in known[each.name]:
            return f"**{value_shown(each.key, known[each.name][n])}**"
        found = fitted.get(each.name)
        return EMPTY if found is None else value_shown(each.key, found.at(n))

    for each in QUANTITIES:
        lines.append(f"| {each.shown} | {' | '.join(cell(each, n) for n in SIZES)} |")
    recalls = {row["documents"]: row["recall_at_10"] for row in rows if "recall_at_10" in row}
    cells = [f"**{recalls[n]:.3f}**" if n in recalls else EMPTY for n in SIZES]
    lines.append(f"| recall@10 of approximate search | {' | '.join(cells)} |")
    on_all = [cluster_seconds(rows, n, hardware) for n in SIZES]
    cells = [EMPTY if seconds is None else seconds_shown(seconds) for seconds in on_all]
    speed = f" of {hardware.device_tokens:,.0f} tokens/s" if hardware.device_tokens else ""
    name = f"encode, {hardware.devices:,} × {hardware.device}{speed}"
    return "\n".join([*lines, f"| {name} | {' | '.join(cells)} |"])


def limits(rows: Sequence[Row], hardware: Hardware) -> list[tuple[float, Quantity, float]]:
    """Sizes at which something passes a limit, the first first: size, what, limit."""
    fitted, found = fits(rows), []
    of_machine = {"memory": hardware.memory_gb * 1e9, "disk": hardware.disk_gb * 1e9}
    for each in QUANTITIES:
        limit = of_machine[each.of_machine] if each.of_machine else each.limit
        if limit is not None and each.name in fitted:
            found.append((largest(fitted[each.name], limit), each, limit))
    return sorted(found, key=lambda each: each[0])


def limit_table(rows: Sequence[Row], hardware: Hardware) -> str:
    """What breaks first, as Markdown."""
    lines = ["| documents | what | passes |", "|---|---|---|"]
    for size, each, limit in limits(rows, hardware):
        shown = "not below 10^15" if math.isinf(size) else f"{float(f'{size:.2g}'):,.0f}"
        lines.append(f"| {shown} | {each.shown} | {value_shown(each.key, limit)} |")
    return "\n".join(lines if len(lines) > 2 else [*lines, f"| {EMPTY} | {EMPTY} | {EMPTY} |"])


def replaced(document: str, tables: Callable[[str], str]) -> str:
    """Fill the places of a document between ``<!-- table: NAME -->`` and ``<!-- end -->``."""
    parts = document.split("<!-- table: ")
    for number, part in enumerate(parts[1:], start=1):
        name, rest = part.split(" -->", 1)
        _, after = rest.split("<!-- end -->", 1)
        parts[number] = f"{name} -->\n{tables(name)}\n<!-- end -->{after}"
    return "<!-- table: ".join(parts)
