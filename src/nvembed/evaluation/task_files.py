"""Reads the files of a local evaluation task strictly, noting every problem instead of the first.

In: JSONL and TSV files of a task folder. Out: the frozen ``…Data`` objects that the scorers use. A
reader returns what it could make of a file; ``Problems.check`` raises when anything was noted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvembed.core.errors import DataError
from nvembed.core.text_files import read_jsonl

_SHOWN_PROBLEMS = 10
_QRELS_HEADER = ["query-id", "corpus-id", "score"]


@dataclass(frozen=True)
class RetrievalData:
    """A corpus, queries, and for every query the judged documents.

    ``documents`` are title and text joined by a space. Only queries with a positive judgement are
    kept: no ranking can be right or wrong for the others.
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


@dataclass
class Problems:
    """Everything found wrong with one task folder."""

    folder: Path
    found: list[DataError] = field(default_factory=list)

    def add(self, message: str, where: str, expected: str | None = None) -> None:
        """Note one problem at ``file:line``."""
        self.found.append(DataError(message, where=where, expected=expected))

    def rows(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield ``(file:line, row)``; a file that cannot be read on, or is empty, is a problem."""
        empty = True
        try:
            for number, row in read_jsonl(path):
                empty = False
                yield f"{path}:{number}", row
        except DataError as error:
            self.found.append(error)
        else:
            if empty:
                self.add("the file is empty", str(path), "at least one record")

    def check(self) -> None:
        """Raise what was noted, as one error.

        Raises:
            DataError: naming up to ten problems with file and line, and counting the rest.
        """
        if not self.found:
            return
        if len(self.found) == 1:
            raise self.found[0]
        shown = [str(error) for error in self.found[:_SHOWN_PROBLEMS]]
        if (rest := len(self.found) - len(shown)) > 0:
            shown.append(f"and {rest} more")
        raise DataError(f"{len(self.found)} problems: {'; '.join(shown)}", where=str(self.folder))

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


def read_retrieval(folder: Path, problems: Problems) -> RetrievalData:
    """Read ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/test.tsv`` (the BEIR layout)."""
    documents = _read_ids(folder / "corpus.jsonl", problems, _document_text)
    queries = _read_ids(
        folder / "queries.jsonl", problems, lambda row, where, p: p.text(row, "text", where)
    )
    judgements = _read_qrels(folder / "qrels" / "test.tsv", documents, queries, problems)
    judged = {
        query: grades for query, grades in judgements.items() if any(g > 0 for g in grades.values())
    }
    if not judged and not problems.found:
        problems.add(
            "no query has a relevant document",
            str(folder / "qrels" / "test.tsv"),
            "a score above 0 for at least one query",
        )
    kept = [query for query in queries if query in judged]
    return RetrievalData(
        document_ids=tuple(documents),
        documents=tuple(documents.values()),
        query_ids=tuple(kept),
        queries=tuple(queries[query] for query in kept),
        judgements=judged,
    )


def _document_text(row: Mapping[str, Any], where: str, problems: Problems) -> str | None:
    title, text = row.get("title", ""), row.get("text")
    if not isinstance(title, str):
        problems.add(f"'title' is {_kind(title)}", where, "a text or no title")
    elif not isinstance(text, str):
        problems.add(f"'text' is {_kind(text)}", where, "a text")
    elif not (joined := f"{title} {text}".strip()):
        problems.add("the document is empty", where, "a text or a title")
    else:
        return joined
    return None


def _read_ids(path: Path, problems: Problems, take: Any) -> dict[str, str]:
    """Read ``_id`` → text; ids may not repeat."""
    found: dict[str, str] = {}
    lines: dict[str, str] = {}
    for where, row in problems.rows(path):
        name, text = problems.text(row, "_id", where), take(row, where, problems)
        if name is None:
            continue
        if name in lines:
            problems.add(f"id {name!r} is given twice, first at {lines[name]}", where)
            continue
        lines[name] = where
        # A broken text is noted already; the id counts as known, so that qrels are not blamed too.
        found[name] = text or ""
    return found


def _read_qrels(
    path: Path, documents: Mapping[str, str], queries: Mapping[str, str], problems: Problems
) -> dict[str, dict[str, int]]:
    judgements: dict[str, dict[str, int]] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        problems.add("no such file", str(path), "query-id, corpus-id, score, between tabs")
        return judgements
    except (UnicodeDecodeError, OSError) as error:
        problems.add(f"cannot read: {error}", str(path), "UTF-8 text")
        return judgements
    if lines[0].rstrip("\r").split("\t") != _QRELS_HEADER:
        problems.add(
            f"header {_shorten(lines[0])!r}", f"{path}:1", "query-id, corpus-id, score between tabs"
        )
        return judgements
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        cells = line.rstrip("\r").split("\t")
        if len(cells) != 3:
            problems.add(
                f"{len(cells)} columns", where, "3, between tabs: query-id, corpus-id, score"
            )
            continue
        query, document, grade = cells
        # isascii: int() takes digits of other scripts, which no qrels file means.
        if not (grade.isascii() and grade.isdigit()):
            problems.add(f"score {_shorten(grade)!r}", where, "an integer, 0 or more")
        if query not in queries and queries:
            problems.add(f"unknown query id {_shorten(query)!r}", where, "an _id of queries.jsonl")
        if document not in documents and documents:
            problems.add(
                f"unknown document id {_shorten(document)!r}", where, "an _id of corpus.jsonl"
            )
        elif document in judgements.setdefault(query, {}):
            problems.add(f"document {document!r} is judged twice for query {query!r}", where)
        elif grade.isascii() and grade.isdigit():
            judgements[query][document] = int(grade)
    return judgements


def read_reranking(folder: Path, problems: Problems) -> RerankingData:
    """Read ``test.jsonl`` of {query, positive[], negative[]}."""
    rows = []
    for where, row in problems.rows(folder / "test.jsonl"):
        query = problems.text(row, "query", where)
        positive = problems.texts(row, "positive", where)
        negative = problems.texts(row, "negative", where)
        if query is not None and positive is not None and negative is not None:
            rows.append((query, positive, negative))
    queries, positives, negatives = zip(*rows, strict=True) if rows else ((), (), ())
    return RerankingData(queries, positives, negatives)


def read_sts(folder: Path, problems: Problems) -> PairData:
    """Read ``test.jsonl`` of {sentence1, sentence2, score}."""
    path = folder / "test.jsonl"
    data = _read_pairs(path, "score", problems)
    if not problems.found and len(set(data.values)) < 2:
        problems.add("all scores are equal", str(path), "scores that can be ranked")
    return data


def read_pair_classification(folder: Path, problems: Problems) -> PairData:
    """Read ``test.jsonl`` of {sentence1, sentence2, label}, labels 0 and 1."""
    path = folder / "test.jsonl"
    data = _read_pairs(path, "label", problems)
    if not problems.found and set(data.values) != {0.0, 1.0}:
        problems.add("only one of the labels 0 and 1 occurs", str(path), "both")
    return data


def _read_pairs(path: Path, key: str, problems: Problems) -> PairData:
    rows = []
    for where, row in problems.rows(path):
        first = problems.text(row, "sentence1", where)
        second = problems.text(row, "sentence2", where)
        value = problems.number(row, key, where)
        if value is not None and key == "label" and value not in (0.0, 1.0):
            problems.add(f"label {row[key]!r}", where, "0 or 1")
        elif first is not None and second is not None and value is not None:
            rows.append((first, second, value))
    first_texts, second_texts, values = zip(*rows, strict=True) if rows else ((), (), ())
    return PairData(first_texts, second_texts, values)


def read_classification(folder: Path, problems: Problems) -> ClassificationData:
    """Read ``train.jsonl`` and ``test.jsonl`` of {text, label}; every label can be trained."""
    train, _ = _read_labelled(folder / "train.jsonl", problems)
    test, lines = _read_labelled(folder / "test.jsonl", problems)
    known = set(train.labels)
    for label in sorted(set(test.labels) - known) if known else ():
        where = lines[test.labels.index(label)]
        problems.add(f"label {label!r} does not occur in train.jsonl", where)
    if len(known) == 1:
        problems.add(
            f"only the label {train.labels[0]!r} occurs", str(folder / "train.jsonl"), "two or more"
        )
    return ClassificationData(train, test)


def read_clustering(folder: Path, problems: Problems) -> LabelledTexts:
    """Read ``test.jsonl`` of {text, label}."""
    path = folder / "test.jsonl"
    data, _ = _read_labelled(path, problems)
    if not problems.found and len(set(data.labels)) < 2:
        problems.add(f"only the label {data.labels[0]!r} occurs", str(path), "two or more")
    return data


def _read_labelled(path: Path, problems: Problems) -> tuple[LabelledTexts, Sequence[str]]:
    rows = []
    for where, row in problems.rows(path):
        text, label = problems.text(row, "text", where), problems.label(row, where)
        if text is not None and label is not None:
            rows.append((text, label, where))
    texts, labels, lines = zip(*rows, strict=True) if rows else ((), (), ())
    return LabelledTexts(texts, labels), lines


def read_summarization(folder: Path, problems: Problems) -> SummarizationData:
    """Read ``test.jsonl`` of {text, human_summaries[], machine_summaries[], relevance[]}."""
    rows = []
    path = folder / "test.jsonl"
    for where, row in problems.rows(path):
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
    if not problems.found and all(len(set(row[3])) < 2 for row in rows):
        problems.add("all relevance values of each article are equal", str(path), "values to rank")
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


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
