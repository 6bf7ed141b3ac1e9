"""Local evaluation tasks: a folder with ``task.json`` and the data files of its type.

A folder in BEIR's layout without ``task.json`` is a Retrieval task called like the folder.
``find_tasks`` finds the folders, ``load_task`` reads one and refuses it with every problem named.
Scoring is in ``local_scores`` (all types) and ``bm25`` (retrieval).
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from nvembed.core.errors import ConfigError, DataError
from nvembed.core.text_files import read_json_object
from nvembed.data.sources.beir import first_split, is_beir_folder
from nvembed.evaluation import task_files
from nvembed.evaluation.reference import ignores_identical_ids
from nvembed.evaluation.retrieval_files import read_retrieval
from nvembed.evaluation.task_files import Problems, RetrievalData, TaskData
from nvembed.text.instructions import read_task

_log = logging.getLogger(__name__)
_HEADER = "task.json"
_PLAIN_SCORE = "ndcg_at_10"  # of a folder without task.json, as in BEIR

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

_READERS: dict[TaskType, Callable[[Problems], TaskData]] = {
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
            ``task.json`` may name an MTEB task for its instruction.
        main_score: one of ``MAIN_SCORES[type]``.
        folder: where it was read from.
        data: the texts and gold values, one class per layout.
        ignore_identical_ids: of Retrieval: a result with the id of its query does not count, as
            where the queries are documents of the corpus.
        remarks: what the files hold that scores are computed in spite of, in one line; or nothing.
    """

    name: str
    type: TaskType
    instruction: str | None
    main_score: str
    folder: Path
    data: TaskData
    ignore_identical_ids: bool = False
    remarks: str = ""


def find_tasks(folder: str | Path) -> list[Path]:
    """List the task folders at ``folder``: itself if it is one, else those directly inside it.

    Raises:
        DataError: there is no such folder, or no task in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError("no such folder", where=str(root), expected="a task folder or one of tasks")
    if _is_task(root):
        return [root]
    found = sorted(path for path in root.iterdir() if path.is_dir() and _is_task(path))
    if not found:
        raise DataError(
            "no evaluation task here",
            where=str(root),
            expected="a task.json, or corpus, queries and qrels, in this folder or in folders "
            "directly inside it",
        )
    return found


def _is_task(folder: Path) -> bool:
    return (folder / _HEADER).is_file() or is_beir_folder(folder)


def load_tasks(
    folders: Sequence[str | Path],
    names: Sequence[str] | None = None,
    *,
    broken: dict[str, str] | None = None,
) -> list[LocalTask]:
    """Load all tasks at ``folders``, or only those called one of ``names``.

    Everything is read before anything is encoded, so that a broken task is told at once. What is
    odd about the files of a task, and does not stop it, is logged in one line.

    Args:
        folders: see ``find_tasks``.
        names: of tasks; ``None`` is all.
        broken: takes the tasks that cannot be used, and why, instead of an error about the first.

    Raises:
        DataError: a folder or task that cannot be used, a name given twice or not found.
    """
    paths: dict[Path, Path] = {}
    for folder in folders:
        with _kept_going(str(folder), broken):
            paths |= {path.resolve(): path for path in find_tasks(folder)}
    kept: dict[str, Path] = {}
    for path in paths.values():
        with _kept_going(path.name, broken):
            name = _read_header(path).name
            if name in kept:
                raise DataError(
                    f"task {name!r} is also in {kept[name]}",
                    where=str(path / _HEADER),
                    expected="one name per task",
                )
            kept[name] = path
    if names is not None:
        if unknown := [name for name in names if name not in kept]:
            raise DataError(
                f"no task called {unknown[0]!r}", expected=_near(unknown[0], sorted(kept))
            )
        kept = {name: path for name, path in kept.items() if name in set(names)}
    loaded = []
    for name, path in kept.items():
        with _kept_going(name, broken):
            loaded.append(load_task(path))
    return loaded


@contextmanager
def _kept_going(name: str, broken: dict[str, str] | None) -> Iterator[None]:
    """Put the error of a block under ``name`` into ``broken``, where there is one."""
    try:
        yield
    except DataError as error:
        if broken is None:
            raise
        broken[name] = str(error)


def load_task(folder: str | Path) -> LocalTask:
    """Read and check one task folder.

    Raises:
        DataError: naming every problem of ``task.json``, or else every problem of the data, with
            file and line.
    """
    path = Path(folder)
    header = _read_header(path)
    problems = Problems(path)
    data: TaskData
    if header.type == "Retrieval":
        data = read_retrieval(problems, header.split)
    else:
        data = _READERS[header.type](problems)
    problems.check()
    ignored, reason = header.ignore_identical_ids, None
    if ignored is None:
        reason = ignores_identical_ids(header.name)
        ignored = reason is not None and _has_identical_ids(data)
    remarks = [str(kind).replace(f"{path}/", "") for kind in problems.remarks.kinds]
    if header.note:
        remarks.insert(0, header.note)
    if ignored and reason is not None:
        remarks.append(f"results with the id of their query do not count, as in mteb's {reason}")
    if remarks:
        _log.warning("%s: %s", header.name, "; ".join(remarks))
    return LocalTask(
        header.name,
        header.type,
        header.instruction,
        header.main_score,
        folder=path,
        data=data,
        ignore_identical_ids=ignored,
        remarks="; ".join(remarks),
    )


def _has_identical_ids(data: TaskData) -> bool:
    return isinstance(data, RetrievalData) and not set(data.query_ids).isdisjoint(data.document_ids)


@dataclass(frozen=True)
class _Header:
    name: str
    type: TaskType
    instruction: str | None
    main_score: str
    split: str | None = None
    ignore_identical_ids: bool | None = None
    note: str | None = None


def _read_header(folder: Path) -> _Header:
    path = folder / _HEADER
    if not path.is_file() and is_beir_folder(folder):
        split = first_split(folder)
        note = f"no {_HEADER}: Retrieval without an instruction, {_PLAIN_SCORE}, split {split}"
        return _Header(folder.resolve().name, "Retrieval", None, _PLAIN_SCORE, split, note=note)
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
        try:
            instruction = read_task(instruction)
        except ConfigError as error:
            problems.add(error.message, f"{where}: instruction", error.expected)
    if kind is not None and kind not in TASK_TYPES:
        problems.add(f"type {kind!r}", where, _near(kind, TASK_TYPES))
    elif kind is not None and main_score is not None:
        scores = MAIN_SCORES[kind]
        if main_score not in scores:
            problems.add(f"main_score {main_score!r} for {kind}", where, _near(main_score, scores))
    split = problems.text(values, "split", where) if values.get("split") is not None else None
    ignored = values.get("ignore_identical_ids")
    if ignored is not None and not isinstance(ignored, bool):
        problems.add("'ignore_identical_ids' is neither true nor false", where, "true or false")
    for key in ("split", "ignore_identical_ids"):
        if values.get(key) is not None and kind in TASK_TYPES and kind != "Retrieval":
            problems.add(f"{key!r} is of Retrieval tasks, not of {kind}", where)
    problems.check()
    return _Header(str(name), cast(TaskType, kind), instruction, str(main_score), split, ignored)


def _near(given: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(given, known, n=3, cutoff=0.5)
    return f"perhaps {' or '.join(matches)}" if matches else f"one of {', '.join(known)}"
