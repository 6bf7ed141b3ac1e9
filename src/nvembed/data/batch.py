"""Batches: which examples come when, and a step's as unique texts and index matrices.

A mixture holds its sources in their proportions in every stretch of its order (NV-Embed trains on
well-blended batches; paper s4; homogeneous ones are an option). The place in the order is the whole
state of the data, so a run can stop and go on anywhere. The model embeds every text once; the loss
sees embeddings and indices. Which document may stand against which query is decided here alone.
B rows of the loss (a query and one of its positives), N unique documents, U unique texts, K own
candidates of a row, Q queries.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nvembed.core.runs import derive_seed
from nvembed.data.examples import Example, ExampleSource
from nvembed.data.instructions import PromptedText, Side, query_prompt

# The additive sequence of the golden ratio covers [0, 1) more evenly than any other of its sort.
GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Mixture:
    """Sources, each with a name of its own, and their relative weights.

    ``digests`` holds, by name, ``records_digest`` of all records of a set that was read from files.
    """

    sources: Sequence[ExampleSource]
    weights: Sequence[float]
    digests: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.sources) == len(self.weights) > 0
        assert len({source.name for source in self.sources}) == len(self.sources)
        assert all(weight > 0 for weight in self.weights)

    def order(self, seed: int, num_examples: int, *, run_length: int = 1) -> NDArray[np.int64]:
        """Plan (source, query) of every slot; the order of fewer slots begins that of more.

        The source of slot t is where ``offset + t * golden ratio`` (mod 1) falls among the shares
        of the sources laid end to end: after any n slots each is within a few of n times its share.
        Each is walked in freshly shuffled epochs. With a ``run_length``, each run of so many slots
        takes its queries from one source.
        """
        shares = np.cumsum(np.asarray(self.weights, dtype=np.float64))
        offset = np.random.default_rng(derive_seed(seed, "blend")).random()
        points = (offset + np.arange(num_examples) // run_length * GOLDEN_RATIO) % 1.0
        order = np.empty((num_examples, 2), dtype=np.int64)
        # Dividing before the comparison would let a point of 0.999… fall behind the last share.
        order[:, 0] = np.searchsorted(shares[:-1], points * shares[-1], side="right")
        for number, source in enumerate(self.sources):
            slots = np.flatnonzero(order[:, 0] == number)
            rng = np.random.default_rng(derive_seed(seed, "walk", source.name))
            # Whole shuffled epochs, the last one cut.
            num_epochs = -(-len(slots) // len(source))
            epochs = np.tile(np.arange(len(source), dtype=np.int64), (num_epochs, 1))
            order[slots, 1] = rng.permuted(epochs, axis=1).reshape(-1)[: len(slots)]
        return order

    def examples(
        self,
        order: NDArray[np.int64],
        start: int,
        stop: int,
        *,
        seed: int,
        num_negatives: int,
        num_positives: int = 1,
    ) -> list[Example]:
        """Make the examples of some slots; each draws by the seed and the slot alone."""
        found = []
        for slot, (source, index) in enumerate(order[start:stop].tolist(), start):
            rng = np.random.default_rng(derive_seed(seed, "draw", slot))
            found.append(self.sources[source].example(index, rng, num_negatives, num_positives))
        return found


def tempered_weights(
    sizes: Sequence[int], weights: Sequence[float | None], temperature: float
) -> list[float]:
    """Weights of sets by their sizes; given ones (not None) are left as they are.

    Sets without a weight share the sum of their sizes in proportion to ``size ** (1 / T)``. At 1
    these are the sizes themselves; a higher temperature moves queries from large sets to small
    ones, and neither to nor from the sets whose weight is given.
    """
    assert temperature >= 1
    by_size = [size for size, weight in zip(sizes, weights, strict=True) if weight is None]
    scale = sum(by_size) / sum(size ** (1 / temperature) for size in by_size) if by_size else 1.0
    return [
        weight if weight is not None else scale * size ** (1 / temperature)
        for size, weight in zip(sizes, weights, strict=True)
    ]


class GivenText(NamedTuple):
    """A text as its data set gives it, which is what a teacher reads."""

    side: Side
    instruction: str | None
    text: str


@dataclass(frozen=True, slots=True)
class TeacherScores:
    """How well a teacher finds that the own documents of a row answer its query."""

    # Columns in document_N: the positive, its negatives that stand against the query, then -1.
    column_BK: NDArray[np.int64]
    score_BK: NDArray[np.float32]  # on the teacher's scale; NaN where there is none


@dataclass(frozen=True, slots=True)
class GradedPairs:
    """Pairs of texts and how similar they are, from 0 to 5."""

    rows_2P: NDArray[np.int64]  # in texts
    score_P: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ContrastiveBatch:
    """One step's texts and who stands against whom; a query with P positives has P rows."""

    texts: tuple[PromptedText, ...]  # U different ones; a query and a document may share a row
    query_B: NDArray[np.int64]  # row of each query in texts
    document_N: NDArray[np.int64]  # row of each document in texts, without repetition
    positive_B: NDArray[np.int64]  # column of each query's positive in document_N
    negative_BN: NDArray[np.bool_]  # True where document n is a negative of query b
    weight_B: NDArray[np.float32]  # of each row in the mean of the loss: 1 / P
    mentioned: int  # texts before repeated ones were joined
    teacher: TeacherScores | None = None  # None where no example has scores
    graded: GradedPairs | None = None  # None where no example is one
    given_U: tuple[GivenText, ...] = ()  # what ``texts`` are made of
    teacher_UE: NDArray[np.float16] | None = None  # a teacher's vectors of them, of its width E

    @property
    def labelled(self) -> float:
        """Records that have a positive or a score, over which a step's loss is the mean."""
        return float(self.weight_B.sum()) + (0 if self.graded is None else len(self.graded.score_P))


def build_batch(examples: Sequence[Example], *, in_batch_negatives: bool) -> ContrastiveBatch:
    """De-duplicate the texts of the examples and decide the negatives of every query.

    A query's own negatives stand against it; with ``in_batch_negatives`` all documents of the batch
    do. Taken out in any case are documents whose text is the query's own, its positive's or that of
    a known positive (whatever their prompt), of this example or of another one with the same query,
    and documents that share a class with the query in the same data set. Texts without labels are
    among the texts, and no row of the loss.
    """
    assert examples
    given = given_texts(examples)
    num_mentioned = len(examples) + sum(example.graded is not None for example in examples)
    rows = {prompted: row for row, prompted in enumerate(given)}
    graded = _graded_pairs(examples, rows)
    examples = [example for example in examples if example.positive is not None]
    queries = [rows[query_prompt(example.instruction), example.query] for example in examples]
    documents = _Documents(rows)
    columns = list(map(documents.add, examples))
    positives_Q, negatives_Q = [own for own, _ in columns], [own for _, own in columns]
    negative_QN = np.zeros((len(examples), len(documents.columns)), dtype=np.bool_)
    for example, allowed_N, own in zip(examples, negative_QN, negatives_Q, strict=True):
        allowed_N[:] = in_batch_negatives
        allowed_N[own] = True
        allowed_N[documents.never_against(example)] = False
    counts_Q = np.array([len(own) for own in positives_Q], dtype=np.int64)
    # The mask is the largest array of a step: not copied where every query is one row.
    single = bool((counts_Q == 1).all())
    return ContrastiveBatch(
        texts=tuple(rows),
        query_B=np.array(queries, dtype=np.int64).repeat(counts_Q),
        document_N=np.fromiter(documents.columns, np.int64, len(documents.columns)),
        positive_B=np.array([column for own in positives_Q for column in own], dtype=np.int64),
        negative_BN=negative_QN if single else negative_QN.repeat(counts_Q, axis=0),
        weight_B=(1.0 / counts_Q).astype(np.float32).repeat(counts_Q),
        mentioned=num_mentioned + sum(map(len, (*positives_Q, *negatives_Q))),
        teacher=_teacher_scores(examples, positives_Q, negatives_Q, negative_QN),
        graded=graded,
        given_U=tuple(given.values()),
    )


def _graded_pairs(examples: Sequence[Example], rows: dict[PromptedText, int]) -> GradedPairs | None:
    pairs = []
    for example in examples:
        if example.graded is not None:
            prompt, (other, score) = query_prompt(example.instruction), example.graded
            pairs.append((rows[prompt, example.query], rows[prompt, other], score))
    if not pairs:
        return None
    first, second, scores = zip(*pairs, strict=True)
    return GradedPairs(np.array([first, second], dtype=np.int64), np.array(scores, np.float32))


def given_texts(examples: Iterable[Example]) -> dict[PromptedText, GivenText]:
    """The different texts of examples, in the order that ``build_batch`` numbers them in.

    Documents of a symmetric set carry the instruction, and so are queries to a teacher as well. A
    text that is a query here and a bare document there, without an instruction, is a query.
    """
    queries: dict[PromptedText, GivenText] = {}
    documents: dict[PromptedText, GivenText] = {}
    for example in examples:
        prompt, instruction = query_prompt(example.instruction), example.instruction
        asks = example.positive is not None or example.symmetric or bool(prompt)
        side: Side = "query" if asks else "document"
        given = GivenText(side, instruction, example.query)
        (queries if asks else documents).setdefault((prompt, example.query), given)
        if not example.symmetric:
            prompt, instruction, side = "", None, "document"
        graded = () if example.graded is None else example.graded[:1]
        for text in (*example.positives, *example.negatives, *graded):
            documents.setdefault((prompt, text), GivenText(side, instruction, text))
    return queries | {key: given for key, given in documents.items() if key not in queries}


class _Documents:
    """Columns of the documents of a batch, found by text and by class."""

    def __init__(self, rows: dict[PromptedText, int]) -> None:
        self.columns: dict[int, int] = {}  # by the row of the text
        self._rows = rows
        self._of_text = defaultdict[str, set[int]](set)
        self._of_label = defaultdict[tuple[str, str], set[int]](set)
        self._answers = defaultdict[str, set[str]](set)  # of a query, whichever example asks it

    def add(self, example: Example) -> tuple[list[int], list[int]]:
        """Number the documents of an example; return the columns of positives and of negatives."""
        positives = example.positives
        self._answers[example.query].update((example.query,), positives, example.known_positives)
        prompt = query_prompt(example.instruction) if example.symmetric else ""
        labels = [example.positive_labels] * len(positives)
        labels += example.negative_labels or ((),) * len(example.negatives)
        own: list[int] = []
        for text, of_text in zip((*positives, *example.negatives), labels, strict=True):
            row = self._rows[prompt, text]
            own.append(column := self.columns.setdefault(row, len(self.columns)))
            self._of_text[text].add(column)
            for label in of_text:
                self._of_label[example.dataset, label].add(column)
        return own[: len(positives)], own[len(positives) :]

    def never_against(self, example: Example) -> list[int]:
        """Columns of all documents that may answer the query."""
        found = [self._of_text.get(text, ()) for text in self._answers[example.query]]
        found += [self._of_label.get((example.dataset, label), ()) for label in example.labels]
        return list(set[int]().union(*found))


def _teacher_scores(
    examples: Sequence[Example],
    positives_Q: Sequence[Sequence[int]],
    negatives_Q: Sequence[Sequence[int]],
    negative_QN: NDArray[np.bool_],
) -> TeacherScores | None:
    """Line up the own documents of every row with their scores."""
    if not any(example.positive_scores for example in examples):
        return None
    candidates: list[list[tuple[int, float]]] = []
    for example, positives, negatives, allowed_N in zip(
        examples, positives_Q, negatives_Q, negative_QN, strict=True
    ):
        scores = example.negative_scores or (math.nan,) * len(negatives)
        score_of = dict(zip(negatives, scores, strict=True))
        own = [pair for pair in score_of.items() if allowed_N[pair[0]]]
        scores = example.positive_scores or (math.nan,) * len(positives)
        candidates += [[pair, *own] for pair in zip(positives, scores, strict=True)]
    width = max(map(len, candidates))
    padded = [pairs + [(-1, math.nan)] * (width - len(pairs)) for pairs in candidates]
    pair_BK2 = np.array(padded, dtype=np.float64)
    return TeacherScores(pair_BK2[..., 0].astype(np.int64), pair_BK2[..., 1].astype(np.float32))


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
    """Cut a batch down to some of its queries and what they need, whose losses add up to the whole.

    Returned with it are the rows of the whole batch's ``texts`` that its own texts are.
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
    """Mean number of negatives per query that the masks leave; 0 without queries."""
    if not len(batch.weight_B):
        return 0.0
    return float(np.average(batch.negative_BN.sum(axis=1), weights=batch.weight_B))
