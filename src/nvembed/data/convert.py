"""Conversion: records of any kind become (query, positive, negatives) examples.

    retrieval, nli      one of the positives (or several, each in a row of the loss of its own),
                        negatives drawn from the record's own
    sts                 every pair scored 4 or more gives (a, b) and (b, a); negatives are the mined
                        ones of the record, else other sentences of the set
    classification,     ``example`` (default): the positive is another text of the class, negatives
    clustering          are texts of other classes; ``label``: the class names are the documents

NV-Embed v2 converts multi-class sets by example and binary ones by label text, v1 all by label text
(paper s4.2, s5.2.4). Here all sets, binary ones too, are converted by example unless the recipe
says ``conversion: label``: labels of real files are often codes, and evaluation compares texts with
texts.

An instruction belongs to the query; a pair record may bring its own, as synthetic ones do. Where
both sides are texts of one sort, positive and negatives carry it too (``symmetric``): sts as in the
paper, and example-based classes, whose texts all carry the instruction when they are classified or
clustered later. Next file: ``data/mixture.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import DataError
from nvembed.data.classes import ClassSource, LabelTextSource
from nvembed.data.examples import Example, ExampleSource, sample, sample_where
from nvembed.data.records import (
    LABEL_HINTS,
    Conversion,
    Kind,
    LabelRecord,
    PairRecord,
    Records,
    StsRecord,
    label_problems,
)

POSITIVE_SCORE = 4.0  # paper s4.2: "relevance score greater than or equal to 4"


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
        self.scored = any(record.positive_scores for record in records)
        self._known: dict[str, tuple[str, ...]] = {}
        for record in records:
            known = (*self._known.get(record.query, ()), *record.positives)
            self._known[record.query] = tuple(dict.fromkeys(known))

    def __len__(self) -> int:
        return len(self._records)

    def example(
        self, index: int, rng: np.random.Generator, num_negatives: int, num_positives: int = 1
    ) -> Example:
        """Draw positives of the record and up to ``num_negatives`` of its negatives."""
        record = self._records[index]
        known = self._known[record.query]
        first = int(rng.integers(len(record.positives)))
        candidates = [
            place
            for place, text in enumerate(record.negatives)
            if text != record.query and text not in known
        ]
        negatives = sample(candidates, num_negatives, rng)
        others = [place for place in range(len(record.positives)) if place != first]
        further = sample(others, num_positives - 1, rng) if num_positives > 1 else ()
        scored = bool(record.positive_scores)
        return Example(
            query=record.query,
            positive=record.positives[first],
            negatives=tuple(record.negatives[place] for place in negatives),
            known_positives=known,
            further_positives=tuple(record.positives[place] for place in further),
            positive_scores=tuple(record.positive_scores[p] for p in (first, *further) if scored),
            negative_scores=tuple(record.negative_scores[p] for p in negatives if scored),
            labels=(),
            instruction=self._instruction if record.instruction is None else record.instruction,
            symmetric=False,
            dataset=self.name,
        )


class StsSource:
    """Both directions of every pair scored 4 or more.

    A pair of one sentence with itself teaches nothing and is left out.
    """

    scored = False

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

    def example(
        self, index: int, rng: np.random.Generator, num_negatives: int, num_positives: int = 1
    ) -> Example:
        """Take the pair; draw mined negatives, or sentences that are no positives of the query."""
        query, positive, mined = self._directions[index]
        known = self._known[query]
        candidates = [text for text in mined if text != query and text not in known]
        if candidates:
            negatives = sample(candidates, num_negatives, rng)
        else:
            negatives = sample_where(
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
            labels=(),
            instruction=self._instruction,
            symmetric=True,
            dataset=self.name,
        )


class _Subset:
    """Some queries of a source."""

    def __init__(self, source: ExampleSource, indices: NDArray[np.int64]) -> None:
        self.name = source.name
        self.scored = source.scored
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def example(
        self, index: int, rng: np.random.Generator, num_negatives: int, num_positives: int = 1
    ) -> Example:
        return self._source.example(int(self._indices[index]), rng, num_negatives, num_positives)


def _check_labels(records: Sequence[LabelRecord], name: str, conversion: Conversion) -> None:
    # Files were checked line by line before; records made in memory come here first.
    problems = [text for _, text in label_problems(records, conversion)]
    if problems:
        raise DataError("; ".join(problems[:5]), where=name, hint=LABEL_HINTS[conversion])
