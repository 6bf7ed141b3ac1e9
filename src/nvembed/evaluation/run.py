"""Scores tasks one after the other: a model by ``local_scores``, or BM25 on retrieval.

In: an encoder and tasks. Out: ``TaskResult`` by task name. Next file: ``evaluation/session.py``,
which keeps the results on disk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from nvembed.core.errors import UserError
from nvembed.encoding.encoder import Encoder
from nvembed.evaluation.results import Items, TaskResult, task_hash
from nvembed.evaluation.task_files import RetrievalData
from nvembed.evaluation.tasks import LocalTask

BM25_NAME = "bm25"
"""The name under which BM25 is evaluated like a model."""

OnResult = Callable[[str, TaskResult], None]
TaskOutcome = tuple[TaskResult, Items | None]


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
    return _run(tasks, lambda task: score_task(task, encoder), on_result)


def evaluate_bm25(
    tasks: Iterable[LocalTask], *, on_result: OnResult | None = None
) -> dict[str, TaskResult]:
    """Score BM25 on those of the tasks that are retrieval with nDCG@10; the others are left out.

    Raises:
        UserError: scipy is not installed.
    """
    return _run(filter(fits_bm25, tasks), score_bm25, on_result)


def score_task(task: LocalTask, encoder: Encoder) -> TaskOutcome:
    """Score an encoder on one task; see ``evaluate``."""
    started = time.perf_counter()
    try:
        from nvembed.evaluation.local_scores import score_local

        scored = score_local(task, encoder)
    except ModuleNotFoundError as error:
        raise _missing_extra(error) from error
    return task_result(task, scored.scores, started), scored.items


def score_bm25(task: LocalTask) -> TaskOutcome:
    """Score BM25 on a task that fits it; see ``evaluate_bm25``."""
    assert isinstance(task.data, RetrievalData)
    started = time.perf_counter()
    try:
        ndcgs = bm25_ndcgs(task.data, ignore_identical_ids=task.ignore_identical_ids)
    except ModuleNotFoundError as error:
        raise _missing_extra(error) from error
    values_N = np.array(ndcgs)
    result = task_result(task, {task.main_score: float(values_N.mean())}, started)
    return result, Items("values", task.main_score, task_hash(task), {"values_N": values_N})


def bm25_ndcgs(
    data: RetrievalData, k: int = 10, *, ignore_identical_ids: bool = False
) -> list[float]:
    """nDCG@k of BM25 per query of a retrieval task; documents without a shared word do not rank.

    With ``ignore_identical_ids`` a document with the id of the query does not rank either.
    """
    from nvembed.encoding.bm25 import BM25  # needs scipy, which is optional

    scores, indices = BM25(data.documents).top_k(data.queries, k + ignore_identical_ids)
    values = []
    for query, row_scores, row in zip(data.query_ids, scores, indices, strict=True):
        ranked = [data.document_ids[i] for i in row[row_scores > 0]]
        if ignore_identical_ids:
            ranked = [document for document in ranked if document != query]
        values.append(ndcg(ranked, data.judgements[query], k))
    return values


def ndcg(ranked: Sequence[str], judged: Mapping[str, int], k: int) -> float:
    """DCG of the first ``k`` document ids over that of the best possible order; gain = grade.

    0 where nothing is relevant.
    """
    gained = _dcg([judged.get(document, 0) for document in ranked[:k]])
    best = _dcg(sorted(judged.values(), reverse=True)[:k])
    return gained / best if best else 0.0


def _dcg(grades: Sequence[int]) -> float:
    return sum(grade / math.log2(rank + 2) for rank, grade in enumerate(grades))


def fits_bm25(task: LocalTask) -> bool:
    """Whether BM25 has a score for it."""
    return task.type == "Retrieval" and task.main_score == "ndcg_at_10"


def task_result(task: LocalTask, scores: dict[str, float | None], started: float) -> TaskResult:
    """Put the scores of a task together with the time since ``started`` (``perf_counter``)."""
    seconds = round(time.perf_counter() - started, 2)
    return TaskResult(task.type, task.main_score, scores[task.main_score], seconds, scores)


def _run(
    tasks: Iterable[LocalTask],
    score: Callable[[LocalTask], TaskOutcome],
    on_result: OnResult | None,
) -> dict[str, TaskResult]:
    results: dict[str, TaskResult] = {}
    for task in tasks:
        results[task.name] = score(task)[0]
        if on_result is not None:
            on_result(task.name, results[task.name])
    return results


def _missing_extra(error: ModuleNotFoundError) -> UserError:
    return UserError(
        f"evaluation needs the package {error.name!r}",
        hint="Install it with: pip install 'nvembed[eval]'",
    )
