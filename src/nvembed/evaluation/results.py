"""What an evaluation leaves behind: ``results.json``, one entry per finished task.

No model, mteb or torch is needed to read it: ``summary`` makes tables of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nvembed.core.errors import DataError
from nvembed.core.files import write_json
from nvembed.core.text_files import read_json_object

EVALUATE = "evaluate"


@dataclass(frozen=True)
class TaskResult:
    """The scores of one model on one task.

    Attributes:
        type: of the task, mteb's name of it.
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
    """Read a file of ``write_results``.

    Raises:
        DataError: the file is missing or holds something else.
    """
    expected = "a results.json of `nvembed evaluate`"
    values = read_json_object(Path(path), expected)
    try:
        results = {name: TaskResult(**entry) for name, entry in values.items()}
        if not all(isinstance(result.type, str) for result in results.values()):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise DataError("not evaluation results", where=str(path), expected=expected) from error
    return results
