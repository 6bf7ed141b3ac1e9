"""A build that is killed at any place ends, when it is started again, with the same bytes."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faults import Fault, Outcome, in_child
from nvembed.cli.main import run
from tiny_build import contents, write_inputs


def command(folder: Path) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(["data", "build", str(folder / "recipe.yaml")])
    return code, err.getvalue()


def attempt(folder: Path, fault: Fault | None = None, kill_after: float | None = None) -> Outcome:
    done = in_child(lambda: command(folder), folder, fault=fault, kill_after=kill_after)
    assert done.error is None, done.error
    return done


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The build that is left alone; in this process, so that its children have all modules."""
    folder = tmp_path_factory.mktemp("whole")
    write_inputs(folder)
    assert command(folder) == (0, "[1/3] pairs\n[2/3] sts\n[3/3] classes\n")
    found = contents(folder / "built")
    assert len([name for name in found if name.endswith(".parquet")]) == 7
    return found


def assert_finishes(folder: Path, whole: dict[str, bytes]) -> None:
    assert attempt(folder).value[0] == 0
    assert contents(folder / "built") == whole
    assert sorted(path.name for path in (folder / "built").iterdir()) == ["classes", "pairs", "sts"]


def test_twenty_kills_at_random_moments(tmp_path: Path, whole: dict[str, bytes]) -> None:
    choose = random.Random(0)
    kills = number = 0
    seconds = 0.2
    while kills < 20:
        folder = tmp_path / str(number)
        folder.mkdir()
        write_inputs(folder)
        number += 1
        if number == 1:
            seconds = attempt(folder).seconds
        while kills < 20:
            if not attempt(folder, kill_after=choose.uniform(0, seconds / 2)).died:
                break
            kills += 1
        assert_finishes(folder, whole)


KILLED_AT = [
    r"mkdir .*/built/\.steps/pairs",
    r"open .*/\.read-.*/refused",
    r"open .*/\.read-.*/part-00000",
    r"rename .*/\.read-",
    r"open .*/\.distinct-.*/spilled",
    r"open .*/\.distinct-.*/part-00000",
    r"remove .*/spilled",
    r"rename .*/\.distinct-",
    r"open .*/\.decontaminate-.*/contaminated",
    r"rename .*/\.decontaminate-",
    r"open .*/\.pairs\..*/refused",
    r"open .*/mine-.*/\.in\.jsonl",
    r"rename .*/mine-.*/\.documents\.jsonl",
    r"open .*/mine-.*/\.out\.jsonl",
    r"rename .*/mine-.*/\.out\.jsonl\.report",
    r"open .*/\.pairs\..*/part-00001",
    r"rename .*/\.manifest\.json",
    r"rename .*/\.pairs\.",
    r"rmdir .*pairs",
    r"open .*/\.read-.*/part-00000",
    r"rename .*/\.sts\.",
    r"open .*/\.classes\..*/refused",
    r"rename .*/\.classes\.",
]


def test_killed_in_the_middle_of_every_kind_of_write(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    write_inputs(tmp_path)
    for place in KILLED_AT:
        assert attempt(tmp_path, Fault(place)).died, place
    assert_finishes(tmp_path, whole)


FULL_AT = {
    r"mkdir .*/built": "cannot write: No space left",
    r"open .*/\.read-.*/refused": r"read-\w+: cannot write: No space left",
    r"open .*/\.read-.*/part-00000": r"read-\w+: cannot write: No space left",
    r"open .*/spilled": r"distinct-\w+: cannot write: No space left",
    r"open .*/\.pairs\..*/part-00001": "built/pairs: cannot write: No space left",
    r"open .*/\.sts\..*/\.manifest": "manifest.json: cannot write: No space left",
}


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, whole: dict[str, bytes]) -> None:
    write_inputs(tmp_path)
    for place, message in FULL_AT.items():
        code, err = attempt(tmp_path, Fault(place, full=True)).value
        lines = [line for line in err.splitlines() if not line.startswith("[")]
        assert (code, len(lines)) == (2, 1), (place, err)
        assert re.search(message, lines[0]), (place, err)
    assert_finishes(tmp_path, whole)


def test_a_rebuild_that_is_killed_leaves_one_of_the_two(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    write_inputs(tmp_path)
    assert_finishes(tmp_path, whole)
    write_inputs(tmp_path, rows_per_shard=5)
    for place in (r"open .*/\.pairs\..*/part-00003", r"rename .*/\.manifest\.json"):
        assert attempt(tmp_path, Fault(place)).died
        left = {
            name: content
            for name, content in contents(tmp_path / "built").items()
            if not name.startswith(".")
        }
        assert left == whole
    assert attempt(tmp_path).value[0] == 0
    assert len(list((tmp_path / "built" / "pairs").glob("part-*"))) == 6


@pytest.mark.slow
def test_killed_at_every_file_operation(tmp_path: Path, whole: dict[str, bytes]) -> None:
    number = 0
    died = True
    while died:
        folder = tmp_path / str(number)
        folder.mkdir()
        write_inputs(folder)
        died = attempt(folder, Fault(number)).died
        assert_finishes(folder, whole)
        number += 1
    assert number > 80


@pytest.mark.slow
def test_kills_of_the_command_itself(tmp_path: Path) -> None:
    """As a user would start it: Python, the command line, SIGKILL."""
    for name in ("alone", "killed"):
        (tmp_path / name).mkdir()
        write_inputs(tmp_path / name)
    program = [sys.executable, "-m", "nvembed", "data", "build"]
    subprocess.run([*program, str(tmp_path / "alone" / "recipe.yaml")], check=True)
    choose = random.Random(1)
    kills = 0
    while kills < 10:
        process = subprocess.Popen([*program, str(tmp_path / "killed" / "recipe.yaml")])
        time.sleep(choose.uniform(0.3, 0.9))
        os.kill(process.pid, signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        if kills < 10 and process.returncode == 0:
            break
    subprocess.run([*program, str(tmp_path / "killed" / "recipe.yaml")], check=True)
    assert contents(tmp_path / "killed" / "built") == contents(tmp_path / "alone" / "built")
