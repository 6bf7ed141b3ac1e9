"""What a user's own file holds, found by the names of its columns, and its records.

Nothing is guessed: where names allow for two readings, the error names the columns and how to say
which is which.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from nvembed.building.check import check_file
from nvembed.building.row_filters import Repeats, identity, merge, without_query
from nvembed.core.errors import ConfigError, DataError
from nvembed.data.config import FORMS, Column, DatasetConfig, Layout, file_dataset
from nvembed.data.instructions import read_task
from nvembed.data.loading import open_dataset
from nvembed.data.records import COLUMNS, REQUIRED, Converted, Kind, PairRecord, Record
from nvembed.data.similarity import text_key
from nvembed.data.sources.beir import judged_splits
from nvembed.data.sources.files import open_file
from nvembed.data.sources.rows import Columns, Row, separated_otherwise

Ask = Callable[[str, Sequence[str]], str]
"""Asks a person for a column: what it is to hold, and those that there are."""

KINDS: tuple[Kind, ...] = ("retrieval", "classification", "sts")
INSTRUCTIONS: dict[Kind, str] = {
    "retrieval": "Given a question, retrieve passages that answer the question",
    "classification": "Given a text, identify its category",
    "sts": "Retrieve semantically similar text",
}
_LOOKED_AT = 100  # rows of a JSON file whose keys are its columns
_WEAK = {"title", "headline", "prompt"}  # as often a query as a part of the document
_SCALES = (1.0, 5.0, 10.0, 100.0)  # tops of scores
# Names of columns, without case and with "_" between words; earlier groups win.
_NAMES: dict[str, tuple[set[str], ...]] = {
    "query": ({"query"}, {"question", "anchor", "search_query", "q"}, _WEAK),
    "positive": (
        {"positive"},
        {"positives", "answer", "answers", "response", "passage", "document", "doc", "text"}
        | {"context", "body", "content", "description", "abstract", "completion"},
    ),
    "text": (
        {"text"},
        {"sentence", "utterance", "query", "question", "comment", "review", "message", "content"},
        {"title", "headline", "body", "description", "document"},
    ),
    "label": ({"label"}, {"intent", "category", "class", "topic"}),
    "sentence1": ({"sentence1"}, {"sentence_1", "text1", "text_1", "sentence_a", "text_a", "s1"}),
    "sentence2": ({"sentence2"}, {"sentence_2", "text2", "text_2", "sentence_b", "text_b", "s2"}),
    "score": ({"score"}, {"similarity", "similarity_score", "relatedness", "relatedness_score"}),
}


def find_dataset(
    path: Path,
    columns: Mapping[str, Column] | None = None,
    *,
    instruction: str | None = None,
    ask: Ask | None = None,
) -> DatasetConfig:
    """Find kind, layout and columns of a file, or of a folder in BEIR's layout (``read_own``).

    Args:
        path: CSV, TSV, JSON, JSONL or Parquet file, or the folder.
        columns: those that the user named, by what they hold; they decide where they can.
        instruction: put before the queries, or the name of an MTEB task; None is one that fits the
            kind.
        ask: asks where names do not tell; None raises.

    Raises:
        UserError: no such file, or one whose columns can be read in several ways or in none.
    """
    named, instruction = dict(columns or {}), read_task(instruction)
    if path.is_dir():
        return _of_folder(path, named, instruction)
    found = _columns_of(path)
    by_name = {_plain(name): name for name in reversed(found)}
    layout: Layout = next(
        (layout for layout in ("lists", "passages") if set(FORMS[layout].needed) <= {*by_name}),
        "records",
    )
    kind: Kind = "retrieval"
    if layout != "records":
        named = {**{name: by_name[name] for name in FORMS[layout].needed}, **named}
    else:
        kind, named = _kind_and_columns(path, found, named, ask)
        if kind == "retrieval" and any(re.fullmatch(r"negative_\d+", name) for name in by_name):
            layout = "tuples"
    config = file_dataset(path, kind, layout=layout, columns=named)
    changes: dict[str, Any] = {"instruction": instruction or INSTRUCTIONS[kind]}
    if kind == "sts":
        changes["max_score"] = _scale(path, config)
    return config.model_copy(update=changes)


def _of_folder(path: Path, named: Mapping[str, Column], instruction: str | None) -> DatasetConfig:
    config = file_dataset(path, "retrieval", layout="beir", columns=named)
    splits = judged_splits(path)
    split = "train" if "train" in splits else splits[0]
    return config.model_copy(
        update={"instruction": instruction or INSTRUCTIONS["retrieval"], "split": split}
    )


def _columns_of(path: Path) -> list[str]:
    """The columns of a file; of JSON the keys that its first rows share."""
    table = open_file(path)
    if table.columns is not None:
        return [*table.columns]
    rows = [row for row in islice(table.rows, _LOOKED_AT) if isinstance(row, Row)]
    if not rows:
        raise DataError("the file holds no records", where=str(path))
    return [name for name in rows[0].values if all(name in row.values for row in rows)]


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().casefold())


def _kind_and_columns(
    path: Path, found: Sequence[str], named: dict[str, Column], ask: Ask | None
) -> tuple[Kind, dict[str, Column]]:
    kinds = [kind for kind in KINDS if named.keys() <= {*COLUMNS[kind]}]
    readings = {kind: _reading(kind, found, named) for kind in kinds}
    full = [kind for kind, reading in readings.items() if reading is not None]
    pairs = readings.get("retrieval")
    if len(full) > 1 and full[:2] == ["retrieval", "classification"] and pairs is not None:
        # A category beside question and answer is no reason to doubt; beside a title it is.
        doubtful = "query" not in named and _plain(str(pairs["query"])) in _WEAK
        full = full if doubtful else full[:1]
    elif full == ["retrieval"] and not named and _candidates("score", found):
        full = []  # of pairs of texts with scores nobody knows which are answers
    if len(full) == 1 and (reading := readings[full[0]]) is not None:
        return full[0], reading
    if ask is not None and "retrieval" in kinds:
        asked = {role: ask(role, found) for role in REQUIRED["retrieval"] if role not in named}
        return "retrieval", named | asked
    ways = [" ".join(f"--column {role}=…" for role in REQUIRED[kind]) for kind in kinds or KINDS]
    raise ConfigError(
        "the names of the columns do not tell what they hold",
        where=str(path),
        expected=f"{', or '.join(ways)}, each one of {', '.join(found)}",
        hint=separated_otherwise(found),
    )


def _reading(
    kind: Kind, found: Sequence[str], named: Mapping[str, Column]
) -> dict[str, Column] | None:
    """The columns of a kind where each can be only one; else None."""
    reading = dict(named)
    for role in REQUIRED[kind]:
        if role not in reading:
            candidates = _candidates(role, [name for name in found if name not in named.values()])
            if len(candidates) != 1:
                return None
            reading[role] = candidates[0]
    return reading


def _candidates(role: str, found: Sequence[str]) -> list[str]:
    groups = ([name for name in found if _plain(name) in group] for group in _NAMES[role])
    return next(filter(None, groups), [])


def _scale(path: Path, config: DatasetConfig) -> float | None:
    """The top of the scale of scores; None is that of records."""
    columns, highest = Columns(config.columns), 0.0
    for row in open_file(path).rows:
        if isinstance(row, Row):
            with suppress(TypeError, ValueError):
                highest = max(highest, float(columns.find(row.values, "score")))
    if not math.isfinite(highest) or highest > _SCALES[-1]:
        raise DataError(f"a score is {highest:g}", where=str(path), expected="0 to 1, 5, 10 or 100")
    top = next(top for top in _SCALES if highest <= top)
    return None if top == 5 else top


@dataclass(frozen=True)
class OwnPairs:
    """The good records of a file, each query and text once, and what a user has to know of it."""

    config: DatasetConfig
    records: tuple[Record, ...]
    notes: tuple[str, ...] = ()  # a line each
    sources: tuple[frozenset[str], ...] = ()  # the files of each record, where there are several


def read_pairs(config: DatasetConfig) -> OwnPairs:
    """Check a file and read its good records; records of one query become one.

    Raises:
        DataError: there is no good record.
    """
    check = check_file(config)
    groups: dict[tuple[str, ...], list[Record]] = {}
    for row in open_dataset(config, base_dir=Path(), give_up=False).rows:
        if isinstance(row, Converted) and (record := without_query(row.record)) is not None:
            groups.setdefault(tuple(map(text_key, identity(record))), []).append(record)
    if not groups:
        reason = next((str(kind) for kind in check.problems.kinds), "the file is empty")
        raise DataError(f"no good record ({reason})", where=str(config.path))
    records: list[Record] = []
    for group in groups.values():
        pairs = [record for record in group if isinstance(record, PairRecord)]
        records.append(merge(pairs, Repeats()) if len(pairs) > 1 else group[0])
    doubtful = [f"left out or doubtful: {kind}" for kind in check.problems.kinds]
    notes = (*doubtful, *(f"warning: {kind}" for kind in check.warnings.kinds))
    return OwnPairs(config, tuple(records), notes)
