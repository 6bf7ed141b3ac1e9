"""The template of prompts, and the instructions of the MTEB tasks by name.

A query is ``Instruct: {instruction}\\nQuery: {text}``, a document the bare text (paper s4); the
part before the text is the *prompt*. ``instructions.yaml`` has the instruction of each task of MTEB
English v1. Next file: ``model/tokens.py``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Literal

import yaml

from nvembed.core.errors import ConfigError

Side = Literal["query", "document"]
PromptedText = tuple[str, str]  # (prompt, text)

QUERY_PROMPT = "Instruct: {instruction}\nQuery: "

# So near to a task's name that it was meant as one: "FiQA2019" but not "Summarise".
_TYPO_CUTOFF = 0.85
# So many letters of the beginning of a name are meant as the name: "quora", "banking".
_SHORTEST_BEGINNING = 5
# What words of a sentence do not have: a digit, "_" or "." inside, a capital after a small one.
_NAME_MARK = re.compile(r"[0-9_.]|[a-z][A-Z]")


def query_prompt(instruction: str | None) -> str:
    """Render the prompt of an instruction; no instruction gives the empty prompt.

    >>> query_prompt("Given a question, retrieve passages that answer the question")
    'Instruct: Given a question, retrieve passages that answer the question\\nQuery: '
    """
    if instruction is None or not instruction.strip():
        return ""
    return QUERY_PROMPT.replace("{instruction}", instruction.strip())


def prompt_instruction(prompt: str | None) -> str | None:
    """The instruction of a prompt of our template; ``None`` where it is another."""
    before, after = QUERY_PROMPT.split("{instruction}")
    if not prompt or not (prompt.startswith(before) and prompt.endswith(after)):
        return None
    return prompt[len(before) : -len(after)]


def split_prompt(text: str) -> PromptedText:
    """Take a prompt of our template off a text; no prompt where it does not begin with one.

    >>> split_prompt("Instruct: Find it\\nQuery: sorted lists")
    ('Instruct: Find it\\nQuery: ', 'sorted lists')
    """
    before, after = QUERY_PROMPT.split("{instruction}")
    end = text.find(after) + len(after)
    if not text.startswith(before) or end < len(before + after):
        return "", text
    return text[:end], text[end:]


def side_prompt(
    prompts: Mapping[str, str | None], side: Side, default_name: str | None = None
) -> str:
    """Return a model's own prompt of a side, as encode_query and encode_document choose it."""
    names = ("query",) if side == "query" else ("document", "passage", "corpus")
    name = next((name for name in names if name in prompts), default_name)
    return (prompts.get(name) or "") if name is not None else ""


@dataclass(frozen=True, slots=True)
class TaskInstruction:
    """The instruction of one task, a row of ``instructions.yaml``.

    ``source`` is ``official`` (file of the released model), ``mteb`` or ``recalled`` (from memory);
    where a task is symmetric documents carry the instruction too.
    """

    name: str
    type: str
    instruction: str
    source: Literal["official", "mteb", "recalled"]
    symmetric: bool = False
    aliases: Sequence[str] = ()


@cache
def all_instructions() -> dict[str, TaskInstruction]:
    """Return the table by the name of the task, without aliases; do not change it."""
    text = files("nvembed.data").joinpath("instructions.yaml").read_text(encoding="utf-8")
    return {name: TaskInstruction(name, **row) for name, row in yaml.safe_load(text).items()}


@cache
def _by_any_name() -> dict[str, TaskInstruction]:
    tasks = all_instructions().values()
    return {name: task for task in tasks for name in (task.name, *task.aliases)}


def find_instruction(name: str) -> TaskInstruction | None:
    """Look up a task by its exact name or an alias; ``None`` where the table has none."""
    return _by_any_name().get(name)


def task_instruction(name: str) -> TaskInstruction:
    """Look up a task by its exact name or an alias; the ConfigError gives the nearest names.

    >>> task_instruction("FiQA2018").instruction
    'Given a financial question, retrieve relevant passages that answer the query'
    """
    found = find_instruction(name)
    if found is None:
        near = _near(name, cutoff=0.5)
        raise ConfigError(
            f"no instruction for a task called {name!r}",
            expected=f"perhaps {' or '.join(near)}" if near else "a task of MTEB English v1",
        )
    return found


def read_task(task: str | None, prompts: Collection[str] | None = ()) -> str | None:
    """Read what a user gave as a task: the name of an MTEB task becomes its instruction.

    The name of one of the ``prompts`` stays, for ``resolve_prompt``. Else it is an instruction, but
    a single word that looks like a name is a ConfigError, as a typing error would spoil every
    vector without a sign; with ``prompts`` None it may be a prompt that is not known yet.
    """
    if task is None or len(task.split()) != 1:
        return task
    word = task.strip()
    found = find_instruction(word)
    if found is not None:
        return found.instruction
    if prompts is not None and word not in prompts and _looks_like_a_name(word, prompts):
        near = _near(word, cutoff=0.5, more=prompts)
        raise ConfigError(
            f"{task!r} is neither a task nor an instruction",
            where="task",
            expected=f"perhaps {' or '.join(near)}" if near else "the name of a task of MTEB",
            hint="An instruction is a sentence, such as 'Given a question, retrieve its answer'",
        )
    return task


def resolve_prompt(
    task: str | None, prompts: Mapping[str, str | None] = MappingProxyType({})
) -> str | None:
    """Return the prompt that stands in front of texts: the one place where a task becomes one.

    ``task`` is the name of an MTEB task, else of one of the model's ``prompts``, else an
    instruction; a blank one gives the empty prompt, and ``None`` gives ``None``.
    """
    if task is None:
        return None
    name = task.strip()
    if name in prompts and find_instruction(name) is None:
        return prompts[name] or ""
    return query_prompt(read_task(task, prompts))


def task_prompts() -> dict[str, str]:
    """Return the prompts of all tasks and aliases, for the ``prompts`` of a model.

    Where documents stay bare there is an empty ``NAME-document`` for mteb.
    """
    prompts = {}
    for name, task in _by_any_name().items():
        prompts[name] = query_prompt(task.instruction)
        if task.type in ("Retrieval", "Reranking") and not task.symmetric:
            prompts[f"{name}-document"] = ""
    return prompts


def _looks_like_a_name(word: str, prompts: Collection[str]) -> bool:
    """Whether a word was meant as a name: "FiQA2019", "scifact", "my_task", but not "Summarise"."""
    if not word.isascii():  # languages without spaces write a sentence as one word
        return False
    inner = word.strip(".:!")[1:]
    if _NAME_MARK.search(inner) and not inner.isupper():
        return True
    return bool(_near(word, cutoff=_TYPO_CUTOFF, more=prompts))


def _near(name: str, *, cutoff: float, more: Collection[str] = ()) -> list[str]:
    by_lower = {known.lower(): known for known in (*more, *_by_any_name())}
    start = name.lower()
    matches = difflib.get_close_matches(start, list(by_lower), n=3, cutoff=cutoff)
    if len(start) >= _SHORTEST_BEGINNING:
        matches += [known for known in by_lower if known.startswith(start)]
    return [by_lower[match] for match in dict.fromkeys(matches)][:3]
