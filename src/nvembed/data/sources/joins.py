"""Layouts that put rows together: by an id, or rows of one query.

    beir        judgements ``query-id``, ``corpus-id``, ``score`` (above 0: relevant), with tables
                of queries and of documents: BEIR, MTEB, MIRACL
    references  a ``query`` and the ``ids`` of its documents in ``corpus`` (``negative_ids``: of
                documents that do not answer it): passages by number, Wikipedia articles by title
    scored      LightOn: ``document_ids`` of a query, the positive first, and a teacher's ``scores``
    entailment  ``premise``, ``hypothesis``, ``label``: a record per premise, what follows from it
                against what contradicts it

Tables of documents may be far larger than memory: which documents are needed is found out first,
then the table is read through once and only those are kept. Next file: ``data/sources/opening.py``.
"""

from __future__ import annotations

import ast
import html
import unicodedata
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from nvembed.data.records import RowError
from nvembed.data.sources.beir import Judgement, join_texts, read_id, read_judgements
from nvembed.data.sources.columns import ID_NAMES, MISSING, Columns
from nvembed.data.sources.config import DatasetConfig
from nvembed.data.sources.rows import BadRow, Rows, Table, Values


@dataclass(frozen=True, slots=True)
class Joined:
    """The object of a record, with the place of the row that it comes from."""

    place: str
    values: Values


def read_title(value: Any) -> str:
    """Read an id or title in one spelling: without HTML entities and with composed accents.

    Raises:
        RowError: see ``read_id``.
    """
    text = html.unescape(read_id(value))
    return text if text.isascii() else unicodedata.normalize("NFC", text)


@dataclass(frozen=True, slots=True)
class Keyed:
    """A table of texts by their ids.

    Args:
        table: its rows.
        columns: where ``id`` and ``text`` are found.
        ids: names that the id may have where ``columns`` does not say.
        texts: columns that make up the text, those that are there, where ``columns`` does not say.
        spell: reads the value of an id as the text by which it is looked up.
    """

    table: Table
    columns: Columns
    ids: tuple[str, ...] = ID_NAMES
    texts: tuple[str, ...] = ("title", "text")
    spell: Callable[[Any], str] = read_title

    def check(self) -> None:
        """Look for the columns; see ``Columns.check``."""
        have = self.table.columns or ()
        needed = [] if set(self.ids) & set(have) else ["id"]
        needed += [] if self.texts[-1] in have else ["text"]
        self.columns.check(self.table, tuple(needed))

    def id_of(self, values: Values) -> str:
        """The id of a row.

        Raises:
            RowError: there is none.
        """
        value = self.columns.find(values, "id")
        if value is MISSING:
            value = next((values[name] for name in self.ids if name in values), MISSING)
        if value is MISSING:
            value = self.columns.need(values, "id")
        return self.spell(value)

    def text_of(self, values: Values) -> str:
        """The text, with the title before it where there is one; it may be empty.

        Raises:
            RowError: there is none, or it is something else.
        """
        if self.columns.names("text"):
            return join_texts([self.columns.need(values, "text")])
        if self.texts[-1] not in values:
            return join_texts([self.columns.need(values, "text")])
        return join_texts([values[name] for name in self.texts if name in values])


def look_up(keyed: Keyed, wanted: set[str]) -> Generator[BadRow, None, dict[str, str]]:
    """Read a table until all wanted texts are found; return them by id, and yield its bad rows."""
    found: dict[str, str] = {}
    if not wanted:
        return found
    for row in keyed.table.rows:
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            key = keyed.id_of(row.values)
            if key not in wanted or key in found:
                continue
            text = keyed.text_of(row.values)
        except RowError as bad:
            yield BadRow(row.place, str(bad))
            continue
        if not text:
            yield BadRow(row.place, f"document {key!r} has no text", harmless=True)
            continue
        found[key] = text
        if len(found) == len(wanted):
            break
    return found


# --- Judgements -----------------------------------------------------------------------------------

# Documents of a query with their judgements.
_Judged = list[tuple[str, Judgement]]


def beir(
    rows: Rows, config: DatasetConfig, columns: Columns, queries: Keyed, corpus: Keyed
) -> Iterator[Joined | BadRow]:
    """Join judgements with their queries and documents."""
    judgements = yield from read_judgements(rows, columns)
    chosen: dict[str, tuple[_Judged, _Judged]] = {}
    wanted: set[str] = set()
    for query, of_query in judgements.items():
        for document, judgement in of_query.items():
            if judgement.differs:
                yield BadRow(
                    judgement.place,
                    f"document {document!r} was judged otherwise before, for query {query!r}; "
                    "the last judgement counts",
                    harmless=True,
                )
        relevant = [(one, judgement) for one, judgement in of_query.items() if judgement.grade > 0]
        if not relevant:
            continue
        relevant.sort(key=lambda pair: -pair[1].grade)  # stable: else in the order of the rows
        del relevant[config.max_positives or len(relevant) :]
        others = [pair for pair in of_query.items() if pair[1].grade <= 0]
        chosen[query] = relevant, others if config.judged_negatives else []
        wanted.update(document for pairs in chosen[query] for document, _ in pairs)
    texts = yield from look_up(queries, set(chosen))
    documents = yield from look_up(corpus, wanted)
    for query, (relevant, others) in chosen.items():
        place = next(iter(judgements[query].values())).place
        if query not in texts:
            yield BadRow(place, f"query {query!r} is not in {queries.table.name}", harmless=True)
            continue
        positives = []
        for document, judgement in relevant:
            if document in documents:
                positives.append((documents[document], judgement.place))
            else:
                yield BadRow(
                    judgement.place,
                    f"document {document!r} is not in {corpus.table.name}",
                    harmless=True,
                )
        negatives = [documents[document] for document, _ in others if document in documents]
        base: Values = {"query": texts[query], "negative": negatives}
        if config.one_record_per == "positive":
            for text, own_place in positives:
                yield Joined(own_place, base | {"positive": [text]})
        elif positives:
            yield Joined(place, base | {"positive": [text for text, _ in positives]})


# --- Ids in the row -------------------------------------------------------------------------------


def references(rows: Rows, columns: Columns, corpus: Keyed) -> Iterator[Joined | BadRow]:
    """Put the documents that a row names in the place of their ids."""
    waiting: list[tuple[str, Any, list[str], list[str]]] = []
    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            query, ids = columns.need(row.values, "query"), _ids(columns.need(row.values, "ids"))
            others = columns.find(row.values, "negative_ids")
            negatives = _ids(others) if others is not MISSING and others else []
        except RowError as bad:
            yield BadRow(row.place, str(bad))
            continue
        if not ids:
            yield BadRow(row.place, '"ids" is empty, expected at least one')
            continue
        waiting.append((row.place, query, ids, negatives))
    wanted = {one for _, _, ids, negatives in waiting for one in (*ids, *negatives)}
    documents = yield from look_up(corpus, wanted)
    for place, query, ids, negatives in waiting:
        absent = [one for one in (*ids, *negatives) if one not in documents]
        if absent:
            yield BadRow(place, f"document {absent[0]!r} is not in {corpus.table.name}")
        positives = [documents[one] for one in ids if one in documents]
        if positives:
            others = [documents[one] for one in negatives if one in documents]
            yield Joined(place, {"query": query, "positive": positives, "negative": others})


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


# --- Documents with scores ------------------------------------------------------------------------


def scored(
    rows: Rows, config: DatasetConfig, columns: Columns, queries: Keyed, corpus: Keyed
) -> Iterator[Joined | BadRow]:
    """Take the first document for the positive and those scored well below it for negatives."""
    waiting: list[tuple[str, str, list[tuple[str, float]]]] = []
    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            query = read_title(columns.need(row.values, "query_id"))
            waiting.append((row.place, query, _candidates(row.values, config, columns)))
        except RowError as bad:
            yield BadRow(row.place, str(bad))
    texts = yield from look_up(queries, {query for _, query, _ in waiting})
    wanted = {document for _, _, chosen in waiting for document, _ in chosen}
    documents = yield from look_up(corpus, wanted)
    for place, query, chosen in waiting:
        (positive, best), *others = chosen
        if query not in texts or positive not in documents:
            absent = f"query {query!r}" if query not in texts else f"document {positive!r}"
            table = queries.table if query not in texts else corpus.table
            yield BadRow(place, f"{absent} is not in {table.name}")
            continue
        others = [pair for pair in others if pair[0] in documents]
        yield Joined(
            place,
            {
                "query": texts[query],
                "positive": [documents[positive]],
                "positive_scores": [best],
                "negative": [documents[document] for document, _ in others],
                "negative_scores": [score for _, score in others],
            },
        )


def _candidates(values: Values, config: DatasetConfig, columns: Columns) -> list[tuple[str, float]]:
    ids, scores = columns.need(values, "document_ids"), columns.need(values, "scores")
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
    return [(read_title(ids[0]), best), *negatives[: config.max_negatives]]


# --- Natural language inference -------------------------------------------------------------------

_RELATIONS = {"0": True, "entailment": True, "2": False, "contradiction": False}
_NO_RELATION = {"1", "neutral", "-1", "-", ""}


def entailment(rows: Rows, columns: Columns) -> Iterator[Joined | BadRow]:
    """Group rows by premise; those with both an entailed and a contradicted hypothesis stay."""
    premises: dict[str, tuple[str, dict[str, None], dict[str, None]]] = {}
    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            premise, hypothesis, label = (
                columns.need(row.values, name) for name in ("premise", "hypothesis", "label")
            )
            if not isinstance(premise, str) or not isinstance(hypothesis, str):
                raise RowError('"premise" or "hypothesis" is no text')
            relation = _RELATIONS.get(str(label))
            if relation is None and str(label) not in _NO_RELATION:
                raise RowError(f'"label" is {label!r}, expected 0 to 2 or entailment, …')
        except RowError as bad:
            yield BadRow(row.place, str(bad))
            continue
        if relation is not None:
            _, entailed, contradicted = premises.setdefault(premise, (row.place, {}, {}))
            (entailed if relation else contradicted)[hypothesis] = None
    for premise, (place, entailed, contradicted) in premises.items():
        negatives = [text for text in contradicted if text not in entailed]
        if entailed and negatives:
            values = {"query": premise, "positive": list(entailed), "negative": negatives}
            yield Joined(place, values)
