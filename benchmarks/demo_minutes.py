"""What more time gives: the demo for several numbers of minutes, and its scores drawn.

    python benchmarks/demo_minutes.py 3 5 10 20 --output runs/minutes

runs them one after the other (those that are finished are not run again), prints a Markdown table
and draws `OUTPUT/minutes.png`. Nothing else should run on the machine: the demo plans by the clock.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nvembed.core.files import atomic_path, write_json
from nvembed.core.runs import RunFolder

BM25, STAGE1, STAGE2 = "BM25", "after stage 1", "after stage 2"


def run_demo(minutes: float, folder: Path) -> dict[str, Any]:
    """Run the demo into a folder, or read what it left there; returns what the table shows."""
    file = folder / "minutes.json"
    if not file.exists():
        started = time.monotonic()
        command = ["--minutes", f"{minutes:g}", "--output", str(folder)]
        subprocess.run([sys.executable, "examples/pydocs", *command], check=True)
        rows = RunFolder(folder).read_metrics()
        scores = json.loads((folder / "eval" / "scores.json").read_text())
        write_json(
            file,
            {
                "minutes": minutes,
                "took": (time.monotonic() - started) / 60,
                "steps": [sum(r["stage"] == s for r in rows) for s in ("stage1", "stage2")],
                "scores": scores,
            },
        )
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def draw(runs: list[dict[str, Any]], output: Path) -> None:
    """Draw nDCG@10 over minutes, with BM25 as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    minutes = [run["took"] for run in runs]
    bm25 = runs[-1]["scores"][BM25][0]
    axes.axhline(bm25, color="#9a9a9a", linestyle="--", label=f"BM25 ({bm25:.3f})")
    for name, colour in ((STAGE1, "#0072b2"), (STAGE2, "#d55e00")):
        scores = [run["scores"][name][0] for run in runs]
        axes.plot(minutes, scores, marker="o", color=colour, label=name)
    axes.set_xlabel("minutes, everything included (2 CPU cores)")
    axes.set_ylabel("nDCG@10, held-out modules")
    axes.set_xscale("log")
    axes.set_xticks(minutes, [f"{value:.1f}" for value in minutes])
    axes.minorticks_off()
    axes.grid(color="#e4e4e4")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic_path(output) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def main() -> None:
    """Run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("minutes", type=float, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("runs/minutes"))
    arguments = parser.parse_args()
    runs = [
        run_demo(minutes, arguments.output / f"{minutes:g}")
        for minutes in sorted(arguments.minutes)
    ]
    print("| minutes asked | took | steps | BM25 | base | stage 1 | stage 2 |")
    print("|---|---|---|---|---|---|---|")
    for run in runs:
        shown = " | ".join(f"{scores[0]:.3f}" for scores in run["scores"].values())
        steps = " + ".join(map(str, run["steps"]))
        print(f"| {run['minutes']:g} | {run['took']:.1f} | {steps} | {shown} |")
    draw(runs, arguments.output / "minutes.png")


if __name__ == "__main__":
    main()
