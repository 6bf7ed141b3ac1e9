"""What a run of a grid leaves behind, and how its folder tells where it stands.

``outcome.json``: state, cost and error. ``results.json`` (of ``evaluation/results.py``): scores.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from nvembed.core.config import dump_config, load_config
from nvembed.core.dtypes import Precision
from nvembed.core.errors import ConfigError, DataError
from nvembed.core.files import write_json
from nvembed.core.runs import RunFolder
from nvembed.training.ablation.arms import Run
from nvembed.training.config import TrainConfig
from nvembed.training.inputs import changed_inputs
from nvembed.training.recipe_differences import recipe_differences

_OTHER_FOLDER = "Choose another output folder, or delete the folder of the arm"

ABLATE = "ablate"
State = Literal["finished", "failed", "open"]


@dataclass(frozen=True)
class Outcome:
    """Where a run stands and what it cost.

    Attributes:
        state: ``open``: not finished, started or not.
        error: why it failed, one line.
        training_seconds: wall time of its steps.
        evaluation_seconds: wall time of its scores.
        tokens: trained on, over all steps.
        loss: mean of the last ten steps of the last stage.
        tasks: digests of the tasks that it was scored on, by name; ``None``: not recorded.
    """

    state: State
    error: str | None = None
    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    tokens: int = 0
    loss: float | None = None
    tasks: dict[str, str] | None = None


def outcome_file(folder: Path) -> Path:
    """Path of the outcome of the run in ``folder``."""
    return folder / "outcome.json"


def log_file(folder: Path) -> Path:
    """Path of what the run in ``folder`` printed."""
    return folder / "arm.log"


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write ``outcome.json``, atomically."""
    write_json(outcome_file(folder), dataclasses.asdict(outcome), ABLATE)


def read_outcome(run: Run) -> Outcome:
    """Read where a run stands; one that never ended is ``open``."""
    try:
        values = json.loads(outcome_file(run.folder).read_text("utf-8"))
        outcome = Outcome(**values)
    except (OSError, ValueError, TypeError, RecursionError):
        return Outcome("open")
    return outcome if outcome.state in get_args(State) else Outcome("open")


def training_cost(folder: Path) -> tuple[float, int, float | None]:
    """Sum up ``metrics.jsonl``: seconds, tokens, and the loss at the end."""
    rows = RunFolder(folder).read_metrics()
    try:
        steps = {(row["stage"], row["step"]): row for row in rows if "loss" in row}
        if not steps:
            return 0.0, 0, None
        final = [row["loss"] for (stage, _), row in steps.items() if stage == rows[-1]["stage"]]
        return (
            sum(row["seconds"] for row in steps.values()),
            sum(row["tokens"] for row in steps.values()),
            sum(final[-10:]) / len(final[-10:]),
        )
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise DataError(
            "not the metrics of a run",
            where=str(RunFolder(folder).metrics),
            expected="stage, step, loss, seconds and tokens in every row of a step",
            hint="Delete the folder of the arm to run it again",
        ) from error


def begun_precision(run: Run) -> Precision | None:
    """Return the type that a run computes in, settled when it began; None where it has not."""
    file = RunFolder(run.folder).config
    if not file.is_file():
        return None
    precision = load_config(TrainConfig, file).precision
    return None if precision == "auto" else precision


def check_same(run: Run) -> None:
    """Make sure that a finished run is the one that the grid asks for.

    Raises:
        ConfigError: its configuration is another one; names the keys.
    """
    file = RunFolder(run.folder).config
    if not file.is_file():
        return
    # The precision is settled when a run starts.
    earlier = load_config(TrainConfig, file)
    wanted = run.config
    if wanted.precision == "auto":
        wanted = wanted.model_copy(update={"precision": earlier.precision})
    if dump_config(earlier) == dump_config(wanted):
        return
    different = recipe_differences(earlier.model_dump(mode="json"), wanted.model_dump(mode="json"))
    if different:
        raise ConfigError(
            f"arm {run.arm} was run with another configuration: {'; '.join(different)}",
            where=str(file),
            hint=_OTHER_FOLDER,
        )


def check_inputs(run: Run, inputs: Mapping[str, str], tasks: Mapping[str, str]) -> None:
    """Make sure that a finished run was made from what there is now, and scored on it.

    Args:
        run: finished.
        inputs: digests of what it would be trained on now.
        tasks: digests of the tasks of the grid, by name.

    Raises:
        ConfigError: something changed; names it.
    """
    scored = read_outcome(run).tasks or {}
    changed = changed_inputs(RunFolder(run.folder), inputs)
    changed += [f"task {name}" for name in tasks if scored.get(name, tasks[name]) != tasks[name]]
    if changed:
        raise ConfigError(
            f"arm {run.arm} with seed {run.seed} is finished, and changed since: "
            f"{', '.join(changed)}",
            where=str(run.folder),
            hint=_OTHER_FOLDER,
        )
