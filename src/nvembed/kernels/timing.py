"""How much faster one computation is than another here, measured so that load does not move it.

Both run on one thread, in turns, and what counts is the CPU time of that thread: other processes
take wall-clock time from it, but hardly CPU time. The best of several turns is compared, since
whatever disturbs only adds. The answer is kept in the cache folder for a month, per CPU, number of
cores and version of what computes, so that all processes of a machine go by one measurement.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from nvembed.core import __version__
from nvembed.core.cache import is_own_file, open_private, private_folders
from nvembed.core.errors import UserError
from nvembed.core.files import write_json
from nvembed.kernels.cpu import this_cpu

KEPT = timedelta(days=30)

_TURNS = 15
_NATIVE = Path(__file__).parent / "native"


def kept_gain(name: str, plain: Callable[[], object], other: Callable[[], object]) -> float:
    """Return how many times as fast ``other`` is as ``plain`` here.

    Args:
        name: what the answer is kept under.
        plain: one of the two computations, of some milliseconds.
        other: the other one.
    """
    file_name = f"{name}-{hashlib.sha256(_machine_key().encode()).hexdigest()[:24]}.json"
    gain: float | None = None
    with suppress(UserError):  # no folder can be had at all
        for folder in private_folders("measured"):
            found = _read(folder, file_name)
            if found is None and gain is None:
                gain = measured_gain(plain, other)
                # Of processes that measure at the same time, the later take the first answer.
                found = _read(folder, file_name)
            if found is not None:
                return found
            assert gain is not None
            if _write(folder, file_name, gain):
                return gain
    return measured_gain(plain, other) if gain is None else gain


def measured_gain(plain: Callable[[], object], other: Callable[[], object]) -> float:
    """Measure how many times as fast ``other`` is as ``plain``, by the CPU time of one thread."""
    best = [math.inf, math.inf]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # time that other threads spend would not be counted
    try:
        for _ in range(_TURNS):
            for which, compute in enumerate((plain, other)):
                started = time.thread_time_ns()
                compute()
                best[which] = min(best[which], time.thread_time_ns() - started)
    finally:
        torch.set_num_threads(threads)
    return best[0] / max(best[1], 1)


def _machine_key() -> str:
    sources = [path.read_text("utf-8") for path in sorted(_NATIVE.iterdir())]
    kernels = hashlib.sha256("\0".join(sources).encode()).hexdigest()
    cpu = this_cpu()
    return json.dumps(
        [cpu.model, cpu.described, cpu.cores, torch.__version__, __version__, kernels]
    )


def _read(folder: Path, name: str) -> float | None:
    """Return a kept answer; None where there is none, or it is damaged or too old."""
    try:
        with open_private(folder) as opened:
            if opened is None:
                return None
            handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=opened)
            with open(handle, "rb") as file:
                if not is_own_file(os.fstat(handle)):
                    return None
                kept: Any = json.loads(file.read())
        gain, measured = float(kept["gain"]), str(kept["measured"])
        age = datetime.now(UTC) - datetime.fromisoformat(measured)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    intact = kept.get("checksum") == _checksum({"gain": gain, "measured": measured})
    return gain if intact and timedelta(0) <= age < KEPT else None


def _write(folder: Path, name: str, gain: float) -> bool:
    content = {"gain": gain, "measured": datetime.now(UTC).isoformat()}
    with open_private(folder) as opened, suppress(UserError):
        if opened is not None:
            write_json(folder / name, content | {"checksum": _checksum(content)})
            return True
    return False


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
