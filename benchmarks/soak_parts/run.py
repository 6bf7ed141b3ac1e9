"""One run: what was asked for, and its rows, which are on the disk as soon as they are found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu import add_row, read_rows


@dataclass(frozen=True)
class Run:
    """Options of a run, and where it writes."""

    part: str
    model: str
    out: Path
    work: Path
    seconds: float
    every: float = 60.0  # seconds of a row
    dtype: str = "float32"
    rehearse: bool = False

    def row(self, name: str, /, **values: Any) -> None:
        """Write a row."""
        add_row(self.out, {"part": self.part, "row": name, **values})

    def check(self, name: str, found: Any, expected: str, holds: bool) -> None:
        """Write whether something is as it must be."""
        self.row("check", name=name, found=found, expected=expected, holds=holds)

    def rows(self) -> list[dict[str, Any]]:
        """The rows so far."""
        return read_rows(self.out)
