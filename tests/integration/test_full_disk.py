"""A run whose disk is full says so in one line, and goes on to the same bits once there is room."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import Fault
from tiny_run import assert_same, attempt, finish

# Where the disk is full, and the line that says so. The same command goes on once there is room.
FULL_AT = {
    r"mkdir .*/run/checkpoints$": "cannot make the run folder: No space left on device",
    r"open .*/\.config\.yaml": r"run/config\.yaml: cannot write: No space left",
    r"open .*/\.metrics\.jsonl": r"run/metrics\.jsonl: cannot write: No space left",
    r"open .*/\.graph-memory\.json": r"run/graph-memory\.json: cannot write: No space left",
    r"open .*/train\.log": r"run/train\.log: cannot write: No space left",
    r"open .*/metrics\.jsonl$": r"run/metrics\.jsonl: cannot write: No space left",
    r"/\.best\..*/weights": r"checkpoints/best: cannot write: No space left",
    r"/\.step-0000000002\..*/optimizer": r"step-0000000002: cannot write: No space left",
    r"/\.step-0000000004\..*/state": r"step-0000000004: cannot write: No space left",
    r"/\.model-one\..*/modules\.json": r"run/model-one: cannot write: No space left",
    r"/\.step-0000000005-end\..*/weights": r"step-0000000005-end: cannot write: No space left",
    r"open .*/mined/two/\.pairs\.jsonl": r"two/pairs\.jsonl: cannot write: No space left",
    r"/\.step-0000000008\..*/optimizer": r"step-0000000008: cannot write: No space left",
    r"/\.adapter\..*/adapter_config": r"run/adapter: cannot write: No space left",
    r"/\.model\..*/1_Latent": r"run/model: cannot write: No space left",
}


def test_a_full_disk_is_one_line_and_loses_nothing(folder: Path, whole: dict[str, Any]) -> None:
    for place, message in FULL_AT.items():
        stopped = attempt(folder, fault=Fault(place, full=True))
        assert stopped.error is None, (place, stopped.error)
        code, _, err = stopped.value
        assert (code, err.count("\n")) == (2, 1), (place, err)
        assert re.search(f"^error: .*{message}", err), (place, err)
    finish(folder)
    assert_same(folder, whole)


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Callable[[int], None]]:
    """A file system at ``run``, of as many kB as the function is told; more each time."""
    place = folder / "run"
    place.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=16k", "nvembed-test", str(place)]
    try:
        made = subprocess.run(options, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs the command mount")
    if made.returncode:
        pytest.skip(f"may not mount a small disk: {made.stderr.strip()}")

    def grow(kilobytes: int) -> None:
        remount = ["mount", "-o", f"remount,size={kilobytes}k", str(place)]
        subprocess.run(remount, capture_output=True, check=True)

    try:
        yield grow
    finally:
        subprocess.run(["umount", str(place)], capture_output=True, check=True)


def test_a_disk_that_is_really_full(
    folder: Path, whole: dict[str, Any], small_disk: Callable[[int], None]
) -> None:
    messages = []
    kilobytes = 40
    small_disk(kilobytes)
    while True:
        done = attempt(folder)
        assert done.error is None, done.error
        code, _, err = done.value
        if code == 0:
            break
        assert (code, err.count("\n")) == (2, 1), err
        assert "o space left" in err, err
        messages.append(err)
        kilobytes = kilobytes * 4 // 3
        small_disk(kilobytes)
    assert_same(folder, whole)
    for place in ("checkpoints/step-", "model-one"):
        assert any(place in message for message in messages), messages
