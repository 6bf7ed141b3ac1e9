"""A comparison: sides that take turns, rows that are kept as they come, tables of medians.

A row of ``results.jsonl`` is one run of one side with one set of options in one part. The same
command, given again after a kill or when its minutes were over, measures what is missing. In the
first run every side tries its options; later runs take the fastest of each. Rows of another commit
or other sizes stay in the file and are left out of the tables.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu import RESULTS, TABLES, add_row, read_rows

from nvembed.core.files import write_text
from peers.environments import interpreter, not_installed
from peers.job import JobError, run_program
from peers.models import SHARED, Models
from peers.report import header, median, say, table

Options = dict[str, Any]
BUSY = 0.05  # share of the CPU time that others had, from which a run is told as disturbed
DTYPES = ("float32", "bfloat16")
ROOFLINE = "products alone (roofline)"


@dataclass(frozen=True)
class Side:
    """A program that is measured in a type; the first of a comparison is what all are against.

    Args:
        name: of the program, and its environment.
        dtype: that it computes in.
        options: what it tries in a part; one without any where none is named.
        label: what it is called in tables, where not by its name.
    """

    name: str
    dtype: str
    options: Callable[[str], Sequence[Options]] = lambda _: ({},)
    label: str = ""

    @property
    def title(self) -> str:
        return self.label or self.name


@dataclass(frozen=True)
class Case:
    """What a side is to measure once."""

    part: str
    options: Options


Measure = Callable[[Side, Sequence[Case]], Iterable[tuple[Case, dict[str, Any]]]]


class Bench:
    """The rows of a benchmark of one model."""

    def __init__(
        self, name: str, given: argparse.Namespace, models: Models, sizes: Mapping[str, Any]
    ) -> None:
        self.given, self.models, self.sizes = given, models, sizes
        self.out = self.models.folder / name
        self.out.mkdir(parents=True, exist_ok=True)
        about = header(given.threads)
        self.setting = json.dumps([about["commit"], given.threads, sizes], default=str)
        self._until = time.monotonic() + 60 * given.minutes
        kept = read_rows(self.out) if (self.out / RESULTS).exists() else []
        self.rows = [row for row in kept if row.get("setting") == self.setting]
        self._add({"part": "about", "about": about})

    def _add(self, row: dict[str, Any]) -> None:
        row |= {"setting": self.setting}
        add_row(self.out, row)
        self.rows.append(row)

    def seconds_left(self) -> float:
        """Of the minutes that this call may take; a process gets at least one."""
        return self._until - time.monotonic()

    def run(self, module: str, given: Mapping[str, Any], side: str = "") -> dict[str, Any]:
        """A program in a process of its own, by the interpreter of a side."""
        python = interpreter(side, self.given.venvs)
        assert python is not None, side
        return run_program(
            module, given, threads=self.given.threads, python=python, seconds=self.seconds_left()
        )

    def installed(self, sides: Sequence[Side]) -> list[Side]:
        """The chosen sides without those that have no environment here, which is told."""
        given = self.given
        chosen = [side for side in sides if side.name in given.sides or not given.sides]
        if missing := not_installed({side.name for side in chosen}, given.venvs):
            say(missing)
        return [
            side
            for side in chosen
            if side.dtype in given.dtypes and interpreter(side.name, given.venvs)
        ]

    # --- Measuring --------------------------------------------------------------------------------

    def found(self, part: str, side: Side, **wanted: Any) -> list[dict[str, Any]]:
        """Rows of a side in a part that did not fail."""
        key = {"part": part, "side": side.title, "dtype": side.dtype, **wanted}
        return [
            row
            for row in self.rows
            if "failed" not in row and all(row.get(name) == value for name, value in key.items())
        ]

    def best(self, part: str, side: Side) -> Options | None:
        """The options with the highest rate in the first run; None where all failed."""
        tried = self.found(part, side, run=1)
        return max(tried, key=lambda row: row["rate"])["options"] if tried else None

    def missing(self, parts: Sequence[str], side: Side, run: int) -> list[Case]:
        """What a side has still to measure in a run."""
        cases = []
        for part in parts:
            best = self.best(part, side)
            later = [] if best is None else [best]
            for options in side.options(part) if run == 1 else later:
                if not self.found(part, side, run=run, options=options):
                    cases.append(Case(part, dict(options)))
        return cases

    def turns(self, parts: Sequence[str], sides: Sequence[Side], measure: Measure) -> None:
        """Let the sides take turns until all is measured or the minutes are over."""
        try:
            for run in range(1, self.given.runs + 1):
                for dtype in dict.fromkeys(side.dtype for side in sides):
                    self._one(["ceiling"], Side("ceiling", dtype), run, self._ceiling)
                for side in sides:
                    self._one(parts, side, run, measure)
        except subprocess.TimeoutExpired:
            say("the minutes are over; the same command goes on")

    def _one(self, parts: Sequence[str], side: Side, run: int, measure: Measure) -> None:
        cases = self.missing(parts, side, run)
        if not cases:
            return
        if self.seconds_left() <= 0:
            raise subprocess.TimeoutExpired(side.title, 0)
        waiting = list(cases)
        try:
            for case, values in measure(side, cases):
                waiting.remove(case)
                self._row(case, side, run, values)
        except JobError as error:
            for case in waiting:
                self._row(case, side, run, failure(error))

    def _row(self, case: Case, side: Side, run: int, values: Mapping[str, Any]) -> None:
        key = {"part": case.part, "side": side.title, "dtype": side.dtype}
        self._add({**key, "options": case.options, "run": run, **values})

    def _ceiling(self, side: Side, cases: Sequence[Case]) -> Iterator[tuple[Case, dict[str, Any]]]:
        given = {"decoder": str(self.models.decoder), "threads": self.given.threads}
        found = self.run("peers.ceiling", given | {"dtype": side.dtype})
        yield cases[0], {**found, "rate": 1e9 * found["gflops"] / self.models.token_flops}

    # --- Tables -----------------------------------------------------------------------------------

    def report(
        self,
        parts: Sequence[str],
        sides: Sequence[Side],
        columns: Mapping[str, Callable[[list[dict[str, Any]]], str]],
        *,
        unit: str = "tokens/s",
        passes: float = 1.0,
    ) -> None:
        """Print a table of each part and write all to ``results.md``.

        Args:
            parts: in order; those without a row are left out.
            sides: in order; the first of each type is what the others are compared with.
            columns: further ones: name → what the rows of a side make of it.
            unit: of ``rate``.
            passes: products of a token, in forward passes; 0 leaves the roofline out.
        """
        texts = [f"{json.dumps(self.sizes, default=str)}"]
        for part in parts:
            if not any(row["part"] == part for row in self.rows):
                continue
            lines = []
            for dtype in dict.fromkeys(side.dtype for side in sides):
                of_type = [side for side in sides if side.dtype == dtype]
                lines += self._lines(part, of_type, columns, passes)
            against = sides[0].title
            head = [part, "type", f"{unit}, median", "range", f"{against} is faster by"]
            head += ["of the roofline"] * bool(passes) + [*columns, "options", "runs"]
            texts.append(table(head, lines))
        write_text(self.out / TABLES, "\n\n".join(texts) + "\n")

    def _lines(
        self,
        part: str,
        sides: Sequence[Side],
        columns: Mapping[str, Callable[[list[dict[str, Any]]], str]],
        passes: float,
    ) -> list[list[str]]:
        roof = self.found("ceiling", Side("ceiling", sides[0].dtype))
        limit = median([row["rate"] for row in roof]) / passes if roof and passes else 0.0
        first = {row["run"]: row["rate"] for row in self._of_best(part, sides[0])}
        lines = []
        for side in sides:
            rows = self._of_best(part, side)
            if not rows:
                failed = [r for r in self.rows if r["part"] == part and "failed" in r]
                key = (side.title, side.dtype)
                said = [r["failed"] for r in failed if (r["side"], r["dtype"]) == key]
                lines += [[side.title, side.dtype, f"failed: {said[-1]}"]] if said else []
                continue
            rates = [row["rate"] for row in rows]
            pairs = [first[row["run"]] / row["rate"] for row in rows if row["run"] in first]
            busy = sum(row.get("others_share", 0) > BUSY for row in rows)
            runs = f"{len(rows)}" + (f", {busy} beside other work" if busy else "")
            cells = [f"{median(rates):,.0f}", f"{min(rates):,.0f}–{max(rates):,.0f}"]
            cells.append(f"{median(pairs):.2f}×" if pairs and side != sides[0] else "–")
            cells += [f"{median(rates) / limit:.0%}" if limit else "–"] * bool(passes)
            cells += [show(rows) for show in columns.values()]
            options = ", ".join(f"{k} {v}" for k, v in rows[0]["options"].items()) or "–"
            lines.append([side.title, side.dtype, *cells, options, runs])
        if limit:
            gflops = median([row["gflops"] for row in roof])
            speed = f"{gflops:,.0f} GFLOP/s"
            cells = [f"{limit:,.0f}", speed, "–", "100%", *["–"] * (len(columns) + 1)]
            lines.append([ROOFLINE, sides[0].dtype, *cells, f"{len(roof)}"])
        return lines

    def _of_best(self, part: str, side: Side) -> list[dict[str, Any]]:
        return self.found(part, side, options=self.best(part, side))


def failure(error: JobError) -> dict[str, str]:
    """What a row says of a process that failed: its last words."""
    return {"failed": str(error).rstrip().splitlines()[-1].strip()[:300]}


def one_by_one(measure: Callable[[Side, Case], dict[str, Any]]) -> Measure:
    """Cases that have a process each: one that fails does not end the others."""

    def each(side: Side, cases: Sequence[Case]) -> Iterator[tuple[Case, dict[str, Any]]]:
        for case in cases:
            try:
                yield case, measure(side, case)
            except JobError as error:
                say(str(error))
                yield case, failure(error)

    return each


def of_all(name: str, shown: str, choose: Callable[[list[float]], float] = median) -> Any:
    """A column: one number of a side's rows, by its key in them."""

    def show(rows: list[dict[str, Any]]) -> str:
        values = [row[name] for row in rows if row.get(name) is not None]
        return format(choose(values), shown) if values else "–"

    return show


def option_parser(text: str) -> argparse.ArgumentParser:
    """The options that all comparisons have."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    model = "decoder-6m, smollm2-135m, a decoder's folder or package:NAME"
    add("--model", default="decoder-6m", help=model)
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--sides", nargs="+", default=[], help="only these")
    add("--runs", type=int, default=3)
    add("--threads", type=int, default=2)
    add("--minutes", type=float, default=20.0, help="of this call; the next one goes on")
    add("--output", type=Path, default=Path("runs/bench"), help="folder of models and results")
    venvs = "folder of the peers' environments (peers/environments.py makes them)"
    add("--venvs", type=Path, default=Path("runs/bench/venvs"), help=venvs)
    add("--data", type=Path, default=SHARED)
    return parser
