"""One training run in a process of its own: what it is told, and what it reports.

Read by the peers' interpreters too, so it imports the standard library only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1]

PROGRAMS = {
    "nvembed": "peers.ours",
    "sentence-transformers": "peers.sentence_trainer",
    "FlagEmbedding": "peers.flag_embedding",
}


@dataclass(frozen=True)
class Job:
    """A run of one side.

    Args:
        side: key of ``PROGRAMS``.
        work: folder with ``stock/`` (the model as plain sentence-transformers), ``adapter/`` (LoRA
            with B = 0), ``train.jsonl`` (in the order that our trainer reads as ``columns.json``)
            and ``columns.json`` (one list per column, in order of the steps).
        decoder: folder of the language model.
        steps: optimizer updates.
        batch_size: queries per step.
        num_negatives: of every query.
        learning_rate: falls linearly from here to zero, no warm-up.
        temperature: of the softmax.
        max_tokens: longest text.
        instruction: of the queries.
        prompt: the instruction as it stands before a query.
        prompt_tokens: tokens (with BOS) that pooling leaves out on the query's side.
        threads: of torch, in each process.
        processes: that share the run, by torchrun; our side only.
        options: what differs between variants of one side.
    """

    side: str
    work: str
    decoder: str
    steps: int
    batch_size: int
    num_negatives: int = 3
    learning_rate: float = 5e-4
    temperature: float = 0.05
    max_tokens: int = 512
    instruction: str = ""
    prompt: str = ""
    prompt_tokens: int = 0
    threads: int = 2
    processes: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def of(self, side: str, **options: Any) -> Job:
        """The same run by another side."""
        return replace(self, side=side, options=options)

    def columns(self) -> dict[str, list[str]]:
        """Texts of the run: ``query``, ``positive``, ``negative_1`` …"""
        columns: dict[str, list[str]] = json.loads(Path(self.work, "columns.json").read_text())
        return columns


@dataclass
class Outcome:
    """What a run reports.

    Args:
        losses: of every step.
        step_seconds: from the end of the step before to the end of the step; that of the first step
            counts from the start of training.
        wall_seconds: of the whole process, loading included.
        others_share: share of the machine's CPU time that went to others meanwhile, or was taken by
            the machine's host; timings with more than a few percent are worth nothing.
        loaded_bytes: resident memory when the model and its data were loaded (0: not measured).
        peak_bytes: highest resident memory.
    """

    losses: list[float]
    step_seconds: list[float]
    loaded_bytes: int = 0
    peak_bytes: int = 0
    wall_seconds: float = 0.0
    others_share: float = 0.0


class JobError(RuntimeError):
    """A run that failed, with the end of what it printed."""


def run_job(job: Job, python: str | Path = sys.executable) -> Outcome:
    """Run a job in a fresh process and wait for it."""
    path = [str(BENCHMARKS), str(BENCHMARKS.parent / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "OMP_NUM_THREADS": str(job.threads),
        "TOKENIZERS_PARALLELISM": "false" if job.threads == 1 else "true",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with tempfile.TemporaryDirectory(prefix="nvembed-bench-") as folder:
        given, result = Path(folder, "job.json"), Path(folder, "result.json")
        given.write_text(json.dumps(asdict(job)))
        # Tokens are computed anew in every run, as the peers do.
        environment["NVEMBED_CACHE"] = str(Path(folder, "cache"))
        started, taken = time.perf_counter(), _cpu_seconds()
        command = [str(python), "-m", PROGRAMS[job.side], str(given), str(result)]
        if job.processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone"]
            command[1:1] = [*launcher, f"--nproc-per-node={job.processes}"]
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - started
        others = max(0.0, _cpu_seconds() - taken) / (seconds * (os.cpu_count() or 1))
        if done.returncode or not result.exists():
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
            raise JobError(f"{job.side} {job.options} ended with {done.returncode}\n{tail}")
        if "--verbose" in sys.argv:
            print(done.stdout)
        outcome = Outcome(**json.loads(result.read_text()))
    outcome.wall_seconds, outcome.others_share = seconds, others
    if others > 0.05:
        print(f"  the machine was busy: others took {others:.0%} of its CPU time", flush=True)
    return outcome


def _cpu_seconds() -> float:
    """CPU time of the machine that was neither idle nor used by our children or this process."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, interrupts, soft, stolen = (int(value) for value in fields[:8])
    busy = (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return busy - own.user - own.system - own.children_user - own.children_system


def child_main(run: Any) -> None:
    """Entry of a program: read the job, run it, write the outcome."""
    given, result = Path(sys.argv[1]), Path(sys.argv[2])
    outcome = run(Job(**json.loads(given.read_text())))
    if os.environ.get("RANK", "0") != "0":
        return
    outcome.peak_bytes = memory_bytes("VmHWM")
    result.write_text(json.dumps(asdict(outcome)))


def memory_bytes(key: str = "VmRSS") -> int:
    """Resident memory of this process now (``VmRSS``) or at its highest (``VmHWM``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
