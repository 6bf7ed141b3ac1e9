"""Local evaluation tasks: a folder with ``task.json`` and the data files of its type.

``find_tasks`` finds the folders, ``load_task`` reads one and refuses it with every problem named.
Scoring is in ``local_scores`` (all types) and ``bm25`` (retrieval).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from nvembed.core.errors import DataError
from nvembed.core.files import read_json_object
from nvembed.evaluation import task_files
from nvembed.evaluation.task_files import Problems, TaskData

TaskType = Literal[
    "Retrieval",
    "Reranking",
    "Clustering",
    "PairClassification",
    "Classification",
    "STS",
    "Summarization",
]
"""In the column order of the paper's tables."""

TASK_TYPES: tuple[TaskType, ...] = get_args(TaskType)

_RANKING_SCORES = (
    "map",
    "mrr",
    *(
        f"{name}_at_{k}"
        for name in ("ndcg", "map", "recall", "precision", "mrr", "hit_rate")
        for k in (1, 3, 5, 10, 20, 100, 1000)
    ),
)
_CORRELATIONS = ("cosine_spearman", "cosine_pearson", "spearman", "pearson")
_CLASS_SCORES = (
    "accuracy",
    "f1",
    "f1_weighted",
    "precision",
    "precision_weighted",
    "recall",
    "recall_weighted",
)

MAIN_SCORES: dict[TaskType, tuple[str, ...]] = {
    "Retrieval": _RANKING_SCORES,
    "Reranking": _RANKING_SCORES,
    "Clustering": ("v_measure", "ami"),
    "PairClassification": ("max_ap", "max_f1", "max_accuracy", "cosine_ap", "cosine_f1"),
    "Classification": _CLASS_SCORES,
    "STS": _CORRELATIONS,
    "Summarization": _CORRELATIONS,
}
"""The scores that ``main_score`` of a task.json may name."""

_READERS: dict[TaskType, Callable[[Path, Problems], TaskData]] = {
    "Retrieval": task_files.read_retrieval,
    "Reranking": task_files.read_reranking,
    "Clustering": task_files.read_clustering,
    "PairClassification": task_files.read_pair_classification,
    "Classification": task_files.read_classification,
    "STS": task_files.read_sts,
    "Summarization": task_files.read_summarization,
}


@dataclass(frozen=True)
class LocalTask:
    """One evaluation task, read and checked.

    Attributes:
        name: unique among the tasks evaluated together.
        type: what is measured and how the files look.
        instruction: in plain words, for queries and both sides of symmetric types; or ``None``.
        main_score: one of ``MAIN_SCORES[type]``.
        folder: where it was read from.
        data: the texts and gold values, one class per layout.
    """

    name: str
    type: TaskType
    instruction: str | None
    main_score: str
    folder: Path
    data: TaskData


def find_tasks(folder: str | Path) -> list[Path]:
    """List the task folders at ``folder``: itself if it is one, else those directly inside it.

    Raises:
        DataError: there is no such folder, or no task in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError("no such folder", where=str(root), expected="a task folder or one of tasks")
    if (root / "task.json").is_file():
        return [root]
    found = sorted(path.parent for path in root.glob("*/task.json"))
    if not found:
        raise DataError(
            "no evaluation task here",
            where=str(root),
            expected="a task.json in this folder or in folders directly inside it",
        )
    return found


def load_tasks(
    folders: Sequence[str | Path], names: Sequence[str] | None = None
) -> list[LocalTask]:
    """Load all tasks at ``folders``, or only those called one of ``names``.

    Everything is read before anything is encoded, so that a broken task is told at once.

    Raises:
        DataError: a folder or task that cannot be used, a name given twice or not found.
    """
    paths = {path.resolve(): path for folder in folders for path in find_tasks(folder)}
    kept: dict[str, Path] = {}
    for path in paths.values():
        name = _read_header(path).name
        if name in kept:
            raise DataError(
                f"task {name!r} is also in {kept[name]}",
                where=str(path / "task.json"),
                expected="one name per task",
            )
        kept[name] = path
    if names is not None:
        if unknown := [name for name in names if name not in kept]:
            raise DataError(
                f"no task called {unknown[0]!r}", expected=_near(unknown[0], sorted(kept))
            )
        kept = {name: path for name, path in kept.items() if name in set(names)}
    return [load_task(path) for path in kept.values()]


def load_task(folder: str | Path) -> LocalTask:
    """Read and check one task folder.

    Raises:
        DataError: naming every problem of ``task.json``, or else every problem of the data, with
            file and line.
    """
    path = Path(folder)
    header = _read_header(path)
    problems = Problems(path)
    data = _READERS[header.type](path, problems)
    problems.check()
    return LocalTask(
        header.name, header.type, header.instruction, header.main_score, folder=path, data=data
    )


@dataclass(frozen=True)
class _Header:
    name: str
    type: TaskType
    instruction: str | None
    main_score: str


def _read_header(folder: Path) -> _Header:
    path = folder / "task.json"
    where = str(path)
    values = read_json_object(path, "name, type, instruction and main_score")
    problems = Problems(folder)
    name = problems.text(values, "name", where)
    kind = problems.text(values, "type", where)
    main_score = problems.text(values, "main_score", where)
    instruction: str | None = None
    if "instruction" not in values:
        problems.add("'instruction' is missing", where, "a text, or null for none")
    elif values["instruction"] is not None:
        instruction = problems.text(values, "instruction", where)
    if kind is not None and kind not in TASK_TYPES:
        problems.add(f"type {kind!r}", where, _near(kind, TASK_TYPES))
    elif kind is not None and main_score is not None:
        scores = MAIN_SCORES[kind]
        if main_score not in scores:
            problems.add(f"main_score {main_score!r} for {kind}", where, _near(main_score, scores))
    problems.check()
    return _Header(str(name), cast(TaskType, kind), instruction, str(main_score))


def _near(given: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(given, known, n=3, cutoff=0.5)
    return f"perhaps {' or '.join(matches)}" if matches else f"one of {', '.join(known)}"
