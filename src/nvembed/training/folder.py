"""The folder of a run: started, or found to be of this run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvembed.core.config import dump_config, load_config
from nvembed.core.dtypes import Precision
from nvembed.core.errors import TrainingError, UserError
from nvembed.core.files import write_text
from nvembed.core.ownership import check_outputs, problem_of
from nvembed.core.runs import TRAIN, RunFolder
from nvembed.kernels.precision import choose_precision, computing_record, kernels
from nvembed.training.checkpoint import remove_leftovers
from nvembed.training.config import TrainConfig
from nvembed.training.recipe_differences import recipe_differences


def prepare_folder(
    run: RunFolder, config: TrainConfig, *, fresh: bool, inputs: Sequence[Path] = ()
) -> None:
    """Start the run's folder, or make sure that it is of this run.

    Args:
        run: the folder.
        config: of the run.
        fresh: start over.
        inputs: what the run reads; see ``training/input_paths.py``.

    Raises:
        UserError: see ``check_folder``.
    """
    check_folder(run, config, fresh=fresh, inputs=inputs)
    resolved = dump_config(config)
    stages = [stage.name for stage in config.stages]
    run.tidy()
    if fresh or not run.exists:
        run.create(resolved, stages=stages, replace=fresh, computing=_computing(config))
        return
    remove_leftovers(run.checkpoints)
    if _recorded(run) == resolved:
        return
    if run.has_results:
        write_text(run.config, resolved, TRAIN)
    else:
        run.create(resolved, stages=stages, replace=True, computing=_computing(config))


def _computing(config: TrainConfig) -> dict[str, Any]:
    return computing_record(None if config.precision == "auto" else config.precision)


def changed_kernels(run: RunFolder) -> str | None:
    """Say that a run goes on with other kernels than it was begun with; None where it does not.

    The machine is another one then, or its compiler is gone. Numbers differ in the last bits.
    """
    begun: object = None
    with suppress(OSError, ValueError, KeyError, TypeError):  # of an earlier version, or damaged
        begun = json.loads(run.env.read_text("utf-8"))["computing"]["kernels"]
    now = kernels()
    if not isinstance(begun, list) or begun == now:
        return None
    names = " to ".join(", ".join(map(str, found)) or "torch's own" for found in (begun, now))
    return f"the kernels have changed, from {names}: the last bits of all numbers may, too"


def is_finished(run: RunFolder) -> bool:
    """Whether the run has come to its end: its model is there."""
    return (run.model / "modules.json").is_file()


def check_folder(
    run: RunFolder, config: TrainConfig, *, fresh: bool, inputs: Sequence[Path] = ()
) -> None:
    """Make sure that a run may write to its folder, without changing anything.

    Args:
        run: the folder.
        config: of the run.
        fresh: start over.
        inputs: what the run reads.

    Raises:
        TrainingError: it holds another run; names the keys.
        ConfigError: something of the user's would be lost.
        UserError: it cannot be made.
    """
    stages = [stage.name for stage in config.stages]
    known = not fresh and run.exists and problem_of(run.config, TRAIN) is None
    kept: set[Path] = set()
    if known and run.has_results:
        _check_same(run, config)
        if is_finished(run):  # then nothing is written
            return
        kept = {run.env, run.inputs}
    if known and _recorded(run) == dump_config(config):
        kept.add(run.config)
    written = [path for path in run.written(stages) if path not in kept]
    check_outputs((), made_by=TRAIN, inputs=inputs, places=[run.checkpoints, run.mined])
    check_outputs(written, made_by=TRAIN, inputs=inputs)
    if not known:
        run.refuse_foreign(stages)
        check_writable(run)


def _check_same(run: RunFolder, config: TrainConfig) -> None:
    if _recorded(run) == dump_config(config):
        return
    try:
        different = recipe_differences(
            load_config(TrainConfig, run.config).model_dump(mode="json"),
            config.model_dump(mode="json"),
        )
    except UserError:
        different = ["the recipe of the run cannot be read"]
    if different:
        raise TrainingError(
            f"the folder holds a run with another configuration: {'; '.join(different)}",
            where=str(run.config),
            hint="Choose another output folder, or start over with --fresh",
        )


def _recorded(run: RunFolder) -> str | None:
    """The configuration in the folder; ``None`` where nothing can read it."""
    with suppress(OSError, UnicodeDecodeError):
        return run.config.read_text(encoding="utf-8")
    return None


def check_writable(run: RunFolder) -> None:
    """Make sure that the run's folder can be made, without making it.

    Raises:
        UserError: the place is taken by a file or may not be written to.
    """
    place = run.path.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(
            "cannot make the run folder: "
            + ("not allowed to write there" if place.is_dir() else "that is a file"),
            where=str(place),
            hint="Choose another output folder",
        )


def with_settled_precision(
    config: TrainConfig, run: RunFolder, *, fresh: bool
) -> tuple[TrainConfig, str | None]:
    """Replace ``auto``: by what the run was started with, which must not change half-way.

    Returns:
        The configuration, and a line that says what ``auto`` has become; ``None`` where the recipe
        says the type.
    """
    if config.precision != "auto":
        return config, None
    begun: Precision | None = None
    if run.exists and not fresh:
        with suppress(UserError):  # not readable: the comparison of configurations refuses it
            earlier = load_config(TrainConfig, run.config).precision
            begun = None if earlier == "auto" else earlier
    precision, line = choose_precision(begun, "precision=float32")
    return config.model_copy(update={"precision": precision}), line
