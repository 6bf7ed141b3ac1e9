"""The front: exit codes, and one line on stderr for every mistake."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

import nvembed
from nvembed.cli.main import run
from nvembed.core.errors import DataError


def fails(capsys, *arguments: str) -> str:
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def raise_from_search(monkeypatch, error: BaseException) -> list[str]:
    """Make the function behind ``nvembed search`` raise; return a command that calls it."""

    def search_file(*arguments, **options):
        raise error

    monkeypatch.setattr("nvembed.encoding.file_search.search_file", search_file)
    return ["search", "model", "a query", "--documents", "docs.jsonl"]


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version(capsys, option):
    assert run([option]) == 0
    assert capsys.readouterr().out == f"nvembed {nvembed.__version__}\n"


def test_no_arguments_show_the_help(capsys):
    assert run([]) == 0
    assert "make demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument"),
        (["train", "x.yaml", "--frsh"], "No such option: --frsh"),
        (["search", "m", "q", "--documents", "d.jsonl", "--top-k", "0"], "top-k"),
        (["serve", "m", "--port", "99999"], "equal to 65535. See nvembed --help"),
        (["encode", "m", "--input", "x.jsonl"], "--output"),
        (["mine", "a", "b", "--teacher", "m", "--kind", "foo"], "'foo' is not one of"),
    ],
)
def test_usage_errors(capsys, arguments, part):
    assert part in fails(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "no.yaml"], ["no.yaml: no such file"]),
        (
            ["encode", "nowhere/at/all", "--input", "no.jsonl", "--output", "x.npy"],
            ["no.jsonl: no such file"],
        ),
        (
            ["mine", "a.jsonl", "b.jsonl", "--teacher", "m", "num_negative=3", "seed=x"],
            ["2 problems", "did you mean num_negatives?", "seed (override 'seed=x'): \"x\" given"],
        ),
        (
            ["mine", "a.jsonl", "b.jsonl", "--teacher", "m", "strategy=margin", "threshold=3"],
            ["command line: threshold is 3, margin takes 0 to 2"],
        ),
    ],
)
def test_user_errors(capsys, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.chdir(tmp_path)
    text = fails(capsys, *arguments)
    for part in parts:
        assert part in text


def test_a_broken_recipe_is_reported_whole(capsys, tmp_path):
    recipe = tmp_path / "x.yaml"
    recipe.write_text("output: x\nsede: 1\nmodel: {bakbone: y}\n")
    text = fails(capsys, "train", str(recipe), "stages.0.steps=3")
    for part in (
        "sede (line 2): unknown key, did you mean seed?",
        "model.bakbone (line 3): unknown key, did you mean backbone?",
        "model.backbone (line 3): missing",
        "datasets: missing",
        "override 'stages.0.steps=3'",
    ):
        assert part in text


def test_several_lines_in_a_message_become_one(capsys, monkeypatch):
    error = DataError("two\n lines", where="a.jsonl:3", hint="Mend it")
    assert fails(capsys, *raise_from_search(monkeypatch, error)) == (
        "error: a.jsonl:3: two lines. Mend it\n"
    )


def test_ctrl_c(capsys, monkeypatch):
    assert run(raise_from_search(monkeypatch, KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: stopped by Ctrl-C\n"


def test_full_disk(capsys, monkeypatch):
    error = OSError(errno.ENOSPC, "No space left on device", "/data/x")
    text = fails(capsys, *raise_from_search(monkeypatch, error))
    assert "/data/x: no space left on the disk" in text


def test_missing_extra(capsys, monkeypatch):
    error = ModuleNotFoundError("No module named 'mteb.x'", name="mteb.x")
    text = fails(capsys, *raise_from_search(monkeypatch, error))
    assert "pip install 'nvembed[eval]'" in text


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        ModuleNotFoundError("No module named 'own'", name="own"),
        OSError(errno.ENOENT, "x"),
    ],
)
def test_bugs_keep_their_traceback(monkeypatch, error):
    with pytest.raises(type(error)):
        run(raise_from_search(monkeypatch, error))


def test_ctrl_c_in_a_real_process():
    code = (
        "import signal, sys, time, nvembed.encoding.file_search as s\n"
        "from nvembed.cli.main import run\n"
        # Tests that run in the background of a shell are started with SIGINT ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def wait(*a, **k):\n"
        "    print('ready', flush=True); time.sleep(30)\n"
        "s.search_file = wait\n"
        "sys.exit(run(['search', 'm', 'q', '--documents', 'd']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == "error: stopped by Ctrl-C\n"
