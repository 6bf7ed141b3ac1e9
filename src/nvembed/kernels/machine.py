"""What this machine computes best with: the number type of a job, and threads that get a CPU.

No flag says whether a CPU is faster in bfloat16, so it is measured: both products on one thread, in
turns, by the best CPU time, which other jobs do not move. The answer is kept for a month. A job
settles its type once; one that goes on takes the type that it was begun with.

The threads of an operation wait for the slowest of them at its end, so one that waits for a CPU
holds up all. Linux counts how long each thread ran and how long it waited for a CPU; elsewhere
nothing is said. With another number of threads some sums are added up in another order, which
changes last bits: only who asks for it gets another number.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch

from nvembed.core import __version__
from nvembed.core.arguments import (
    FloatPrecision,
    Precision,
    PrecisionChoice,
    goes_on,
    is_settled,
)
from nvembed.core.cache import open_private, private_folders, read_private
from nvembed.core.errors import UserError
from nvembed.core.files import write_json
from nvembed.core.reporting import hold_note
from nvembed.kernels import attention, functions
from nvembed.kernels.build import library, this_cpu

MIN_GAIN = 1.5
"""How much faster products in bfloat16 must be: everything around them gains nothing, and whatever
is nearly even is float32 at every start."""
KEPT = timedelta(days=30)

_ROWS, _INNER, _COLUMNS = 1024, 256, 704
_TURNS = 15
_NATIVE = Path(__file__).parent / "native"


def settle_precision(
    choice: PrecisionChoice, *, begun: Precision | None = None, option: str | None = "--dtype"
) -> Precision:
    """Return the choice, ``auto`` replaced by a type, which a held note tells."""
    if is_settled(choice):
        return choice
    precision, line = choose_precision(begun, option, choice)
    hold_note(line)
    return precision


def choose_precision(
    begun: Precision | None, option: str | None, choice: PrecisionChoice = "auto"
) -> tuple[Precision, str]:
    """Choose the type of a job, or the one it was ``begun`` with; say which, and why."""
    device = _device_type()
    kept = begun if goes_on(choice, begun) else None
    precision = kept or cast(Precision, choice.replace("auto", fastest_precision(device)))
    if kept:
        reason = "as it was begun"
    elif device != "cpu":
        reason = "what this GPU computes in"
    elif not this_cpu().may_multiply_bfloat16:
        reason = "this CPU has no instructions for bfloat16"
    else:
        reason = f"this CPU multiplies bfloat16 {bfloat16_gain():.1f}x as fast as float32"
    how = f"; fix with {option}" if option else ""
    return precision, f"computing in {precision} ({reason}{how})"


def fastest_precision(device_type: str) -> FloatPrecision:
    """Return the type that matrix products are fastest in on a device of ``torch.device.type``.

    On a CPU that may multiply bfloat16, products are measured (0.1 seconds, then kept).
    """
    if device_type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device_type != "cpu" or not this_cpu().may_multiply_bfloat16:
        return "float32"
    return "bfloat16" if bfloat16_gain() >= MIN_GAIN else "float32"


def bfloat16_gain() -> float:
    """How many times as fast as float32 this CPU multiplies bfloat16 matrices."""
    wide, narrow = (
        (torch.ones(_ROWS, _INNER, dtype=dtype), torch.ones(_COLUMNS, _INNER, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    )
    with torch.inference_mode():
        return kept_gain(
            "bfloat16", lambda: functions.product(*wide), lambda: functions.product(*narrow)
        )


def kernels() -> list[str]:
    """Name what computes in torch's place here; another set changes the last bits of vectors."""
    if _device_type() != "cpu":
        return []
    from nvembed.kernels import layers  # imports transformers, which settling a type does not need

    used = {
        "onednn": functions.onednn_pays(),
        "attention": attention.float32_available(),
        "bfloat16-attention": attention.bfloat16_available(),
        "layers": layers.available(),
        "norms-and-gates": library("elementwise.cpp") is not None,
    }
    return [name for name, is_used in used.items() if is_used]


def computing_record(precision: Precision | None) -> dict[str, Any]:
    """Describe how numbers are computed, for the record of a job; ``None`` is the saved type."""
    on_gpu = _device_type() == "cuda"
    return {
        "dtype": precision,
        "kernels": kernels(),
        "processor": torch.cuda.get_device_name() if on_gpu else this_cpu().model,
        "torch": torch.__version__,
    }


def _device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# --- The measurement ------------------------------------------------------------------------------


def kept_gain(name: str, plain: Callable[[], object], other: Callable[[], object]) -> float:
    """Return how many times as fast ``other`` is as ``plain``, of milliseconds, kept by name."""
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
    code = hashlib.sha256("\0".join(sources).encode()).hexdigest()
    cpu = this_cpu()
    return json.dumps([cpu.model, cpu.described, cpu.cores, torch.__version__, __version__, code])


def _read(folder: Path, name: str) -> float | None:
    """Return a kept answer; None where there is none, or it is damaged or too old."""
    try:
        with open_private(folder) as opened:
            content = None if opened is None else read_private(opened, name)
        if content is None:
            return None
        kept: Any = json.loads(content)
        gain, measured = float(kept["gain"]), str(kept["measured"])
        age = datetime.now(UTC) - datetime.fromisoformat(measured)
    except (ValueError, TypeError, KeyError, RecursionError):
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


# --- Threads --------------------------------------------------------------------------------------

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
    return Reading(time.perf_counter(), threads, idle / os.sysconf("SC_CLK_TCK"))


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
