"""A program in a process of its own: what it is told, and what it reports.

Read by the peers' interpreters too, so it imports the standard library only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
OURS, SENTENCE, FLAG = "nvembed", "sentence-transformers", "FlagEmbedding"
TRAINERS = {OURS: "peers.ours", SENTENCE: "peers.sentence_trainer", FLAG: "peers.flag_embedding"}


@dataclass(frozen=True)
class Job:
    """A training run of one side.

    Args:
        side: key of ``TRAINERS``.
        work: folder with ``train.jsonl`` (in the order that our trainer reads as ``columns.json``)
            and ``columns.json`` (one list per column, in order of the steps).
        decoder: folder of the language model.
        steps: optimizer updates.
        batch_size: queries per step.
        models: folder with ``stock/`` (the model as plain sentence-transformers) and ``adapter/``
            (LoRA with B = 0); ``work`` where it is empty.
        dtype: what products are computed in; what is trained is float32.
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
    models: str = ""
    dtype: str = "float32"
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

    def of(self, side: str, dtype: str = "float32", **options: Any) -> Job:
        """The same run by another side."""
        return replace(self, side=side, dtype=dtype, options=options)

    def columns(self) -> dict[str, list[str]]:
        """Texts of the run: ``query``, ``positive``, ``negative_1`` …"""
        columns: dict[str, list[str]] = json.loads(Path(self.work, "columns.json").read_text())
        return columns

    def model(self, name: str) -> Path:
        """``stock`` or ``adapter``."""
        return Path(self.models or self.work, name)


@dataclass
class Outcome:
    """What a training run reports.

    Args:
        losses: of every step.
        step_seconds: from the end of the step before to the end of the step; that of the first step
            counts from the start of training.
        loaded_bytes: resident memory when the model and its data were loaded (0: not measured).
        process: what ``run_program`` adds.
    """

    losses: list[float]
    step_seconds: list[float]
    loaded_bytes: int = 0
    process: dict[str, float] = field(default_factory=dict)


class JobError(RuntimeError):
    """A process that failed, with the end of what it printed."""


def run_job(job: Job, python: str | Path = sys.executable, seconds: float | None = None) -> Outcome:
    """Train in a fresh process and wait for it."""
    found = run_program(
        TRAINERS[job.side],
        asdict(job),
        python=python,
        threads=job.threads,
        processes=job.processes,
        seconds=seconds,
    )
    values = {name: found.pop(name) for name in ("losses", "step_seconds", "loaded_bytes")}
    return Outcome(**values, process=found)


def run_program(
    module: str,
    given: Mapping[str, Any],
    *,
    threads: int,
    python: str | Path = sys.executable,
    processes: int = 1,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Run a module that calls ``child_main`` in a fresh process; what it found.

    Added are ``wall_seconds`` of the whole process, ``peak_mb`` (highest resident memory) and
    ``others_share``: the share of the machine's CPU time that went to others meanwhile, or was
    taken by its host; timings with more than a few percent are worth nothing.

    Raises:
        JobError: it failed.
        subprocess.TimeoutExpired: it was stopped after ``seconds``.
    """
    path = [str(BENCHMARKS), str(BENCHMARKS.parent / "src"), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory(prefix="nvembed-bench-") as folder:
        task, result = Path(folder, "job.json"), Path(folder, "result.json")
        task.write_text(json.dumps(given))
        environment = {
            **os.environ,
            **OFFLINE,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false" if threads == 1 else "true",
            # Tokens are computed anew in every run, as the peers do.
            "NVEMBED_CACHE": str(Path(folder, "cache")),
        }
        started, taken = time.perf_counter(), _cpu_seconds()
        command = [str(python), "-m", module, str(task), str(result)]
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone"]
            command[1:1] = [*launcher, f"--nproc-per-node={processes}"]
        done = subprocess.run(
            command,
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
        wall = time.perf_counter() - started
        others = max(0.0, _cpu_seconds() - taken) / (wall * (os.cpu_count() or 1))
        if done.returncode or not result.exists():
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
            raise JobError(f"{module} ended with {done.returncode}\n{tail}")
        if "--verbose" in sys.argv:
            print(done.stdout)
        found: dict[str, Any] = json.loads(result.read_text())
    return {**found, "wall_seconds": wall, "others_share": others}


OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


def _cpu_seconds() -> float:
    """CPU time of the machine that was neither idle nor used by our children or this process."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, interrupts, soft, stolen = (int(value) for value in fields[:8])
    busy = (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return busy - own.user - own.system - own.children_user - own.children_system


def child_main(run: Any) -> None:
    """Entry of a program: read what is given, run it, write what it found."""
    given, result = Path(sys.argv[1]), Path(sys.argv[2])
    found = run(json.loads(given.read_text()))
    if os.environ.get("RANK", "0") == "0":
        found["peak_mb"] = memory_bytes("VmHWM") / 1e6
        result.write_text(json.dumps(found))


def trainer_main(run: Any) -> None:
    """Entry of a trainer: from a ``Job`` to an ``Outcome``."""

    def trained(given: dict[str, Any]) -> dict[str, Any]:
        found = asdict(run(Job(**given)))
        del found["process"]
        return found

    child_main(trained)


def memory_bytes(key: str = "VmRSS") -> int:
    """Resident memory of this process now (``VmRSS``) or at its highest (``VmHWM``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
