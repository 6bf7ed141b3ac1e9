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

    def example(
        self, index: int, rng: np.random.Generator, num_negatives: int, num_positives: int = 1
    ) -> Example:
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

    scored = False

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
            label=record.label,
            instruction=self._instruction,
            symmetric=False,
            dataset=self.name,
            negative_labels=others,
        )
