"""A synthesis: tasks are thought of, an example of each is written, doubles are dropped.

In: the settings and a folder; out, in the folder:

    journal.jsonl    every answer (``journal.py``); a run with the same settings goes on from it
    tasks.jsonl      {"kind", "task"}
    examples.jsonl   records of kind retrieval, each with its task as ``instruction``
    rejects.jsonl    {"id", "problem", "text"}: answers that stayed unusable
    summary.json     counts

All but the journal are made from the journal alone, so the same answers give the same files,
whatever order they came in.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from nvembed.building.duplicates import NearDuplicates
from nvembed.building.synthesis.answers import TaskList, WrittenExample
from nvembed.building.synthesis.asking import Asker, Request
from nvembed.building.synthesis.config import ExampleKind, SynthesisConfig
from nvembed.building.synthesis.endpoint import ChatEndpoint, read_key
from nvembed.building.synthesis.journal import Journal
from nvembed.building.synthesis.prompts import VERSION, example_prompt, tasks_prompt
from nvembed.core.files import tidy, write_json, write_jsonl
from nvembed.core.ownership import check_outputs
from nvembed.core.reporting import progress
from nvembed.core.text_files import check_folder_name
from nvembed.data.records import PairRecord

JOURNAL = "journal.jsonl"
TASKS = "tasks.jsonl"
EXAMPLES = "examples.jsonl"
REJECTS = "rejects.jsonl"
SUMMARY = "summary.json"
SYNTHESIZE = "data synthesize"
_MADE = (TASKS, EXAMPLES, REJECTS, SUMMARY)
# Jaccard similarity of pairs of words from which two tasks, or two queries, are doubles.
_SAME_TASK = 0.7
_SAME_QUERY = 0.8
_DOUBLE_WORDS = 2
# Rounds without a single new task after which the model has no more of them.
_IDLE_ROUNDS = 3


@dataclass
class KindSummary:
    """Counts of one kind; ``double`` ones are dropped."""

    tasks: int = 0
    double_tasks: int = 0
    examples: int = 0
    double_examples: int = 0
    rejected: int = 0


@dataclass
class Summary:
    """What a run has come to.

    Args:
        kinds: counts by kind.
        unanswered: requests that came to nothing in this run; another run asks them again.
        prompt_tokens: of all answers in the journal, as the endpoint counted them.
        answer_tokens: the same of the answers.
        uncounted: answers that the endpoint gave no token counts for.
    """

    kinds: dict[str, KindSummary] = field(default_factory=dict)
    unanswered: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    uncounted: int = 0


def synthesize(config: SynthesisConfig, folder: Path) -> Summary:
    """Make examples, or go on with it.

    Args:
        config: the settings. Those that decide what is asked must be the ones of before where the
            folder holds a journal; more tasks and more examples may be asked for.
        folder: for everything that is written.

    Raises:
        ConfigError: the folder holds a synthesis with other settings, or files of these names that
            no synthesis made; the key cannot be used.
        EndpointError: the endpoint refuses requests or is gone; what was answered is kept.
    """
    check_folder_name(folder)
    key = read_key(config.key_variable)
    if folder.is_dir():
        for name in _MADE:
            tidy(folder, name)
    check_outputs([folder / name for name in _MADE], made_by=SYNTHESIZE)
    with Journal(folder / JOURNAL, _identity(config)) as journal:
        return asyncio.run(_run(config, folder, key, journal))


def _identity(config: SynthesisConfig) -> dict[str, Any]:
    """What decides which question has which name."""
    return {
        "model": config.model,
        "seed": config.seed,
        "temperature": config.temperature,
        "tasks_per_request": config.tasks_per_request,
        "max_answer_tokens": config.max_answer_tokens,
        "prompts": VERSION,
    }


async def _run(config: SynthesisConfig, folder: Path, key: str | None, journal: Journal) -> Summary:
    summary = Summary({kind: KindSummary() for kind in config.kinds})
    tasks: dict[ExampleKind, list[str]] = {}
    async with ChatEndpoint(config, key) as endpoint:
        with progress(None, "tasks") as bar:
            asker = Asker(endpoint, journal, config, bar)
            for kind in config.kinds:
                tasks[kind] = await _think_of_tasks(kind, config, asker, journal, summary)
        total = sum(map(len, tasks.values())) * config.examples_per_task
        with progress(total, "examples") as bar:
            asker_of_examples = Asker(endpoint, journal, config, bar)
            await asker_of_examples.ask_all(_example_requests(tasks, config))
    summary.unanswered = asker.unanswered + asker_of_examples.unanswered
    _write(folder, tasks, config, journal, summary)
    return summary


async def _think_of_tasks(
    kind: ExampleKind, config: SynthesisConfig, asker: Asker, journal: Journal, summary: Summary
) -> list[str]:
    """Ask for tasks in rounds until there are enough different ones, or no more new ones come.

    The rounds of a run that goes on are those of before: they depend on the answers alone.
    """
    seen = NearDuplicates(_SAME_TASK, shingle_words=_DOUBLE_WORDS)
    tasks: list[str] = []
    doubles = asked = idle = 0
    while len(tasks) < config.tasks and idle < _IDLE_ROUNDS:
        missing = config.tasks - len(tasks)
        numbers = range(asked, asked + math.ceil(missing / config.tasks_per_request))
        asked = numbers.stop
        await asker.ask_all(
            Request(
                _tasks_name(kind, number),
                tasks_prompt(kind, config.tasks_per_request, config.seed, number),
                TaskList,
            )
            for number in numbers
        )
        before = len(tasks)
        for number in numbers:
            row = journal.get(_tasks_name(kind, number)) or {}
            for task in row.get("answer", {}).get("tasks", ()):
                if seen.find_or_add(len(tasks), task):
                    doubles += 1
                else:
                    tasks.append(task)
        idle = idle + 1 if len(tasks) == before else 0
    summary.kinds[kind].double_tasks = doubles
    return tasks[: config.tasks]


def _tasks_name(kind: ExampleKind, number: int) -> str:
    return f"tasks/{kind}/{number:06d}"


def _example_name(kind: ExampleKind, task: str, number: int) -> str:
    # By what the task says: its place changes when a request is answered that was not before.
    return f"example/{kind}/{sha256(task.encode()).hexdigest()[:24]}/{number:03d}"


def _example_requests(
    tasks: dict[ExampleKind, list[str]], config: SynthesisConfig
) -> Iterator[Request]:
    for kind, texts in tasks.items():
        for task in texts:
            for number in range(config.examples_per_task):
                prompt = example_prompt(kind, task, config.seed, number)
                yield Request(_example_name(kind, task, number), prompt, WrittenExample)


def _write(
    folder: Path,
    tasks: dict[ExampleKind, list[str]],
    config: SynthesisConfig,
    journal: Journal,
    summary: Summary,
) -> None:
    for kind, texts in tasks.items():
        summary.kinds[kind].tasks = len(texts)
    write_jsonl(
        folder / TASKS,
        ({"kind": kind, "task": task} for kind, texts in tasks.items() for task in texts),
        SYNTHESIZE,
    )
    write_jsonl(folder / EXAMPLES, _records(tasks, config, journal, summary), SYNTHESIZE)
    write_jsonl(folder / REJECTS, _rejects(journal, summary), SYNTHESIZE)
    write_json(folder / SUMMARY, asdict(summary), SYNTHESIZE)


def _records(
    tasks: dict[ExampleKind, list[str]],
    config: SynthesisConfig,
    journal: Journal,
    summary: Summary,
) -> Iterator[dict[str, Any]]:
    seen = NearDuplicates(_SAME_QUERY, shingle_words=_DOUBLE_WORDS)
    for kind, texts in tasks.items():
        counts = summary.kinds[kind]
        for task in texts:
            for number in range(config.examples_per_task):
                row = journal.get(_example_name(kind, task, number)) or {}
                if "answer" not in row:
                    continue
                example = WrittenExample.model_validate(row["answer"])
                if seen.find_or_add(len(seen), example.query):
                    counts.double_examples += 1
                    continue
                counts.examples += 1
                record = PairRecord(
                    example.query, (example.positive,), (example.negative,), instruction=task
                )
                yield {**record.to_json(), "kind": kind}


def _rejects(journal: Journal, summary: Summary) -> Iterator[dict[str, Any]]:
    """Yield the answers that were refused, and count what the whole journal has cost."""
    for name in journal.names():
        row = journal.get(name) or {}
        summary.prompt_tokens += row["prompt_tokens"]
        summary.answer_tokens += row["answer_tokens"]
        summary.uncounted += row["uncounted"]
        if "rejected" in row:
            kind = name.split("/")[1]
            if kind in summary.kinds:
                summary.kinds[kind].rejected += 1
            yield {"id": name, "problem": row["rejected"], "text": row["text"]}
