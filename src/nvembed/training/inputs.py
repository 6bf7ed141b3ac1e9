"""What a run is made from, told apart by contents: one that goes on must find it as it was.

``inputs.json`` of a run folder holds a digest of every input: the records of the data sets, the
tasks that the run is evaluated on, the model that it starts from, the cross-encoder that it mines
with, and, once they are there, the mined sets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nvembed.core.cache import content_hash, digest_of
from nvembed.core.errors import DataError, TrainingError
from nvembed.core.files import write_json
from nvembed.core.runs import TRAIN, RunFolder
from nvembed.core.text_files import read_json_object
from nvembed.data.built_sets import MINED_KINDS
from nvembed.data.mixture import Mixture
from nvembed.encoding.fingerprint import contents_fingerprint
from nvembed.evaluation.tasks import LocalTask
from nvembed.training.config import TrainConfig
from nvembed.training.evaluating import load_evaluation_tasks
from nvembed.training.model import backbone_source
from nvembed.training.processes import Processes
from nvembed.training.stages import load_mixtures

Inputs = Mapping[str, str]

_MINED = "mined set "


def inputs_of(
    config: TrainConfig, base_dir: Path, mixtures: Sequence[Mixture], tasks: Sequence[LocalTask]
) -> dict[str, str]:
    """Digests of all inputs, by what an error calls them.

    Args:
        config: the run.
        base_dir: folder of the recipe.
        mixtures: of its stages, as their files are before mining.
        tasks: that it is evaluated on.

    Raises:
        ModelError: there is no such backbone.
    """
    found: dict[str, str] = {}
    for mixture in mixtures:
        found |= {f"data set {name}": digest for name, digest in mixture.digests.items()}
    found |= {f"evaluation task {task.name}": digest_of(task.folder) for task in tasks}
    found["model.backbone"] = contents_fingerprint(backbone_source(config, base_dir))
    for stage in config.stages:
        # One of the hub is known by its id, and is not asked for again once negatives are mined.
        if stage.mine and stage.mine.rerank and Path(stage.mine.rerank).is_dir():
            key = f"mine.rerank of {stage.name}"
            found[key] = contents_fingerprint(stage.mine.rerank)
    return found


def read_inputs_of(config: TrainConfig, base_dir: Path) -> dict[str, str]:
    """``inputs_of`` for a run whose data are not in memory.

    Raises:
        UserError: an input cannot be read.
    """
    mixtures = load_mixtures(config, base_dir)
    tasks = load_evaluation_tasks(config.evaluation, base_dir) if config.evaluation else []
    return inputs_of(config, base_dir, mixtures, tasks)


def what_decides_inputs(config: TrainConfig) -> str:
    """The same for runs of the same inputs, whose data then need to be read once."""
    datasets = [dataset.model_dump(mode="json") for dataset in config.datasets]
    build = config.build and config.build.model_dump(mode="json")
    mining = [[stage.name, stage.mine and stage.mine.rerank] for stage in config.stages]
    tasks = config.evaluation and list(config.evaluation.tasks)
    return content_hash(datasets, build, config.model.backbone, mining, tasks)


def changed_inputs(run: RunFolder, inputs: Inputs) -> list[str]:
    """Names of inputs that are others than those that the run was started with.

    Inputs that come into being with the run (mined sets) are none of them; of a run that recorded
    nothing, nothing is known to have changed.

    Raises:
        TrainingError: the record cannot be read.
    """
    recorded = _recorded(run)
    if recorded is None:
        return []
    started = {name: digest for name, digest in recorded.items() if not name.startswith(_MINED)}
    names = dict.fromkeys((*started, *inputs))
    return [name for name in names if started.get(name) != inputs.get(name)]


def check_inputs(run: RunFolder, inputs: Inputs) -> None:
    """Make sure that a run that goes on, or is finished, was made from these inputs.

    Raises:
        TrainingError: names those that changed; or the record cannot be read.
    """
    if changed := changed_inputs(run, inputs):
        raise _changed(run, changed)


def settle_inputs(
    run: RunFolder, inputs: Inputs, processes: Processes, log: Callable[[str], None]
) -> None:
    """Record the inputs of a run that starts, or compare them where it goes on.

    Args:
        run: its folder.
        inputs: as this process finds them.
        processes: of the run; all of them must find the same.
        log: told where nothing was recorded to compare with.

    Raises:
        TrainingError: inputs changed since the run was started, or differ between processes.
    """
    first = processes.of_main(dict(inputs))
    if different := [name for name in inputs if inputs[name] != first.get(name)]:
        raise TrainingError(
            f"process {processes.rank} finds another {', '.join(different)} than the first one",
            expected="the same files on all machines",
        )
    if not processes.is_main:
        return
    if not run.has_results:
        write_json(run.inputs, inputs, TRAIN)
    elif run.inputs.exists():
        check_inputs(run, inputs)
    else:
        log("what the run was started with is not recorded; what is there now is taken for it")
        write_json(run.inputs, inputs, TRAIN)


def check_finished(run: RunFolder, config: TrainConfig, base_dir: Path) -> None:
    """Make sure that a finished run was made from the inputs that there are now.

    Raises:
        TrainingError: names those that changed.
        UserError: an input cannot be read.
    """
    if run.inputs.exists():
        check_inputs(run, read_inputs_of(config, base_dir))


def settle_mined(run: RunFolder, config: TrainConfig, stage: str, mixture: Mixture) -> None:
    """Record what was mined for a stage, or make sure that it is as it was.

    Args:
        run: its folder.
        config: the run.
        stage: name of the stage.
        mixture: its data, mined sets among them.

    Raises:
        TrainingError: a mined set changed since.
    """
    recorded = _recorded(run) or {}
    mined = {dataset.name for dataset in config.datasets if dataset.kind in MINED_KINDS}
    found = {
        f"{_MINED}{name} in {stage}": digest
        for name, digest in mixture.digests.items()
        if name in mined
    }
    if changed := [key for key in found if recorded.get(key, found[key]) != found[key]]:
        raise _changed(run, changed)
    if not found.keys() <= recorded.keys():
        write_json(run.inputs, {**recorded, **found}, TRAIN)


def _changed(run: RunFolder, names: Sequence[str]) -> TrainingError:
    return TrainingError(
        f"changed since the run was started: {', '.join(names)}",
        where=str(run.path),
        expected="what it was started with",
        hint="Put it back as it was, choose another output folder, or start over with --fresh",
    )


def _recorded(run: RunFolder) -> dict[str, str] | None:
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
