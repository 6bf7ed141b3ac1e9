"""The folder of a run: started, or found to be of this run and its inputs; how a run is stopped.

``inputs.json`` holds a digest of every input; a run that goes on must find them as they were.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from nvembed.core.arguments import Precision
from nvembed.core.cache import content_hash, digest_of
from nvembed.core.config import dump_config, load_config
from nvembed.core.errors import ConfigError, DataError, TrainingError, UserError
from nvembed.core.files import alone_in, read_json_object, write_json, write_text
from nvembed.core.ownership import check_outputs, problem_of
from nvembed.core.runs import TRAIN, RunFolder
from nvembed.data.batch import Mixture
from nvembed.data.built_sets import MINED_KINDS
from nvembed.evaluation.tasks import LocalTask
from nvembed.interop.model_folder import contents_fingerprint
from nvembed.kernels.machine import choose_precision, computing_record, kernels
from nvembed.model.embedder import NVEmbed
from nvembed.training.checkpoint import remove_leftovers
from nvembed.training.config import TrainConfig, recipe_differences
from nvembed.training.distributed import DistributedContext
from nvembed.training.metrics import load_evaluation_tasks
from nvembed.training.model import backbone_source
from nvembed.training.stages import load_mixtures, with_fitting_rates, with_rates
from nvembed.training.teacher import teacher_fingerprint

GO_ON = "The same command goes on from the last checkpoint"
_MINED = "mined set "


def prepare_folder(
    run: RunFolder, config: TrainConfig, *, fresh: bool, inputs: Sequence[Path] = ()
) -> None:
    """Start the run's folder, or make sure that it is of this run."""
    check_folder(run, config, fresh=fresh, inputs=inputs)
    if run.checkpoints.exists():
        with held(run):
            pass
    resolved = dump_config(config)
    begun = run.exists and not fresh
    run.tidy()
    if begun:
        remove_leftovers(run.checkpoints)
        if _recorded(run) == resolved or is_finished(run):
            return
        if run.has_results:
            write_text(run.config, resolved, TRAIN)
            return
    run.create(
        resolved,
        stages=[stage.name for stage in config.stages],
        replace=fresh or begun,
        computing=computing_record(None if config.precision == "auto" else config.precision),
    )


@contextmanager
def held(run: RunFolder, *, is_main: bool = True) -> Iterator[None]:
    """Let nobody else train into a run's folder during the block; the main process sees to it."""
    if not is_main:
        yield
        return
    with alone_in(run.checkpoints, needed=False) as alone:
        if not alone:
            raise TrainingError(
                "another process is training into this folder",
                where=str(run.path),
                hint="Wait for its end, or choose another output folder",
            )
        yield


def settle_rates(
    run: RunFolder,
    config: TrainConfig,
    embedder: NVEmbed,
    processes: DistributedContext,
    log: Callable[[str], None],
) -> TrainConfig:
    """Fit open learning rates to the model, say so, and keep them in the folder."""
    config, line = with_fitting_rates(config, embedder)
    if line is not None:
        log(line)
        if processes.is_main:
            write_text(run.config, dump_config(config), TRAIN)
    return config


def changed_kernels(run: RunFolder) -> str | None:
    """Say that a run goes on with other kernels, and so other last bits; None if not."""
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
    """Make sure that a run may write to its folder, without changing anything."""
    stages = [stage.name for stage in config.stages]
    known = not fresh and run.exists and problem_of(run.config, TRAIN) is None
    same = known and _recorded(run) == dump_config(config)
    kept: set[Path] = {run.config} if same else set()
    if known and run.has_results:
        if not same:
            try:
                earlier = load_config(TrainConfig, run.config).model_dump(mode="json")
                different = recipe_differences(earlier, config.model_dump(mode="json"))
            except UserError:
                different = ["the recipe of the run cannot be read"]
            if different:
                raise TrainingError(
                    f"the folder holds a run with another configuration: {'; '.join(different)}",
                    where=str(run.config),
                    hint="Choose another output folder, or start over with --fresh",
                )
        if is_finished(run):  # then nothing is written
            return
        kept |= {run.env, run.inputs}
    written = [path for path in run.written(stages) if path not in kept]
    check_outputs((), made_by=TRAIN, inputs=inputs, places=[run.checkpoints, run.mined])
    check_outputs(written, made_by=TRAIN, inputs=inputs)
    if known:
        return
    run.refuse_foreign(stages)
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


def _recorded(run: RunFolder) -> str | None:
    """The configuration in the folder; ``None`` where nothing can read it."""
    with suppress(OSError, UnicodeDecodeError):
        return run.config.read_text(encoding="utf-8")
    return None


def with_settled_choices(
    config: TrainConfig, run: RunFolder, *, fresh: bool
) -> tuple[TrainConfig, str | None]:
    """Replace ``auto`` and open learning rates by what the run was started with.

    Say what ``auto`` has become; of a run that starts, the rates are open until its model is there.
    """
    begun: Precision | None = None
    if run.exists and not fresh:
        with suppress(UserError):  # not readable: the comparison of configurations refuses it
            earlier = load_config(TrainConfig, run.config)
            begun = None if earlier.precision == "auto" else earlier.precision
            config = with_rates(config, [stage.learning_rate for stage in earlier.stages])
    if config.precision != "auto":
        return config, None
    precision, line = choose_precision(begun, "precision=float32")
    return config.model_copy(update={"precision": precision}), line


def settle_choices(
    config: TrainConfig, run: RunFolder, processes: DistributedContext, *, fresh: bool
) -> tuple[TrainConfig, str | None]:
    """``with_settled_choices`` by the first process for all."""
    if config.threads == "auto" and processes.count > 1:
        raise ConfigError(
            "auto is for one process: several compute the loss to the same bits",
            where="threads",
            expected="a number, or null",
        )
    why: str | None = None
    if processes.is_main:
        config, why = with_settled_choices(config, run, fresh=fresh)
    known = config.precision, [stage.learning_rate for stage in config.stages]
    precision, rates = processes.of_main(known)
    return with_rates(config.model_copy(update={"precision": precision}), rates), why


def inputs_of(
    config: TrainConfig, base_dir: Path, mixtures: Sequence[Mixture], tasks: Sequence[LocalTask]
) -> dict[str, str]:
    """Digests of all inputs, by what an error calls them."""
    found = {f"data set {name}": d for mixture in mixtures for name, d in mixture.digests.items()}
    found |= {f"evaluation task {task.name}": digest_of(task.folder) for task in tasks}
    found["model.backbone"] = contents_fingerprint(backbone_source(config, base_dir))
    for stage in config.stages:
        # One of the hub is known by its id, and is not asked for again once negatives are mined.
        if stage.mine and stage.mine.rerank and Path(stage.mine.rerank).is_dir():
            key = f"mine.rerank of {stage.name}"
            found[key] = contents_fingerprint(stage.mine.rerank)
        if stage.teacher and (teacher := teacher_fingerprint(stage.teacher, base_dir)):
            found[f"teacher of {stage.name}"] = teacher
    return found


def read_inputs_of(config: TrainConfig, base_dir: Path) -> dict[str, str]:
    """``inputs_of`` for a run whose data are not in memory."""
    mixtures = load_mixtures(config, base_dir)
    tasks = load_evaluation_tasks(config.evaluation, base_dir) if config.evaluation else []
    return inputs_of(config, base_dir, mixtures, tasks)


def what_decides_inputs(config: TrainConfig) -> str:
    """The same for runs of the same inputs, whose data then need to be read once."""
    datasets = [dataset.model_dump(mode="json") for dataset in config.datasets]
    build = config.build and config.build.model_dump(mode="json")
    mining = [
        [stage.name, stage.mine and stage.mine.rerank, stage.teacher and stage.teacher.model_dump()]
        for stage in config.stages
    ]
    tasks = config.evaluation and list(config.evaluation.tasks)
    return content_hash(datasets, build, config.model.backbone, mining, tasks)


def changed_inputs(run: RunFolder, inputs: Mapping[str, str]) -> list[str]:
    """Names of inputs, mined sets apart, that differ from those the run was started with."""
    if (recorded := _recorded_inputs(run)) is None:
        return []
    started = {name: digest for name, digest in recorded.items() if not name.startswith(_MINED)}
    return [name for name in {**started, **inputs} if started.get(name) != inputs.get(name)]


def check_inputs(run: RunFolder, inputs: Mapping[str, str]) -> None:
    """Make sure that a run that goes on, or is finished, was made from these inputs."""
    _refuse_changed(run, changed_inputs(run, inputs))


def settle_inputs(
    run: RunFolder,
    inputs: Mapping[str, str],
    processes: DistributedContext,
    log: Callable[[str], None],
) -> None:
    """Record the inputs of a run that starts, or compare them where it goes on."""
    first = processes.of_main(dict(inputs))
    if different := [name for name in inputs if inputs[name] != first.get(name)]:
        raise TrainingError(
            f"process {processes.rank} finds another {', '.join(different)} than the first one",
            expected="the same files on all machines",
        )
    if not processes.is_main:
        return
    if run.has_results:
        if run.inputs.exists():
            check_inputs(run, inputs)
            return
        log("what the run was started with is not recorded; what is there now is taken for it")
    write_json(run.inputs, inputs, TRAIN)


def settle_mined(run: RunFolder, config: TrainConfig, stage: str, mixture: Mixture) -> None:
    """Record what was mined for a stage, or make sure that it is as it was."""
    recorded = _recorded_inputs(run) or {}
    mined = {dataset.name for dataset in config.datasets if dataset.kind in MINED_KINDS}
    found = {
        f"{_MINED}{name} in {stage}": digest
        for name, digest in mixture.digests.items()
        if name in mined
    }
    _refuse_changed(run, [key for key in found if recorded.get(key, found[key]) != found[key]])
    if not found.keys() <= recorded.keys():
        write_json(run.inputs, {**recorded, **found}, TRAIN)


def _refuse_changed(run: RunFolder, names: Sequence[str]) -> None:
    if names:
        raise TrainingError(
            f"changed since the run was started: {', '.join(names)}",
            where=str(run.path),
            expected="what it was started with",
            hint="Put it back as it was, choose another output folder, or start over with --fresh",
        )


def _recorded_inputs(run: RunFolder) -> dict[str, str] | None:
    if not run.inputs.exists():
        return None
    hint = "Put the file back, or delete it to go on with the inputs as they are now"
    try:
        values = read_json_object(run.inputs, "digests of inputs", hint=hint)
    except DataError as error:
        raise TrainingError(str(error)) from error
    if not all(isinstance(digest, str) for digest in values.values()):
        raise TrainingError("not digests of inputs", where=str(run.inputs), hint=hint)
    return values


class _TerminatedError(BaseException):
    """SIGTERM; no ``except Exception`` on the way may take it for its own."""


@contextmanager
def sigterm_is_an_error(folder: str) -> Iterator[None]:
    """Let SIGTERM leave at once, but in order: half-written files go, and one line is told."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise _TerminatedError

    old = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except _TerminatedError:
        raise TrainingError("stopped by SIGTERM", where=folder, hint=GO_ON) from None
    finally:
        signal.signal(signal.SIGTERM, old)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn a first Ctrl-C or SIGTERM into a flag that a stage looks at; a second one stops."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def interrupted(run: RunFolder, step: int) -> TrainingError:
    """What a run ends with that was asked to stop."""
    return TrainingError(
        f"interrupted after step {step}; a checkpoint was written",
        where=str(run.checkpoints),
        hint="The same command goes on from there",
    )
