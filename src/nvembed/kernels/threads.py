"""Whether the CPUs are free for the threads that compute: one line where they are not.

The threads of an operation wait for the slowest of them at its end, so one that waits for a CPU
holds up all. Linux counts how long each thread ran and how long it waited for a CPU; elsewhere
nothing is said. With another number of threads some sums are added up in another order, which
changes last bits: only who asks for it gets another number.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

WINDOW = 5.0  # seconds that are judged together, at least
PATIENCE = 10.0  # seconds in a row that must say the same; to take more threads, twice as many


@dataclass(frozen=True, slots=True)
class Reading:
    """What the system has counted until ``time``, all in seconds."""

    time: float
    threads: Mapping[str, tuple[float, float]]  # of this process: ran, and waited for a CPU
    idle: float  # of the CPUs that this process may use, together


class Room(NamedTuple):
    """What there is for a process's threads."""

    free: float  # CPUs, below 0 where others alone want more than there are
    waiting: float  # share of the time in which its threads could have run, and had no CPU


def room(before: Reading, after: Reading, *, threads: int, cpus: float) -> Room | None:
    """Tell what others leave of the CPUs, from how long this process waited between two readings.

    CPUs are shared evenly: where m threads here and n elsewhere want them, each runs for
    cpus / (m + n) of the time, from which n follows. m counts threads that wait for each other,
    too. Without waiting, the CPUs in use and the idle ones are free. None where nothing ran.
    """
    seconds, ran, waited = after.time - before.time, 0.0, 0.0
    for name, (until_ran, until_waited) in after.threads.items():
        from_ran, from_waited = before.threads.get(name, (0.0, 0.0))
        ran, waited = ran + until_ran - from_ran, waited + until_waited - from_waited
    wanted = ran + waited
    if seconds <= 0 or ran <= 0:
        return None
    here = max(threads, wanted / seconds)
    idle = (after.idle - before.idle) / seconds
    return Room(min(cpus + here - cpus * wanted / ran + idle, cpus), 1 - ran / wanted)


def read_now() -> Reading | None:
    """Ask the system; None where it does not count this."""
    threads = {}
    try:
        for thread in Path("/proc/self/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                ran, waited, _ = map(int, (thread / "schedstat").read_text("ascii").split())
                threads[thread.name] = ran / 1e9, waited / 1e9
        rows = [line.split() for line in Path("/proc/stat").read_text("ascii").splitlines()]
    except (OSError, ValueError):
        return None
    mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    idle = sum(int(row[4]) + int(row[5]) for row in rows if row[0] in mine)
    return Reading(time.monotonic(), threads, idle / os.sysconf("SC_CLK_TCK"))


def allowed_cpus(root: Path = Path("/")) -> float:
    """CPUs that this process may use: by its affinity, and by the quotas of its cgroup (v2)."""
    affinity = getattr(os, "sched_getaffinity", None)
    found = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    groups = root / "sys/fs/cgroup"
    with suppress(OSError, ValueError):
        rows = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
        own = [row.removeprefix("0::/") for row in rows if row.startswith("0::/")]
        for folder in [each for name in own for each in (groups / name, *(groups / name).parents)]:
            with suppress(OSError, ValueError):  # no such file, or "max"
                quota, period = (folder / "cpu.max").read_text("ascii").split()
                found = min(found, int(quota) / int(period))
    return found


class ThreadWatch:
    """Looks between steps at how many CPUs are free, and tells once of too few.

    Where it ``adapts``, torch gets as many threads as there are CPUs free, at most as many as it
    has now. They become fewer where an eighth of them, or half of one, has no CPU, and more where
    three quarters of a CPU are free besides, so a number that fits is kept. ``remedy`` says what
    the user may do, with ``{}`` for the number that fits.
    """

    def __init__(
        self,
        *,
        adapts: bool = False,
        remedy: str = "",
        read: Callable[[], Reading | None] | None = None,
        cpus: float | None = None,
    ) -> None:
        self.adapts, self.remedy, self._read = adapts, remedy, read or read_now
        self.cpus = allowed_cpus() if cpus is None else cpus
        self.threads = self.most = torch.get_num_threads()
        self._before = self._read()
        self._crowded = self._roomy = 0.0  # seconds in a row
        self._told = False

    def look(self) -> str | None:
        """Judge the time since the last window, if it is long enough; what there is to tell."""
        before, now = self._before, self._read()
        if before is None or now is None or now.time - before.time < WINDOW:
            return None
        self._before = now
        found = room(before, now, threads=self.threads, cpus=self.cpus)
        if found is None:
            return None
        crowded = self.threads - found.free >= max(0.5, self.threads / 8)
        roomy = self.threads < self.most and found.free - self.threads >= 0.75
        seconds = now.time - before.time
        self._crowded = self._crowded + seconds if crowded else 0.0
        self._roomy = self._roomy + seconds if roomy else 0.0
        if self._crowded < PATIENCE and self._roomy < 2 * PATIENCE:
            return None
        self._crowded = self._roomy = 0.0
        fitting = min(max(math.ceil(found.free - 0.5), 1), self.most)
        if self.adapts and fitting != self.threads:
            line = f"threads {self.threads} → {fitting}: {self._told_of(found)}"
            torch.set_num_threads(fitting)
            self.threads, self._told = fitting, True
            return line
        if self._told or roomy:
            return None
        self._told = True
        remedy = f", or {self.remedy.format(fitting)}" if fitting < self.threads else ""
        return f"the CPUs are busy: {self._told_of(found)}; end other jobs{remedy}"

    def _told_of(self, found: Room) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return (
            f"of {self.cpus:g} about {max(found.free, 0):.1f} are free for {threads} here, which "
            f"waited for a CPU for {found.waiting:.0%} of their time"
        )


@contextmanager
def watched_threads(
    choice: Literal["auto"] | int | None, remedy: str = "", device: str = "cpu"
) -> Iterator[ThreadWatch]:
    """Compute with so many threads inside; gives what looks after them, on a ``cpu``."""
    found = torch.get_num_threads()
    try:
        if isinstance(choice, int):
            torch.set_num_threads(choice)
        read = read_now if device == "cpu" else lambda: None
        yield ThreadWatch(adapts=choice == "auto", remedy=remedy, read=read)
    finally:
        torch.set_num_threads(found)
