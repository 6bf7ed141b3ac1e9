"""Lines that tell what was decided for the user: shown by the command line, silent in Python.

A line is held back until the work that it speaks of has begun. A command that fails before, for a
mistake in the input, then says nothing but its error.
"""

from __future__ import annotations

import sys

_held: list[str] = []
_shown = False


def hold_note(line: str) -> None:
    """Keep a line for ``release_notes``."""
    _held.append(line)


def release_notes() -> None:
    """Show the lines that are held: what they speak of has begun."""
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
