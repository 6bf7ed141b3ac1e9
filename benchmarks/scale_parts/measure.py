"""A part's process, watched: seconds and peak memory of all that it starts, kept over kills."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from gpu import end_group

from nvembed.core.files import write_json

ROOT = Path(__file__).resolve().parents[2]
_KINDS = ("Anon", "Shmem")
_FIGURE = re.compile(r"^(VmRSS|RssAnon|RssShmem):\s+(\d+) kB", re.MULTILINE)


@dataclass
class Measured:
    """What a part took so far; bytes are sums over its processes.

    ``peak_rss`` counts pages that processes share once each, and files that are mapped, which the
    system may drop; ``peak_anonymous`` is what it may not.
    """

    seconds: float = 0.0
    peak_rss: int = 0
    peak_anonymous: int = 0
    attempts: int = 0


def memory_of(process: int) -> tuple[int, int]:
    """Resident and anonymous bytes of a process and of all below it."""
    resident = anonymous = 0
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(process).children(recursive=True)
        for each in [process, *(child.pid for child in below)]:
            with suppress(OSError):  # it has ended
                found = dict(_FIGURE.findall(Path(f"/proc/{each}/status").read_text()))
                resident += 1024 * int(found.get("VmRSS", 0))
                anonymous += 1024 * sum(int(found.get(f"Rss{kind}", 0)) for kind in _KINDS)
    return resident, anonymous


def environment() -> dict[str, str]:
    """Processes that a part starts find this checkout too; no bars are drawn into the log."""
    path = filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "NVEMBED_PROGRESS": "0"}


def watch(command: Sequence[str], log: Path, begun: Path) -> tuple[int, Measured]:
    """Run a command to its end; the exit status, and what it took with all earlier attempts.

    ``begun`` keeps that while it runs, so a part that goes on where it was killed has all of it.
    """
    taken = Measured()
    with suppress(OSError, ValueError, TypeError):  # it is the first attempt
        taken = Measured(**json.loads(begun.read_text("utf-8")))
    taken.attempts += 1
    before, started = taken.seconds, time.perf_counter()
    kept = 0.0
    with open(log, "ab") as out:
        process = subprocess.Popen(
            command, env=environment(), stdout=out, stderr=out, process_group=0
        )
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(min(0.5, 0.02 + taken.seconds / 100))
                    break
                resident, anonymous = memory_of(process.pid)
                taken.peak_rss = max(taken.peak_rss, resident)
                taken.peak_anonymous = max(taken.peak_anonymous, anonymous)
                taken.seconds = before + time.perf_counter() - started
                if taken.seconds > kept + 1.0:
                    kept = taken.seconds
                    write_json(begun, asdict(taken))
        finally:
            end_group(process)
    taken.seconds = before + time.perf_counter() - started
    return code, taken


def machine() -> dict[str, Any]:
    """What ran it: the processor, how many of its cores, and the commit of this checkout."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    commands = (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])
    said = [
        subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False
        ).stdout.strip()
        for words in commands
    ]
    return {
        "cpu": model[1] if model else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "commit": said[0] + ("+" if said[1] else ""),
    }
