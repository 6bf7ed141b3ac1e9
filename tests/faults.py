"""Stop a function at a chosen file operation, or at any moment, in a process of its own.

Forked, because starting Python and importing torch again costs seconds per process. An audit hook
in the child notes what it does to files below some folders (opening for writing, renaming,
removing, making folders). At a chosen operation it dies, as of ``kill -9``, or is told that the
disk is full; the operation itself is not done.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
_NEED_SPACE = ("open ", "os.mkdir ")


@dataclass(frozen=True)
class Fault:
    """Where it happens and what.

    Args:
        at: pattern of the operation (``os.rename /run/.model.…``), or its number from 0.
        full: the disk is full from there on; ``False`` is death.
    """

    at: str | int
    full: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Args:
        value: what the function returned; ``None`` if it did not come to that.
        error: the traceback of what it raised; ``None`` where it raised nothing.
        died: it was killed, by the fault or from outside.
        operations: what it did to files; empty of one that died.
        seconds: from the fork to the end.
    """

    value: Any
    error: str | None
    died: bool
    operations: Sequence[str]
    seconds: float


def in_child(
    function: Callable[[], Any],
    folder: Path,
    *,
    fault: Fault | None = None,
    kill_after: float | None = None,
) -> Outcome:
    """Run a function in a child, and stop it on its way.

    Args:
        function: needs no arguments; what it returns must be picklable.
        folder: below it, file operations are noted.
        fault: what happens to it.
        kill_after: seconds.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    started = time.perf_counter()
    with warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads; the child runs on one thread of its own.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = multiprocessing.get_context("fork").Process(
            target=_child, args=(sender, function, os.fspath(folder), fault), daemon=True
        )
        process.start()
    sender.close()
    told: bytes | None = None
    if receiver.poll(60 if kill_after is None else kill_after):
        try:
            told = receiver.recv_bytes()
        except EOFError:
            told = None
    seconds = time.perf_counter() - started
    process.kill()
    process.join()
    if told is None:
        assert kill_after is not None or seconds < 60, "no answer in 60 s"
        return Outcome(None, None, True, (), seconds)
    value, error, operations = pickle.loads(told)
    return Outcome(value, error, False, operations, seconds)


def _child(sender: Any, function: Callable[[], Any], folder: str, fault: Fault | None) -> None:
    torch.set_num_threads(1)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    operations: list[str] = []
    full = False

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal full
        operation = _operation(event, arguments, folder)
        if operation is None:
            return
        operations.append(operation)
        if fault is None:
            return
        here = (
            len(operations) > fault.at
            if isinstance(fault.at, int)
            else re.search(fault.at, operation) is not None
        )
        if here and not fault.full:
            os.kill(os.getpid(), signal.SIGKILL)
        full = full or here
        if full and operation.startswith(_NEED_SPACE):
            raise OSError(errno.ENOSPC, "No space left on device")

    sys.addaudithook(note)
    value = error = None
    try:
        value = function()
    except BaseException:
        error = traceback.format_exc()
    sender.send_bytes(pickle.dumps((value, error, list(operations))))
    signal.pause()


def _operation(event: str, arguments: tuple[Any, ...], folder: str) -> str | None:
    """What is about to change below the folder, or ``None``."""
    if event == "open":
        path, _, flags = arguments
        if not flags & (os.O_WRONLY | os.O_RDWR):
            return None
    elif event in _CHANGES:
        path = arguments[0]
        if event in ("os.remove", "os.rmdir") and arguments[1] not in (-1, None):
            return f"{event} …/{path}"  # relative to an open folder: shutil.rmtree at work
    else:
        return None
    name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
    return f"{event} {name}" if name.startswith(folder) else None
