"""A measurement that load does not move, and what is kept of it."""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from nvembed.core import cache
from nvembed.kernels import build as cpu
from nvembed.kernels import machine as precision
from nvembed.kernels.machine import KEPT, kept_gain, measured_gain


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    cache._of_this_process.cache_clear()


class BusyMachine:
    """Clocks of a machine with other jobs: most computations are held up, some for long.

    Args:
        monkeypatch: sets the clocks.
        seed: of what disturbs.
        disturbed: share of the computations whose CPU time grows (cold caches, lower frequency).
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int, disturbed: float = 0.6) -> None:
        self.cpu_ns, self.wall_ns = 0, 0
        self._random = random.Random(seed)
        self._disturbed = disturbed
        monkeypatch.setattr(time, "thread_time_ns", lambda: self.cpu_ns)
        monkeypatch.setattr(time, "thread_time", lambda: self.cpu_ns / 1e9)
        for name in ("perf_counter", "monotonic", "time"):
            monkeypatch.setattr(time, name, lambda: self.wall_ns / 1e9)
            monkeypatch.setattr(time, f"{name}_ns", lambda: self.wall_ns)

    def work(self, milliseconds: float) -> Callable[[], None]:
        """A computation that takes so long where nothing disturbs."""

        def compute() -> None:
            took = milliseconds * 1e6
            if self._random.random() < self._disturbed:
                took *= self._random.uniform(1.1, 30)
            self.cpu_ns += int(took)
            self.wall_ns += int(took + self._random.expovariate(1 / 40e6))  # of the others' turns

        return compute


@pytest.mark.parametrize("seed", range(20))
def test_load_does_not_move_it(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = BusyMachine(monkeypatch, seed)
    assert measured_gain(machine.work(6), machine.work(2)) == pytest.approx(3, rel=1e-6)


@pytest.mark.parametrize(("gain", "expected"), [(2.0, "bfloat16"), (1.2, "float32")])
@pytest.mark.parametrize("seed", range(5))
def test_the_decision_stays_on_a_busy_machine(
    seed: int, gain: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = BusyMachine(monkeypatch, seed)
    milliseconds = {torch.float32: 4.0, torch.bfloat16: 4.0 / gain}
    monkeypatch.setattr(
        precision.functions, "product", lambda x, _: machine.work(milliseconds[x.dtype])()
    )
    monkeypatch.setattr(
        precision, "this_cpu", lambda: cpu.read_cpu(["flags : avx512f avx512_bf16"])
    )
    assert precision.fastest_precision("cpu") == expected


def test_it_counts_the_time_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    measured_gain(lambda: None, lambda: None)
    assert seen == [1, before]


def test_both_sides_take_turns() -> None:
    turns: list[str] = []
    measured_gain(lambda: turns.append("plain"), lambda: turns.append("other"))
    assert turns == ["plain", "other"] * (len(turns) // 2)
    assert len(turns) >= 20


def test_a_real_gain() -> None:
    few, many = torch.ones(64, 64), torch.ones(512, 512)
    assert measured_gain(lambda: many @ many, lambda: few @ few) > 20


def never() -> None:
    raise AssertionError("it was measured again")


def times(gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next measurement come out so."""
    monkeypatch.setattr(precision, "measured_gain", lambda plain, other: gain)


def kept_file(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "cache" / "measured").glob("bfloat16-*.json")
    return file


def test_one_measurement_holds_for_all_processes_of_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times(2.5, monkeypatch)
    assert kept_gain("bfloat16", never, never) == 2.5
    times(0.5, monkeypatch)
    assert kept_gain("bfloat16", never, never) == 2.5
    assert kept_gain("another", never, never) == 0.5
    assert kept_file(tmp_path).parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("what", ["nvembed", "torch", "cores", "model", "flags", "kernels"])
def test_it_is_measured_again_where_something_else_computes(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times(2.5, monkeypatch)
    kept_gain("bfloat16", never, never)
    times(0.5, monkeypatch)
    lines = {"model": ["model name : Other"], "flags": ["flags : avx"]}.get(what)
    if what == "nvembed":
        monkeypatch.setattr(precision, "__version__", "0.0.1")
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "0.0.1")
    elif what == "kernels":
        (tmp_path / "native").mkdir()
        (tmp_path / "native" / "other.cpp").touch()
        monkeypatch.setattr(precision, "_NATIVE", tmp_path / "native")
    else:
        if lines is None:
            monkeypatch.setattr(os, "cpu_count", lambda: 77)
            lines = Path("/proc/cpuinfo").read_text().splitlines()
        other = cpu.read_cpu(lines)
        monkeypatch.setattr(precision, "this_cpu", lambda: other)
    assert kept_gain("bfloat16", never, never) == 0.5


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("2.5", "0.5"),
        lambda text: "[1]",
        lambda text: "{}",
        lambda text: text.replace('"2.5"', "null").replace("2.5", "null"),
        lambda text: "\x00",
    ],
)
def test_what_is_damaged_is_measured_again(
    damage: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times(2.5, monkeypatch)
    kept_gain("bfloat16", never, never)
    file = kept_file(tmp_path)
    file.write_text(damage(file.read_text()))
    times(4.0, monkeypatch)
    assert kept_gain("bfloat16", never, never) == 4.0
    times(1.0, monkeypatch)
    assert kept_gain("bfloat16", never, never) == 4.0


@pytest.mark.parametrize(
    ("age", "expected"),
    [(KEPT - timedelta(hours=1), 2.5), (KEPT + timedelta(hours=1), 4.0), (-timedelta(days=1), 4.0)],
)
def test_it_expires(
    age: timedelta, expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times(2.5, monkeypatch)
    kept_gain("bfloat16", never, never)
    file = kept_file(tmp_path)
    content = {"gain": 2.5, "measured": (datetime.now(UTC) - age).isoformat()}
    file.write_text(json.dumps(content | {"checksum": precision._checksum(content)}))
    times(4.0, monkeypatch)
    assert kept_gain("bfloat16", never, never) == expected


def test_a_file_that_others_can_write_to_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times(2.5, monkeypatch)
    kept_gain("bfloat16", never, never)
    kept_file(tmp_path).chmod(0o666)
    times(4.0, monkeypatch)
    assert kept_gain("bfloat16", never, never) == 4.0


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").touch()
    times(2.5, monkeypatch)
    assert kept_gain("bfloat16", never, never) == 2.5

    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    times(3.5, monkeypatch)
    assert kept_gain("bfloat16", never, never) == 3.5


def test_of_two_that_measure_at_once_the_later_takes_the_first_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slowly(plain: object, other: object) -> float:
        times(2.5, monkeypatch)
        assert kept_gain("bfloat16", never, never) == 2.5  # another process, meanwhile
        return 0.5

    monkeypatch.setattr(precision, "measured_gain", slowly)
    assert kept_gain("bfloat16", never, never) == 2.5
