"""The documents that negatives are taken from, and what makes two texts the same.

In: texts as they come; out: each different text once, with its row. Texts are the same when they
differ in case and white space only. Next file: ``miner.py``.
"""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+")


def text_key(text: str) -> str:
    """Return what equal texts have in common: the text without case and with single spaces."""
    return " ".join(text.casefold().split())


def word_overlap(first: frozenset[str], second: frozenset[str]) -> float:
    """Return intersection over union of two sets of words, 0 for two empty sets."""
    union = len(first | second)
    return len(first & second) / union if union else 0.0


def words(text: str) -> frozenset[str]:
    """Return the different words of a text, without case."""
    return frozenset(_WORD.findall(text.casefold()))


class DocumentPool:
    """Different texts, in the order they came and in the spelling that came first."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._rows: dict[str, int] = {}

    def add(self, text: str) -> int:
        """Take a text in, unless it is there already, and return its row."""
        row = self._rows.setdefault(text_key(text), len(self.texts))
        if row == len(self.texts):
            self.texts.append(text)
        return row

    def find(self, text: str) -> int | None:
        """Return the row of a text, ``None`` where it is not in the pool."""
        return self._rows.get(text_key(text))
