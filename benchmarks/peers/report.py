"""What every training benchmark prints and writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nvembed.core.files import write_json
from nvembed.core.runs import describe_environment


def say(line: str) -> None:
    """A line of progress or of results, at once."""
    print(line, flush=True)


def header(threads: int) -> dict[str, Any]:
    """Machine, commit and date; printed and kept with the results."""
    about = describe_environment()
    about["threads"] = threads
    git = about["git"] or {"commit": "unknown", "changed": False}
    commit = git["commit"][:7] + (" with changes" if git["changed"] else "")
    versions = ", ".join(f"{name} {about['packages'][name]}" for name in ("torch", "transformers"))
    say(f"{about['processor']}, {about['cpus']} CPUs, {threads} threads; {versions}")
    say(f"commit {commit}; {about['started']}")
    return about


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table."""
    say("")
    say("| " + " | ".join(head) + " |")
    say("|" + "---|" * len(head))
    for row in rows:
        say("| " + " | ".join(str(cell) for cell in row) + " |")
    say("")


def keep(path: Path, part: str, value: Any, about: dict[str, Any]) -> None:
    """Put a part's results into the JSON file, beside those of parts that ran before."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[part] = {"about": about, **value}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, kept)
    say(f"written to {path} under {part!r}")


def rate(step_tokens: Sequence[int], step_seconds: Sequence[float], skip: int) -> float:
    """Real tokens per second of the steps after the first ``skip``."""
    assert len(step_tokens) == len(step_seconds) > skip
    return sum(step_tokens[skip:]) / sum(step_seconds[skip:])


def median(values: Sequence[float]) -> float:
    """Of at least one value."""
    return float(np.median(values))


def straight_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Least squares: intercept, slope, and the share of the variance that the line explains."""
    slope, intercept = np.polyfit(x, y, 1)
    rest = np.asarray(y) - (intercept + slope * np.asarray(x))
    return float(intercept), float(slope), float(1 - rest.var() / np.asarray(y).var())
