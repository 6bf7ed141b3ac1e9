"""Reads the files of a local evaluation task strictly, noting every problem instead of the first.

Files of rows (``test.jsonl``, or another format of ``data/sources/files.py``) become the frozen
``…Data`` objects that the scorers use. A reader returns what it could make of a file;
``Problems.check`` raises when anything was noted. Retrieval is read by ``retrieval_files.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from annotated_types import Predicate
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
)

from nvembed.core.errors import DataError
from nvembed.core.reporting import ProblemCounts
from nvembed.data.records import BadRow
from nvembed.data.sources.beir import find_rows
from nvembed.data.sources.files import open_file
from nvembed.data.sources.rows import Table

TaskType = Literal[
    "Retrieval",
    "Reranking",
    "Clustering",
    "PairClassification",
    "Classification",
    "STS",
    "Summarization",
]
TASK_TYPES: tuple[TaskType, ...] = get_args(TaskType)
"""In the column order of the paper's tables."""

_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class RetrievalData:
    """A corpus, queries with a judgement, and for every query the judged documents."""

    document_ids: tuple[str, ...]
    documents: tuple[str, ...]  # title and text joined by a space, or empty
    query_ids: tuple[str, ...]
    queries: tuple[str, ...]
    # Grades of 0 or more, of documents that need not be there: relevant ones count as missed.
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


# --- Rows -----------------------------------------------------------------------------------------


def _binary(value: float) -> float:
    if value not in (0.0, 1.0):
        raise ValueError(f"label {value:g}; expected 0 or 1")
    return value


def _one_each(values: list[float], info: ValidationInfo) -> list[float]:
    count = len(info.data.get("machine_summaries", values))
    if len(values) != count:
        told = f"{len(values)} values of 'relevance' for {count} machine summaries"
        raise ValueError(f"{told}; expected one each")
    return values


# A description is what an error says was expected, in place of a text.
Text = Annotated[str, Predicate(str.strip)]
_Texts = Annotated[list[Text], Field(min_length=1, description="a list of texts")]
_Number = Annotated[float, Field(allow_inf_nan=False, description="a finite number")]
_Label = Annotated[Text | int, AfterValidator(str)]
_Relevance = Annotated[
    list[_Number], AfterValidator(_one_each), Field(description="a list of finite numbers")
]


def _row(**fields: Any) -> type[BaseModel]:
    definitions: dict[str, Any] = {name: (kind, ...) for name, kind in fields.items()}
    return create_model("Row", **definitions)


_LABELLED = _row(text=Text, label=_Label)
# By type: what is made of the columns of ``test``, the fields of its rows, and what is wrong, and
# expected, where gold values, the last field, do not differ. Articles whose summaries all got the
# same relevance are not scored, so one must have several.
_LAYOUTS: dict[TaskType, tuple[type[Any], type[BaseModel], str, str]] = {
    "Reranking": (RerankingData, _row(query=Text, positive=_Texts, negative=_Texts), "", ""),
    "Clustering": (LabelledTexts, _LABELLED, "only the label {!r} occurs", "two or more"),
    "PairClassification": (
        PairData,
        _row(sentence1=Text, sentence2=Text, label=Annotated[_Number, AfterValidator(_binary)]),
        "only one of the labels 0 and 1 occurs",
        "both",
    ),
    "STS": (
        PairData,
        _row(sentence1=Text, sentence2=Text, score=_Number),
        "all scores are equal",
        "scores that can be ranked",
    ),
    "Summarization": (
        SummarizationData,
        _row(text=Text, human_summaries=_Texts, machine_summaries=_Texts, relevance=_Relevance),
        "all relevance values of each article are equal",
        "values to rank",
    ),
}

M = TypeVar("M", bound=BaseModel)


class Problems:
    """What was found wrong with one task folder, or was read by a rule of its own (``remarks``)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.remarks = ProblemCounts()
        self._found = ProblemCounts(by_value=True)

    def __bool__(self) -> bool:
        return self._found.count > 0

    def add(self, message: str, where: str, expected: str | None = None) -> None:
        """Note one problem at ``file:line``."""
        self._found.add(where, message if expected is None else f"{message}; expected {expected}")

    def add_error(self, error: DataError) -> None:
        """Note why a file cannot be read."""
        where = error.where or str(self.folder)
        self.add(str(error).removeprefix(f"{where}: "), where)

    def open(self, name: str) -> Table | None:
        """Open a file of rows of the task by its name without the ending; ``None`` is a problem."""
        path = find_rows(self.folder, name)
        if path is None:
            self.add("no such file", str(self.folder / f"{name}.jsonl"))
            return None
        try:
            return open_file(path)
        except DataError as error:
            self.add_error(error)
            return None

    def rows(self, table: Table | None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield ``(file:line, row)``; a file that cannot be read on, or is empty, is a problem."""
        if table is None:
            return
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

    def parse(
        self, model: type[M], values: Mapping[str, Any], where: str, *, textual: bool = False
    ) -> M | None:
        """Check a row, ``textual`` where numbers are texts; ``None`` where problems were noted."""
        try:
            return model.model_validate(values, strict=not textual)
        except ValidationError as error:
            first = {str(one["loc"][0]): one for one in reversed(error.errors(include_url=False))}
        for key in filter(first.__contains__, model.model_fields):
            if first[key]["type"] == "value_error":
                self.add(str(first[key]["ctx"]["error"]), where)
            else:
                expected = model.model_fields[key].description or "a text"
                self.add(f"{key!r} {_problem_of(values.get(key))}", where, expected)
        return None

    def check(self) -> None:
        """Raise what was noted, as one error that names up to ten kinds of problems."""
        if not self:
            return
        first = self._found.kinds[0]
        if len(self._found.kinds) == 1:
            raise DataError(first.message, where=first.place)
        told = f"{first.place}: {self._found.summary(_SHOWN_PROBLEMS)}"
        raise DataError(f"{self._found.count} problems: {told}", where=str(self.folder))


def _problem_of(value: object) -> str:
    if value == [] or (isinstance(value, str) and not value.strip()):
        return "is empty"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "is a list with texts" if all(map(str.strip, value)) else "holds an empty text"
    return f"is {_kind(value)}"


def _kind(value: object) -> str:
    names = {str: "a text", dict: "an object", bool: "true or false", type(None): "missing"}
    if isinstance(value, list):
        return f"a list with {next((_kind(v) for v in value if not isinstance(v, str)), 'texts')}"
    return names.get(type(value), f"the number {value}")


def read_rows(problems: Problems, kind: TaskType) -> TaskData:
    """Read a task of any type but Retrieval from ``test``, and ``train`` of Classification."""
    if kind == "Classification":
        return _read_classification(problems)
    make, row, alike, expected = _LAYOUTS[kind]
    columns, places = _read_columns(problems, "test", row)
    groups = columns[-1] if kind == "Summarization" else columns[-1:]
    if not problems and alike and all(len(set(values)) < 2 for values in groups):
        problems.add(alike.format(groups[0][0]), places[0].rpartition(":")[0], expected)
    return make(*columns)


def _read_columns(
    problems: Problems, name: str, model: type[BaseModel]
) -> tuple[list[tuple[Any, ...]], list[str]]:
    """Read a file into one tuple per field, lists as tuples, and the places of the rows."""
    table = problems.open(name)
    textual = table is not None and table.textual
    rows, places = [], []
    for where, values in problems.rows(table):
        row = problems.parse(model, values, where, textual=textual)
        if row is not None:
            rows.append([tuple(v) if isinstance(v, list) else v for v in vars(row).values()])
            places.append(where)
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(model.model_fields)
    return columns, places


def _read_classification(problems: Problems) -> ClassificationData:
    train, train_places = _read_columns(problems, "train", _LABELLED)
    test, places = _read_columns(problems, "test", _LABELLED)
    known = set(train[1])
    for label in sorted(set(test[1]) - known) if known else ():
        where = places[test[1].index(label)]
        problems.add(f"label {label!r} does not occur in the train part", where)
    if len(known) == 1:
        _, _, alike, expected = _LAYOUTS["Clustering"]
        problems.add(alike.format(train[1][0]), train_places[0].rpartition(":")[0], expected)
    return ClassificationData(LabelledTexts(*train), LabelledTexts(*test))
