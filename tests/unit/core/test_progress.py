from __future__ import annotations

import io
import subprocess
import sys
import time
import types

import pytest

from nvembed.core import reporting
from nvembed.core.reporting import announce, hold_note, progress, release_notes


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


def look_on(monkeypatch):
    """Somebody looks, and soon is sooner."""
    monkeypatch.delenv("NVEMBED_PROGRESS", raising=False)
    monkeypatch.setattr(reporting, "_SOON", 0.2)
    monkeypatch.setattr(reporting, "_shown", True)
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_a_terminal_shows_no_bar_of_what_ends_at_once(monkeypatch):
    terminal = look_on(monkeypatch)
    with progress(1, "encode") as bar:
        bar.advance(1, rate=3.4)
    time.sleep(0.3)
    assert terminal.getvalue() == ""
    with progress(2, "encode") as bar:
        bar.advance(1)
        time.sleep(0.4)
        assert "encode" in terminal.getvalue()
        bar.advance(1)
    assert "2/2" in terminal.getvalue()


def test_a_terminal_is_told_what_is_waited_for(monkeypatch):
    terminal = look_on(monkeypatch)
    announce("loading libraries")
    announce("loading MODEL")
    time.sleep(0.4)
    assert terminal.getvalue() == "loading MODEL …\n"
    announce("loading MODEL")
    hold_note("computing in float32")
    release_notes()  # it is there
    time.sleep(0.4)
    assert terminal.getvalue() == "loading MODEL …\ncomputing in float32\n"
    monkeypatch.setenv("NVEMBED_PROGRESS", "0")
    announce("loading MODEL")
    time.sleep(0.4)
    assert terminal.getvalue().count("loading") == 1


def test_in_a_notebook_the_bar_is_an_output_that_replaces_itself(capsys, monkeypatch):
    monkeypatch.delenv("NVEMBED_PROGRESS", raising=False)
    shown: list[str] = []

    def show(data, **options):
        assert options.pop("raw")
        assert shown or options == {"display_id": True}
        shown.append(data["text/plain"])
        return types.SimpleNamespace(update=show)

    shell = types.SimpleNamespace(kernel=None)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=show))
    with progress(40, "encode") as bar:
        begun = len(shown)
        assert "0/40" in shown[-1]
        for _ in range(39):
            bar.advance(rate=12.345)
        assert len(shown) <= begun + 2  # at most four times a second
        bar.advance(rate=12.345)
    assert "encode" in shown[-1]
    assert "40/40" in shown[-1]
    assert "rate 12.35" in shown[-1]
    assert not any("\x1b" in text or "\n" in text for text in shown)
    with progress(3, "x", shown=False) as bar:
        bar.advance(3)
    assert "3/3" not in shown[-1]
    assert capsys.readouterr() == ("", "")
    del shell.kernel  # IPython in a terminal
    with progress(3, "y"):
        assert "y" not in shown[-1]


# Runs code in a real kernel and prints what a cell shows as its outputs.
NOTEBOOK = """
import sys, nbformat, nbclient
cells = [nbformat.v4.new_code_cell(source) for source in sys.argv[1:]]
book = nbformat.v4.new_notebook(cells=cells)
nbclient.NotebookClient(book, timeout=60, kernel_name="python3").execute()
for cell in book.cells:
    for output in cell.outputs:
        print(output.get("data", {}).get("text/plain", output.get("text")))
    print("%%")
"""


@pytest.mark.slow
def test_a_notebook_shows_one_bar_that_replaces_itself():
    pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    begin = "from nvembed.core.reporting import progress\nshown = progress(40, 'encode')\n"
    cells = [
        begin + "with shown as bar:\n    for _ in range(40):\n        bar.advance(rate=12.345)",
        begin + "bar = shown.__enter__()\nbar.advance(3)",
    ]
    command = [sys.executable, "-W", "ignore", "-c", NOTEBOOK, *cells]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    whole, begun, end = found.stdout.split("%%\n")
    assert end == ""
    assert whole.count("encode") == 1  # one output, and no line for each change
    assert "40/40" in whole
    assert "rate 12.35" in whole
    assert "\x1b" not in whole
    assert begun.count("encode") == 1
    assert "0/40" in begun or "3/40" in begun
