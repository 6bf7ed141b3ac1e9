"""What others published, as data: instructions by source, scores of models, the paper's ablations.

All scores are times 100. The tables are the YAML files beside this one; each entry names its
source and how certain it is. Needs neither torch nor mteb.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

from nvembed.core.errors import ConfigError
from nvembed.data.instructions import find_instruction

InstructionSource = Literal["paper", "official", "mteb", "none"]


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """Published scores of one model on MTEB(eng, v1), times 100, per type and task as printed."""

    name: str
    source: str
    date: str | None  # ISO
    certainty: str  # ``official`` (card or paper) or ``leaderboard``; tasks may have their own
    instructions: str | None
    average: float
    types: Mapping[str, float]
    tasks: Mapping[str, float]
    tasks_certainty: str | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class PaperTable:
    """One ablation as printed: by row, the score (times 100) per task type and ``average``."""

    name: str
    source: str
    certainty: str
    rows: Mapping[str, Mapping[str, float]]
    note: str | None = None


def instruction_for(
    task_name: str, source: InstructionSource, *, mteb_prompt: str | None = None
) -> str | None:
    """Return the instruction of a task of mteb from one source, in plain words.

    ``paper`` is the table ``data/instructions.yaml``, which says how sure each row is: the paper's
    appendix itself was not read. ``official`` are those rows of it that stand in NVIDIA's
    instructions.json. A task that either lacks gets mteb's prompt: the models compared were scored
    with some instruction on every task, and without one they would be held against other scores.
    """
    if source == "none":
        return None
    found = find_instruction(task_name)
    if found and (source == "paper" or source == found.source == "official"):
        return found.instruction
    return mteb_prompt


def near_names(name: str, known: Collection[str], otherwise: str | None = None) -> str:
    """Say which names come near to an unknown one, or else what is expected."""
    folded = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.5)
    if near:
        return f"perhaps {' or '.join(folded[one] for one in near)}"
    return otherwise or f"one of {', '.join(known)}"


@cache
def published_scores() -> Mapping[str, PublishedModel]:
    """Return the published models by hub id; do not change it."""
    return {name: PublishedModel(name=name, **row) for name, row in _read("published").items()}


def published_model(name: str) -> PublishedModel:
    """Look up a model by its hub id; a ``ConfigError`` gives near ones of an unknown name."""
    known = published_scores()
    if name not in known:
        raise ConfigError(f"no published scores of {name!r}", expected=near_names(name, known))
    return known[name]


@cache
def paper_tables() -> Mapping[str, PaperTable]:
    """Return the ablations: ``stage_1``, ``v1``, ``v2`` (pooling/attention) and ``procedure``."""
    return {name: PaperTable(name=name, **row) for name, row in _read("paper_tables").items()}


@cache
def _read(name: str) -> dict[str, dict[str, Any]]:
    text = files("nvembed.evaluation.reference").joinpath(f"{name}.yaml").read_text("utf-8")
    return yaml.safe_load(text)


def ignores_identical_ids(name: str) -> str | None:
    """Give mteb's name of a retrieval task whose results may not have the id of their query."""
    table: dict[str, Any] = _read("identical_ids")
    return (table["beir"] | {task.casefold(): task for task in table["tasks"]}).get(name.casefold())
