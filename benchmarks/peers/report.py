"""What the benchmarks print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nvembed.core.runs import describe_environment


def say(line: str) -> None:
    """A line of progress or of results, at once."""
    print(line, flush=True)


def header(threads: int) -> dict[str, Any]:
    """Machine, commit and date; printed and kept with the results."""
    about = describe_environment()
    about["threads"] = threads
    git = about["git"] or {"commit": "unknown", "changed": False}
    about["commit"] = git["commit"][:7] + (" with changes" if git["changed"] else "")
    versions = ", ".join(f"{name} {about['packages'][name]}" for name in ("torch", "transformers"))
    say(f"{about['processor']}, {about['cpus']} CPUs, {threads} threads; {versions}")
    say(f"commit {about['commit']}; {about['started']}")
    return about


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, printed."""
    lines = [head, ["---"] * len(head), *rows]
    made = "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in lines)
    say(f"\n{made}\n")
    return made


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
