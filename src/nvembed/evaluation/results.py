"""What an evaluation leaves: ``results.json``, and the items that each main score is made of.

``results.json`` has one entry per finished task; ``summary`` makes tables of it. The items, for
resampling, are one ``.npz`` without pickle per task in the folder ``<results>.items`` beside it;
``significance`` reads them. Neither torch nor mteb is needed.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from nvembed.core.errors import DataError
from nvembed.core.files import atomic_path, read_json_object, write_json
from nvembed.core.ownership import remove

EVALUATE = "evaluate"


@dataclass(frozen=True)
class TaskResult:
    """The scores of one model on one task.

    Attributes:
        type: mteb's name of the type of task.
        main_score_name: as in its task.json.
        main_score: mostly 0 to 1, higher is better; ``None`` where undefined (constant vectors).
        seconds: wall time, encoding included.
        scores: all scores, the main one among them.
    """

    type: str
    main_score_name: str
    main_score: float | None
    seconds: float
    scores: Mapping[str, float | None]


def write_results(
    path: str | Path, results: Mapping[str, TaskResult], made_by: str | None = None
) -> None:
    """Write task name → result as JSON, atomically; ``made_by`` as in ``atomic_path``."""
    values = {name: dataclasses.asdict(result) for name, result in results.items()}
    write_json(path, values, made_by)


def read_results(path: str | Path) -> dict[str, TaskResult]:
    """Read a file of ``write_results``; a ``DataError`` where it is missing or something else."""
    expected = "a results.json of `nvembed evaluate`"
    values = read_json_object(Path(path), expected)
    try:
        return TypeAdapter(dict[str, TaskResult]).validate_python(values)
    except ValidationError as error:
        raise DataError("not evaluation results", where=str(path), expected=expected) from error


def run_file(results: str | Path) -> Path:
    """Where the record of what results were made with lies: ``a.json`` → ``a.run.json``."""
    return Path(results).with_suffix(".run.json")


# --- Items ----------------------------------------------------------------------------------------

ItemKind = Literal["values", "correlation", "pairs", "classes", "clusters"]

_ARRAYS: dict[str, set[str]] = {
    "values": {"values_N"},
    "correlation": {"gold_N", "similarities_N"},
    "pairs": {"gold_N", "similarities_SN"},
    "classes": {"gold_N", "predicted_EN"},
    "clusters": {"gold_N", "assigned_EN", "drawn_EN"},
}


@dataclass(frozen=True)
class Items:
    """The items of one model on one task.

    Attributes:
        kind: how the main score comes from the arrays:
            ``values``: the mean of values_N, per query or article;
            ``correlation``: of similarities_N with gold_N, per pair;
            ``pairs``: labels gold_N and the similarities that the score is the best of;
            ``classes``: gold_N and the predictions of E experiments, per test text;
            ``clusters``: gold_N, and for E experiments how often each text was drawn and the
            cluster that it got.
        score: name of the main score.
        task_hash: names the task's data: only items of equal data can be paired.
        arrays: by name, the last axis running over the items.
    """

    kind: ItemKind
    score: str
    task_hash: str
    arrays: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return int(next(iter(self.arrays.values())).shape[-1])


def items_folder(results: str | Path) -> Path:
    """Where the items of a results file lie: ``runs/a.json`` → ``runs/a.items``."""
    return Path(results).with_suffix(".items")


def _items_file(folder: str | Path, name: str) -> Path:
    return Path(folder) / f"{quote(name, safe=' ')}.npz"  # names of tasks may hold slashes


def write_items(folder: str | Path, name: str, items: Items, made_by: str | None = None) -> None:
    """Write the items of the task ``name`` atomically; ``made_by`` as in ``atomic_path``."""
    arrays: dict[str, Any] = {**items.arrays}
    arrays |= {key: np.array(getattr(items, key)) for key in ("kind", "score", "task_hash")}
    path = _items_file(folder, name)
    with atomic_path(path, made_by) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def keep_items(folder: str | Path, names: Collection[str]) -> None:
    """Delete the items of all other tasks: they may be another model's."""
    for path in set(Path(folder).glob("*.npz")) - {_items_file(folder, name) for name in names}:
        remove(path)


def read_items(folder: str | Path, name: str) -> Items | None:
    """Read the items of the task ``name``; ``None`` where none were written.

    Raises:
        DataError: the file is damaged or holds something else.
    """
    path = _items_file(folder, name)
    if not path.is_file():
        return None
    try:
        # Opened here, since np.load leaves a damaged file open.
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        kind, score, hashed = (str(arrays.pop(key)) for key in ("kind", "score", "task_hash"))
        lengths = {array.shape[-1:] for array in arrays.values()}
        if set(arrays) != _ARRAYS[kind] or len(lengths) != 1:
            raise ValueError
    # TypeError: a single array is no archive.
    except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            "not items of an evaluation",
            where=str(path),
            expected="a file that `nvembed evaluate` wrote",
            hint="Delete it and evaluate the task again",
        ) from error
    kinds: Any = kind
    return Items(kinds, score, hashed, arrays)
