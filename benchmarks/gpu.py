"""One prepared run on a GPU: nine minutes, in parts with a budget of time each.

    python benchmarks/gpu.py --out runs/gpu
    python benchmarks/gpu.py --rehearse --out runs/rehearsal    # tiny shapes, on a CPU
    python benchmarks/gpu.py --base SMOLLM2 --data FOLDER       # what the last part trains

A part is a process of its own. One that overruns is stopped and the next begins; one that fails is
reported. Below ``--out`` lie ``results.jsonl`` (a row is on the disk as soon as it is found),
``results.md`` (the same as tables, written anew after every part), ``log.txt`` (what the parts
printed, and where one that was stopped stood) and what was trained. docs/gpu.md says more.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS, TABLES, LOG = "results.jsonl", "results.md", "log.txt"
STATUS = "status"  # the row that ends a part
_GRACE = 8.0  # seconds between the request to end and the end
_LEAST = 5.0  # seconds that a part is started for
_SCRIPT = Path(__file__).resolve()


@dataclass(frozen=True)
class Part:
    """A module of ``gpu_parts`` and the seconds it may take; None is all that are left."""

    name: str
    seconds: float | None
    command: tuple[str, ...] = ()  # in place of the module


# By worth: what comes late may find no time.
PARTS = (
    Part("environment", 35),
    Part("attention", 75),
    Part("encode", 110),
    Part("train", 90),
    Part("serve", 90),
    Part("quantize", 45),
    Part("recipe", None),
)
SECONDS, REHEARSAL_SECONDS = 535.0, 600.0


@dataclass(frozen=True)
class Context:
    """What a part is told, and where it writes."""

    part: str
    out: Path
    work: Path  # kept from part to part, deleted at the end
    seconds: float
    rehearse: bool = False
    base: str | None = None
    data: Path | None = None
    teacher: str | None = None
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds until the part is stopped."""
        return self.seconds - (time.monotonic() - self.started)

    def row(self, name: str, **values: Any) -> None:
        """Write a result to the disk, at once."""
        add_row(self.out, {"part": self.part, "row": name, **values})

    def attempt(self, name: str, measure: Callable[[], Any]) -> Any:
        """Measure; a failure is a row, and None."""
        try:
            return measure()
        except (Exception, SystemExit) as error:  # whatever a library or a device raises
            self.row(name, failed=first_line(error))
            return None


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def add_row(out: Path, row: dict[str, Any]) -> None:
    line = json.dumps(row, ensure_ascii=False)
    print(line, flush=True)
    with open(out / RESULTS, "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(out: Path) -> list[dict[str, Any]]:
    """Rows that are whole: a kill may have cut the last one."""
    found = []
    for line in (out / RESULTS).read_text("utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


# --- Tables ---------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value).replace("|", "\\|")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A heading for every part; neighbours with the same columns are a table."""
    lines = ["# A run on a GPU"]
    for part, of_part in itertools.groupby(rows, key=lambda row: row["part"]):
        found = list(of_part)
        status = next((row for row in found if row["row"] == STATUS), {"status": "cut off"})
        lines += ["", f"## {part}", "", ", ".join(shown(status[k]) for k in _ENDS if k in status)]
        results = [row for row in found if row["row"] != STATUS]
        for columns, alike in itertools.groupby(results, key=lambda row: tuple(row)[1:]):
            lines += ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            lines += [f"| {' | '.join(shown(row[key]) for key in columns)} |" for row in alike]
    return "\n".join(lines) + "\n"


_ENDS = ("status", "seconds", "error")


def write_tables(out: Path) -> None:
    temporary = out / f".{TABLES}"
    temporary.write_text(markdown(read_rows(out)), "utf-8")
    temporary.replace(out / TABLES)


# --- The run --------------------------------------------------------------------------------------


def run_parts(
    parts: Sequence[Part], out: Path, seconds: float, options: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Run the parts one after the other; their last rows."""
    deadline = time.monotonic() + seconds
    ends = []
    for part in parts:
        room = deadline - time.monotonic()
        allotted = room if part.seconds is None else min(part.seconds, room)
        begun = time.monotonic()
        if allotted < _LEAST:
            status, error = "not begun", "no time was left"
        else:
            status, error = run_part(part, out, allotted, options)
        took = round(time.monotonic() - begun, 1)
        end = {"part": part.name, "row": STATUS, "status": status, "seconds": took}
        ends.append(end | ({"error": error} if error else {}))
        add_row(out, ends[-1])
        write_tables(out)
    return ends


def run_part(
    part: Part, out: Path, seconds: float, options: Sequence[str]
) -> tuple[str, str | None]:
    """Run one part in a group of processes of its own: how it ended, and what it said."""
    own = [sys.executable, str(_SCRIPT), "--child", part.name, "--out", str(out), *options]
    command = list(part.command) or [*own, "--seconds", str(seconds)]
    # Servers and tests that a part starts find this checkout too; nothing is looked for elsewhere.
    path = [str(_SCRIPT.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {"HF_HUB_OFFLINE": "1", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    with open(out / LOG, "ab") as log:
        start = log.tell()
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, process_group=0
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return "stopped", f"not done after {seconds:.0f} s"
        finally:
            end_group(process)
    if code == 0:
        return "finished", None
    with open(out / LOG, "rb") as log:
        log.seek(start)
        said = log.read().decode("utf-8", "replace").split("\n")
    last = next((line.strip() for line in reversed(said) if line.strip()), "nothing was said")
    return "failed", f"ended with {code}: {last[:300]}"


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a part and all that it started: politely, then at once."""
    for number, patience in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def run_child(context: Context) -> None:
    """In the process of a part: say where it hangs before it is stopped, and end with the run."""
    faulthandler.dump_traceback_later(max(1.0, context.seconds - 2.0))
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    importlib.import_module(f"gpu_parts.{context.part}").run(context)


def option_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/gpu"), help="folder of the results, new or empty")
    add("--work", type=Path, help="folder for 20 GB of checkpoints; a temporary one")
    add("--parts", nargs="+", choices=[part.name for part in PARTS], default=None)
    add("--seconds", type=float, help=f"of all parts; {SECONDS:.0f}")
    add("--rehearse", action="store_true", help="tiny shapes on a CPU")
    add("--base", help="SmolLM2-135M, as a folder or GGUF file; random weights of its shape")
    add("--data", type=Path, help="folder of the recipe's training files; lines of our documents")
    add("--teacher", help="folder of the recipe's teacher; without one the recipe has none")
    add("--child", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    parser = option_parser()
    given = parser.parse_args()
    if given.child:
        options = (given.rehearse, given.base, given.data, given.teacher)
        run_child(Context(given.child, given.out, given.work, given.seconds, *options))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    if any(given.out.iterdir()):
        parser.error(f"{given.out} is not empty; name a new folder")
    parts = [part for part in PARTS if given.parts is None or part.name in given.parts]
    if given.rehearse:
        seconds = given.seconds or REHEARSAL_SECONDS
        parts = [Part(part.name, seconds / len(parts)) for part in parts]
    else:
        seconds = given.seconds or SECONDS
    # A request to end goes the way of an interrupt, so that the part in progress ends too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="nvembed-gpu-") as folder:
        options = ["--work", str(given.work or folder)]
        for name in ("base", "data", "teacher"):
            value = getattr(given, name)
            options += [f"--{name}", str(value)] if value else []
        run_parts(parts, given.out, seconds, [*options, *["--rehearse"] * given.rehearse])
    print((given.out / TABLES).read_text("utf-8"))


if __name__ == "__main__":
    main()
