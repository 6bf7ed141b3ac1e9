"""The report of a grid: what was found, what it cost, and what it does not show.

``report.md``, ``scores.csv``, ``figure.png``, and ``report.html``, which needs no other file.
"""

from __future__ import annotations

import base64
import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nvembed.core.files import atomic_path, write_text
from nvembed.core.runs import describe_environment
from nvembed.evaluation.reference import paper_tables
from nvembed.evaluation.results import TaskResult, read_results
from nvembed.training.ablation import statistics
from nvembed.training.ablation.grid import GridConfig, Run, runs_by_arm
from nvembed.training.ablation.runner import ABLATE, Outcome, read_outcome
from nvembed.training.ablation.statistics import ALL, ArmScores, Contrast

_COLOURS = ("#0b6fb8", "#c8502c", "#3d8f45", "#8a5bb0", "#9a7a1f", "#4f5b66")
_MARKERS = ("o", "s", "D", "^", "v", "P")
_COLUMN_TITLES = {
    ALL: "mean of all tasks",
    "PairClassification": "Pair class.",
    "Classification": "Class.",
    "Summarization": "Summ.",
}


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is the name of the row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that the four files show."""

    title: str
    findings: tuple[str, ...]
    tables: tuple[Table, ...]
    figure: bytes | None
    scores: tuple[tuple[str, int, str, str, float | None], ...]


def report_files(grid: GridConfig) -> list[Path]:
    """The files that ``write_report`` writes."""
    names = ("figure.png", "scores.csv", "report.html", "report.md")
    return [Path(grid.output) / name for name in names]


def write_report(grid: GridConfig, runs: Sequence[Run]) -> Path:
    """Write the four files into the folder of the grid and return that of ``report.md``."""
    report = make_report(grid, runs)
    figure, scores, page, text = report_files(grid)
    if report.figure is not None:
        with atomic_path(figure, ABLATE) as path:
            path.write_bytes(report.figure)
    write_text(scores, _csv(report), ABLATE)
    write_text(page, _html(report), ABLATE)
    write_text(text, _markdown(report), ABLATE)
    return text


def make_report(grid: GridConfig, runs: Sequence[Run]) -> Report:
    """Put together what the finished runs show."""
    outcomes = {run: read_outcome(run) for run in runs}
    results = {
        run: read_results(run.results)
        for run, outcome in outcomes.items()
        if outcome.state == "finished"
    }
    arms = [
        statistics.arm_scores(arm, [results[run] for run in of_arm if run in results])
        for arm, of_arm in runs_by_arm(runs)
    ]
    contrasts = statistics.arm_contrasts(arms, grid.baseline_arm)
    tables = [_arm_table(grid, arms, contrasts)]
    effects = {
        axis: statistics.value_contrasts(arms, grid.arms(), axis, _reference(grid, axis))
        for axis in (grid.axes if len(grid.axes) > 1 else ())
    }
    tables += [_effect_table(grid, effects)] if effects else []
    tables += [*_paper_tables(grid, arms), _cost_table(grid, runs, outcomes)]
    if broken := [(run, o) for run, o in outcomes.items() if o.state == "failed"]:
        rows = tuple((run.arm, str(run.seed), outcome.error or "") for run, outcome in broken)
        tables.append(Table("Failed runs", ("arm", "seed", "error"), rows))
    return Report(
        title=grid.title or f"{Path(grid.output).name}: a grid of {Path(grid.recipe).stem}",
        findings=tuple(_findings(grid, runs, arms, contrasts, effects, results)),
        tables=tuple(tables),
        figure=draw(grid, arms) if any(arm.num_seeds for arm in arms) else None,
        scores=tuple(
            (run.arm, run.seed, name, result.type, result.main_score)
            for run, by_task in results.items()
            for name, result in by_task.items()
        ),
    )


def _reference(grid: GridConfig, axis: str) -> str:
    return grid.arms()[grid.baseline_arm][axis]


# --- Tables ---------------------------------------------------------------------------------------


def _arm_table(
    grid: GridConfig, arms: Sequence[ArmScores], contrasts: Mapping[str, Contrast]
) -> Table:
    columns = list(dict.fromkeys(column for arm in arms for column in arm.columns))
    rows = []
    for arm in arms:
        cells = [_spread_cell(arm.columns[c]) if arm.num_seeds else "–" for c in columns]
        is_baseline = arm.arm == grid.baseline_arm and arm.num_seeds
        compared = ("baseline", "") if is_baseline else _contrast_cells(contrasts.get(arm.arm))
        rows.append((arm.arm, str(arm.num_seeds), *cells, *compared))
    return Table(
        "Arms",
        ("arm", "seeds", *(_COLUMN_TITLES.get(c, c) for c in columns), "difference", "p"),
        tuple(rows),
        "Main scores × 100, mean ± standard deviation over seeds. Difference and p: of the mean "
        "of all tasks, against the baseline; * where p < 0.05 after Holm's correction for all "
        "arms.",
    )


def _effect_table(grid: GridConfig, effects: Mapping[str, Mapping[str, Contrast]]) -> Table:
    rows = [
        (axis, value, _reference(grid, axis), *_contrast_cells(contrast))
        for axis, contrasts in effects.items()
        for value, contrast in contrasts.items()
    ]
    return Table(
        "One axis at a time",
        ("axis", "value", "against", "difference", "p"),
        tuple(rows),
        "Mean of all tasks, averaged over the arms that differ in this axis alone. Holm's "
        "correction within each axis. It says little where the axes interact.",
    )


def _paper_tables(grid: GridConfig, arms: Sequence[ArmScores]) -> list[Table]:
    found = {
        arm.arm: statistics.mean_and_spread(arm.columns[ALL])[0] for arm in arms if arm.num_seeds
    }
    tables = []
    for paper in grid.paper:
        published = paper_tables()[paper.table]
        base = grid.baseline_arm if grid.baseline_arm in paper.rows else next(iter(paper.rows))
        base_theirs = published.rows[paper.rows[base]]["average"]
        rows = []
        for arm, row in paper.rows.items():
            theirs = published.rows[row]["average"]
            ours = f"{found[arm]:.2f}" if arm in found else "–"
            compared = arm in found and base in found
            difference = f"{found[arm] - found[base]:+.2f}" if compared else "–"
            cells = (ours, difference, f"{theirs:.2f}", f"{theirs - base_theirs:+.2f}")
            rows.append((arm, *cells))
        tables.append(
            Table(
                f"Beside the paper: {published.source}",
                ("arm", "here", "difference", "paper, 56 tasks", "difference"),
                tuple(rows),
                f"Differences to {base}. Other tasks, data and model size: compare signs, not "
                "numbers." + (f" {published.note}" if published.note else ""),
            )
        )
    return tables


def _cost_table(grid: GridConfig, runs: Sequence[Run], outcomes: Mapping[Run, Outcome]) -> Table:
    rows = []
    for arm, of_arm in runs_by_arm(runs):
        done = [outcomes[run] for run in of_arm if outcomes[run].state == "finished"]
        losses = [outcome.loss for outcome in done if outcome.loss is not None]
        tokens = _mean([outcome.tokens for outcome in done], ",.0f")
        training = _mean([outcome.training_seconds for outcome in done], ".0f")
        scoring = _mean([outcome.evaluation_seconds for outcome in done], ".0f")
        rows.append((arm, tokens, training, scoring, _mean(losses, ".3f")))
    return Table(
        "Cost per run",
        ("arm", "tokens trained on", "training, s", "scoring, s", "loss at the end"),
        tuple(rows),
        "Means over seeds, wall time. Losses of different stages or negatives do not compare.",
    )


def _mean(values: Sequence[float], form: str) -> str:
    return f"{sum(values) / len(values):{form}}" if values else "–"


def _spread_cell(scores: Sequence[float]) -> str:
    mean, spread = statistics.mean_and_spread(scores)
    return f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"


def _contrast_cells(contrast: Contrast | None) -> tuple[str, str]:
    if contrast is None or contrast.p is None:
        return "–" if contrast is None else f"{contrast.difference:+.2f}", "–"
    mark = " *" if contrast.stands_out else ""
    return f"{contrast.difference:+.2f}{mark}", _shown_p(contrast.p)


def _shown_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


# --- Findings -------------------------------------------------------------------------------------


def _findings(
    grid: GridConfig,
    runs: Sequence[Run],
    arms: Sequence[ArmScores],
    contrasts: Mapping[str, Contrast],
    effects: Mapping[str, Mapping[str, Contrast]],
    results: Mapping[Run, Mapping[str, TaskResult]],
) -> list[str]:
    tasks = {name for by_task in results.values() for name in by_task}
    found = [
        f"{len(results)} of {_counted(len(runs), 'run')} {'is' if len(results) == 1 else 'are'} "
        f"finished: {_counted(len(arms), 'arm')}, {_counted(len(grid.seeds), 'seed')} each, "
        f"{_counted(len(tasks), 'task')}."
    ]
    spread, freedom = statistics.pooled_spread(arms)
    visible = statistics.smallest_visible(arms)
    if visible is None:
        told = "so nothing is known of the spread, and no difference can be told from chance."
        return [*found, f"No arm has two finished seeds, {told}"]
    found.append(
        f"Other seeds move an arm's mean by {spread:.2f} (standard deviation, "
        f"{_counted(freedom, 'degree')} of freedom). Two arms must differ by "
        f"{visible:.2f} to stand out even as the only comparison; anything below is not shown "
        "to be a difference, nor to be none."
    )
    good = [name for name, c in contrasts.items() if c.stands_out and c.difference > 0]
    bad = [name for name, c in contrasts.items() if c.stands_out and c.difference < 0]
    open_ones = len(contrasts) - len(good) - len(bad)
    found.append(
        f"Against the baseline {grid.baseline_arm}: better {_listed(good)}; worse {_listed(bad)}; "
        f"{open_ones} of {len(contrasts)} cannot be told from it."
    )
    for axis, values in effects.items():
        for value, contrast in values.items():
            what = f"{axis}: {value} against {_reference(grid, axis)} {contrast.difference:+.2f}"
            verdict = ", which the spread does not allow to call a difference."
            if contrast.stands_out and contrast.p is not None:
                verdict = f" (p: {_shown_p(contrast.p)})."
            found.append(f"{what} over all else{verdict}")
    return found


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown or "none"


# --- Figure --------------------------------------------------------------------------------------


def draw(grid: GridConfig, arms: Sequence[ArmScores]) -> bytes:
    """Draw the mean of all tasks per arm as PNG: every seed a dot, every arm its mean."""
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
            mean, spread = statistics.mean_and_spread(scores)
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
    axes[0].ticklabel_format(axis="y", useOffset=False)
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


# --- Files ----------------------------------------------------------------------------------------


def _csv(report: Report) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("arm", "seed", "task", "type", "main_score"))
    writer.writerows(report.scores)
    return out.getvalue()


def _markdown(report: Report) -> str:
    lines = [f"# {report.title}", "", *(f"- {finding}" for finding in report.findings), ""]
    if report.figure is not None:
        lines += ["![arms of the grid](figure.png)", ""]
    for table in report.tables:
        lines += [f"## {table.title}", "", *([table.note, ""] if table.note else [])]
        lines += [f"| {' | '.join(table.header)} |", "|" + "---|" * len(table.header)]
        escaped = ([cell.replace("|", "\\|") for cell in row] for row in table.rows)
        lines += [*(f"| {' | '.join(row)} |" for row in escaped), ""]
    return "\n".join([*lines, _made_with(), ""])


def _made_with() -> str:
    environment = describe_environment()
    git = environment["git"]
    commit = f", commit {git['commit'][:10]}" if git else ""
    return (
        f"Made by nvembed {environment['packages']['nvembed']}{commit} on "
        f"{environment['cpus']} cores of {environment['processor']}, {environment['started'][:10]}."
    )


_PAGE = """\
<!doctype html><html lang='en'><head><meta charset='utf-8'>
<meta name='viewport' content='width=device-width, initial-scale=1'>
<title>{{ report.title }}</title><style>
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
.scroll { overflow-x: auto; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
tr.base td { font-weight: 600; }
img { max-width: 100%; background: #fff; border-radius: 6px; }
.note { opacity: .75; font-size: 13px; }
</style></head><body><h1>{{ report.title }}</h1>
<ul>{% for finding in report.findings %}<li>{{ finding }}</li>{% endfor %}</ul>
{% if figure %}<img alt='arms of the grid' src='data:image/png;base64,{{ figure }}'>{% endif %}
{% for table in report.tables %}<h2>{{ table.title }}</h2>
{% if table.note %}<p class='note'>{{ table.note }}</p>{% endif %}
<div class='scroll'><table><thead><tr>{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}
</tr></thead><tbody>
{% for row in table.rows %}<tr{% if 'baseline' in row %} class='base'{% endif %}>
{%- for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endfor %}<p class='note'>{{ made_with }}</p></body></html>
"""


def _html(report: Report) -> str:
    import jinja2  # not before a report is written

    figure = None if report.figure is None else base64.b64encode(report.figure).decode("ascii")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE)
    return page.render(report=report, figure=figure, made_with=_made_with()) + "\n"
