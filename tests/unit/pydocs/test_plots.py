"""Pictures: they show the numbers they were given, and wrong files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from nvembed.core.errors import DataError
from pydocs import plots
from pydocs.plots import plot_losses, plot_scores, running_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    save = plots._save

    def keep(figure: Figure, output: Path) -> None:
        figures.append(figure)
        save(figure, output)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def write_metrics(path: Path) -> None:
    rows = [{"step": n, "stage": "stage1", "loss": 4.0 - n / 100} for n in range(1, 101)]
    rows += [{"step": n, "stage": "stage2", "loss": 1.5} for n in range(101, 131)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_losses(tmp_path: Path, drawn: list[Figure]) -> None:
    write_metrics(tmp_path / "metrics.jsonl")
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    one, two = drawn[0].axes
    assert [axes.get_title(loc="left") for axes in (one, two)] == ["stage1", "stage2"]
    raw, smooth = one.lines
    np.testing.assert_allclose(raw.get_ydata(), 4.0 - np.arange(1, 101) / 100)
    assert np.asarray(smooth.get_ydata())[-1] == pytest.approx(3.095)  # the mean of 81 to 100
    assert np.asarray(two.lines[0].get_xdata())[0] == 101


@pytest.mark.parametrize("line", ['{"step": 1, "stage": "a"}', '{"step":1,"stage":"a","loss":{}}'])
def test_other_files_are_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "stage": "a", "loss": 1}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a row of training metrics"):
        plot_losses(path, tmp_path / "loss.png")
    path.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="no training step"):
        plot_losses(path, tmp_path / "loss.png")


def test_scores(tmp_path: Path, drawn: list[Figure]) -> None:
    scores = {"BM25": [0.6, None], "base": [0.05, 0.3], "trained": [0.65, 0.7]}
    plot_scores(scores, ["retrieval", "classification"], tmp_path / "scores.png", title="Scores")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    bars = [patch for patch in axes.patches if patch.get_width()]
    assert [bar.get_height() for bar in bars] == [0.6, 0.05, 0.65, 0.3, 0.7]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in bars]
    assert np.mean(centres[:3]) == pytest.approx(0)
    assert np.mean(centres[3:]) == pytest.approx(1)  # no gap where BM25 has no score
    assert [text.get_text() for text in axes.texts] == ["0.600", "0.050", "0.650", "0.300", "0.700"]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == list(scores)


def test_running_mean() -> None:
    values = list(np.random.default_rng(0).normal(size=50))
    expected = [np.mean(values[max(0, n - 6) : n + 1]) for n in range(50)]
    np.testing.assert_allclose(running_mean(values, 7), expected)
