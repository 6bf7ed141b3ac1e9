"""The figure of a grid: every seed a dot, every arm its mean, by the values of the axes."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence

from nvembed.training.ablation.grid import GridConfig
from nvembed.training.ablation.statistics import ALL, ArmScores, mean_and_spread

_COLOURS = ("#0b6fb8", "#c8502c", "#3d8f45", "#8a5bb0", "#9a7a1f", "#4f5b66")
_MARKERS = ("o", "s", "D", "^", "v", "P")


def draw(grid: GridConfig, arms: Sequence[ArmScores]) -> bytes:
    """Draw the mean of all tasks per arm as PNG.

    One panel per value of the last axis, one column per value of the axis before it, one colour
    per combination of the others; a grid of one axis has one panel with a column per arm.
    """
    from matplotlib.figure import Figure

    by_name = {arm.arm: arm for arm in arms if arm.num_seeds}
    cells = _cells(grid)
    panels = list(dict.fromkeys(panel for panel, _, _ in cells.values()))
    columns = list(dict.fromkeys(column for _, column, _ in cells.values()))
    series = list(dict.fromkeys(name for _, _, name in cells.values()))
    styles = dict(zip(series, itertools.cycle(zip(_COLOURS, _MARKERS, strict=True))))
    figure = Figure(figsize=(max(4.5, 0.7 + len(panels) * 0.75 * (len(columns) + 1)), 4.2), dpi=150)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    width = 0.7 / len(series)
    for panel, axis in zip(panels, axes, strict=True):
        for arm, (where, column, name) in cells.items():
            if where != panel or arm not in by_name:
                continue
            scores = by_name[arm].columns[ALL]
            mean, spread = mean_and_spread(scores)
            x = columns.index(column) + (series.index(name) - (len(series) - 1) / 2) * width
            colour, marker = styles[name]
            axis.plot([x] * len(scores), scores, ".", color=colour, alpha=0.45, markersize=5)
            axis.errorbar(x, mean, yerr=spread, fmt=marker, color=colour, capsize=2, markersize=6)
        axis.set_title(panel, fontsize=10)
        axis.set_xticks(range(len(columns)), columns, fontsize=9, rotation=20, ha="right")
        axis.set_xlim(-0.6, len(columns) - 0.4)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("mean of all tasks × 100")
    if len(series) > 1:
        for name, (colour, marker) in styles.items():
            axes[0].plot([], [], marker, color=colour, label=name)
        figure.legend(loc="upper center", ncols=len(series), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _cells(grid: GridConfig) -> dict[str, tuple[str, str, str]]:
    """Arm → panel, column, series."""
    found = {}
    for arm, values in grid.arms().items():
        *others, last = values.values()
        panel = last if len(others) > 1 else ""
        column = others.pop() if panel else last
        found[arm] = (panel, column, " + ".join(others))
    return found
