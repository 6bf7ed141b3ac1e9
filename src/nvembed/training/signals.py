"""Ctrl-C and SIGTERM: in a stage a flag, so that a checkpoint is written; elsewhere at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from nvembed.core.errors import TrainingError


class _TerminatedError(BaseException):
    """SIGTERM; no ``except Exception`` on the way may take it for its own."""


@contextmanager
def sigterm_is_an_error(folder: str) -> Iterator[None]:
    """Let SIGTERM leave at once, but in order: half-written files go, and one line is told.

    Args:
        folder: of the run.

    Raises:
        TrainingError: SIGTERM came.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise _TerminatedError

    old = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except _TerminatedError:
        raise TrainingError(
            "stopped by SIGTERM",
            where=folder,
            hint="The same command goes on from the last checkpoint",
        ) from None
    finally:
        signal.signal(signal.SIGTERM, old)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a flag that a stage looks at after each step and at its end.

    Outside the block (loading, mining) they stop at once: nothing there is lost by it. So does a
    second one inside.
    """
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
