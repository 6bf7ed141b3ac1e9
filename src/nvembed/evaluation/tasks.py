"""Local evaluation tasks: a folder with ``task.json`` and the data files of its type.

A folder in BEIR's layout without ``task.json`` is a Retrieval task called like the folder.
``find_tasks`` finds the folders, ``load_task`` reads one and refuses it with every problem named.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationInfo, field_validator

from nvembed.core.errors import ConfigError, DataError
from nvembed.core.files import read_json_object
from nvembed.data.instructions import read_task
from nvembed.data.sources.beir import first_split, is_beir_folder
from nvembed.evaluation.reference import ignores_identical_ids, near_names
from nvembed.evaluation.retrieval_files import read_retrieval
from nvembed.evaluation.task_files import (
    TASK_TYPES,
    Problems,
    RetrievalData,
    TaskData,
    TaskType,
    Text,
    read_rows,
)

_log = logging.getLogger(__name__)
_HEADER = "task.json"
_PLAIN_SCORE = "ndcg_at_10"  # of a folder without task.json, as in BEIR

_RANKING = tuple(
    f"{name}_at_{k}"
    for name in ("ndcg", "map", "recall", "precision", "mrr", "hit_rate")
    for k in (1, 3, 5, 10, 20, 100, 1000)
)
_CORRELATIONS = ("cosine_spearman", "cosine_pearson", "spearman", "pearson")
_PER_CLASS = ("f1", "f1_weighted", "precision", "precision_weighted", "recall", "recall_weighted")

MAIN_SCORES: dict[TaskType, tuple[str, ...]] = {
    "Retrieval": ("map", "mrr", *_RANKING),
    "Reranking": ("map", "mrr", *_RANKING),
    "Clustering": ("v_measure", "ami"),
    "PairClassification": ("max_ap", "max_f1", "max_accuracy", "cosine_ap", "cosine_f1"),
    "Classification": ("accuracy", *_PER_CLASS),
    "STS": _CORRELATIONS,
    "Summarization": _CORRELATIONS,
}
"""The scores that ``main_score`` of a task.json may name."""


@dataclass(frozen=True)
class LocalTask:
    """One evaluation task, read and checked."""

    name: str  # unique among the tasks evaluated together
    type: TaskType
    instruction: str | None  # in plain words, for queries and both sides of symmetric types
    main_score: str  # one of ``MAIN_SCORES[type]``
    folder: Path
    data: TaskData
    ignore_identical_ids: bool = False  # in Retrieval: a result with the id of its query
    remarks: str = ""  # what the files hold that scores are computed in spite of, in one line


def task_hash(task: LocalTask) -> str:
    """Name the contents of a task: texts, gold values and what is scored, not the instruction."""
    digest = hashlib.sha256(f"{task.type} {task.main_score}".encode())
    if task.ignore_identical_ids:
        digest.update(b" without identical ids")
    for part in astuple(task.data):
        digest.update(repr(part).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def find_tasks(folder: str | Path) -> list[Path]:
    """List the task folders at ``folder``: itself if it is one, else those directly inside it."""
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
        names: the tasks that are wanted; ``None`` is all.
        broken: takes the tasks that cannot be used, and why, instead of an error about the first.

    Raises:
        DataError: a folder or task that cannot be used, a name given twice or not found.
    """
    paths: dict[Path, Path] = {}
    for folder in folders:
        with _kept_going(str(folder), broken):
            paths |= {path.resolve(): path for path in find_tasks(folder)}
    kept: dict[str, tuple[Path, _Header]] = {}
    for path in paths.values():
        with _kept_going(path.name, broken):
            header = _read_header(path)
            if header.name in kept:
                message = f"task {header.name!r} is also in {kept[header.name][0]}"
                raise DataError(message, where=str(path / _HEADER), expected="one name per task")
            kept[header.name] = path, header
    for name in names or ():
        if name not in kept:
            raise DataError(f"no task called {name!r}", expected=near_names(name, sorted(kept)))
    loaded = []
    for name, (path, header) in kept.items():
        if names is None or name in names:
            with _kept_going(name, broken):
                loaded.append(_load(path, header))
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
    """Read one task folder, or name every problem of ``task.json``, or else of the data."""
    return _load(Path(folder), _read_header(Path(folder)))


def _load(path: Path, header: _Header) -> LocalTask:
    problems = Problems(path)
    if header.type == "Retrieval":
        data: TaskData = read_retrieval(problems, header.split)
    else:
        data = read_rows(problems, header.type)
    problems.check()
    remarks = []
    if not (path / _HEADER).is_file():
        plain = f"Retrieval without an instruction, {_PLAIN_SCORE}, split {header.split}"
        remarks.append(f"no {_HEADER}: {plain}")
    remarks += [str(kind).replace(f"{path}/", "") for kind in problems.remarks.kinds]
    ignored = header.ignore_identical_ids
    if ignored is None:
        known = ignores_identical_ids(header.name)
        ignored = (
            known is not None
            and isinstance(data, RetrievalData)
            and not set(data.query_ids).isdisjoint(data.document_ids)
        )
        if ignored:
            remarks.append(f"results with the id of their query do not count, as in mteb's {known}")
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


class _Header(BaseModel):
    """A task.json."""

    name: Text
    type: TaskType
    main_score: Text
    instruction: Annotated[Text | None, Field(description="a text, or null for none")]
    split: Text | None = None
    ignore_identical_ids: bool | None = None

    @field_validator("type", mode="before")
    @classmethod
    def _is_known(cls, value: Any) -> Any:
        if isinstance(value, str) and value.strip() and value not in TASK_TYPES:
            raise ValueError(f"type {value!r}; expected {near_names(value, TASK_TYPES)}")
        return value

    @field_validator("main_score")
    @classmethod
    def _is_of_type(cls, value: str, info: ValidationInfo) -> str:
        kind = info.data.get("type")
        if kind is not None and value not in MAIN_SCORES[kind]:
            near = near_names(value, MAIN_SCORES[kind])
            raise ValueError(f"main_score {value!r} for {kind}; expected {near}")
        return value

    @field_validator("split", "ignore_identical_ids", mode="before")
    @classmethod
    def _is_of_retrieval(cls, value: Any, info: ValidationInfo) -> Any:
        kind, key = info.data.get("type", "Retrieval"), info.field_name
        if value is not None and kind != "Retrieval":
            raise ValueError(f"{key!r} is of Retrieval tasks, not of {kind}")
        if key == "ignore_identical_ids" and not isinstance(value, bool | None):
            raise ValueError(f"{key!r} is neither true nor false; expected true or false")
        return value


def _read_header(folder: Path) -> _Header:
    path = folder / _HEADER
    if not path.is_file() and is_beir_folder(folder):
        return _Header(
            name=folder.resolve().name,
            type="Retrieval",
            main_score=_PLAIN_SCORE,
            instruction=None,
            split=first_split(folder),
        )
    values = read_json_object(path, "name, type, instruction and main_score")
    problems = Problems(folder)
    header = problems.parse(_Header, values, str(path))
    instruction = values.get("instruction")
    if isinstance(instruction, str) and instruction.strip():
        try:
            instruction = read_task(instruction)
        except ConfigError as error:
            problems.add(error.message, f"{path}: instruction", error.expected)
    problems.check()
    assert header is not None
    return header.model_copy(update={"instruction": instruction})
