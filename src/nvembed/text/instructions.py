"""The instructions of the MTEB tasks, by name: what NV-Embed puts in front of whose texts.

In: the name of a task of MTEB English v1, or of a renamed or reduced version of it; out: its
instruction, whether both sides carry it, and how sure that is. The table is ``instructions.yaml``
beside this file.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

from nvembed.core.errors import ConfigError
from nvembed.text.template import query_prompt

Source = Literal["official", "mteb", "recalled"]

# So near to a task's name that it was meant as one: "FiQA2019" but not "Summarise".
_TYPO_CUTOFF = 0.85


@dataclass(frozen=True, slots=True)
class TaskInstruction:
    """The instruction of one task.

    Attributes:
        name: as in the benchmark "MTEB(eng, v1)".
        type: mteb's, such as ``Retrieval``.
        instruction: in plain words, without the template.
        symmetric: two texts are compared and both carry it; otherwise documents stay bare.
        source: ``official`` (file of the released model), ``mteb`` (mteb's prompt, said to be the
            paper's too) or ``recalled`` (from memory).
        aliases: tasks over the same texts under other names.
    """

    name: str
    type: str
    instruction: str
    symmetric: bool
    source: Source
    aliases: tuple[str, ...]


@cache
def all_instructions() -> dict[str, TaskInstruction]:
    """Return the table by the name of the task, without aliases; do not change it."""
    text = files("nvembed.text").joinpath("instructions.yaml").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return {
        name: TaskInstruction(
            name=name,
            type=row["type"],
            instruction=row["instruction"],
            symmetric=row.get("symmetric", False),
            source=row["source"],
            aliases=tuple(row.get("aliases", ())),
        )
        for name, row in table.items()
    }


def find_instruction(name: str) -> TaskInstruction | None:
    """Look up a task by its exact name or an alias; ``None`` where the table has none."""
    return _by_any_name().get(name)


def task_instruction(name: str) -> TaskInstruction:
    """Look up a task by its exact name or an alias.

    >>> task_instruction("FiQA2018").instruction
    'Given a financial question, retrieve relevant passages that answer the query'

    Raises:
        ConfigError: no task of that name; the nearest names are given.
    """
    found = find_instruction(name)
    if found is None:
        near = _near(name, cutoff=0.5)
        raise ConfigError(
            f"no instruction for a task called {name!r}",
            expected=f"perhaps {' or '.join(near)}" if near else "a task of MTEB English v1",
        )
    return found


def read_task(text: str | None) -> str | None:
    """Read what a user gave as ``--task``: a task's name becomes its instruction.

    Anything else is taken as the instruction itself, except a single word that is nearly a name:
    used as an instruction, a typing error would spoil every vector without a sign.

    Raises:
        ConfigError: such a word.
    """
    if text is None or text in _by_any_name():
        return None if text is None else task_instruction(text).instruction
    if len(text.split()) == 1 and _near(text, cutoff=_TYPO_CUTOFF):
        raise ConfigError(
            f"{text!r} is neither a task nor an instruction",
            where="--task",
            expected=f"perhaps {' or '.join(_near(text, cutoff=_TYPO_CUTOFF))}",
        )
    return text


def task_prompts() -> dict[str, str]:
    """Return the prompts of all tasks and aliases, for the ``prompts`` of a model.

    ``model.encode(texts, prompt_name="FiQA2018")`` then encodes queries of that task. For tasks
    whose documents stay bare there is an empty ``FiQA2018-document`` too: mteb would otherwise put
    the prompt of the task in front of its documents.
    """
    prompts = {}
    for task in all_instructions().values():
        for name in (task.name, *task.aliases):
            prompts[name] = query_prompt(task.instruction)
            if task.type in ("Retrieval", "Reranking") and not task.symmetric:
                prompts[f"{name}-document"] = ""
    return prompts


@cache
def _by_any_name() -> dict[str, TaskInstruction]:
    return {
        name: task for task in all_instructions().values() for name in (task.name, *task.aliases)
    }


def _near(name: str, *, cutoff: float) -> list[str]:
    by_lower = {known.lower(): known for known in _by_any_name()}
    matches = difflib.get_close_matches(name.lower(), list(by_lower), n=3, cutoff=cutoff)
    return [by_lower[match] for match in matches]
