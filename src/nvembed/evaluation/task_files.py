"""Reads the files of a local evaluation task strictly, noting every problem instead of the first.

In: files of rows of a task folder: ``test.jsonl``, or another format of ``data/sources/files.py``.
Out: the frozen ``…Data`` objects that the scorers use. A reader returns what it could make of a
file; ``Problems.check`` raises when anything was noted. ``retrieval_files.py`` reads retrieval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvembed.core.errors import DataError
from nvembed.core.reporting import ProblemCounts
from nvembed.data.records import BadRow
from nvembed.data.sources.beir import find_rows
from nvembed.data.sources.files import open_file
from nvembed.data.sources.rows import Table

_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class RetrievalData:
    """A corpus, queries, and for every query the judged documents.

    ``documents`` are title and text joined by a space, and may be empty. Queries without a
    judgement are left out. ``judgements`` holds grades of 0 or more; it may name documents that
    are not in the corpus: no ranking finds them, and the relevant ones count as missed.
    """

    document_ids: tuple[str, ...]
    documents: tuple[str, ...]
    query_ids: tuple[str, ...]
    queries: tuple[str, ...]
    judgements: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class RerankingData:
    """Queries with their own candidates, relevant and not."""

    queries: tuple[str, ...]
    positives: tuple[tuple[str, ...], ...]
    negatives: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class PairData:
    """Pairs of sentences with a similarity score (STS) or 0 / 1 (pair classification)."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with one label each."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class ClassificationData:
    """Labelled texts to fit a classifier on, and to test it with."""

    train: LabelledTexts
    test: LabelledTexts


@dataclass(frozen=True)
class SummarizationData:
    """Per article: human summaries, machine summaries, and the relevance people gave the latter."""

    articles: tuple[str, ...]
    human: tuple[tuple[str, ...], ...]
    machine: tuple[tuple[str, ...], ...]
    relevance: tuple[tuple[float, ...], ...]


TaskData = (
    RetrievalData
    | RerankingData
    | PairData
    | LabelledTexts
    | ClassificationData
    | SummarizationData
)


class Problems:
    """Everything found wrong with one task folder, and what was read by a rule of its own.

    ``remarks`` is what the scores are computed in spite of, such as documents without a text.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.remarks = ProblemCounts()
        self._found = ProblemCounts(by_value=True)
        self._expected: str | None = None
        self._textual = False

    def __bool__(self) -> bool:
        return self._found.count > 0

    def add(self, message: str, where: str, expected: str | None = None) -> None:
        """Note one problem at ``file:line``."""
        self._found.add(where, message if expected is None else f"{message}; expected {expected}")

    def add_error(self, error: DataError) -> None:
        """Note why a file cannot be read."""
        where = error.where or str(self.folder)
        self.add(str(error).removeprefix(f"{where}: "), where)

    def place(self, name: str) -> str:
        """The file of that name without the ending; JSONL where there is none."""
        return str(find_rows(self.folder, name) or self.folder / f"{name}.jsonl")

    def open(self, name: str) -> Table | None:
        """Open a file of rows of the task by its name without the ending; ``None`` is a problem."""
        if find_rows(self.folder, name) is None:
            self.add("no such file", self.place(name))
            return None
        try:
            return open_file(Path(self.place(name)))
        except DataError as error:
            self.add_error(error)
            return None

    def rows(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield ``(file:line, row)``; a file that cannot be read on, or is empty, is a problem."""
        table = self.open(name)
        if table is not None:
            self._textual = table.textual
            yield from self.rows_of(table)

    def rows_of(self, table: Table) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield ``(file:line, row)`` of an open table, as ``rows`` does."""
        empty = True
        try:
            for row in table.rows:
                empty = False
                if isinstance(row, BadRow):
                    self.add(row.problem, row.place)
                else:
                    yield row.place, row.values
        except DataError as error:
            self.add_error(error)
        else:
            if empty:
                self.add("the file is empty", table.name, "at least one record")

    def check(self) -> None:
        """Raise what was noted, as one error.

        Raises:
            DataError: naming up to ten kinds of problems with file and line, and counting the rest.
        """
        if not self:
            return
        first = self._found.kinds[0]
        if len(self._found.kinds) == 1:
            raise DataError(first.message, where=first.place)
        told = f"{first.place}: {self._found.summary(_SHOWN_PROBLEMS)}"
        raise DataError(f"{self._found.count} problems: {told}", where=str(self.folder))

    # --- fields: None when the problem has been noted ---------------------------------------------

    def text(self, row: Mapping[str, Any], key: str, where: str) -> str | None:
        """Take a text that is not blank."""
        value = row.get(key)
        if not isinstance(value, str):
            self.add(f"{key!r} is {_kind(value)}", where, "a text")
        elif not value.strip():
            self.add(f"{key!r} is empty", where, "a text")
        else:
            return value
        return None

    def texts(self, row: Mapping[str, Any], key: str, where: str) -> tuple[str, ...] | None:
        """Take a list of at least one text, none of them blank."""
        value = row.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.add(f"{key!r} is {_kind(value)}", where, "a list of texts")
        elif not value:
            self.add(f"{key!r} is empty", where, "at least one text")
        elif not all(item.strip() for item in value):
            self.add(f"{key!r} holds an empty text", where, "texts")
        else:
            return tuple(value)
        return None

    def number(self, row: Mapping[str, Any], key: str, where: str) -> float | None:
        """Take a finite number."""
        value = row.get(key)
        if self._textual and isinstance(value, str):
            with suppress(ValueError):
                value = float(value)
        if _is_number(value):
            return float(value)  # type: ignore[arg-type]
        self.add(f"{key!r} is {_kind(value)}", where, "a finite number")
        return None

    def label(self, row: Mapping[str, Any], where: str) -> str | None:
        """Take a label: a text, or an integer read as its digits."""
        value = row.get("label")
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self.text(row, "label", where)


def read_reranking(problems: Problems) -> RerankingData:
    """Read ``test`` of {query, positive[], negative[]}."""
    rows = []
    for where, row in problems.rows("test"):
        query = problems.text(row, "query", where)
        positive = problems.texts(row, "positive", where)
        negative = problems.texts(row, "negative", where)
        if query is not None and positive is not None and negative is not None:
            rows.append((query, positive, negative))
    queries, positives, negatives = zip(*rows, strict=True) if rows else ((), (), ())
    return RerankingData(queries, positives, negatives)


def read_sts(problems: Problems) -> PairData:
    """Read ``test`` of {sentence1, sentence2, score}."""
    data = _read_pairs("score", problems)
    if not problems and len(set(data.values)) < 2:
        problems.add("all scores are equal", problems.place("test"), "scores that can be ranked")
    return data


def read_pair_classification(problems: Problems) -> PairData:
    """Read ``test`` of {sentence1, sentence2, label}, labels 0 and 1."""
    data = _read_pairs("label", problems)
    if not problems and set(data.values) != {0.0, 1.0}:
        problems.add("only one of the labels 0 and 1 occurs", problems.place("test"), "both")
    return data


def _read_pairs(key: str, problems: Problems) -> PairData:
    rows = []
    for where, row in problems.rows("test"):
        first = problems.text(row, "sentence1", where)
        second = problems.text(row, "sentence2", where)
        value = problems.number(row, key, where)
        if value is not None and key == "label" and value not in (0.0, 1.0):
            problems.add(f"label {row[key]!r}", where, "0 or 1")
        elif first is not None and second is not None and value is not None:
            rows.append((first, second, value))
    first_texts, second_texts, values = zip(*rows, strict=True) if rows else ((), (), ())
    return PairData(first_texts, second_texts, values)


def read_classification(problems: Problems) -> ClassificationData:
    """Read ``train`` and ``test`` of {text, label}; every label can be trained."""
    train, _ = _read_labelled("train", problems)
    test, lines = _read_labelled("test", problems)
    known = set(train.labels)
    for label in sorted(set(test.labels) - known) if known else ():
        where = lines[test.labels.index(label)]
        problems.add(f"label {label!r} does not occur in the train part", where)
    if len(known) == 1:
        problems.add(
            f"only the label {train.labels[0]!r} occurs", problems.place("train"), "two or more"
        )
    return ClassificationData(train, test)


def read_clustering(problems: Problems) -> LabelledTexts:
    """Read ``test`` of {text, label}."""
    data, _ = _read_labelled("test", problems)
    if not problems and len(set(data.labels)) < 2:
        problems.add(
            f"only the label {data.labels[0]!r} occurs", problems.place("test"), "two or more"
        )
    return data


def _read_labelled(name: str, problems: Problems) -> tuple[LabelledTexts, Sequence[str]]:
    rows = []
    for where, row in problems.rows(name):
        text, label = problems.text(row, "text", where), problems.label(row, where)
        if text is not None and label is not None:
            rows.append((text, label, where))
    texts, labels, lines = zip(*rows, strict=True) if rows else ((), (), ())
    return LabelledTexts(texts, labels), lines


def read_summarization(problems: Problems) -> SummarizationData:
    """Read ``test`` of {text, human_summaries[], machine_summaries[], relevance[]}."""
    rows = []
    for where, row in problems.rows("test"):
        article = problems.text(row, "text", where)
        human = problems.texts(row, "human_summaries", where)
        machine = problems.texts(row, "machine_summaries", where)
        relevance = row.get("relevance")
        if not isinstance(relevance, list) or not all(_is_number(value) for value in relevance):
            problems.add(f"'relevance' is {_kind(relevance)}", where, "a list of finite numbers")
        elif machine is not None and len(relevance) != len(machine):
            problems.add(
                f"{len(relevance)} values of 'relevance' for {len(machine)} machine summaries",
                where,
                "one each",
            )
        elif article is not None and human is not None and machine is not None:
            rows.append((article, human, machine, tuple(map(float, relevance))))
    # Articles whose summaries all got the same relevance cannot be ranked: scoring skips them.
    if not problems and all(len(set(row[3])) < 2 for row in rows):
        problems.add(
            "all relevance values of each article are equal",
            problems.place("test"),
            "values to rank",
        )
    articles, humans, machines, values = zip(*rows, strict=True) if rows else ((), (), (), ())
    return SummarizationData(articles, humans, machines, values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _kind(value: object) -> str:
    names = {str: "a text", dict: "an object", bool: "true or false", type(None): "missing"}
    if isinstance(value, list):
        inner = next((_kind(item) for item in value if not isinstance(item, str)), "texts")
        return f"a list with {inner}"
    return names.get(type(value), f"the number {value}")
