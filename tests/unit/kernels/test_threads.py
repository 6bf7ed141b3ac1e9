"""Busy CPUs: what is free is found from waiting and told once; threads follow it if asked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nvembed.core import reporting
from nvembed.kernels import machine as threads
from nvembed.kernels.machine import (
    PATIENCE,
    WINDOW,
    Reading,
    ThreadWatch,
    allowed_cpus,
    read_now,
    room,
    watched_threads,
)
from nvembed.model.bulk import EncodeOptions, Job, embed


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Machine:
    """A scheduler in slow motion: at each tick the CPUs go to those that have run least."""

    def __init__(self, cpus: int, others: int = 0) -> None:
        self.cpus, self.others, self.time, self.idle = cpus, others, 0.0, 0.0
        self.own: dict[str, tuple[float, float]] = {}
        self.ran: dict[str, float] = {}

    def go(self, seconds: float, own: int) -> None:
        tick = 0.01
        ours, others = (
            [f"{kind}{n}" for n in range(count)]
            for kind, count in (("own", own), ("x", self.others))
        )
        self.ran = {name: self.ran.get(name, 0.0) for name in (*ours, *others)}
        least = min(self.ran.values())
        self.ran = {name: min(ran, least + tick) for name, ran in self.ran.items()}  # as newcomers
        for _ in range(round(seconds / tick)):
            running = sorted(self.ran, key=self.ran.__getitem__)[: self.cpus]
            for name in running:
                self.ran[name] += tick
            for name in ours:
                ran, waited = self.own.get(name, (0.0, 0.0))
                on = name in running
                self.own[name] = (ran + tick * on, waited + tick * (not on))
            self.idle += tick * (self.cpus - len(running))
            self.time += tick

    def read(self) -> Reading:
        return Reading(self.time, dict(self.own), self.idle)


@pytest.mark.parametrize("cpus", [1, 2, 16])
@pytest.mark.parametrize("others", [0, 1, 3, 8, 24])
@pytest.mark.parametrize("own", [1, 2, 16])
def test_what_others_leave_is_found_from_waiting(cpus: int, others: int, own: int) -> None:
    machine = Machine(cpus, others)
    before = machine.read()
    machine.go(6.0, own)
    found = room(before, machine.read(), threads=own, cpus=cpus)
    assert found is not None
    wanted = own + others
    assert found.waiting == pytest.approx(max(0.0, 1 - cpus / wanted), abs=0.01)
    assert found.free == pytest.approx(cpus - others, abs=0.02 * wanted**2 / cpus)


def test_threads_that_wait_for_each_other_and_further_ones_are_both_counted() -> None:
    start = Reading(0.0, {}, 0.0)
    # Two threads in lockstep on two CPUs with one hog: one shares its CPU, the other sleeps half.
    half = Reading(10.0, {"a": (5.0, 5.0), "b": (5.0, 0.0)}, 0.0)
    found = room(start, half, threads=2, cpus=2)
    assert found is not None
    assert found.free == pytest.approx(2 + 2 - 2 * 1.5)
    # Of one's own: four threads on two CPUs of which nobody else wants any.
    own = Reading(10.0, {name: (5.0, 5.0) for name in "abcd"}, 0.0)
    found = room(start, own, threads=2, cpus=2)
    assert found is not None
    assert found.free == pytest.approx(2)
    assert room(start, start, threads=2, cpus=2) is None
    assert room(start, Reading(10.0, {}, 20.0), threads=2, cpus=2) is None


LITTLE = round(PATIENCE / WINDOW)  # windows until threads become fewer


def looked(watch: ThreadWatch, machine: Machine, windows: int) -> list[str | None]:
    found = []
    for _ in range(windows):
        machine.go(WINDOW + 0.1, torch.get_num_threads())
        found.append(watch.look())
    return found


def test_threads_follow_what_is_free_and_stay_where_they_fit() -> None:
    torch.set_num_threads(2)
    machine = Machine(2)
    watch = ThreadWatch(adapts=True, read=machine.read, cpus=2)
    assert looked(watch, machine, 10) == [None] * 10
    machine.others = 3
    *quiet, line = looked(watch, machine, LITTLE)
    assert quiet == [None] * (LITTLE - 1)
    assert line is not None
    assert line.startswith("threads 2 → 1: of 2 about 0.0 are free for 2 threads here")
    assert torch.get_num_threads() == 1
    machine.others = 1  # one CPU is free, for one thread
    assert looked(watch, machine, 20) == [None] * 20
    machine.others = 0
    *quiet, line = looked(watch, machine, 2 * LITTLE)
    assert quiet == [None] * (2 * LITTLE - 1)
    assert line is not None
    assert line.startswith("threads 1 → 2:")
    assert looked(watch, machine, 10) == [None] * 10
    assert torch.get_num_threads() == 2


def test_a_moment_changes_nothing() -> None:
    torch.set_num_threads(2)
    machine = Machine(2)
    watch = ThreadWatch(adapts=True, read=machine.read, cpus=2)
    for _ in range(5):
        machine.others = 3
        assert looked(watch, machine, LITTLE - 1) == [None] * (LITTLE - 1)
        machine.others = 0
        assert looked(watch, machine, 1) == [None]
    machine.others = 3
    for _ in range(int(WINDOW / 0.1) - 1):  # windows are not shorter
        machine.go(0.1, 2)
        assert watch.look() is None


def test_one_long_step_is_enough() -> None:
    torch.set_num_threads(2)
    machine = Machine(2, others=3)
    watch = ThreadWatch(adapts=True, read=machine.read, cpus=2)
    machine.go(PATIENCE + 0.1, 2)
    assert str(watch.look()).startswith("threads 2 → 1: ")


def test_without_the_option_it_is_said_once_with_a_remedy() -> None:
    torch.set_num_threads(4)
    machine = Machine(4, others=2)
    watch = ThreadWatch(remedy="set N={}", read=machine.read, cpus=4)
    lines = [line for line in looked(watch, machine, 10) if line is not None]
    assert len(lines) == 1
    assert lines[0].startswith("the CPUs are busy: of 4 about 2.0 are free for 4 threads here")
    assert "for 33% of their time" in lines[0]
    assert lines[0].endswith("; end other jobs, or set N=2")
    assert torch.get_num_threads() == 4
    alone = Machine(2, others=5)
    torch.set_num_threads(1)
    watch = ThreadWatch(adapts=True, remedy="x", read=alone.read, cpus=2)
    lines = [line for line in looked(watch, alone, 10) if line is not None]
    assert len(lines) == 1  # there is no smaller number
    assert lines[0].endswith("end other jobs")


def test_a_system_that_counts_nothing_is_not_judged() -> None:
    watch = ThreadWatch(read=lambda: None, cpus=2)
    assert watch.look() is None


def test_linux_counts_the_time_of_this_process() -> None:
    before = read_now()
    if before is None:
        pytest.skip("this system does not count it")
    started = time.process_time()
    while time.process_time() - started < 0.1:
        pass
    after = read_now()
    assert after is not None
    spent = sum(
        ran - before.threads.get(name, (0.0,))[0] for name, (ran, _) in after.threads.items()
    )
    assert 0.05 < spent < 2.0
    assert after.time > before.time
    assert after.idle >= before.idle


def test_the_quota_of_a_container_counts(tmp_path: Path) -> None:
    all_cpus = allowed_cpus(tmp_path)
    assert all_cpus >= 1
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("1:cpu:/x\n0::/outer/inner\n")
    inner = tmp_path / "sys" / "fs" / "cgroup" / "outer" / "inner"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000\n")
    assert allowed_cpus(tmp_path) == all_cpus
    (inner.parent / "cpu.max").write_text("50000 100000\n")
    assert allowed_cpus(tmp_path) == 0.5
    (inner / "cpu.max").write_text("25000 100000\n")
    assert allowed_cpus(tmp_path) == 0.25


def test_the_number_of_threads_is_put_back() -> None:
    torch.set_num_threads(2)
    with watched_threads(1) as watch:
        assert torch.get_num_threads() == 1
        assert not watch.adapts
    with watched_threads("auto", "x", "cuda") as watch:
        assert watch.adapts
        assert watch.look() is None  # the threads of a CPU compute nothing there
        torch.set_num_threads(1)
    assert torch.get_num_threads() == 2


class Ones:
    """An encoder on a CPU."""

    device, dimension, max_tokens = torch.device("cpu"), 4, 8

    def encode_document(self, texts: Any, *, task: Any = None) -> Any:
        return torch.ones(len(texts), 4).numpy()


def test_encoding_tells_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(2)
    machine = Machine(2, others=2)
    monkeypatch.setattr(threads, "read_now", machine.read)
    monkeypatch.setattr(threads, "allowed_cpus", lambda: 2.0)
    monkeypatch.setattr(reporting, "_shown", True)
    encoder: Any = Ones()
    jobs = [Job(["a", "b"], tmp_path / f"{number}.npy") for number in range(6)]
    embed(jobs, encoder, EncodeOptions("document"), lambda *_: machine.go(WINDOW + 0.1, 2))
    told = [line for line in capsys.readouterr().err.splitlines() if "CPUs are busy" in line]
    assert len(told) == 1
    assert told[0].endswith("; end other jobs, or start it with OMP_NUM_THREADS=1")
