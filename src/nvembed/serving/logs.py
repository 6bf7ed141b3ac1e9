"""One line of JSON per event on stderr. Texts, vectors and keys never stand in it."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

_logger = logging.getLogger("nvembed.serving")


def start_logging() -> None:
    """Send the events to stderr as they are."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    _logger.handlers = [handler]
    _logger.setLevel(logging.INFO)
    _logger.propagate = False


def log_event(event: str, **fields: str | int | float | None) -> None:
    """Write one event; fields that are ``None`` are left out."""
    if not _logger.isEnabledFor(logging.INFO):
        return
    row: dict[str, str | int | float | None] = {}
    row |= {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event}
    row |= {name: value for name, value in fields.items() if value is not None}
    _logger.info(json.dumps(row, ensure_ascii=True))
