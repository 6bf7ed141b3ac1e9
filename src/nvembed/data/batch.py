"""The contrastive batch: examples as unique texts and index matrices.

Examples enter, texts without repetition and three index arrays leave. The model embeds every text
once, the loss sees embeddings and indices and never a text. Which document may stand against which
query is decided here and only here. Next files: ``text/instructions.py``, then
``training/contrastive_loss.py``.

Shapes: B rows of the loss (a query and one of its positives), N unique documents, U unique texts,
K own candidates of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from nvembed.data.examples import Example
from nvembed.text.instructions import PromptedText, query_prompt

KeyT = TypeVar("KeyT")


@dataclass(frozen=True, slots=True)
class TeacherScores:
    """How well a teacher finds that the own documents of a row answer its query.

    Args:
        column_BK: columns in ``document_N``: the positive, then the own negatives that stand
            against the query, then -1.
        score_BK: their scores, float32, on the teacher's scale; NaN where there is none.
    """

    column_BK: NDArray[np.int64]
    score_BK: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ContrastiveBatch:
    """One step's texts and who stands against whom.

    A query with P positives has P rows, one after the other.

    Args:
        texts: U different (prompt, text) pairs; a query and a document may share a row.
        query_B: row of each query in ``texts``.
        document_N: row of each document in ``texts``, without repetition.
        positive_B: column of each query's positive in ``document_N``.
        negative_BN: True where document n is a negative of query b.
        weight_B: float32 weight of each row in the mean of the loss: 1 / P.
        mentioned: texts before repeated ones were joined.
        teacher: a teacher's scores of own candidates; None where no example has any.
    """

    texts: tuple[PromptedText, ...]
    query_B: NDArray[np.int64]
    document_N: NDArray[np.int64]
    positive_B: NDArray[np.int64]
    negative_BN: NDArray[np.bool_]
    weight_B: NDArray[np.float32]
    mentioned: int
    teacher: TeacherScores | None = None


def build_batch(
    examples: Sequence[Example], *, in_batch_negatives: bool, same_source_only: bool = False
) -> ContrastiveBatch:
    """De-duplicate the texts of the examples and decide the negatives of every query.

    A query's own negatives stand against it; with ``in_batch_negatives`` all documents of the batch
    do. Taken out in either case are documents whose text is the query's own, its positive's or that
    of a known positive (whatever their prompt), of this example or of another one with the same
    query, and documents that share a class with the query in the same data set.

    Args:
        examples: the queries of one step.
        in_batch_negatives: use the documents of the other queries as well.
        same_source_only: of those, only documents that an example of the same data set brought in.
    """
    assert examples
    rows: dict[PromptedText, int] = {}
    queries = [_add(rows, _query(example)) for example in examples]
    columns: dict[int, int] = {}
    index = _DocumentIndex()
    documents_of: list[_Documents] = []
    for example in examples:
        own = _Documents([], [])
        index.note_answers(example)
        for text, labels, is_positive in _documents(example):
            column = _add(columns, _add(rows, (_document_prompt(example), text)))
            index.note(column, text, labels, example.dataset)
            (own.positives if is_positive else own.negatives).append(column)
        documents_of.append(own)
    negative_QN = np.zeros((len(examples), len(columns)), dtype=np.bool_)
    for example, allowed_N, own in zip(examples, negative_QN, documents_of, strict=True):
        if in_batch_negatives and same_source_only:
            allowed_N[list(index.by_dataset[example.dataset])] = True
        elif in_batch_negatives:
            allowed_N[:] = True
        allowed_N[own.negatives] = True
        allowed_N[index.never_against(example)] = False
    counts_Q = np.array([len(own.positives) for own in documents_of])
    # The mask is the largest array of a step: not copied where every query is one row.
    single = bool((counts_Q == 1).all())
    positives = [column for own in documents_of for column in own.positives]
    return ContrastiveBatch(
        texts=tuple(rows),
        query_B=np.array(queries, dtype=np.int64).repeat(counts_Q),
        document_N=np.fromiter(columns, dtype=np.int64, count=len(columns)),
        positive_B=np.array(positives, dtype=np.int64),
        negative_BN=negative_QN if single else negative_QN.repeat(counts_Q, axis=0),
        weight_B=(1.0 / counts_Q).astype(np.float32).repeat(counts_Q),
        mentioned=len(examples) + sum(map(len, documents_of)),
        teacher=_teacher_scores(examples, documents_of, negative_QN),
    )


def needed_texts(batch: ContrastiveBatch) -> list[list[int]]:
    """Rows of ``texts`` that each query's loss depends on: itself and all its candidates."""
    needed: list[list[int]] = []
    for row, query in enumerate(batch.query_B):
        documents = batch.document_N[_candidates(batch, np.array([row]))]
        needed.append(np.unique(np.append(documents, query)).tolist())
    return needed


def select_queries(
    batch: ContrastiveBatch, rows: Sequence[int]
) -> tuple[ContrastiveBatch, NDArray[np.int64]]:
    """Cut a batch down to some of its queries and what they need.

    The losses of parts that hold every query once add up to that of the whole batch.

    Args:
        batch: the whole.
        rows: which queries.

    Returns:
        The part, and which rows of the whole batch's ``texts`` its own texts are.
    """
    chosen = np.asarray(rows, dtype=np.int64)
    columns = _candidates(batch, chosen)
    new_column_N = np.full(len(batch.document_N), -1, dtype=np.int64)
    new_column_N[columns] = np.arange(len(columns))
    kept = np.unique(np.concatenate([batch.query_B[chosen], batch.document_N[columns]]))
    teacher = batch.teacher
    if teacher is not None:
        column_BK = teacher.column_BK[chosen]
        moved_BK = np.where(column_BK < 0, -1, new_column_N[column_BK])
        teacher = TeacherScores(moved_BK, teacher.score_BK[chosen])
    part = ContrastiveBatch(
        texts=tuple(batch.texts[row] for row in kept),
        query_B=np.searchsorted(kept, batch.query_B[chosen]),
        document_N=np.searchsorted(kept, batch.document_N[columns]),
        positive_B=new_column_N[batch.positive_B[chosen]],
        negative_BN=batch.negative_BN[np.ix_(chosen, columns)],
        weight_B=batch.weight_B[chosen],
        mentioned=len(kept),
        teacher=teacher,
    )
    return part, kept


def _candidates(batch: ContrastiveBatch, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Columns that any of the queries is held against, in order."""
    used_N: NDArray[np.bool_] = np.any(batch.negative_BN[rows], axis=0)
    used_N[batch.positive_B[rows]] = True
    if batch.teacher is not None:
        own = batch.teacher.column_BK[rows]
        used_N[own[own >= 0]] = True
    return np.flatnonzero(used_N)


def effective_negatives(batch: ContrastiveBatch) -> float:
    """Mean number of negatives per query that the masks leave."""
    return float(np.average(batch.negative_BN.sum(axis=1), weights=batch.weight_B))


@dataclass(frozen=True, slots=True)
class _Documents:
    """Columns of an example's own documents, in its order."""

    positives: list[int]
    negatives: list[int]

    def __len__(self) -> int:
        return len(self.positives) + len(self.negatives)


def _teacher_scores(
    examples: Sequence[Example],
    documents_of: Sequence[_Documents],
    negative_QN: NDArray[np.bool_],
) -> TeacherScores | None:
    """Line up the own documents of every row with their scores."""
    if not any(example.positive_scores for example in examples):
        return None
    candidates: list[list[tuple[int, float]]] = []
    for example, own, allowed_N in zip(examples, documents_of, negative_QN, strict=True):
        scores = example.negative_scores or (math.nan,) * len(own.negatives)
        score_of = dict(zip(own.negatives, scores, strict=True))
        negatives = [pair for pair in score_of.items() if allowed_N[pair[0]]]
        own_scores = example.positive_scores or (math.nan,) * len(own.positives)
        for pair in zip(own.positives, own_scores, strict=True):
            candidates.append([pair, *negatives])
    width = max(map(len, candidates))
    column_BK = np.full((len(candidates), width), -1, dtype=np.int64)
    score_BK = np.full((len(candidates), width), np.nan, dtype=np.float32)
    for row, pairs in enumerate(candidates):
        column_BK[row, : len(pairs)] = [column for column, _ in pairs]
        score_BK[row, : len(pairs)] = [score for _, score in pairs]
    return TeacherScores(column_BK, score_BK)


class _DocumentIndex:
    """Where the documents of a batch are found by text, by class and by data set."""

    def __init__(self) -> None:
        self._by_text: dict[str, set[int]] = {}
        self._by_label: dict[tuple[str, str], set[int]] = {}
        self._answers: dict[str, set[str]] = {}
        self.by_dataset: dict[str, set[int]] = {}

    def note(self, column: int, text: str, labels: Iterable[str], dataset: str) -> None:
        self._by_text.setdefault(text, set()).add(column)
        self.by_dataset.setdefault(dataset, set()).add(column)
        for label in labels:
            self._by_label.setdefault((dataset, label), set()).add(column)

    def note_answers(self, example: Example) -> None:
        """Note what answers a query, for all examples that ask the same."""
        own = (example.query, example.positive, *example.further_positives)
        self._answers.setdefault(example.query, set()).update(own, example.known_positives)

    def never_against(self, example: Example) -> list[int]:
        """Columns of all documents that may answer the query."""
        found: set[int] = set()
        for text in self._answers[example.query]:
            found |= self._by_text.get(text, set())
        for label in example.labels:
            found |= self._by_label.get((example.dataset, label), set())
        return list(found)


def _query(example: Example) -> PromptedText:
    return query_prompt(example.instruction), example.query


def _document_prompt(example: Example) -> str:
    return query_prompt(example.instruction) if example.symmetric else ""


def _documents(example: Example) -> Iterable[tuple[str, tuple[str, ...], bool]]:
    """The positives, then the negatives, each with its classes and whether it is a positive."""
    for text in (example.positive, *example.further_positives):
        yield text, example.positive_labels, True
    every = example.negative_labels or ((),) * len(example.negatives)
    for text, labels in zip(example.negatives, every, strict=True):
        yield text, labels, False


def _add(numbers: dict[KeyT, int], key: KeyT) -> int:
    """Return the number of ``key``, the next free one where it is new."""
    return numbers.setdefault(key, len(numbers))
