"""The report: the numbers of the results, in their places."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

from rich.console import Console

from nvembed.evaluation.results import TaskResult
from pydocs.report import main_scores, next_commands, score_table


def result(score: float | None) -> TaskResult:
    return TaskResult("Retrieval", "x", score, 1.0, {})


RESULTS = {
    "BM25": {"pydocs_retrieval": result(0.6)},
    "trained": {
        "pydocs_clustering": result(0.4),
        "pydocs_classification": result(0.75),
        "pydocs_retrieval": result(0.6125),
    },
}


def printed(thing: object) -> str:
    out = io.StringIO()
    Console(file=out, width=100).print(thing)
    return out.getvalue()


def test_scores_come_in_the_order_of_the_columns() -> None:
    assert main_scores(RESULTS) == {"BM25": [0.6, None, None], "trained": [0.6125, 0.75, 0.4]}


def test_table() -> None:
    lines = [line.split() for line in printed(score_table(RESULTS)).splitlines()]
    cells = {line[1]: line[3::2] for line in lines if len(line) > 1 and line[0] == "│"}
    assert cells["BM25"] == ["0.600", "–", "–"]
    assert cells["trained"] == ["0.613", "0.750", "0.400"]


def test_next_commands_quote_the_folder() -> None:
    commands = "\n".join(command for _, command in next_commands(Path("my runs/demo")))
    for line in commands.splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] in ("nvembed", "python", "PYTHONPATH=examples")
        assert not any(word.startswith("runs/") for word in words)
    assert "'my runs/demo'/model" in commands
