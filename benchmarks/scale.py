"""Documents by the million: encode, index, search, mine, be killed and go on; and a cost model.

    python benchmarks/scale.py --texts /data/*.jsonl.gz --documents 10000 100000 1000000
    python benchmarks/scale.py --texts … --documents 1000000 --vectors hash   # no model
    python benchmarks/scale.py --predict 1000000       # from the smaller sizes; the error
    python benchmarks/scale.py --table                 # carried to 10^9; what breaks first

Each part is a process, watched from outside. What is done is a line of ``results.jsonl`` below
``--out`` and not done again; a part that was killed goes on. Files of a size lie in a folder below.
docs/scale.md says more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu import RESULTS, add_row, read_rows
from scale_parts import cost
from scale_parts.measure import machine, watch
from scale_parts.place import OF_MODELS, PARTS, Place

from nvembed.core.files import write_json

ROOT = Path(__file__).resolve().parents[1]
SETTINGS, LOG = "settings.json", "log.txt"
_PAGE = ROOT / "docs" / "scale.md"


def read_place(folder: Path) -> Place:
    values = json.loads((folder / SETTINGS).read_text("utf-8"))
    return Place(folder=folder, **values | {"texts": tuple(values["texts"])})


def settle(place: Place) -> None:
    """Keep the settings of a folder; others are refused."""
    values = {k: v for k, v in dataclasses.asdict(place).items() if k != "folder"}
    values["texts"] = list(place.texts)
    file = place.folder / SETTINGS
    if file.exists() and json.loads(file.read_text("utf-8")) != values:
        raise SystemExit(f"{place.folder} was made with other settings: name another --out")
    write_json(file, values)


def known_rows(out: Path) -> list[dict[str, Any]]:
    return read_rows(out) if (out / RESULTS).exists() else []


def run_size(place: Place, out: Path, parts: Sequence[str]) -> None:
    """Run the parts of one size that are not recorded yet."""
    settle(place)
    done = {row["part"] for row in known_rows(out) if row["documents"] == place.documents}
    for part in PARTS:
        left_out = place.vectors == "hash" and part in OF_MODELS
        if part not in parts or part in done or left_out:
            continue
        result, begun = place.folder / f"{part}.result.json", place.folder / f"{part}.begun.json"
        command = [sys.executable, __file__, "--child", part, "--folder", str(place.folder)]
        code, taken = watch(command, place.folder / LOG, begun)
        if code:
            raise SystemExit(
                f"{part} of {place.documents:,} ended with {code}: {place.folder / LOG}"
            )
        row = {"part": part, "row": part, "documents": place.documents}
        row |= dataclasses.asdict(taken) | json.loads(result.read_text("utf-8"))
        row.setdefault("documents_per_second", place.documents / row["seconds"])
        if "tokens" in row:
            row["tokens_per_second"] = row["tokens"] / row["seconds"]
        of_place = {"vectors": place.vectors, "dtype": place.dtype}
        of_place |= {"model": place.model if place.vectors == "model" else None}
        add_row(out, row | of_place | machine())
        begun.unlink(missing_ok=True)


def child(given: argparse.Namespace) -> None:
    """In the process of a part: it ends with the one that started it."""
    parent = os.getppid()

    def watch_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch_parent, daemon=True).start()
    from scale_parts.children import run_child  # slow: the rest of the package

    die = (int(given.die[0]), float(given.die[1])) if given.die else None
    found = run_child(given.child, read_place(given.folder), die)
    plain = {key: getattr(value, "item", lambda v=value: v)() for key, value in found.items()}
    write_json(given.folder / f"{given.child}.result.json", plain)


def predicted(rows: Sequence[dict[str, Any]], target: int) -> str:
    """Predictions beside what was measured, as Markdown."""
    lines = [f"| | fitted | predicted for {target:,} | measured | error |", "|---|---|---|---|---|"]
    keys = {each.shown: each.key for each in cost.QUANTITIES}
    for row in cost.predictions(rows, target):
        key, real = keys[row["quantity"]], row["measured"]
        cells = [row["quantity"], row["form"], cost.value_shown(key, row["predicted"])]
        cells += (
            ["–", "–"] if real is None else [cost.value_shown(key, real), f"{row['error']:+.0%}"]
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def option_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/scale"), help="results, and a folder for each size")
    add("--texts", nargs="+", default=[], help="JSONL files whose sentences are recombined")
    add("--documents", nargs="+", type=int, default=[], help="sizes, such as 10000 100000")
    add("--parts", nargs="+", choices=PARTS, default=None, help="all; ray with --ray only")
    add("--model", default=str(ROOT / "assets" / "decoder-6m"))
    add("--vectors", choices=("model", "hash"), default="model", help="hash: bags of words")
    add("--dtype", default="auto", help="of the model's weights")
    add("--processes", type=int, default=2, help="of the part of that name")
    add("--ray", type=int, default=0, help="workers of a Ray cluster of this machine")
    add("--queries", type=int, default=200, help="that are searched for")
    add("--mine-queries", type=int, default=1024)
    add("--kill-documents", type=int, default=20 * 1024, help="of kill_encode")
    add("--seed", type=int, default=0)
    add("--window", type=int, default=None, help="texts in one call of the model, for rehearsals")
    add("--predict", type=int, help="a size, from those below it")
    add("--table", action="store_true", help="sizes and limits")
    add("--fill", action="store_true", help="write the tables into docs/scale.md")
    add("--devices", type=int, default=1, help="what the tables carry the encoding to")
    add("--device", default="this machine", help="its name")
    add("--device-tokens", type=float, help="its tokens/s; what was measured here")
    add("--memory-gb", type=float, default=24.0, help="of the machine that holds the database")
    add("--disk-gb", type=float, default=500.0)
    for name, count in (("--child", None), ("--folder", None), ("--die", 2)):
        kind = Path if name == "--folder" else str
        add(name, nargs=count, type=kind, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    parser = option_parser()
    given = parser.parse_args()
    if given.child:
        child(given)
        return
    if given.documents and not given.texts:
        parser.error("--documents are made of --texts")
    if not (given.documents or given.predict or given.table or given.fill):
        parser.error("nothing to do: --documents, --predict or --table")
    if "ray" in (given.parts or ()) and not given.ray:
        parser.error("--parts ray needs the number of workers: --ray 2")
    if given.fill and not known_rows(given.out):
        parser.error(f"no results in {given.out}: nothing to fill the page with")
    fields = {each.name for each in dataclasses.fields(Place)} - {"folder", "documents", "texts"}
    settings = {name: value for name, value in vars(given).items() if name in fields}
    parts = given.parts or [part for part in PARTS if part != "ray" or given.ray]
    for count in given.documents:
        place = Place(given.out / str(count), count, tuple(given.texts), **settings)
        place.folder.mkdir(parents=True, exist_ok=True)
        run_size(place, given.out, parts)
    rows = known_rows(given.out)
    names = ("devices", "device_tokens", "device", "memory_gb", "disk_gb")
    hardware = cost.Hardware(**{name: getattr(given, name) for name in names})
    tables = {
        "sizes": lambda: cost.size_table(rows, hardware),
        "limits": lambda: cost.limit_table(rows, hardware),
        "prediction": lambda: predicted(rows, given.predict or 10**6),
    }
    if given.predict:
        print(tables["prediction"]())
    if given.table:
        print(f"{tables['sizes']()}\n\n{tables['limits']()}")
    if given.fill:
        _PAGE.write_text(
            cost.replaced(_PAGE.read_text("utf-8"), lambda name: tables[name]()), "utf-8"
        )


if __name__ == "__main__":
    main()
