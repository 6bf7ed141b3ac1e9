"""Examples: records of any kind become (query, positive, negatives).

NV-Embed v2 converts multi-class sets by example and binary ones by label text (paper s4.2, s5.2.4).
Here all are converted by example unless the recipe says ``conversion: label``: labels are often
codes. An instruction belongs to the query; where both sides are texts of one sort, the documents
carry it too (``symmetric``). Next file: ``data/batch.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from nvembed.core.errors import DataError
from nvembed.data.records import (
    LABEL_HINTS,
    LABEL_KINDS,
    Conversion,
    Kind,
    LabelRecord,
    PairRecord,
    StsRecord,
    label_problems,
    label_text,
)

POSITIVE_SCORE = 4.0  # paper s4.2: "relevance score greater than or equal to 4"

T = TypeVar("T")
Rng = np.random.Generator


@dataclass(frozen=True, slots=True)
class Example:
    """One query with what it is trained on; its instruction is not part of the text."""

    query: str
    positive: str | None  # None: a text without labels, which is contrasted with nothing
    negatives: tuple[str, ...]  # fewer than asked for where the data has no more
    known_positives: tuple[str, ...]  # never used against the query
    labels: tuple[str, ...]  # of the query; no document of any of them stands against it
    instruction: str | None
    symmetric: bool  # whether the instruction goes before the documents too
    dataset: str
    positive_labels: tuple[str, ...] = ()
    negative_labels: tuple[tuple[str, ...], ...] = ()
    further_positives: tuple[str, ...] = ()  # each in a row of the loss of its own
    positive_scores: tuple[float, ...] = ()  # of a teacher: the positive and the further ones
    negative_scores: tuple[float, ...] = ()
    graded: tuple[str, float] | None = None  # another text, and how similar it is, from 0 to 5

    @property
    def positives(self) -> tuple[str, ...]:
        """All of them, each of which gives a row of the loss."""
        return () if self.positive is None else (self.positive, *self.further_positives)


class ExampleSource(ABC):
    """A data set as a sequence of queries, each giving another example with another generator."""

    scored = False  # whether any query has a teacher's scores
    symmetric = False

    def __init__(self, records: Sequence[Any], name: str, instruction: str | None) -> None:
        self.name = name
        self.instruction = instruction
        self.queries: Sequence[int] = range(len(records))
        self._records = records  # one for each query

    def __len__(self) -> int:
        return len(self.queries)

    def example(self, index: int, rng: Rng, num_negatives: int, num_positives: int = 1) -> Example:
        """Make the example of query ``index``; ``rng`` alone decides what is drawn.

        Both numbers are the most that are drawn. Only pair records have several positives; their
        first one and the negatives do not depend on ``num_positives``.
        """
        return self._draw(self.queries[index], rng, num_negatives, num_positives)

    @abstractmethod
    def _draw(self, number: int, rng: Rng, num_negatives: int, num_positives: int) -> Example: ...

    def _example(self, query: str, positive: str | None, **others: Any) -> Example:
        of_the_set: dict[str, Any] = {"dataset": self.name, "symmetric": self.symmetric}
        of_the_set |= {"instruction": self.instruction, "labels": ()}
        of_the_set |= {"negatives": (), "known_positives": ()}
        return Example(query=query, positive=positive, **of_the_set | others)


def make_source(
    records: Sequence[Any],
    kind: Kind,
    *,
    name: str,
    instruction: str | None,
    conversion: Conversion = "example",
    max_records: int | None = None,
    graded: bool = False,
) -> ExampleSource:
    """Build the source of a set's records; a DataError where they cannot be converted.

    At most ``max_records`` queries are used, spread evenly over the file, because files are often
    sorted by class. The other records still serve as positives and negatives. ``graded`` takes the
    scores of STS sets as they are.
    """
    make: Callable[[Sequence[Any], str, str | None], ExampleSource] = PairSource
    if kind == "sts":
        make = GradedSource if graded else StsSource
    elif kind == "text":
        make = TextSource
    elif kind in LABEL_KINDS:
        # Files were checked line by line before; records made in memory come here first.
        problems = [text for _, text in label_problems(records, conversion)]
        if problems:
            raise DataError("; ".join(problems[:5]), where=name, hint=LABEL_HINTS[conversion])
        make = ClassSource if conversion == "example" else LabelTextSource
    source = make(records, name, instruction)
    total = len(source)
    if total == 0:
        raise DataError("the set holds no records", where=name)
    if max_records is not None and max_records < total:
        source.queries = (np.arange(max_records) * total // max_records).tolist()
    return source


class PairSource(ExampleSource):
    """Queries with listed positives; one of several records knows the positives of all of them."""

    def __init__(self, records: Sequence[PairRecord], name: str, instruction: str | None) -> None:
        super().__init__(records, name, instruction)
        self.scored = any(record.positive_scores for record in records)
        self._known: dict[str, tuple[str, ...]] = {}
        for record in records:
            known = (*self._known.get(record.query, ()), *record.positives)
            self._known[record.query] = tuple(dict.fromkeys(known))

    def _draw(self, number: int, rng: Rng, num_negatives: int, num_positives: int) -> Example:
        record: PairRecord = self._records[number]
        known = self._known[record.query]
        first = int(rng.integers(len(record.positives)))
        refused = (record.query, *known)
        allowed = [place for place, text in enumerate(record.negatives) if text not in refused]
        negatives = sample(allowed, num_negatives, rng)
        others = [place for place in range(len(record.positives)) if place != first]
        further = sample(others, num_positives - 1, rng) if num_positives > 1 else ()
        scored = bool(record.positive_scores)
        return self._example(
            record.query,
            record.positives[first],
            negatives=tuple(record.negatives[place] for place in negatives),
            known_positives=known,
            further_positives=tuple(record.positives[place] for place in further),
            positive_scores=tuple(record.positive_scores[p] for p in (first, *further) if scored),
            negative_scores=tuple(record.negative_scores[p] for p in negatives if scored),
            instruction=self.instruction if record.instruction is None else record.instruction,
        )


class StsSource(ExampleSource):
    """Both directions of every pair of different sentences scored 4 or more.

    Where no negatives are mined, they are sentences of the set that are no positives of the query.
    """

    symmetric = True

    def __init__(self, records: Sequence[StsRecord], name: str, instruction: str | None) -> None:
        directions: list[tuple[str, str, tuple[str, ...]]] = []
        self._known: dict[str, dict[str, None]] = {}  # an ordered set per sentence
        for record in records:
            first, second = record.sentence1, record.sentence2
            if record.score < POSITIVE_SCORE or first == second:
                continue
            for query, positive in ((first, second), (second, first)):
                directions.append((query, positive, record.negatives))
                self._known.setdefault(query, {})[positive] = None
        if not directions:
            told = f"no pair of different sentences scores {POSITIVE_SCORE:g} or more"
            raise DataError(told, where=name, expected="scores on the scale from 0 to 5")
        sentences = (text for record in records for text in (record.sentence1, record.sentence2))
        self._pool = list(dict.fromkeys(sentences))
        super().__init__(directions, name, instruction)

    def _draw(self, number: int, rng: Rng, num_negatives: int, num_positives: int) -> Example:
        query, positive, mined = self._records[number]
        known = self._known[query]

        def is_negative(text: str) -> bool:
            return text != query and text not in known

        if candidates := list(filter(is_negative, mined)):
            negatives = sample(candidates, num_negatives, rng)
        else:
            num_refused = len(known) + 1
            negatives = sample_where(
                is_negative, self._pool, num_negatives, num_refused=num_refused, rng=rng
            )
        return self._example(query, positive, negatives=negatives, known_positives=tuple(known))


class _LabelSource(ExampleSource):
    """Labelled texts."""

    def __init__(self, records: Sequence[LabelRecord], name: str, instruction: str | None) -> None:
        super().__init__(records, name, instruction)
        found: dict[str, dict[str, None]] = {}
        for record in records:
            found.setdefault(record.text, {})[record.label] = None
        self._labels_of = {text: tuple(labels) for text, labels in found.items()}
        self._labels = list(dict.fromkeys(record.label for record in records))


class ClassSource(_LabelSource):
    """A text, another text of its class, and texts that share no class with it."""

    symmetric = True

    def __init__(self, records: Sequence[LabelRecord], name: str, instruction: str | None) -> None:
        super().__init__(records, name, instruction)
        members: dict[str, dict[str, None]] = {}
        for record in records:
            members.setdefault(record.label, {})[record.text] = None
        # All classes in one list, each a contiguous block: "not of this class" is an index shift.
        self._members: list[str] = []
        self._blocks: dict[str, tuple[int, int]] = {}
        self._positions: dict[LabelRecord, int] = {}
        for label, texts in members.items():
            start = len(self._members)
            self._members += texts
            self._blocks[label] = (start, len(self._members))
            for position, text in enumerate(texts, start):
                self._positions[LabelRecord(text, label)] = position
        self._num_surplus = len(self._members) - len(self._labels_of)

    def _draw(self, number: int, rng: Rng, num_negatives: int, num_positives: int) -> Example:
        record = self._records[number]
        start, stop = self._blocks[record.label]
        position = start + int(rng.integers(stop - start - 1))
        positive = self._members[position + (position >= self._positions[record])]
        negatives = self._draw_negatives(record, num_negatives, rng)
        return self._example(
            record.text,
            positive,
            negatives=negatives,
            known_positives=(positive,),
            labels=self._labels_of[record.text],
            positive_labels=self._labels_of[positive],
            negative_labels=tuple(self._labels_of[text] for text in negatives),
        )

    def _draw_negatives(self, record: LabelRecord, count: int, rng: Rng) -> tuple[str, ...]:
        """Return up to ``count`` different texts that share no class with the record's text."""
        start, stop = self._blocks[record.label]
        num_outside = len(self._members) - (stop - start)
        own = self._labels_of[record.text]
        # Refused are the places of the text's other classes. Beyond them, a text with m labels
        # fills m places, of which at least m - 1 are repeats or in one of those classes.
        blocks = (self._blocks[label] for label in own if label != record.label)
        num_refused = sum(end - begin for begin, end in blocks)
        size = min(num_outside, count + self._num_surplus + num_refused) if count else 0
        places = rng.choice(num_outside, size=size, replace=False)
        places = np.where(places >= start, places + (stop - start), places)
        found: dict[str, None] = {}
        for place in places.tolist():
            text = self._members[place]
            if not set(own).intersection(self._labels_of[text]):
                found[text] = None
            if len(found) == count:
                break
        return tuple(found)


class LabelTextSource(_LabelSource):
    """The positive is the name of the class, negatives are other names."""

    def _draw(self, number: int, rng: Rng, num_negatives: int, num_positives: int) -> Example:
        record = self._records[number]
        own = self._labels_of[record.text]
        others = sample_where(
            lambda one: one not in own, self._labels, num_negatives, num_refused=len(own), rng=rng
        )
        return self._example(
            record.text,
            label_text(record.label),
            negatives=tuple(map(label_text, others)),
            known_positives=tuple(map(label_text, own)),
            labels=own,
            positive_labels=(record.label,),
            negative_labels=tuple((label,) for label in others),
        )


class TextSource(ExampleSource):
    """Texts by themselves: without an instruction they are documents, with one queries."""

    def _draw(self, number: int, rng: Rng, num_negatives: int, num_positives: int) -> Example:
        return self._example(self._records[number].text, None)


class GradedSource(TextSource):
    """All pairs of an STS set with their scores, whatever these are."""

    symmetric = True

    def _draw(self, number: int, rng: Rng, num_negatives: int, num_positives: int) -> Example:
        record: StsRecord = self._records[number]
        return self._example(record.sentence1, None, graded=(record.sentence2, record.score))


def sample(candidates: Sequence[T], count: int, rng: Rng) -> tuple[T, ...]:
    """Draw up to ``count`` different places of ``candidates`` in random order."""
    size = min(count, len(candidates))
    return tuple(candidates[place] for place in rng.choice(len(candidates), size, replace=False))


def sample_where(
    accept: Callable[[T], bool],
    pool: Sequence[T],
    count: int,
    *,
    num_refused: int,
    rng: Rng,
) -> tuple[T, ...]:
    """Draw up to ``count`` accepted items of a pool of different ones, without walking it.

    At most ``num_refused`` are not accepted; with so many drawn in addition, enough are left.
    """
    drawn = sample(pool, count + num_refused, rng)
    return tuple(item for item in drawn if accept(item))[:count]
