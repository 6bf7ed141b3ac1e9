"""The nine layouts: how rows of a source become the objects of records.

``FORMS`` of ``data/config.py`` has their columns. ``lists`` are those of FlagEmbedding,
``passages`` Tevatron's, ``clusters`` MTEB's old ones, ``scored`` LightOn's. Tables of documents may
be far larger than memory: which are needed is found out first, then the table is read through once.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nvembed.data.config import DatasetConfig, Layout
from nvembed.data.records import COLUMNS, MAX_SCORE, REQUIRED, BadRow, RowError
from nvembed.data.sources.beir import read_judgements
from nvembed.data.sources.rows import (
    MISSING,
    Columns,
    Keyed,
    Rows,
    Values,
    all_rows,
    each_row,
    read_title,
)

# The object of a record with the place of its row, or a bad row.
Joined = Iterator[tuple[str, Values] | BadRow]


@dataclass(frozen=True, slots=True)
class Source:
    """What converting a row depends on: whether values are ``textual``, and the tables of texts."""

    config: DatasetConfig
    columns: Columns
    textual: bool = False
    tables: Mapping[str, Keyed] = field(default_factory=dict)

    def need(self, values: Values, name: str) -> Any:
        """The value; a RowError where the row has no such column."""
        return self.columns.need(values, name)

    def find(self, values: Values, name: str) -> Any:
        """The value, None where the row has no such column."""
        value = self.columns.find(values, name)
        return None if value is MISSING else value


def record_values(rows: Rows, source: Source) -> Joined:
    """Make the objects that ``parse_record`` checks."""
    layout = source.config.layout
    if layout in _TOGETHER:
        return _TOGETHER[layout](rows, source)
    return each_row(rows, lambda values: _ROW_BY_ROW[layout](values, source))


# --- Row by row -----------------------------------------------------------------------------------


def _records(values: Values, source: Source) -> Iterator[Values]:
    config = source.config
    found = {name: source.need(values, name) for name in REQUIRED[config.kind]}
    for name in COLUMNS[config.kind]:
        value = source.columns.find(values, name)
        if name not in found and value is not MISSING and not (source.textual and value == ""):
            found[name] = value
    if "score" in found:
        found["score"] = _score(found["score"], config.max_score, textual=source.textual)
    if "label" in found:
        found["label"] = _label(found["label"], config.label_names)
    yield found


def _score(value: Any, top: float | None, *, textual: bool) -> Any:
    if textual and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise RowError(f'"score" is {value!r}, expected a number') from None
    if top is None or isinstance(value, bool) or not isinstance(value, int | float):
        return value  # ``parse_record`` says what is wrong with it
    if value > top:
        raise RowError(f'"score" is {value}, above max_score {top:g}')
    return value * (MAX_SCORE / top)  # so that a top of 5 changes nothing


def _label(value: Any, names: tuple[str, ...] | None) -> Any:
    if names is None or isinstance(value, bool):
        return value
    text = str(value).strip()
    if not text.isdecimal() or int(text) >= len(names):
        raise RowError(f'"label" is {text!r}, expected 0 to {len(names) - 1} (label_names)')
    return names[int(text)]


def _tuples(values: Values, source: Source) -> Iterator[Values]:
    def number(name: str) -> tuple[int, str]:
        digits = re.search(r"\d+$", name)
        return (int(digits.group()) if digits else -1), name

    named = source.columns.find(values, "query") is not MISSING or "anchor" not in values
    query = source.need(values, "query") if named else values["anchor"]
    negatives: list[Any] = []
    for name in sorted((name for name in values if name.startswith("negative")), key=number):
        value = values[name]
        negatives += value if isinstance(value, list) else [] if value in (None, "") else [value]
    yield {"query": query, "positive": source.need(values, "positive"), "negative": negatives}


def _lists(values: Values, source: Source) -> Iterator[Values]:
    row = {"query": source.need(values, "query"), "positive": source.need(values, "pos")}
    optional = ("neg", "pos_scores", "neg_scores", "instruction")
    for name, column in zip(COLUMNS["retrieval"][2:], optional, strict=True):
        if (value := source.find(values, column)) is not None:
            row[name] = value
    yield row


def _passages(values: Values, source: Source) -> Iterator[Values]:
    names = ("positive_passages", "negative_passages")
    given = (source.need(values, names[0]), source.find(values, names[1]) or [])
    positives, negatives = map(_passage_texts, given, names)
    if not positives:
        raise RowError('"positive_passages" holds no text')
    yield {"query": source.need(values, "query"), "positive": positives, "negative": negatives}


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


def _clusters(values: Values, source: Source) -> Iterator[Values]:
    texts, labels = source.need(values, "sentences"), source.need(values, "labels")
    if not isinstance(texts, list) or not isinstance(labels, list):
        raise RowError('"sentences" and "labels" are no lists')
    if len(texts) != len(labels):
        raise RowError(f"{len(texts)} sentences and {len(labels)} labels")
    for text, label in zip(texts, labels, strict=True):
        # Labels of Reddit and StackExchange are names of files: ux.stackexchange.com.txt
        name = label.removesuffix(".txt") if isinstance(label, str) else label
        yield {"text": text, "label": _label(name, source.config.label_names)}


_ROW_BY_ROW: dict[Layout, Callable[[Values, Source], Iterator[Values]]] = {
    "records": _records,
    "tuples": _tuples,
    "lists": _lists,
    "passages": _passages,
    "clusters": _clusters,
}


# --- Rows put together ----------------------------------------------------------------------------


def _beir(rows: Rows, source: Source) -> Joined:
    """Join judgements with their queries and documents."""
    config, queries, corpus = source.config, source.tables["queries"], source.tables["corpus"]
    judgements = yield from read_judgements(rows, source.columns)
    # The documents of a query with their judgements: relevant ones, and those that are negatives.
    chosen: dict[str, tuple[list[Any], list[Any]]] = {}
    for query, of_query in judgements.items():
        for document, judgement in of_query.items():
            if judgement.differs:
                told = f"document {document!r} was judged otherwise before, for query {query!r}"
                told += "; the last judgement counts"
                yield BadRow(judgement.place, told, harmless=True)
        pairs = sorted(of_query.items(), key=lambda pair: -pair[1].grade)
        relevant = [pair for pair in pairs if pair[1].grade > 0]  # of one grade as the rows are
        others = [pair for pair in of_query.items() if pair[1].grade <= 0]
        if relevant:
            negatives = others if config.judged_negatives else []
            chosen[query] = relevant[: config.max_positives], negatives
    texts = yield from queries.look_up(chosen)
    wanted = (one for both in chosen.values() for pairs in both for one, _ in pairs)
    documents = yield from corpus.look_up(wanted)
    for query, (relevant, others) in chosen.items():
        place = next(iter(judgements[query].values())).place
        if query not in texts:
            yield BadRow(place, f"query {query!r} is not in {queries.table.name}", harmless=True)
            continue
        for document, judgement in relevant:
            if document not in documents:
                told = f"document {document!r} is not in {corpus.table.name}"
                yield BadRow(judgement.place, told, harmless=True)
        positives = [(documents[one], which.place) for one, which in relevant if one in documents]
        base: Values = {"query": texts[query]}
        base["negative"] = [documents[one] for one, _ in others if one in documents]
        if config.one_record_per == "positive":
            for text, own_place in positives:
                yield own_place, base | {"positive": [text]}
        elif positives:
            yield place, base | {"positive": [text for text, _ in positives]}


def _references(rows: Rows, source: Source) -> Joined:
    """Put the documents that a row names in the place of their ids."""
    corpus = source.tables["corpus"]

    def read(values: Values) -> Iterator[tuple[Any, list[str], list[str]]]:
        query, ids = source.need(values, "query"), _ids(source.need(values, "ids"))
        others = source.find(values, "negative_ids")
        negatives = _ids(others) if others else []
        if not ids:
            raise RowError('"ids" is empty, expected at least one')
        yield query, ids, negatives

    waiting = yield from all_rows(rows, read)
    wanted = (one for _, (_, ids, negatives) in waiting for one in (*ids, *negatives))
    documents = yield from corpus.look_up(wanted)
    for place, (query, ids, negatives) in waiting:
        absent = [one for one in (*ids, *negatives) if one not in documents]
        if absent:
            yield BadRow(place, f"document {absent[0]!r} is not in {corpus.table.name}")
        positives = [documents[one] for one in ids if one in documents]
        if positives:
            others = [documents[one] for one in negatives if one in documents]
            yield place, {"query": query, "positive": positives, "negative": others}


def _ids(value: Any) -> list[str]:
    """Ids of a list, or of a text that spells one; of pairs the first, of objects their ``id``."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise RowError(f'"ids" is {value[:40]!r}, expected a list') from None
    items = value if isinstance(value, list) else [value]
    return list(dict.fromkeys(read_title(_id(item)) for item in items))


def _id(item: Any) -> Any:
    if isinstance(item, dict):
        return item.get("id")
    return item[0] if isinstance(item, list | tuple) and item else item


def _scored(rows: Rows, source: Source) -> Joined:
    """Take the first document for the positive and those scored well below it for negatives."""
    queries, corpus = source.tables["queries"], source.tables["corpus"]
    waiting = yield from all_rows(rows, lambda values: _candidates(values, source))
    texts = yield from queries.look_up(query for _, (query, _) in waiting)
    documents = yield from corpus.look_up(one for _, (_, found) in waiting for one, _ in found)
    for place, (query, ((positive, best), *others)) in waiting:
        if query not in texts:
            yield BadRow(place, f"query {query!r} is not in {queries.table.name}")
        elif positive not in documents:
            yield BadRow(place, f"document {positive!r} is not in {corpus.table.name}")
        else:
            found = [(documents[one], score) for one, score in others if one in documents]
            values: Values = {"query": texts[query], "positive": [documents[positive]]}
            values |= {"positive_scores": [best], "negative": [text for text, _ in found]}
            yield place, values | {"negative_scores": [score for _, score in found]}


def _candidates(values: Values, source: Source) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """The id of a query, and of its documents with their scores, the positive first."""
    query, config = read_title(source.need(values, "query_id")), source.config
    ids, scores = source.need(values, "document_ids"), source.need(values, "scores")
    if not isinstance(ids, list) or not isinstance(scores, list) or len(ids) != len(scores):
        raise RowError('"document_ids" and "scores" are no lists of one length')
    if not ids or not all(isinstance(score, int | float) for score in scores):
        raise RowError('"scores" holds something else than numbers, or nothing')
    best = float(scores[0])
    if best < 0:
        raise RowError("the positive has no score")
    below = config.percent_of_positive * best
    pairs = zip(map(read_title, ids[1:]), map(float, scores[1:]), strict=True)
    negatives = [(one, score) for one, score in pairs if 0 <= score < below]  # -1: not scored
    yield query, [(read_title(ids[0]), best), *negatives[: config.max_negatives]]


_RELATIONS = {"0": True, "entailment": True, "2": False, "contradiction": False}
_NO_RELATION = {"1", "neutral", "-1", "-", ""}


def _entailment(rows: Rows, source: Source) -> Joined:
    """Group rows by premise; those with both an entailed and a contradicted hypothesis stay."""

    def read(values: Values) -> Iterator[tuple[str, str, bool]]:
        names = ("premise", "hypothesis", "label")
        premise, hypothesis, label = (source.need(values, name) for name in names)
        if not isinstance(premise, str) or not isinstance(hypothesis, str):
            raise RowError('"premise" or "hypothesis" is no text')
        if (relation := _RELATIONS.get(str(label))) is not None:
            yield premise, hypothesis, relation
        elif str(label) not in _NO_RELATION:
            raise RowError(f'"label" is {label!r}, expected 0 to 2 or entailment, …')

    premises: dict[str, tuple[str, dict[str, None], dict[str, None]]] = {}
    for place, (premise, hypothesis, follows) in (yield from all_rows(rows, read)):
        _, entailed, contradicted = premises.setdefault(premise, (place, {}, {}))
        (entailed if follows else contradicted)[hypothesis] = None
    for premise, (place, entailed, contradicted) in premises.items():
        negatives = [text for text in contradicted if text not in entailed]
        if entailed and negatives:
            yield place, {"query": premise, "positive": list(entailed), "negative": negatives}


_TOGETHER: dict[Layout, Callable[[Rows, Source], Joined]] = {
    "beir": _beir,
    "references": _references,
    "scored": _scored,
    "entailment": _entailment,
}
