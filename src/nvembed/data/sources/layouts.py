"""Layouts whose rows give records one by one.

    records     as in ``data/records.py``: pairs, classes and sentence pairs, by ``columns``
    tuples      a query (or ``anchor``), a ``positive``, and every column called ``negative…``
    lists       FlagEmbedding: ``query``, ``pos``, ``neg``, ``pos_scores``, ``neg_scores``, and with
                ``columns: {instruction: prompt}`` an instruction per row
    passages    Tevatron: ``query``, ``positive_passages``, ``negative_passages``: [{title, text}]
    clusters    old MTEB clustering: ``sentences`` and ``labels``, one row for many texts

Layouts that look texts up in other tables are in ``data/sources/joins.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from nvembed.data.records import MAX_SCORE, REQUIRED, Kind, RowError
from nvembed.data.sources.columns import MISSING, Columns
from nvembed.data.sources.config import DatasetConfig
from nvembed.data.sources.rows import Values

# Takes the values of a row, gives the objects that ``parse_record`` makes records of.
Convert = Callable[[Values], Iterator[Values]]

_OPTIONAL: dict[Kind, tuple[str, ...]] = {
    "retrieval": ("negative", "positive_scores", "negative_scores", "instruction"),
    "nli": ("negative", "positive_scores", "negative_scores", "instruction"),
    "sts": ("negative",),
    "classification": (),
    "clustering": (),
}


def needed_columns(config: DatasetConfig) -> tuple[str, ...]:
    """The names that a layout cannot do without."""
    match config.layout:
        case "records":
            return REQUIRED[config.kind]
        case "tuples":
            return ("positive",)
        case "lists":
            return ("query", "pos")
        case "passages":
            return ("query", "positive_passages")
        case "clusters":
            return ("sentences", "labels")
        case "beir":
            return ("query-id", "corpus-id")
        case "references":
            return ("query", "ids")
        case "scored":
            return ("query_id", "document_ids", "scores")
        case "entailment":
            return ("premise", "hypothesis", "label")


def converter(config: DatasetConfig, columns: Columns, *, textual: bool) -> Convert:
    """The function that converts a row.

    Args:
        config: the data set; its layout is one of this file.
        columns: where values are found.
        textual: all values are texts, so that numbers are read from them, and empty ones are left
            out where they may be.
    """
    match config.layout:
        case "records":
            return _records(config, columns, textual=textual)
        case "tuples":
            return lambda values: _tuple(values, columns)
        case "lists":
            return lambda values: _lists(values, columns)
        case "passages":
            return lambda values: _passages(values, columns)
        case "clusters":
            return lambda values: _clusters(values, columns, config.label_names)
        case _:
            raise AssertionError(config.layout)


def _records(config: DatasetConfig, columns: Columns, *, textual: bool) -> Convert:
    needed, optional = REQUIRED[config.kind], _OPTIONAL[config.kind]

    def convert(values: Values) -> Iterator[Values]:
        found = {name: columns.need(values, name) for name in needed}
        for name in optional:
            value = columns.find(values, name)
            if value is not MISSING and not (textual and value == ""):
                found[name] = value
        if "score" in found:
            found["score"] = _score(found["score"], config.max_score, textual=textual)
        if "label" in found:
            found["label"] = _label(found["label"], config.label_names)
        yield found

    return convert


def _score(value: Any, top: float | None, *, textual: bool) -> Any:
    if textual:
        value = number_in(value, "score")
    if top is None or isinstance(value, bool) or not isinstance(value, int | float):
        return value  # ``parse_record`` says what is wrong with it
    if value > top:
        raise RowError(f'"score" is {value}, above max_score {top:g}')
    return value * (MAX_SCORE / top)  # so that a top of 5 changes nothing


def number_in(value: Any, name: str) -> Any:
    """Read a number from a text, and leave anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        raise RowError(f'"{name}" is {value!r}, expected a number') from None


def _label(value: Any, names: tuple[str, ...] | None) -> Any:
    if names is None or isinstance(value, bool):
        return value
    text = str(value).strip()
    if not text.isdecimal() or int(text) >= len(names):
        raise RowError(f'"label" is {text!r}, expected 0 to {len(names) - 1} (label_names)')
    return names[int(text)]


def _tuple(values: Values, columns: Columns) -> Iterator[Values]:
    query = columns.find(values, "query")
    if query is MISSING:
        query = values.get("anchor", MISSING)
    if query is MISSING:
        query = columns.need(values, "query")
    numbered = sorted((_number(name), name) for name in values if name.startswith("negative"))
    negatives: list[Any] = []
    for _, name in numbered:
        value = values[name]
        if isinstance(value, list):
            negatives += value
        elif value is not None and value != "":
            negatives.append(value)
    yield {
        "query": query,
        "positive": columns.need(values, "positive"),
        "negative": negatives,
    }


def _number(name: str) -> int:
    digits = re.search(r"\d+$", name)
    return int(digits.group()) if digits else -1


def _lists(values: Values, columns: Columns) -> Iterator[Values]:
    row = {"query": columns.need(values, "query"), "positive": columns.need(values, "pos")}
    for name, column in (
        ("negative", "neg"),
        ("positive_scores", "pos_scores"),
        ("negative_scores", "neg_scores"),
        ("instruction", "instruction"),
    ):
        value = columns.find(values, column)
        if value is not MISSING and value is not None:
            row[name] = value
    yield row


def _passages(values: Values, columns: Columns) -> Iterator[Values]:
    positives = _passage_texts(columns.need(values, "positive_passages"), "positive_passages")
    if not positives:
        raise RowError('"positive_passages" holds no text')
    negatives = columns.find(values, "negative_passages")
    yield {
        "query": columns.need(values, "query"),
        "positive": positives,
        "negative": []
        if negatives is MISSING or negatives is None
        else _passage_texts(negatives, "negative_passages"),
    }


def _passage_texts(passages: Any, name: str) -> list[str]:
    """Title and text of each passage, those without any left out: some sets publish ids alone."""
    if not isinstance(passages, list) or not all(isinstance(item, dict) for item in passages):
        raise RowError(f'"{name}" is no list of passages')
    found: list[str] = []
    for index, passage in enumerate(passages):
        parts = [passage.get("title") or "", passage.get("text") or ""]
        if not all(isinstance(part, str) for part in parts):
            raise RowError(f'"{name}[{index}]" has a title or text that is no text')
        found.append(" ".join(filter(None, map(str.strip, parts))))
    return [text for text in found if text]


def _clusters(values: Values, columns: Columns, names: tuple[str, ...] | None) -> Iterator[Values]:
    texts, labels = columns.need(values, "sentences"), columns.need(values, "labels")
    if not isinstance(texts, list) or not isinstance(labels, list):
        raise RowError('"sentences" and "labels" are no lists')
    if len(texts) != len(labels):
        raise RowError(f"{len(texts)} sentences and {len(labels)} labels")
    for text, label in zip(texts, labels, strict=True):
        # Labels of Reddit and StackExchange are names of files: ux.stackexchange.com.txt
        name = label.removesuffix(".txt") if isinstance(label, str) else label
        yield {"text": text, "label": _label(name, names)}
