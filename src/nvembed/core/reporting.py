"""What a job tells its user while it runs: notes, problems of many rows, and a progress bar.

Notes are shown by the command line alone, and held until the work that they speak of has begun. The
bar needs a terminal or a notebook; ``NVEMBED_PROGRESS=1`` shows it all the same,
``NVEMBED_PROGRESS=0`` never.
"""

from __future__ import annotations

import io
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

# --- Notes ----------------------------------------------------------------------------------------

_held: list[str] = []
_shown = False


def hold_note(line: str) -> None:
    """Keep a line for ``release_notes``."""
    _held.append(line)


def release_notes() -> None:
    """Show the lines that are held: what they speak of has begun."""
    withdraw()
    lines = _held[:]
    _held.clear()
    if _shown:
        for line in lines:
            print(line, file=sys.stderr, flush=True)


def show_notes() -> None:
    """Print notes on stderr from now on; those of an earlier command are forgotten."""
    global _shown
    _shown = True
    _held.clear()


# --- What takes long before anything is shown ----------------------------------------------------

_SOON = 1.0  # seconds
_announced: threading.Timer | None = None


def announce(line: str) -> None:
    """Say on a terminal what is waited for, should it take longer than a second."""
    global _announced
    withdraw()
    if _shown and _wanted(sys.stderr.isatty()):
        _announced = threading.Timer(_SOON, print, [f"{line} …"], {"file": sys.stderr})
        _announced.daemon = True
        _announced.start()


def withdraw() -> None:
    """What was announced is over, or shows by itself."""
    if _announced is not None:
        _announced.cancel()


def _wanted(somebody: bool) -> bool:
    """Whether to show what comes and goes: the user's setting, else whether somebody looks."""
    setting = os.environ.get("NVEMBED_PROGRESS")
    return somebody if setting is None else setting != "0"


# --- Problems of rows, each kind told once --------------------------------------------------------

# What differs between two rows with one problem: numbers, and the user's values in single quotes.
_VARYING = re.compile(r"'(?:[^'\\]|\\.)*'|\d+")
_MAX_KINDS = 1000  # more kinds than that are counted together
_MAX_RANGES = 10


@dataclass
class ProblemKind:
    """The rows that have one problem; ``ranges`` are those of others in its file."""

    place: str  # of the first row: ``file:line``
    text: str
    count: int = 1
    ranges: list[list[int]] = field(default_factory=list)

    def add(self, place: str) -> None:
        """Count another row."""
        self.count += 1
        file, _, line = place.rpartition(":")
        if file != self.place.rpartition(":")[0] or not line.isdecimal():
            return
        number = int(line)
        if self.ranges and self.ranges[-1][1] == number - 1:
            self.ranges[-1][1] = number
        elif len(self.ranges) <= _MAX_RANGES:
            self.ranges.append([number, number])

    @property
    def message(self) -> str:
        """The problem, and how many other rows have it."""
        if self.count == 1:
            return self.text
        ranges = self.ranges[:_MAX_RANGES]
        lines = [str(low) if low == high else f"{low}-{high}" for low, high in ranges]
        lines += ["…"] if len(self.ranges) > _MAX_RANGES else []
        several = len(lines) > 1 or "-" in "".join(lines)
        named = f": line{'s' if several else ''} {', '.join(lines)}" if lines else ""
        return f"{self.text} ({self.count - 1:,} more like it{named})"

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


class ProblemCounts:
    """Problems by kind, in the order in which the kinds were met; memory does not grow with rows.

    Two rows have one problem when what is said of them differs in numbers only, and in values in
    single quotes, unless ``by_value``. ``problems`` are (place, text) of those to begin with.
    """

    def __init__(self, problems: Iterable[tuple[str, str]] = (), *, by_value: bool = False) -> None:
        self.count = 0
        self._by_value = by_value
        self._kinds: dict[str, ProblemKind] = {}
        for place, text in problems:
            self.add(place, text)

    @property
    def kinds(self) -> list[ProblemKind]:
        """The kinds that were met."""
        return list(self._kinds.values())

    def add(self, place: str, text: str, *, by_value: bool | None = None) -> None:
        """Count a problem of the row at ``place`` (``file:line``); ``by_value`` as of the whole."""
        self.count += 1
        exact = self._by_value if by_value is None else by_value
        key = _VARYING.sub(lambda found: found[0] if exact and found[0][0] == "'" else "#", text)
        if key not in self._kinds and len(self._kinds) >= _MAX_KINDS:
            key, text = "", "other problems"
        if key in self._kinds:
            self._kinds[key].add(place)
        else:
            self._kinds[key] = ProblemKind(place, text)

    def summary(self, most: int) -> str:
        """Describe ``most`` kinds in one line, which lacks the place of the first problem."""
        first, *others = self.kinds[:most]
        file = first.place.rpartition(":")[0]
        parts = [first.message]
        for kind in others:
            own_file, _, line = kind.place.rpartition(":")
            place = f"line {line}" if own_file == file and line.isdecimal() else kind.place
            parts.append(f"{place}: {kind.message}")
        beyond = sum(kind.count for kind in self.kinds[most:])
        parts += [f"and {beyond:,} more problem{'s' if beyond > 1 else ''}"] if beyond else []
        return "; ".join(parts)


# --- Progress -------------------------------------------------------------------------------------


class ProgressBar:
    """What ``progress`` yields; without an ``update``, nobody looks and it does nothing."""

    def __init__(self, update: Callable[..., None] | None = None) -> None:
        self._update = update

    def advance(self, n: int = 1, **fields: float | str) -> None:
        """Move on by ``n`` and show ``fields`` (``loss=0.41``) beside the bar."""
        if self._update is None:
            return
        text = "  ".join(f"{name} {_short(value)}" for name, value in fields.items())
        self._update(advance=n, **({"fields": text} if fields else {}))


class Rates:
    """Counts per second since this was made, as fields of a bar."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._counts: dict[str, int] = {}

    def add(self, **counts: int) -> dict[str, float]:
        """Add to the counts and return all rates: ``{"texts/s": 12.5, "tokens/s": 800.0}``."""
        for name, count in counts.items():
            self._counts[name] = self._counts.get(name, 0) + count
        seconds = max(time.monotonic() - self._started, 1e-9)
        return {f"{name}/s": count / seconds for name, count in self._counts.items()}


@contextmanager
def progress(total: int | None, description: str, *, shown: bool = True) -> Iterator[ProgressBar]:
    """Show progress towards ``total`` (None: unknown) while the block runs, if ``shown``.

    On a terminal the bar comes after a second: what ends sooner needs none.
    """
    withdraw()
    notebook = _in_notebook()
    if not shown or not _wanted(notebook or sys.stderr.isatty()):
        yield ProgressBar()
        return
    from rich import progress as bar  # --help must not wait for it
    from rich.console import Console

    columns = (
        *(bar.TextColumn("{task.description}"), bar.BarColumn(), bar.MofNCompleteColumn()),
        *(bar.TextColumn("{task.fields[fields]}"), bar.TimeElapsedColumn()),
        *(bar.TextColumn("left"), bar.TimeRemainingColumn()),
    )
    # That of a notebook is never started, so it writes nothing by itself.
    bars = bar.Progress(*columns, console=Console(stderr=True))
    update = partial(bars.update, bars.add_task(description, total=total, fields=""))
    if notebook:
        redraw = _notebook_redraw(bars)

        def update_shown(**changes: Any) -> None:
            update(**changes)
            redraw(False)

        redraw(True)
        yield ProgressBar(update_shown)
        redraw(True)
        return
    late = threading.Timer(_SOON, bars.start)
    late.daemon = True
    if "NVEMBED_PROGRESS" in os.environ:
        bars.start()
    else:
        late.start()
    try:
        yield ProgressBar(update)
    finally:
        late.cancel()
        if late.ident is not None:
            late.join()
        if bars.live.is_started:
            bars.stop()


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook (Jupyter, VS Code, Colab)."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def _notebook_redraw(bars: Progress) -> Callable[[bool], None]:
    """Show bars in one output of a cell; what is returned brings it up to date, or seldom does.

    It is text that replaces itself: rich needs ipywidgets there, which not every notebook shows.
    """
    from IPython.display import display
    from rich.console import Console

    shown, drawn = display({"text/plain": ""}, raw=True, display_id=True), 0.0

    def redraw(now: bool) -> None:
        nonlocal drawn
        if now or time.monotonic() - drawn > 0.25:
            drawn, out = time.monotonic(), io.StringIO()
            console = Console(file=out, width=110, force_jupyter=False, color_system=None)
            console.print(bars.get_renderable())
            shown.update({"text/plain": out.getvalue().strip()}, raw=True)

    return redraw


def _short(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# --- Numbers --------------------------------------------------------------------------------------


def byte_size(count: float) -> str:
    """Show a number of bytes: ``1.5 GB``."""
    unit, size = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6) if count >= 1e6 else ("kB", 1e3)
    return f"{count / size:,.1f} {unit}"
