"""Conversion: records of any kind become (query, positive, negatives) examples.

    retrieval, nli      one of the positives, negatives drawn from the record's own
    sts                 every pair scored 4 or more gives (a, b) and (b, a); negatives are the mined
                        ones of the record, else other sentences of the set
    classification,     ``example`` (default): the positive is another text of the class, negatives
    clustering          are texts of other classes; ``label``: the class names are the documents

NV-Embed v2 converts multi-class sets by example and binary ones by label text, v1 all by label text
(paper s4.2, s5.2.4). Here all sets, binary ones too, are converted by example unless the recipe
says ``conversion: label``: labels of real files are often codes, and evaluation compares texts with
texts.

An instruction belongs to the query. Where both sides are texts of one sort, positive and negatives
carry it too (``symmetric``): sts as in the paper, and example-based classes, whose texts all carry
the instruction when they are classified or clustered later. Next file: ``data/mixture.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import DataError
from nvembed.data.records import (
    LABEL_HINTS,
    Conversion,
    Kind,
    LabelRecord,
    PairRecord,
    Records,
    StsRecord,
    label_problems,
    label_text,
)

POSITIVE_SCORE = 4.0  # paper s4.2: "relevance score greater than or equal to 4"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Example:
    """One query with what it is trained on.

    Args:
        query: the query text, without instruction.
        positive: the document that answers it.
        negatives: documents that do not; fewer than asked for where the data has no more.
        known_positives: all texts known to answer the query; never used against it.
        label: class of query and positive, where there is one.
        instruction: goes before the query, and before the documents if ``symmetric``.
        symmetric: query and documents are texts of one sort.
        dataset: name of the source.
        negative_labels: class of each negative, in their order, where there are classes.
    """

    query: str
    positive: str
    negatives: tuple[str, ...]
    known_positives: tuple[str, ...]
    label: str | None
    instruction: str | None
    symmetric: bool
    dataset: str
    negative_labels: tuple[str, ...] = ()


class ExampleSource(Protocol):
    """A data set as a sequence of queries, each giving another example with another generator."""

    @property
    def name(self) -> str:
        """Name of the data set in errors, masks and seeds."""
        ...

    def __len__(self) -> int:
        """Count the queries."""
        ...

    def example(self, index: int, rng: np.random.Generator, num_negatives: int) -> Example:
        """Make the example of query ``index``; ``rng`` alone decides what is drawn."""
        ...


def make_source(
    records: Records,
    kind: Kind,
    *,
    name: str,
    instruction: str | None,
    conversion: Conversion = "example",
    max_records: int | None = None,
) -> ExampleSource:
    """Build the source that fits the kind.

    Args:
        records: all records of the set.
        kind: kind of the records.
        name: name of the set, for errors and masks.
        instruction: None for none.
        conversion: how classes become examples; without meaning for the other kinds.
        max_records: use at most this many queries, spread evenly over the file, because files are
            often sorted by class. The other records still serve as positives and negatives.

    Raises:
        DataError: no record, no pair scored 4 or more, or classes that cannot be converted.
    """
    source: ExampleSource
    match kind:
        case "retrieval" | "nli":
            source = PairSource(cast(list[PairRecord], records), name, instruction)
        case "sts":
            source = StsSource(cast(list[StsRecord], records), name, instruction)
        case "classification" | "clustering":
            labelled = cast(list[LabelRecord], records)
            _check_labels(labelled, name, conversion)
            by_example = conversion == "example"
            source = (ClassSource if by_example else LabelTextSource)(labelled, name, instruction)
    if len(source) == 0:
        raise DataError("the set holds no records", where=name)
    if max_records is None or max_records >= len(source):
        return source
    return _Subset(source, np.arange(max_records) * len(source) // max_records)


class PairSource:
    """Queries with listed positives; a query of several records knows the positives of all of them.

    A record without negatives gives examples without: fine with in-batch negatives, of no use
    without (mine them first).
    """

    def __init__(self, records: Sequence[PairRecord], name: str, instruction: str | None) -> None:
        self.name = name
        self._records = records
        self._instruction = instruction
        self._known: dict[str, tuple[str, ...]] = {}
        for record in records:
            known = (*self._known.get(record.query, ()), *record.positives)
            self._known[record.query] = tuple(dict.fromkeys(known))

    def __len__(self) -> int:
        return len(self._records)

    def example(self, index: int, rng: np.random.Generator, num_negatives: int) -> Example:
        """Draw one of the record's positives and up to ``num_negatives`` of its negatives."""
        record = self._records[index]
        known = self._known[record.query]
        candidates = [n for n in record.negatives if n != record.query and n not in known]
        return Example(
            query=record.query,
            positive=record.positives[int(rng.integers(len(record.positives)))],
            negatives=_sample(candidates, num_negatives, rng),
            known_positives=known,
            label=None,
            instruction=self._instruction,
            symmetric=False,
            dataset=self.name,
        )


class StsSource:
    """Both directions of every pair scored 4 or more.

    A pair of one sentence with itself teaches nothing and is left out.
    """

    def __init__(self, records: Sequence[StsRecord], name: str, instruction: str | None) -> None:
        self.name = name
        self._instruction = instruction
        self._directions: list[tuple[str, str, tuple[str, ...]]] = []
        self._known: dict[str, dict[str, None]] = {}  # an ordered set per sentence
        for record in records:
            first, second = record.sentence1, record.sentence2
            if record.score < POSITIVE_SCORE or first == second:
                continue
            for query, positive in ((first, second), (second, first)):
                self._directions.append((query, positive, record.negatives))
                self._known.setdefault(query, {})[positive] = None
        if not self._directions:
            raise DataError(
                f"no pair of different sentences scores {POSITIVE_SCORE:g} or more",
                where=name,
                expected="scores on the scale from 0 to 5",
            )
        sentences = (text for record in records for text in (record.sentence1, record.sentence2))
        self._pool = list(dict.fromkeys(sentences))

    def __len__(self) -> int:
        return len(self._directions)

    def example(self, index: int, rng: np.random.Generator, num_negatives: int) -> Example:
        """Take the pair; draw mined negatives, or sentences that are no positives of the query."""
        query, positive, mined = self._directions[index]
        known = self._known[query]
        candidates = [text for text in mined if text != query and text not in known]
        if candidates:
            negatives = _sample(candidates, num_negatives, rng)
        else:
            negatives = _sample_where(
                lambda text: text != query and text not in known,
                self._pool,
                num_negatives,
                num_refused=len(known) + 1,
                rng=rng,
            )
        return Example(
            query=query,
            positive=positive,
            negatives=negatives,
            known_positives=tuple(known),
            label=None,
            instruction=self._instruction,
            symmetric=True,
            dataset=self.name,
        )


class ClassSource:
    """Example-based conversion: a text, another text of its class, texts of other classes.

    Texts that carry several labels are never negatives of each other where they share one.
    """

    def __init__(self, records: Sequence[LabelRecord], name: str, instruction: str | None) -> None:
        self.name = name
        self._records = records
        self._instruction = instruction
        members: dict[str, dict[str, None]] = {}
        for record in records:
            members.setdefault(record.label, {})[record.text] = None
        # All classes in one list, each a contiguous block: "not of this class" is an index shift.
        self._members = [(text, label) for label, texts in members.items() for text in texts]
        self._classes = members
        self._blocks: dict[str, tuple[int, int]] = {}
        self._positions: dict[tuple[str, str], int] = {}
        for position, member in enumerate(self._members):
            start, _ = self._blocks.get(member[1], (position, position))
            self._blocks[member[1]] = (start, position + 1)
            self._positions[member] = position
        self._num_surplus = len(self._members) - len({text for text, _ in self._members})

    def __len__(self) -> int:
        return len(self._records)

    def example(self, index: int, rng: np.random.Generator, num_negatives: int) -> Example:
        """Draw the positive from the class of the text and the negatives from all other classes."""
        record = self._records[index]
        start, stop = self._blocks[record.label]
        own = self._positions[(record.text, record.label)]
        position = start + int(rng.integers(stop - start - 1))
        positive, _ = self._members[position + (position >= own)]
        negatives = self._draw_negatives(record, num_negatives, rng)
        return Example(
            query=record.text,
            positive=positive,
            negatives=tuple(negatives),
            known_positives=(positive,),
            label=record.label,
            instruction=self._instruction,
            symmetric=True,
            dataset=self.name,
            negative_labels=tuple(negatives.values()),
        )

    def _draw_negatives(
        self, record: LabelRecord, count: int, rng: np.random.Generator
    ) -> dict[str, str]:
        """Return text → label of up to ``count`` different texts outside the class."""
        start, stop = self._blocks[record.label]
        num_outside = len(self._members) - (stop - start)
        # A text with m labels fills m places, of which at least m - 1 are repeats or in the class.
        size = min(num_outside, count + self._num_surplus) if count else 0
        places = rng.choice(num_outside, size=size, replace=False)
        places = np.where(places >= start, places + (stop - start), places)
        found: dict[str, str] = {}
        own_class = self._classes[record.label]
        for place in places.tolist():
            text, label = self._members[place]
            if text not in own_class:
                found.setdefault(text, label)
            if len(found) == count:
                break
        return found


class LabelTextSource:
    """Label-text conversion: the positive is the name of the class, negatives are other names.

    Query and document are different sorts of text here, so only the query carries the instruction.
    """

    def __init__(self, records: Sequence[LabelRecord], name: str, instruction: str | None) -> None:
        self.name = name
        self._records = records
        self._instruction = instruction
        self._labels = list(dict.fromkeys(record.label for record in records))
        self._labels_of: dict[str, dict[str, None]] = {}
        for record in records:
            self._labels_of.setdefault(record.text, {})[record.label] = None

    def __len__(self) -> int:
        return len(self._records)

    def example(self, index: int, rng: np.random.Generator, num_negatives: int) -> Example:
        """Take the name of the class and draw names of classes the text does not belong to."""
        record = self._records[index]
        own = self._labels_of[record.text]
        others = _sample_where(
            lambda label: label not in own,
            self._labels,
            num_negatives,
            num_refused=len(own),
            rng=rng,
        )
        return Example(
            query=record.text,
            positive=label_text(record.label),
            negatives=tuple(label_text(label) for label in others),
            known_positives=tuple(label_text(label) for label in own),
            label=record.label,
            instruction=self._instruction,
            symmetric=False,
            dataset=self.name,
            negative_labels=others,
        )


class _Subset:
    """Some queries of a source."""

    def __init__(self, source: ExampleSource, indices: NDArray[np.int64]) -> None:
        self.name = source.name
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def example(self, index: int, rng: np.random.Generator, num_negatives: int) -> Example:
        return self._source.example(int(self._indices[index]), rng, num_negatives)


def _check_labels(records: Sequence[LabelRecord], name: str, conversion: Conversion) -> None:
    # Files were checked line by line before; records made in memory come here first.
    problems = [text for _, text in label_problems(records, conversion)]
    if problems:
        raise DataError("; ".join(problems[:5]), where=name, hint=LABEL_HINTS[conversion])


def _sample(candidates: Sequence[T], count: int, rng: np.random.Generator) -> tuple[T, ...]:
    """Draw up to ``count`` different places of ``candidates`` in random order."""
    size = min(count, len(candidates))
    return tuple(candidates[place] for place in rng.choice(len(candidates), size, replace=False))


def _sample_where(
    accept: Callable[[T], bool],
    pool: Sequence[T],
    count: int,
    *,
    num_refused: int,
    rng: np.random.Generator,
) -> tuple[T, ...]:
    """Draw up to ``count`` accepted items without walking the pool.

    At most ``num_refused`` items are not accepted; with so many drawn in addition, enough are left.
    """
    drawn = _sample(pool, count + num_refused, rng)
    return tuple(item for item in drawn if accept(item))[:count]
