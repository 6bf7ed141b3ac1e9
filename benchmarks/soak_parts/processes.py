"""Commands of nvembed as processes of their own, and what they hold.

They are forked from a server that has imported the libraries, so that a kill hits a command at
work and not its imports.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

# Whoever starts a process looks for the exit codes of all, and each can be read once.
_ONE_AT_A_TIME = threading.Lock()
_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = ["nvembed.cli.main", "nvembed.model.embedder", "pyarrow", "uvicorn", "fastapi"]


def launch(arguments: Sequence[str], log: Path) -> BaseProcess:
    """Begin ``nvembed ARGUMENTS``, whose output goes to the end of a file."""
    _CONTEXT.set_forkserver_preload(_PRELOADED)
    process = _CONTEXT.Process(target=_command, args=(list(arguments), str(log)), daemon=True)
    with _ONE_AT_A_TIME:
        process.start()
    return process


def _command(arguments: list[str], log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from nvembed.cli.main import run

    sys.exit(run(arguments))


def ended(process: BaseProcess, seconds: float = 0.0) -> int | None:
    """Wait so long at most for the exit code, -9 of a process that was killed."""
    wait([process.sentinel], seconds)
    with _ONE_AT_A_TIME:
        return process.exitcode


def finish(process: BaseProcess, seconds: float = 120.0) -> int:
    """Wait for a command that must end."""
    code = ended(process, seconds)
    if code is None:
        process.kill()
        raise SystemExit(f"a command did not end within {seconds:.0f} s")
    return code


def run_command(arguments: Sequence[str], log: Path) -> None:
    """Run a command that must succeed."""
    if code := finish(launch(arguments, log), 3600):
        raise SystemExit(f"nvembed {arguments[0]} ended with {code}: {last_line(log)}")


def last_line(log: Path) -> str:
    """The last line of a file that says something."""
    lines = log.read_text("utf-8", "replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing was said")


def announced_port(process: BaseProcess, log: Path, seconds: float = 600.0) -> int:
    """Wait until a server has said where it listens."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        said = log.read_text("utf-8", "replace") if log.exists() else ""
        places = [word for word in said.split() if word.startswith("http://127.0.0.1:")]
        if places and said.endswith("\n"):
            return int(places[-1].rstrip("/").rpartition(":")[2])
        if ended(process, 0.02) is not None:
            break
    raise SystemExit(f"a server did not begin: {last_line(log)}")


def holdings(number: int) -> dict[str, Any]:
    """What a process and those that it started hold."""
    first = psutil.Process(number)
    tree = [first, *first.children(recursive=True)]
    return {
        "rss_mb": sum(one.memory_info().rss for one in tree) / 2**20,
        "files": sum(one.num_fds() for one in tree),
        "threads": sum(one.num_threads() for one in tree),
        "sockets": sum(len(one.net_connections("inet")) for one in tree),
        "workers": len(tree) - 1,
    }
