from __future__ import annotations

import pytest

from nvembed.core.reporting import progress


def test_silent_when_stderr_is_no_terminal(capsys, monkeypatch):
    monkeypatch.delenv("NVEMBED_PROGRESS", raising=False)
    with progress(3, "training") as bar:
        bar.advance(3, loss=0.5)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


@pytest.mark.parametrize("total", [3, None])
def test_shows_count_and_fields_on_stderr_when_asked(capsys, monkeypatch, total):
    monkeypatch.setenv("NVEMBED_PROGRESS", "1")
    monkeypatch.setenv("COLUMNS", "150")
    with progress(total, "training") as bar:
        bar.advance(loss=0.51234, tokens_per_s=3412.7)
        bar.advance(stage="two")
        bar.advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "training" in captured.err
    assert "3/3" in captured.err if total else "3/?" in captured.err
    assert "stage two" in captured.err


def test_fields_are_short(capsys, monkeypatch):
    monkeypatch.setenv("NVEMBED_PROGRESS", "1")
    monkeypatch.setenv("COLUMNS", "150")
    with progress(1, "x") as bar:
        bar.advance(loss=0.512345, tokens_per_s=3412.7, nan=float("nan"))
    assert "loss 0.5123  tokens_per_s 3,413  nan nan" in capsys.readouterr().err
