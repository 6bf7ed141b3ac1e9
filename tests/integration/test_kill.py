"""A run that is killed at any place ends as if nothing had happened.

It is started again with the same command until it is done; models, adapters, mined negatives and
metrics must then be those of the run that was left alone, to the bit.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from faults import Fault, in_child
from nvembed.core import files
from nvembed.core.files import atomic_folder, tidy
from nvembed.core.ownership import MARK
from nvembed.training import metrics, model, stage_mining
from nvembed.training.checkpoint import latest_checkpoint
from tiny_run import assert_same, attempt, command, finish, write_inputs


def test_twenty_kills_at_random_moments(
    tmp_path: Path, tiny_decoder_dir: Path, whole: dict[str, Any]
) -> None:
    folders = (tmp_path / str(number) for number in range(1000))
    choose = random.Random(0)
    folder = next(folders)
    folder.mkdir()
    write_inputs(folder, tiny_decoder_dir)
    # Half of what a run takes: what is left of it gets shorter with every checkpoint.
    seconds = finish(folder).seconds / 2
    kills = 0
    while kills < 20:
        assert_same(folder, whole)
        folder = next(folders)
        folder.mkdir()
        write_inputs(folder, tiny_decoder_dir)
        while kills < 20:
            killed = attempt(folder, kill_after=choose.uniform(0, seconds))
            assert killed.error is None, killed.error
            if not killed.died:
                assert killed.value[0] == 0, killed.value
                break
            kills += 1
        else:
            finish(folder)
    assert_same(folder, whole)


# In the order in which a run comes to them; the run goes on after each.
KILLED_AT = [
    r"mkdir .*/run/checkpoints$",
    r"open .*/\.env\.json",
    r"rename .*/\.env\.json",
    r"open .*/\.config\.yaml",
    r"rename .*/\.config\.yaml",
    r"rename .*/\.inputs\.json",
    r"rename .*/\.metrics\.jsonl",
    r"rename .*/\.graph-memory\.json",
    r"open .*/train\.log",
    r"open .*/metrics\.jsonl$",
    r"\.best\..*/weights",
    r"rename .*/\.best\.",
    r"/\.step-0000000002\..*/weights",
    r"/\.step-0000000002\..*/optimizer",
    r"/\.step-0000000002\..*/state",
    r"rename .*/\.step-0000000002\.",
    r"rename .*/\.step-0000000004\.",
    r"/\.model-one\..*/config\.json",
    r"rename .*/\.model-one\.",
    r"/\.step-0000000005-end\..*/optimizer",
    r"rename .*/\.step-0000000005-end\.",
    r"remove .*/checkpoints/step-\d+/weights",
    r"rename .*/mined/two/\.pairs\.report",
    r"open .*/mined/two/\.pairs\.jsonl",
    r"rename .*/mined/two/\.pairs\.jsonl",
    r"rename .*/\.inputs\.json",
    r"/\.best\..*/weights",
    r"rmdir .*/\.best\.",
    r"rename .*/\.step-0000000008\.",
    r"/\.adapter\..*/adapter_config",
    r"rename .*/\.adapter\.",
    r"/\.model\..*/modules\.json",
    r"rename .*/\.model\.",
]


def test_killed_in_the_middle_of_every_kind_of_write(folder: Path, whole: dict[str, Any]) -> None:
    for place in KILLED_AT:
        killed = attempt(folder, fault=Fault(place))
        assert killed.died, (place, killed)
    finish(folder)
    assert_same(folder, whole)


def signalled(folder: Path, module: Any, name: str) -> tuple[int, str, str]:
    """The command, with a SIGTERM to itself when it comes to a function of a module."""
    original = getattr(module, name)

    def noted(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    setattr(module, name, noted)
    return command(folder)


STOPPED_AT: list[tuple[Any, str, str, str | None]] = [
    (model, "starting_model", "run: stopped by SIGTERM. The same command goes on", None),
    (metrics.Evaluation, "step", "interrupted after step 2; a checkpoint", "step-0000000002"),
    # Steps since the last checkpoint are not lost for it.
    (
        metrics.Evaluation,
        "put_back",
        "interrupted after step 5; a checkpoint",
        "step-0000000005-end",
    ),
    (
        stage_mining,
        "write_jsonl",
        "run: stopped by SIGTERM. The same command",
        "step-0000000005-end",
    ),
    (model, "save_adapters", "run: stopped by SIGTERM. The", "step-0000000010-end"),
]


def test_sigterm_leaves_in_order_wherever_it_comes(folder: Path, whole: dict[str, Any]) -> None:
    for module, name, message, latest in STOPPED_AT:
        done = in_child(functools.partial(signalled, folder, module, name), folder)
        assert done.error is None, (name, done.error)
        code, _, err = done.value
        assert (code, err.count("\n")) == (2, 1), (name, err)
        assert message in err
        assert {path.name for path in (folder / "run").rglob(".*")} <= {MARK}
        found = latest_checkpoint(folder / "run" / "checkpoints")
        assert (found.name if found else None) == latest
    finish(folder)
    assert_same(folder, whole)


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "renamed twice"])
def test_a_folder_that_is_being_replaced_is_never_lost(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole old or whole new, whatever is the last thing that its writer does."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    elif sys.platform == "linux":
        assert files._exchange(*(_named(tmp_path / "x" / name) for name in "ab"))
        assert (tmp_path / "x" / "a" / "1").read_text() == "b"

    def replace() -> None:
        with atomic_folder(tmp_path / "model") as new:
            (new / "1").write_text("new")
            (new / "2").write_text("new")

    found = []
    missing = 0
    for number in range(100):
        shutil.rmtree(tmp_path, ignore_errors=True)
        (tmp_path / "model").mkdir(parents=True)
        (tmp_path / "model" / "1").write_text("old")
        died = in_child(replace, tmp_path, fault=Fault(number)).died
        missing += not (tmp_path / "model").exists()
        tidy(tmp_path, "model*")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        found.append({path.name: path.read_text() for path in (tmp_path / "model").iterdir()})
        if not died:
            break
    old, new = {"1": "old"}, {"1": "new", "2": "new"}
    assert all(content in (old, new) for content in found)
    assert found == sorted(found, key=len)  # once it is new, it stays
    assert (found[0], found[-1]) == (old, new)
    assert len(found) > 6
    assert missing == (0 if exchange else 1)


def _named(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "1").write_text(folder.name)
    return folder


@pytest.mark.slow
def test_killed_at_every_file_operation(
    tmp_path: Path, tiny_decoder_dir: Path, whole: dict[str, Any]
) -> None:
    number = 0
    died = True
    while died:
        folder = tmp_path / str(number)
        folder.mkdir()
        write_inputs(folder, tiny_decoder_dir)
        died = attempt(folder, fault=Fault(number)).died
        if died:
            finish(folder)
        assert_same(folder, whole)
        number += 1
    assert number > 150
