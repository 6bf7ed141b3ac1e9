"""The server and the database for a long time, among clients that misbehave and kills.

    python benchmarks/soak.py --part server --minutes 30 --out runs/soak-server
    python benchmarks/soak.py --part index --minutes 10 --out runs/soak-index
    python benchmarks/soak.py --part index --model MODEL --out runs/soak-index-of-another

``server``: ``nvembed serve`` is driven at 80 % of what a short closed-loop ramp found (open loop: a
request comes whether or not the ones before were answered), while clients of 35 kinds come, go,
stall and send rubbish; then it is killed with requests under way, begun again and ended by SIGTERM.
``index``: three writers change folders and index them into one database, 40 % of their runs are
killed at a random moment, while one reader searches in process and one over the page; at the end
the table is counted against dictionaries.

Below ``--out`` lie ``results.jsonl`` (a row is on the disk as soon as it is found), ``results.md``,
``soak.png`` and what the commands said. The exit code is 1 where a check does not hold.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu import shown
from soak_parts.run import Run

_MINUTES = {"server": 30.0, "index": 10.0}
_HIDDEN = ("part", "row")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The checks as a table, then the minutes."""
    lines = [f"# Soak of {rows[0]['part']}"]
    for kind in ("check", "ramp", "minute"):
        found = [row for row in rows if row["row"] == kind]
        if found:
            columns = [name for name in found[0] if name not in _HIDDEN]
            lines += ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            lines += [f"| {' | '.join(shown(row.get(c)) for c in columns)} |" for row in found]
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Latencies, and what is held, by the minute."""
    from matplotlib.figure import Figure

    minutes = [row for row in rows if row["row"] == "minute"]
    server = minutes[0]["part"] == "server"
    panels = [("ms", ["p50", "p95", "p99"])]
    panels += [("MB", ["rss_mb"]), ("number", ["files", "threads", "sockets"])] if server else []
    panels += [] if server else [("MB", ["mb"]), ("files", ["files"])]
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    for number, (unit, names) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for name in names:
            axes.plot(*([row[of] for row in minutes] for of in ("minute", name)), label=name)
        axes.set(xlabel="minute", ylabel=unit)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", choices=sorted(_MINUTES), required=True)
    add("--minutes", type=float, help="server: 30, index: 10")
    add("--model", default=str(Path(__file__).resolve().parents[1] / "assets" / "decoder-6m"))
    add("--dtype", default="float32", help="as of the commands")
    add("--out", type=Path, required=True, help="folder of the results, new or empty")
    add("--rehearse", action="store_true", help="few and short texts, limits of a second")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    if any(given.out.iterdir()):
        parser.error(f"{given.out} is not empty; name a new folder")
    seconds = 60 * (given.minutes or _MINUTES[given.part])
    every = seconds / 3 if given.rehearse else 60.0
    model = str(Path(given.model).resolve()) if Path(given.model).exists() else given.model
    with tempfile.TemporaryDirectory(prefix="nvembed-soak-") as folder:
        places = (given.out.resolve(), Path(folder))
        run = Run(given.part, model, *places, seconds, every, given.dtype, given.rehearse)
        importlib.import_module(f"soak_parts.{given.part}").run(run)
    rows = run.rows()
    (given.out / "results.md").write_text(markdown(rows), "utf-8")
    draw(rows, given.out / "soak.png")
    broken = [row["name"] for row in rows if row["row"] == "check" and not row["holds"]]
    print(f"not as they must be: {', '.join(broken)}" if broken else "all checks hold")
    return 1 if broken else 0


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    path = [str(root / "src"), os.environ.get("PYTHONPATH", "")]  # for the processes
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    sys.exit(main())
