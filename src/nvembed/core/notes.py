"""Lines that tell what was decided for the user: shown by the command line, silent in Python."""

from __future__ import annotations

import logging
import sys

_log = logging.getLogger(__name__)


def note(line: str) -> None:
    """Tell the user one line."""
    _log.info(line)


def show_notes() -> None:
    """Print notes on stderr from now on."""
    if not any(isinstance(handler, _ToStderr) for handler in _log.handlers):
        _log.addHandler(_ToStderr())
    _log.setLevel(logging.INFO)
    _log.propagate = False


class _ToStderr(logging.Handler):
    """Prints to what ``sys.stderr`` is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr, flush=True)
