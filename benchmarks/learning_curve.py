"""Scores against tokens seen: the checkpoints of runs, on a few tasks, as a table and a picture.

    python benchmarks/learning_curve.py --curve distilled RUN CHECKPOINTS \
        --curve plain RUN CHECKPOINTS --tasks FOLDER --names stsb sts13 cr --to OUTPUT

`CHECKPOINTS` is the folder of checkpoints that were kept of `RUN` (`RUN/checkpoints`, or copies of
them). Curves of one name are seeds: their mean is drawn, with its range. A checkpoint becomes a
model of adapters under `OUTPUT` and is scored in bfloat16; what is there already is not done again.
`OUTPUT/curve.json`, `curve.md` and `curve.png` are written anew each time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from nvembed.core.arguments import Precision
from nvembed.core.config import load_config
from nvembed.core.files import atomic_path, read_jsonl, write_json, write_text
from nvembed.evaluation.results import read_results, write_results
from nvembed.evaluation.session import evaluate
from nvembed.evaluation.tasks import LocalTask, load_tasks
from nvembed.model.encoder import load_encoder
from nvembed.training.checkpoint import WEIGHTS, read_tensors, trained_parameters
from nvembed.training.config import TrainConfig
from nvembed.training.model import save_adapters, starting_model

Points = dict[str, dict[int, list[tuple[int, float]]]]
"""Curve → step → tokens seen and score × 100, of each seed."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#9a9a9a")


def model_of(run: Path, checkpoint: Path, to: Path) -> Path:
    """Write the model that a run was at a checkpoint, as adapters and head."""
    if not to.is_dir():
        config = load_config(TrainConfig, run / "config.yaml", [])
        model = starting_model(config, run, device="cpu")
        trained = trained_parameters(model)
        with torch.no_grad():
            for name, value in read_tensors(checkpoint / WEIGHTS):
                if name in trained:  # a teacher's projection is of the run alone
                    trained.pop(name).copy_(value)
        assert not trained, f"{checkpoint} lacks {', '.join(trained)}"
        save_adapters(model, config, to)
    return to


def score(folder: Path, tasks: Sequence[LocalTask], dtype: Precision) -> dict[str, float]:
    """Main score × 100 of each task; a file beside the model keeps them."""
    file = folder.with_suffix(".scores.json")
    known = read_results(file) if file.is_file() else {}
    missing = [task for task in tasks if task.name not in known]
    if missing:
        model = load_encoder(str(folder), dtype)
        for task in missing:
            known |= evaluate(model, [task])
            write_results(file, known)
    return {task.name: 100 * (known[task.name].main_score or 0.0) for task in tasks}


def tokens_seen(run: Path, step: int) -> int:
    """Tokens of all texts up to and with a step."""
    rows = (row for _, row in read_jsonl(run / "metrics.jsonl"))
    return sum(row["tokens"] for row in rows if row["step"] <= step)


def table(points: Points) -> str:
    """A Markdown table, one row per step; the range of seeds where there are several."""
    lines = ["| tokens | " + " | ".join(points) + " |", "|" + "---|" * (len(points) + 1)]
    for step in sorted({step for curve in points.values() for step in curve}):
        seeds = [curve.get(step, []) for curve in points.values()]
        tokens = statistics.mean(tokens for found in seeds for tokens, _ in found)
        lines.append(f"| {tokens / 1e6:.2f} M | " + " | ".join(map(_cell, seeds)) + " |")
    return "\n".join(lines) + "\n"


def _cell(seeds: Sequence[tuple[int, float]]) -> str:
    scores = [score for _, score in seeds]
    if not scores:
        return "–"
    several = f" ({min(scores):.1f} to {max(scores):.1f}, {len(scores)} seeds)"
    return f"{statistics.mean(scores):.1f}" + several * (len(scores) > 1)


def draw(points: Points, references: Mapping[str, float], to: Path, what: str) -> None:
    """Draw the curves over a logarithmic axis of tokens, references as dashed lines."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for (name, curve), colour in zip(points.items(), COLOURS, strict=False):
        seen = [statistics.mean(tokens for tokens, _ in curve[step]) for step in sorted(curve)]
        scores = [[score for _, score in curve[step]] for step in sorted(curve)]
        means = [statistics.mean(each) for each in scores]
        below = [mean - min(each) for mean, each in zip(means, scores, strict=True)]
        above = [max(each) - mean for mean, each in zip(means, scores, strict=True)]
        axes.errorbar(seen, means, [below, above], fmt="o-", color=colour, capsize=3, label=name)
    for name, value in references.items():
        axes.axhline(value, color="#9a9a9a", linestyle="--", linewidth=1)
        axes.annotate(name, (0, value), (4, 3), ha="left", size=8, color="#555555",
                      xycoords=axes.get_yaxis_transform(), textcoords="offset points")  # fmt: skip
    axes.set(xscale="log", xlabel="tokens seen", ylabel=what)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic_path(to) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def main() -> None:
    """Score, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--curve", nargs=3, action="append", required=True, default=[])
    parser.add_argument("--reference", nargs=2, action="append", default=[], help="NAME SCORE")
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--names", nargs="+", required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--to", type=Path, required=True)
    given = parser.parse_args()
    given.to.mkdir(parents=True, exist_ok=True)
    tasks = load_tasks([given.tasks], given.names)
    points: Points = {}
    details: list[dict[str, Any]] = []
    for name, run_name, kept in given.curve:
        run = Path(run_name)
        for checkpoint in sorted(Path(kept).glob("step-*[0-9]")):
            step = int(checkpoint.name.removeprefix("step-"))
            folder = model_of(run, checkpoint, given.to / run.name / f"step-{step}")
            scores = score(folder, tasks, given.dtype)
            mean, tokens = statistics.mean(scores.values()), tokens_seen(run, step)
            points.setdefault(name, {}).setdefault(step, []).append((tokens, mean))
            row = {"curve": name, "run": run_name, "step": step, "tokens": tokens}
            details.append(row | {"mean": mean, "scores": scores})
            print(f"{name}, {run.name}, step {step}, {tokens:,} tokens: {mean:.2f}", flush=True)
    references = {name: float(value) for name, value in given.reference}
    write_json(given.to / "curve.json", details)
    write_text(given.to / "curve.md", table(points))
    draw(points, references, given.to / "curve.png", f"mean of {len(tasks)} tasks × 100")
    print(table(points))


if __name__ == "__main__":
    main()
