"""A synthesis: tasks are thought of, examples of each are written, doubles are dropped.

The folder then holds every answer (``journal.jsonl``), tasks, examples (records of kind retrieval,
each with its task as ``instruction``), rejects and a summary. All but the journal are made from the
journal alone, so the same answers give the same files, whatever order they came in.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import aclosing, closing
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from nvembed.building.contamination import NearDuplicates
from nvembed.building.synthesis.endpoint import Asker, Journal, Request
from nvembed.building.synthesis.prompts import (
    VERSION,
    ExampleKind,
    SynthesisConfig,
    TaskList,
    WrittenExample,
    example_prompt,
    tasks_prompt,
)
from nvembed.core.files import tidy, write_json, write_jsonl
from nvembed.core.http import read_key
from nvembed.core.outputs import check_folder_name
from nvembed.core.ownership import check_outputs
from nvembed.core.reporting import progress
from nvembed.data.records import PairRecord

if TYPE_CHECKING:
    from rich.console import Console

_JOURNAL = "journal.jsonl"
_TASKS = "tasks.jsonl"
_EXAMPLES = "examples.jsonl"
_REJECTS = "rejects.jsonl"
_SUMMARY = "summary.json"
_SYNTHESIZE = "data synthesize"
# Jaccard similarity of pairs of words from which two tasks, or two queries, are doubles.
_SAME_TASK = 0.7
_SAME_QUERY = 0.8
_DOUBLE_WORDS = 2
# Rounds without a single new task after which the model has no more of them.
_IDLE_ROUNDS = 3


class KindSummary(BaseModel):
    """Counts of one kind; ``double`` ones are dropped."""

    tasks: int = 0
    double_tasks: int = 0
    examples: int = 0
    double_examples: int = 0
    rejected: int = 0


class Summary(BaseModel):
    """Counts by kind, and what the whole journal has cost, in tokens as the endpoint counted them.

    ``unanswered`` requests came to nothing in this run; ``uncounted`` answers came without counts.
    """

    kinds: dict[str, KindSummary]
    unanswered: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    uncounted: int = 0


def synthesize(config: SynthesisConfig, folder: Path) -> Summary:
    """Make examples, or go on with it, and write everything into the folder.

    Settings that decide what is asked must be those of a journal that is there; more may be asked
    for.
    """
    check_folder_name(folder)
    key = read_key(config.key_variable)
    made = (_TASKS, _EXAMPLES, _REJECTS, _SUMMARY)
    if folder.is_dir():
        for name in made:
            tidy(folder, name)
    check_outputs([folder / name for name in made], made_by=_SYNTHESIZE)
    # What decides which question has which name.
    identity = {
        "model": config.model,
        "seed": config.seed,
        "temperature": config.temperature,
        "tasks_per_request": config.tasks_per_request,
        "max_answer_tokens": config.max_answer_tokens,
        "prompts": VERSION,
    }
    with closing(Journal(folder / _JOURNAL, identity)) as journal:
        run = _Synthesis(config, journal)
        asyncio.run(run.ask(key))
        run.write(folder)
    return run.summary


class _Synthesis:
    """Tasks and counts so far."""

    def __init__(self, config: SynthesisConfig, journal: Journal) -> None:
        self._config = config
        self._journal = journal
        self._tasks: dict[ExampleKind, list[str]] = {}
        self.summary = Summary(kinds={kind: KindSummary() for kind in config.kinds})

    async def ask(self, key: str | None) -> None:
        """Ask for everything that is not in the journal."""
        async with aclosing(Asker(self._config, key, self._journal)) as asker:
            with progress(None, "tasks") as bar:
                asker.begin(bar)
                for kind in self._config.kinds:
                    self._tasks[kind] = await self._think_of_tasks(kind, asker)
            self.summary.unanswered = asker.unanswered
            total = sum(map(len, self._tasks.values())) * self._config.examples_per_task
            with progress(total, "examples") as bar:
                asker.begin(bar)
                await asker.ask_all(request for _, _, request in self._examples())
            self.summary.unanswered += asker.unanswered

    async def _think_of_tasks(self, kind: ExampleKind, asker: Asker) -> list[str]:
        """Ask in rounds, by the answers alone, until there are enough tasks or no new ones come."""
        config, counts = self._config, self.summary.kinds[kind]
        seen = NearDuplicates(_SAME_TASK, shingle_words=_DOUBLE_WORDS)
        tasks: list[str] = []
        asked = idle = 0
        while len(tasks) < config.tasks and idle < _IDLE_ROUNDS:
            missing = math.ceil((config.tasks - len(tasks)) / config.tasks_per_request)
            requests = [
                Request(
                    f"tasks/{kind}/{number:06d}",
                    tasks_prompt(kind, config.tasks_per_request, config.seed, number),
                    TaskList,
                )
                for number in range(asked, asked + missing)
            ]
            asked += missing
            await asker.ask_all(requests)
            before = len(tasks)
            for request in requests:
                for task in self._answer(request).get("tasks", ()):
                    if seen.find_or_add(len(tasks), task):
                        counts.double_tasks += 1
                    else:
                        tasks.append(task)
            idle = idle + 1 if len(tasks) == before else 0
        counts.tasks = min(len(tasks), config.tasks)
        return tasks[: config.tasks]

    def _examples(self) -> Iterator[tuple[ExampleKind, str, Request]]:
        """Yield the kind, the task and the request of each example that is to be written."""
        for kind, texts in self._tasks.items():
            for task in texts:
                # By what the task says: its place changes when a request is answered that was not.
                digest = sha256(task.encode()).hexdigest()[:24]
                for number in range(self._config.examples_per_task):
                    name = f"example/{kind}/{digest}/{number:03d}"
                    prompt = example_prompt(kind, task, self._config.seed, number)
                    yield kind, task, Request(name, prompt, WrittenExample)

    def _answer(self, request: Request) -> dict[str, Any]:
        """Return the valid answer, empty where there is none."""
        return (request.name in self._journal and self._journal[request.name].answer) or {}

    def write(self, folder: Path) -> None:
        """Write all files but the journal, from the journal."""
        tasks = ({"kind": kind, "task": t} for kind, texts in self._tasks.items() for t in texts)
        write_jsonl(folder / _TASKS, tasks, _SYNTHESIZE)
        write_jsonl(folder / _EXAMPLES, self._records(), _SYNTHESIZE)
        write_jsonl(folder / _REJECTS, self._rejects(), _SYNTHESIZE)
        write_json(folder / _SUMMARY, self.summary.model_dump(), _SYNTHESIZE)

    def _records(self) -> Iterator[dict[str, Any]]:
        seen = NearDuplicates(_SAME_QUERY, shingle_words=_DOUBLE_WORDS)
        for key, (kind, task, request) in enumerate(self._examples()):
            if not (answer := self._answer(request)):
                continue
            example, counts = WrittenExample.model_validate(answer), self.summary.kinds[kind]
            if seen.find_or_add(key, example.query):
                counts.double_examples += 1
                continue
            counts.examples += 1
            negatives = (example.negative,)
            record = PairRecord(example.query, (example.positive,), negatives, instruction=task)
            yield {**record.to_json(), "kind": kind}

    def _rejects(self) -> Iterator[dict[str, Any]]:
        """Yield the answers that were refused, and count what the whole journal has cost."""
        summary = self.summary
        for row in self._journal.rows():
            summary.prompt_tokens += row.prompt_tokens
            summary.answer_tokens += row.answer_tokens
            summary.uncounted += row.uncounted
            if row.rejected is not None:
                if (counts := summary.kinds.get(row.id.split("/")[1])) is not None:
                    counts.rejected += 1
                yield {"id": row.id, "problem": row.rejected, "text": row.text}


def print_summary(summary: Summary, folder: Path, console: Console) -> None:
    """Print counts by kind, what it took, and how to train on it."""
    from rich.table import Table

    table = Table("kind", *(name.replace("_", " ") for name in KindSummary.model_fields))
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {kind: list(counts.model_dump().values()) for kind, counts in summary.kinds.items()}
    for kind, values in rows.items():
        table.add_row(kind, *(f"{value:,}" for value in values))
    table.add_section()
    totals = [sum(column) for column in zip(*rows.values(), strict=True)]
    table.add_row("all", *(f"{value:,}" for value in totals))
    console.print(table)
    uncounted = f", {summary.uncounted:,} answers uncounted" if summary.uncounted else ""
    console.print(
        f"tokens: {summary.prompt_tokens:,} in prompts, {summary.answer_tokens:,} in answers"
        f"{uncounted}; cost unknown: the endpoint does not tell",
        soft_wrap=True,
    )
    if summary.unanswered:
        console.print(
            f"{summary.unanswered:,} requests came to nothing: run the same command again",
            soft_wrap=True,
        )
    path = folder / _EXAMPLES
    console.print(f"written: {path}", soft_wrap=True)
    console.print(
        f"for training on it, add to datasets: {{name: synthetic, path: {path}, kind: retrieval, "
        "instruction: null, stages: [1]}",
        soft_wrap=True,
        markup=False,
    )
