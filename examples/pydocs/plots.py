"""The demo's pictures: losses by stage, scores by model. PNG files, no display needed.

Enters: the ``metrics.jsonl`` of a run; a table of scores. matplotlib is imported when a picture is
drawn, not before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvembed.core.errors import DataError
from nvembed.core.files import atomic_path, read_jsonl

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers too; grey is for baselines.
GREY, SKY, BLUE, ORANGE = "#9a9a9a", "#8cc5e3", "#0072b2", "#d55e00"
BAR_COLOURS = (GREY, SKY, BLUE, ORANGE)
SMOOTHING_STEPS = 20
INK, FAINT = "#222222", "#e4e4e4"


def plot_losses(metrics: Path, output: Path) -> None:
    """Draw the loss of each stage, one panel a stage: every step faintly, a running mean boldly.

    The stages have different negatives, so their losses do not compare and get axes of their own.

    Args:
        metrics: JSONL with "stage", "step" and "loss" in each row.
        output: PNG file to write.

    Raises:
        DataError: the file has no such rows.
    """
    stages: dict[str, tuple[list[int], list[float]]] = {}
    for number, row in read_jsonl(metrics):
        try:
            steps, losses = stages.setdefault(str(row["stage"]), ([], []))
            steps.append(int(row["step"]))
            losses.append(float(row["loss"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                "not a row of training metrics",
                where=f"{metrics}:{number}",
                expected='"stage", "step" and "loss"',
            ) from error
    if not stages:
        raise DataError("no training step was recorded", where=str(metrics))
    figure = _figure(width=4.6 * len(stages) + 0.6, height=3.6)
    colours = (BLUE, ORANGE, GREY)
    axes = figure.subplots(1, len(stages), squeeze=False)[0]
    for index, (name, (steps, losses)) in enumerate(stages.items()):
        panel, colour = axes[index], colours[index % len(colours)]
        panel.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.9)
        smooth = running_mean(losses, SMOOTHING_STEPS)
        panel.plot(steps, smooth, color=colour, linewidth=2.2)
        panel.annotate(
            f"{smooth[-1]:.2f}",
            (steps[-1], smooth[-1]),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
        )
        panel.set_title(name, loc="left", fontweight="bold")
        panel.set_xlabel("step")
        panel.set_ylim(bottom=0)
        panel.margins(x=0.08)
        _clean(panel)
    axes[0].set_ylabel("contrastive loss")
    caption = f"faint: each step; bold: mean of the last {SMOOTHING_STEPS} steps"
    figure.supxlabel(caption, fontsize=8, color="#666666")
    _save(figure, output)


def plot_scores(
    scores: Mapping[str, Sequence[float | None]],
    groups: Sequence[str],
    output: Path,
    *,
    title: str,
) -> None:
    """Draw bars: one group for each task, one bar in it for each model.

    Args:
        scores: model → a score from 0 to 1 for each group; None where the model has none.
        groups: what stands under the groups.
        output: PNG file to write.
        title: stands above.
    """
    figure = _figure(width=2.5 * len(groups) + 1.2, height=4.0)
    axes = figure.subplots()
    width = 0.8 / len(scores)
    for group in range(len(groups)):
        present = [name for name, row in scores.items() if row[group] is not None]
        for place, name in enumerate(present):
            # Bars of a group stay together where a model has no score for it.
            x = group + (place - (len(present) - 1) / 2) * width
            value = scores[name][group] or 0.0
            colour = BAR_COLOURS[list(scores).index(name) % len(BAR_COLOURS)]
            axes.bar(x, value, width * 0.92, color=colour)
            axes.text(x, value + 0.012, f"{value:.3f}", ha="center", fontsize=8, color=INK)
    for name, colour in zip(scores, BAR_COLOURS, strict=False):
        axes.bar(0, 0, 0, color=colour, label=name)  # one legend entry for each model
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)
    top = max((value or 0.0) for row in scores.values() for value in row)
    axes.set_ylim(0, min(1.0, top + 0.05) if top < 0.95 else 1.04)
    axes.set_title(title, loc="left", fontweight="bold", pad=28)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=len(scores),
        frameon=False,
        handlelength=1.0,
        handleheight=1.0,
        columnspacing=1.4,
    )
    _clean(axes)
    _save(figure, output)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and up to `window` - 1 before it."""
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means


def _figure(width: float, height: float) -> Figure:
    """Make a figure that draws into a file; pyplot and its windows are not involved."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)


def _save(figure: Figure, output: Path) -> None:
    options: dict[str, Any] = {"format": "png", "metadata": {"Software": None}}
    with atomic_path(output, "demo") as temporary:
        figure.savefig(temporary, **options)
