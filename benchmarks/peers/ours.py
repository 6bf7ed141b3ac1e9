"""Our side: the real trainer on a real configuration, watched from outside."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nvembed.core.runs import RunFolder
from nvembed.training.model import build_model
from nvembed.training.trainer import train
from peers.job import Job, Outcome, memory_bytes, trainer_main
from peers.setup import train_config


def run(job: Job) -> Outcome:
    """Train; a step ends when its row of metrics is written."""
    torch.set_num_threads(job.threads)
    options = dict(job.options)
    profile_steps = options.pop("profile_steps", 0)
    load_only = options.pop("load_only", False)
    config = train_config(replace(job, options=options))
    if load_only:
        model = build_model(config, Path(job.work), device="cpu")
        model.train()
        return Outcome([], [], loaded_bytes=memory_bytes())
    stamps = [time.perf_counter()]
    profiler = _Profiler(profile_steps, after=10)
    append = RunFolder.append_metrics

    def stamped(self: RunFolder, row: dict[str, Any]) -> None:
        append(self, row)
        profiler.step(len(stamps))
        stamps.append(time.perf_counter())

    RunFolder.append_metrics = stamped  # type: ignore[method-assign]
    train(config, base_dir=Path(job.work), fresh=True)
    if os.environ.get("RANK", "0") != "0":
        return Outcome([], [])
    losses = [row["loss"] for row in RunFolder(Path(config.output)).read_metrics()]
    return Outcome(losses, [after - before for before, after in itertools.pairwise(stamps)])


class _Profiler:
    """Profiles some steps and prints where their time went."""

    def __init__(self, steps: int, *, after: int) -> None:
        self._steps, self._after = steps, after
        self._profile: Any = None

    def step(self, number: int) -> None:
        if self._steps and number == self._after:
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self._profile.__enter__()
        elif self._steps and number == self._after + self._steps:
            self._profile.__exit__(None, None, None)
            averages = self._profile.key_averages()
            print(averages.table(sort_by="self_cpu_time_total", row_limit=25))


if __name__ == "__main__":
    trainer_main(run)
