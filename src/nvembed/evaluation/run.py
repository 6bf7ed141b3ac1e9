"""Evaluates models on local tasks, and keeps every finished task on disk.

In: an encoder or its name, and task folders. Out: ``TaskResult`` by task name, and the file
``results.json`` with what it was made with beside it. Next file: ``evaluation/mteb_adapter.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from nvembed.core.errors import ConfigError, DataError, UserError
from nvembed.core.files import write_json
from nvembed.core.runs import describe_environment
from nvembed.evaluation.results import TaskResult, read_results, write_results
from nvembed.evaluation.task_files import RetrievalData
from nvembed.evaluation.tasks import LocalTask, load_tasks, read_json_object
from nvembed.inference.protocol import Encoder
from nvembed.model.settings import Precision, PrecisionChoice

BM25_NAME = "bm25"
"""The name under which BM25 is evaluated like a model."""

OnResult = Callable[[str, TaskResult], None]


def evaluate(
    encoder: Encoder, tasks: Iterable[LocalTask], *, on_result: OnResult | None = None
) -> dict[str, TaskResult]:
    """Score an encoder on tasks, one after the other.

    Args:
        encoder: the model.
        tasks: read by ``load_tasks``.
        on_result: called with name and result as soon as a task is finished.

    Raises:
        ModelError: the encoder gives vectors of another shape or that are not finite.
        UserError: mteb is not installed.
    """
    try:
        from nvembed.evaluation.mteb_adapter import score
    except ModuleNotFoundError as error:
        raise _missing_extra(error) from error
    return _run(tasks, lambda task: score(task, encoder), on_result)


def evaluate_bm25(
    tasks: Iterable[LocalTask], *, on_result: OnResult | None = None
) -> dict[str, TaskResult]:
    """Score BM25 on those of the tasks that are retrieval with nDCG@10; the others are left out.

    Raises:
        UserError: scipy is not installed.
    """
    try:
        from nvembed.evaluation.bm25 import bm25_ndcg
    except ModuleNotFoundError as error:
        raise _missing_extra(error) from error

    def score(task: LocalTask) -> dict[str, float | None]:
        assert isinstance(task.data, RetrievalData)
        return {task.main_score: bm25_ndcg(task.data)}

    return _run(filter(_fits_bm25, tasks), score, on_result)


def evaluate_folders(
    model: str,
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    names: Sequence[str] | None = None,
    resume: bool = False,
    dtype: PrecisionChoice | None = None,
) -> dict[str, TaskResult]:
    """Evaluate a model by name on task folders, writing the results as they come.

    ``output`` is rewritten after every task. Beside it, ``<output>.run.json`` names model,
    versions, machine and instructions.

    Args:
        model: folder or hub id, or ``bm25``.
        folders: task folders or folders of task folders.
        output: the file for the results.
        names: only the tasks of these names; ``None`` is all.
        resume: keep the results of ``output`` and do the missing tasks only.
        dtype: of the model's weights, see ``load_encoder``.

    Raises:
        DataError: a task cannot be used, or ``output`` holds no results to resume.
        ConfigError: ``output`` is a folder, or its results are of another model.
        ModelError: the model cannot be loaded or its vectors cannot be used.
    """
    path = Path(output)
    if path.is_dir():
        raise ConfigError("is a folder", where=str(path), expected="a file name for the results")
    tasks = load_tasks(folders, names)
    instructions = {task.name: task.instruction for task in tasks}
    results: dict[str, TaskResult] = {}
    if resume and path.exists():
        results = read_results(path)
        instructions = _earlier_instructions(path, model) | instructions
    todo = [task for task in tasks if task.name not in results]

    def keep(name: str, result: TaskResult) -> None:
        results[name] = result
        write_results(path, results)

    if model == BM25_NAME and not any(map(_fits_bm25, tasks)):
        raise DataError(
            "BM25 has no score for any of these tasks",
            expected="a Retrieval task with the main score ndcg_at_10",
        )
    if model == BM25_NAME:
        _write_run(path, model, instructions)
        evaluate_bm25(todo, on_result=keep)
    elif todo:
        from nvembed.inference.load import load_encoder
        from nvembed.model.precision import settle_precision

        settled = settle_precision(dtype)
        encoder = load_encoder(model, settled)
        _write_run(path, model, instructions, settled)
        evaluate(encoder, todo, on_result=keep)
    write_results(path, results)
    return results


def _fits_bm25(task: LocalTask) -> bool:
    return task.type == "Retrieval" and task.main_score == "ndcg_at_10"


def _run(
    tasks: Iterable[LocalTask],
    score: Callable[[LocalTask], dict[str, float | None]],
    on_result: OnResult | None,
) -> dict[str, TaskResult]:
    results: dict[str, TaskResult] = {}
    for task in tasks:
        started = time.perf_counter()
        scores = score(task)
        results[task.name] = TaskResult(
            type=task.type,
            main_score_name=task.main_score,
            main_score=scores[task.main_score],
            seconds=round(time.perf_counter() - started, 2),
            scores=scores,
        )
        if on_result is not None:
            on_result(task.name, results[task.name])
    return results


def _run_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}.run.json")


def _write_run(
    path: Path,
    model: str,
    instructions: Mapping[str, str | None],
    dtype: Precision | None = None,
) -> None:
    """Note what the results come from: nobody can repeat a score without versions and prompts.

    ``dtype`` is that of the weights where it is another than the saved one.
    """
    environment = describe_environment()
    write_json(
        _run_file(path),
        {
            "model": model,
            "dtype": dtype,
            "instructions": instructions,
            "environment": environment,
        },
    )


def _earlier_instructions(path: Path, model: str) -> dict[str, str | None]:
    """Read what ``_write_run`` wrote, refusing to mix the results of two models."""
    file = _run_file(path)
    record = read_json_object(file, "the record of the run to resume")
    earlier, instructions = record.get("model"), record.get("instructions")
    if earlier != model:
        raise ConfigError(
            f"holds results of {earlier!r}, not of {model!r}",
            where=str(path),
            hint="Choose another output file, or do not resume",
        )
    if not isinstance(instructions, dict):
        raise DataError("'instructions' is missing", where=str(file), expected="task: instruction")
    return instructions


def _missing_extra(error: ModuleNotFoundError) -> UserError:
    return UserError(
        f"evaluation needs the package {error.name!r}",
        hint="Install it with: pip install 'nvembed[eval]'",
    )
