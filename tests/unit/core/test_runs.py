from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import pytest

from nvembed.core.errors import ConfigError, UserError
from nvembed.core.files import atomic_folder
from nvembed.core.runs import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "first")
    folder.create("seed: 1\n")
    return folder


def test_create_writes_config_and_environment(run):
    assert run.exists
    assert run.config.read_text() == "seed: 1\n"
    assert run.checkpoints.is_dir()
    environment = json.loads(run.env.read_text())
    assert environment["python"] == platform.python_version()
    assert environment["packages"]["numpy"].count(".") >= 1
    assert environment["cpus"] >= 1


def test_git_state_is_the_commit_of_the_checkout_or_none(run):
    git = json.loads(run.env.read_text())["git"]
    assert git is None or (len(git["commit"]) == 40 and isinstance(git["changed"], bool))


def test_names_of_the_run_folder_are_a_contract(tmp_path):
    run = RunFolder(tmp_path)
    names = [run.config, run.env, run.metrics, run.log, run.checkpoints, run.model, run.eval]
    assert [path.relative_to(tmp_path).as_posix() for path in names] == [
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "train.log",
        "checkpoints",
        "model",
        "eval",
    ]


def test_second_create_is_refused_and_changes_nothing(run):
    run.append_metrics({"step": 1})
    with pytest.raises(ConfigError, match="holds a run already"):
        run.create("seed: 2\n")
    assert run.config.read_text() == "seed: 1\n"
    assert run.read_metrics() == [{"step": 1}]


def test_replace_clears_the_old_run_but_no_other_file(run):
    run.append_metrics({"step": 1})
    (run.checkpoints / "step-1").mkdir()
    run.model.mkdir()
    with atomic_folder(run.path / "model-one", "train") as folder:
        (folder / "weights").write_text("1")
    (run.path / "model-notes").mkdir()
    (run.path / "model-notes" / "mine").write_text("mine")
    (run.path / "notes.txt").write_text("mine")
    run.create("seed: 2\n", replace=True)
    assert run.config.read_text() == "seed: 2\n"
    assert run.read_metrics() == []
    assert list(run.checkpoints.iterdir()) == []
    assert not run.model.exists()
    assert not (run.path / "model-one").exists()
    assert (run.path / "notes.txt").read_text() == "mine"
    assert (run.path / "model-notes" / "mine").read_text() == "mine"


def test_metrics_are_appended_as_strict_json(run):
    run.append_metrics({"step": 1, "loss": 0.5, "note": "ü\u2028"})
    run.append_metrics({"step": 2, "loss": float("nan"), "norm": float("inf")})
    text = run.metrics.read_text(encoding="utf-8")
    assert text.count("\n") == 2
    assert "NaN" not in text
    assert "Infinity" not in text
    assert run.read_metrics() == [
        {"step": 1, "loss": 0.5, "note": "ü\u2028"},
        {"step": 2, "loss": None, "norm": None},
    ]


def test_torn_last_line_is_dropped(run):
    run.append_metrics({"step": 1})
    with open(run.metrics, "a") as out:
        out.write('{"step": 2, "lo')
    assert run.read_metrics() == [{"step": 1}]


def test_a_line_that_is_torn_within_a_character_is_dropped(run):
    run.append_metrics({"step": 1, "task": "ü"})
    with open(run.metrics, "ab") as out:
        out.write('{"step": 2, "task": "ü'.encode()[:-1])
    assert run.read_metrics() == [{"step": 1, "task": "ü"}]


def test_a_run_that_is_half_deleted_is_neither_used_nor_taken_for_a_new_one(run, monkeypatch):
    run.model.mkdir()
    run.tidy()

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", killed)
        with pytest.raises(KeyboardInterrupt):
            run.create("seed: 2\n", replace=True)
    assert run.model.is_dir()
    with pytest.raises(ConfigError, match="holds a run already"):
        run.create("seed: 2\n")
    assert "seed" not in run.config.read_text()
    run.create("seed: 2\n", replace=True)
    assert run.config.read_text() == "seed: 2\n"
    assert not run.model.exists()


def test_what_killed_writes_left_is_tidied_up_and_nothing_else(run):
    new, old = ".a1b2c3d4.nvembed-new", ".nvembed-old"
    leftovers = [f".model{new}", f".model-one{new}", f".adapter{old}", "mined/one"]
    for name in leftovers:
        (run.path / name).mkdir(parents=True)
    (run.path / f".metrics.jsonl{new}").write_text("half")
    (run.path / f"mined/one/.pairs.jsonl{new}").write_text("half")
    (run.path / "mined/one/pairs.jsonl").write_text("whole")
    users = [".git", ".old", ".model", ".model.bak", ".model.old", ".model-one.a1b2c3d4"]
    for name in users:
        (run.path / name).mkdir()
    run.tidy()
    assert sorted(path.name for path in run.path.iterdir()) == [
        *sorted([*users, ".nvembed.jsonl"]),
        "adapter",  # it was to be replaced, and its place was empty
        "checkpoints",
        "config.yaml",
        "env.json",
        "mined",
    ]
    assert [path.name for path in (run.path / "mined/one").iterdir()] == ["pairs.jsonl"]


def test_trim_forgets_later_steps_and_the_torn_line(run):
    for step in (1, 2, 3):
        run.append_metrics({"step": step})
    with open(run.metrics, "a") as out:
        out.write('{"st')
    run.trim_metrics(2)
    run.append_metrics({"step": 3, "again": True})
    assert run.read_metrics() == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the run folder"):
        RunFolder(tmp_path / "file" / "run").create("")
    with pytest.raises(UserError, match="resume from the last checkpoint"):
        RunFolder(tmp_path / "absent").append_metrics({"step": 1})
