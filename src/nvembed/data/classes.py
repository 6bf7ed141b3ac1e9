"""Sources of labelled texts; how classes become examples is said in ``data/convert.py``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nvembed.data.examples import Example, sample_where
from nvembed.data.records import LabelRecord, label_text


class ClassSource:
    """Example-based conversion: a text, another text of its class, texts of other classes.

    Texts that carry several labels are never negatives of each other where they share one.
    """

    scored = False

    def __init__(self, records: Sequence[LabelRecord], name: str, instruction: str | None) -> None:
        self.name = name
        self._records = records
        self._instruction = instruction
        members: dict[str, dict[str, None]] = {}
        for record in records:
            members.setdefault(record.label, {})[record.text] = None
        # All classes in one list, each a contiguous block: "not of this class" is an index shift.
        self._members = [(text, label) for label, texts in members.items() for text in texts]
        self._labels_of = labels_by_text(records)
        self._blocks: dict[str, tuple[int, int]] = {}
        self._positions: dict[tuple[str, str], int] = {}
        for position, member in enumerate(self._members):
            start, _ = self._blocks.get(member[1], (position, position))
            self._blocks[member[1]] = (start, position + 1)
            self._positions[member] = position
        self._num_surplus = len(self._members) - len(self._labels_of)

    def __len__(self) -> int:
        return len(self._records)

    def example(
        self, index: int, rng: np.random.Generator, num_negatives: int, num_positives: int = 1
    ) -> Example:
        """Draw the positive from the class of the record, negatives from classes not the text's."""
        record = self._records[index]
        start, stop = self._blocks[record.label]
        own = self._positions[(record.text, record.label)]
        position = start + int(rng.integers(stop - start - 1))
        positive, _ = self._members[position + (position >= own)]
        negatives = self._draw_negatives(record, num_negatives, rng)
        return Example(
            query=record.text,
            positive=positive,
            negatives=negatives,
            known_positives=(positive,),
            labels=self._labels_of[record.text],
            instruction=self._instruction,
            symmetric=True,
            dataset=self.name,
            positive_labels=self._labels_of[positive],
            negative_labels=tuple(self._labels_of[text] for text in negatives),
        )

    def _draw_negatives(
        self, record: LabelRecord, count: int, rng: np.random.Generator
    ) -> tuple[str, ...]:
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
            text, _ = self._members[place]
            if not set(own).intersection(self._labels_of[text]):
                found[text] = None
            if len(found) == count:
                break
        return tuple(found)


class LabelTextSource:
    """Label-text conversion: the positive is the name of the class, negatives are other names.

    Query and document are different sorts of text here, so only the query carries the instruction.
    """

    scored = False

    def __init__(self, records: Sequence[LabelRecord], name: str, instruction: str | None) -> None:
        self.name = name
        self._records = records
        self._instruction = instruction
        self._labels = list(dict.fromkeys(record.label for record in records))
        self._labels_of = labels_by_text(records)

    def __len__(self) -> int:
        return len(self._records)

    def example(
        self, index: int, rng: np.random.Generator, num_negatives: int, num_positives: int = 1
    ) -> Example:
        """Take the name of the class and draw names of classes the text does not belong to."""
        record = self._records[index]
        own = self._labels_of[record.text]
        others = sample_where(
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
            labels=own,
            instruction=self._instruction,
            symmetric=False,
            dataset=self.name,
            positive_labels=(record.label,),
            negative_labels=tuple((label,) for label in others),
        )


def labels_by_text(records: Sequence[LabelRecord]) -> dict[str, tuple[str, ...]]:
    """All labels of every text, in the order of the records."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        found.setdefault(record.text, {})[record.label] = None
    return {text: tuple(labels) for text, labels in found.items()}
