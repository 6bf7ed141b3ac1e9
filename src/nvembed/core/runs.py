"""Runs: the folder of everything that a training run leaves behind, and its random state.

config.yaml      the resolved configuration
env.json         versions, machine, git commit, command line
metrics.jsonl    one row per logged step
train.log        what was printed
graph-memory.json  how many tokens' graphs a step holds at once
inputs.json      digests of the data and models that the run was made from
checkpoints/     state to resume from
mined/<stage>/   training files with mined negatives
model-<stage>/   the model after a stage that was not the last
model/           the finished model, an ordinary sentence-transformers folder
adapter/         its adapters alone, where the recipe asks for them
eval/            evaluation results
tensorboard/     the metrics once more, where the recipe asks for them

Every random choice draws from a generator seeded by ``derive_seed(run seed, what, which step)``, so
no choice depends on how many others came before it. What still uses the global generators (dropout,
libraries) is seeded before every pack; around evaluations it is captured and restored.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from nvembed.core import ownership
from nvembed.core.config import read_yaml
from nvembed.core.errors import ConfigError, DataError
from nvembed.core.files import os_errors, parse_json, read_json_object, tidy, write_json, write_text

# The command that makes a run folder.
TRAIN = "train"
# What TensorBoard's writer leaves in a folder.
_EVENTS = re.compile(r"(.*/)?(events\.out\.tfevents\..*|hparams\.yml)")
# What lies in ``checkpoints/``; see ``training/checkpoint.py``.
_CHECKPOINTS = re.compile(
    r"(step-\d{10}(-end)?|best)/((weights|optimizer)\.safetensors|state\.json)"
)
_NOTHING = re.compile(r"(?!)")
# A line of the log: its time, then what was printed.
_LOG_LINE = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d .*")

# The libraries whose version can change a result.
RECORDED_PACKAGES = (
    *("nvembed", "torch", "transformers", "sentence-transformers", "tokenizers", "peft"),
    *("accelerate", "numpy", "mteb"),
)
_A_ROW = 'a row of metrics, as in {"step": 1, "loss": 0.5}'
_RESTORE = "Put the file of the run back, choose another output folder, or start over with --fresh"


class _Inside:
    """A path below that of the run folder; the names are explained at the top of this file."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: RunFolder, _: type[RunFolder]) -> Path:
        return run.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run, and the few writes that every run does."""

    path: Path

    config = _Inside("config.yaml")
    env = _Inside("env.json")
    metrics = _Inside("metrics.jsonl")
    log = _Inside("train.log")
    checkpoints = _Inside("checkpoints")
    graph_memory = _Inside("graph-memory.json")
    inputs = _Inside("inputs.json")
    mined = _Inside("mined")
    model = _Inside("model")
    adapter = _Inside("adapter")
    eval = _Inside("eval")

    @property
    def exists(self) -> bool:
        """Whether a run was started here, or something of that name lies here."""
        return self.config.is_file()

    @property
    def has_results(self) -> bool:
        """Whether anything here cost training time: a step, a checkpoint, a model."""
        made = (self.checkpoints.glob("step-*"), self.mined.glob("*"), self.path.glob("model*"))
        return bool(self.read_metrics()) or any(True for paths in made for _ in paths)

    def written(self, stages: Sequence[str] = ()) -> list[Path]:
        """All files and folders that a run with these stages writes, but for its checkpoints."""
        models = [self.path / f"model-{stage}" for stage in stages]
        return [*self._files, self.mined, *models, self.model, self.adapter]

    @property
    def _files(self) -> tuple[Path, ...]:
        named = (self.env, self.metrics, self.log, self.graph_memory, self.inputs)
        return (*named, self.config)  # which goes last, see ``_clear``

    def refuse_foreign(self, stages: Sequence[str] = ()) -> None:
        """Refuse to start a run with these stages where something of the user's would be lost."""
        for path in self.written(stages):
            ownership.refuse_foreign(path, TRAIN)
        # Without a run beside them they are not of one.
        ours = _CHECKPOINTS if self.exists else _NOTHING
        for path in ownership.unnamed(self.checkpoints, ours)[:1]:
            message = f"is there already, and nvembed did not make it: {path.name}"
            raise ownership.foreign_error(message, path.parent)
        for file, is_ours in ((self.metrics, _is_row), (self.log, _LOG_LINE.fullmatch)):
            lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
            if not all(map(is_ours, lines)):
                raise ownership.foreign_error("was changed since nvembed made it", file)

    def create(
        self,
        config_yaml: str,
        *,
        stages: Sequence[str] = (),
        replace: bool = False,
        computing: dict[str, Any] | None = None,
    ) -> None:
        """Start a run here: write ``config.yaml`` and ``env.json``, make ``checkpoints/``.

        ``replace`` deletes the earlier run of this folder, which is a ConfigError without it.
        ``computing`` says in ``env.json`` how the numbers of the run are computed.
        """
        if self.exists and not replace and ownership.problem_of(self.config, TRAIN) is None:
            raise ConfigError(
                "the folder holds a run already",
                where=str(self.path),
                hint="Resume it, start over, or choose another output folder",
            )
        self.refuse_foreign(stages)
        with os_errors("cannot make the run folder", self.path):
            if replace:
                self._clear()
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            # Lines are added to two of them, and a damaged measurement is taken again.
            for file in (self.metrics, self.log, self.graph_memory):
                ownership.mark_growing(file, TRAIN)
        computed = {} if computing is None else {"computing": computing}
        write_json(self.env, describe_environment() | computed, TRAIN)
        write_text(self.config, config_yaml, TRAIN)

    def _clear(self) -> None:
        # config.yaml goes last, and says until then that this is no run to go on with.
        if self.exists:
            write_text(self.config, "# Being deleted to start over.\n", TRAIN)
        self.remove_models()  # those of stages that the new run does not have as well
        for folder in (self.adapter, self.eval):
            ownership.remove(folder)
        ownership.remove_named(self.path / "tensorboard" / "nvembed", _EVENTS)
        for file in self._files:
            ownership.remove(file)

    def remove_models(self) -> None:
        """Delete checkpoints, mined files and models; what nvembed did not make stays."""
        ownership.remove_named(self.checkpoints, _CHECKPOINTS)
        for folder in (self.mined, *self.path.glob("model*")):
            ownership.remove(folder)

    def tidy(self) -> None:
        """Clear up after a process that was killed while it wrote; see ``files.tidy``."""
        files = (self.config, self.env, self.metrics, self.graph_memory, self.inputs)
        for name in (*(file.name for file in files), "model*", "adapter"):
            tidy(self.path, name)
        for folder in self.mined.glob("*"):
            tidy(folder, "*")

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append one row to ``metrics.jsonl``; nan and inf, which JSON lacks, become null."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        self._append(self.metrics, json.dumps(finite, ensure_ascii=False))

    def append_log(self, line: str) -> None:
        """Append one line to ``train.log``, with the time."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S")
        self._append(self.log, "\n".join(f"{now} {part}" for part in line.split("\n")))

    @staticmethod
    def _append(file: Path, line: str) -> None:
        hint = "Free space on the disk, then resume from the last checkpoint"
        with (
            os_errors("cannot write", file, hint=hint),
            open(file, "a", encoding="utf-8", newline="\n") as out,
        ):
            out.write(line + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read all rows; a last line that a killed process left half written is dropped."""
        if not self.metrics.is_file():
            return []
        # Whole lines end with a line break, so what follows the last one is a torn line or nothing.
        # It may end within a character, so lines are split before they are decoded.
        with os_errors("cannot read", self.metrics, kind=DataError):
            lines = self.metrics.read_bytes().split(b"\n")
        return [
            _metrics_row(line, f"{self.metrics}:{number}")
            for number, line in enumerate(lines[:-1], start=1)
            if line
        ]

    def read_evaluations(self, *, keep_best: bool) -> dict[str, dict[str, float | None]]:
        """Main scores by task: ``before`` training, and ``after NAME`` of each stage.

        A stage has those of the weights that it ended with: the best, where the recipe keeps them.
        """
        found: dict[str, dict[str, float | None]] = {}
        for row in self.read_metrics():
            if (scores := row.get("evaluation")) is not None:
                name = f"after {row['stage']}" if row["step"] else "before"
                if not keep_best or scores.get("best_step") == row["step"] or name not in found:
                    found[name] = scores["tasks"]
        return found

    def read_recipe(self) -> dict[str, Any]:
        """Read ``config.yaml`` as plain data."""
        return read_yaml(self.config)

    def read_env(self) -> dict[str, Any]:
        """Read ``env.json``: ``describe_environment`` of when the run was started."""
        values = read_json_object(self.env, "the environment of a run", hint=_RESTORE)
        if not isinstance(values.get("started"), str):
            message, expected = "does not say when the run was started", '"started", a time'
            raise DataError(message, where=str(self.env), expected=expected, hint=_RESTORE)
        return values

    def trim_metrics(self, last_step: int) -> None:
        """Forget the rows after ``last_step``, so that a resumed run does not log a step twice."""
        rows = [row for row in self.read_metrics() if row["step"] <= last_step]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(self.metrics, text, TRAIN)


def _metrics_row(line: bytes, where: str) -> dict[str, Any]:
    row = parse_json(line, where, expected=_A_ROW, hint=_RESTORE)
    step = row.get("step") if isinstance(row, dict) else None
    if not isinstance(row, dict) or not isinstance(step, int) or step < 0:
        found = "a row without a step" if isinstance(row, dict) else type(row).__name__
        raise DataError(f"the line holds {found}", where=where, expected=_A_ROW, hint=_RESTORE)
    return row


def _is_row(line: bytes) -> bool:
    """Whether a line of ``metrics.jsonl`` can be one of ours."""
    try:
        return not line or isinstance(json.loads(line), dict)
    except ValueError:
        return False


# --- Seeds and random state ----------------------------------------------------------------------


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed made of ``seed`` and all ``names``, the same on every machine."""
    # JSON keeps ("a", "b") apart from ("ab",) and 1 from "1".
    digest = hashlib.sha256(json.dumps([seed, *names]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (with all CUDA devices)."""
    import numpy as np
    import torch

    random.seed(derive_seed(seed, "python"))
    np.random.seed(derive_seed(seed, "numpy") % 2**32)  # NumPy's global generator takes 32 bits
    torch.manual_seed(derive_seed(seed, "torch"))


def capture_rng() -> tuple[Any, ...]:
    """Take the state of the global generators, for ``restore_rng``."""
    import numpy as np
    import torch

    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_gpus


def restore_rng(state: tuple[Any, ...]) -> None:
    """Put the global generators back to a state taken by ``capture_rng`` in this process."""
    import numpy as np
    import torch

    of_python, of_numpy, on_cpu, on_gpus = state
    random.setstate(of_python)
    np.random.set_state(of_numpy)
    torch.set_rng_state(on_cpu)
    torch.cuda.set_rng_state_all(on_gpus)


# --- What a result was made with ------------------------------------------------------------------


def describe_environment() -> dict[str, Any]:
    """Say what a result was made with: versions, machine, accelerator, git state, command."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "accelerators": _accelerators(),
        "packages": {name: _version(name) for name in RECORDED_PACKAGES},
        "git": _git_state(Path(__file__).parent),
    }


def _version(package: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _accelerators() -> list[str]:
    # Asked only of a torch that is loaded already: importing it here would cost seconds.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether files differ from it; None outside a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.check_output(
            command, stderr=subprocess.DEVNULL, text=True, timeout=10
        ).strip()

    with suppress(OSError, subprocess.SubprocessError):
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    return None
