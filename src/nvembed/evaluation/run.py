"""Scores tasks one after the other: a model by ``local_scores``, or BM25 on retrieval.

Next file: ``evaluation/session.py``, which keeps the results on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Literal

from nvembed.core.errors import DataError, UserError
from nvembed.encoding.encoder import Encoder
from nvembed.evaluation.results import Items, TaskResult
from nvembed.evaluation.tasks import LocalTask

BM25_NAME = "bm25"
"""The name under which BM25 is evaluated like a model."""

Engine = Literal["local", "mteb"]
"""Who scores local tasks."""

OnResult = Callable[[str, TaskResult], None]
TaskOutcome = tuple[TaskResult, Items | None]


class UnreachableTaskError(DataError):
    """The data of one task of mteb could not be loaded; others may be."""


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
        UserError: scikit-learn or scipy is not installed.
    """
    return _evaluate(encoder, tasks, on_result)


def evaluate_bm25(
    tasks: Iterable[LocalTask], *, on_result: OnResult | None = None
) -> dict[str, TaskResult]:
    """Score BM25 on those of the tasks that are retrieval with nDCG@10; the others are left out."""
    return _evaluate(None, filter(fits_bm25, tasks), on_result)


def _evaluate(
    encoder: Encoder | None, tasks: Iterable[LocalTask], on_result: OnResult | None
) -> dict[str, TaskResult]:
    results: dict[str, TaskResult] = {}
    for task in tasks:
        results[task.name], _ = score_task(task, encoder)
        if on_result is not None:
            on_result(task.name, results[task.name])
    return results


def fits_bm25(task: LocalTask) -> bool:
    """Whether BM25 has a score for it."""
    return task.type == "Retrieval" and task.main_score == "ndcg_at_10"


def score_task(task: LocalTask, encoder: Encoder | None, engine: Engine = "local") -> TaskOutcome:
    """Score an encoder on one task; see ``evaluate``. ``None`` is BM25, on a task that fits it."""
    started = time.perf_counter()
    try:
        if encoder is not None and engine == "mteb":
            from nvembed.evaluation.mteb_adapter import score

            scores, items = score(task, encoder), None
        else:
            from nvembed.evaluation.local_scores import score_bm25, score_local

            scores, items = score_bm25(task) if encoder is None else score_local(task, encoder)
    except ModuleNotFoundError as error:
        raise UserError(
            f"evaluation needs the package {error.name!r}",
            hint="Install it with: pip install 'nvembed[eval]'",
        ) from error
    seconds = round(time.perf_counter() - started, 2)
    main = scores[task.main_score]
    return TaskResult(task.type, task.main_score, main, seconds, scores), items
