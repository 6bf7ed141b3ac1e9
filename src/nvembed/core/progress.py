"""A progress bar on stderr: count, fields such as loss and tokens/s, time left.

Silent when stderr is no terminal (logs, pipes, tests). ``NVEMBED_PROGRESS=1`` shows it all the
same, ``NVEMBED_PROGRESS=0`` never.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressBar:
    """What ``progress`` yields; does nothing when there is nobody to look."""

    def __init__(self, shown: Progress | None, task: TaskID | None) -> None:
        self._shown = shown
        self._task = task

    def advance(self, n: int = 1, **fields: float | str) -> None:
        """Move on by ``n`` and show ``fields`` (``loss=0.41``) beside the bar."""
        if self._shown is None or self._task is None:
            return
        if fields:
            text = "  ".join(f"{name} {_short(value)}" for name, value in fields.items())
            self._shown.update(self._task, advance=n, fields=text)
        else:
            self._shown.update(self._task, advance=n)


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
    """Show progress towards ``total`` (None: unknown) while the block runs, if ``shown``."""
    if not (shown and _is_shown()):
        yield ProgressBar(None, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[fields]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield ProgressBar(bars, bars.add_task(description, total=total, fields=""))


def _is_shown() -> bool:
    setting = os.environ.get("NVEMBED_PROGRESS")
    return sys.stderr.isatty() if setting is None else setting != "0"


def _short(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
