"""Documents of real length, by recombining the sentences of real texts, and queries for them.

A document begins with two sentences that no other has together, so all are distinct, and a query
made of those two has one right document. The rest comes from the neighbourhood of the first, so
that documents have subjects. Document number i is the same in a corpus of any size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from random import Random
from typing import Any

from nvembed.core.files import read_jsonl

POOL_SENTENCES = 300_000
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9])")
_WORDS = range(4, 81)  # of a sentence
_MOST = 40  # sentences of a document
_NEAR = 300  # sentences in either direction
_KEPT = 0.7  # of the words, in a query
_YEARS = (1950, 75)


@dataclass(frozen=True)
class Pool:
    """Sentences of real texts, each once, in their order, and how many sentences the texts had."""

    sentences: Sequence[str]
    lengths: Sequence[int]

    @property
    def capacity(self) -> int:
        """How many distinct documents can be made."""
        return len(self.sentences) * (len(self.sentences) - 1)


def sentences_of(text: str) -> list[str]:
    """Split a text into sentences that would be found again if they were joined by spaces."""
    parts = _END.split(" ".join(text.split()))
    return [
        part
        for part in parts
        if part[-1:] in (".", "!", "?")
        and part[0] in "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
        and part.count(" ") + 1 in _WORDS
    ]


def read_pool(files: Sequence[Path], limit: int = POOL_SENTENCES) -> Pool:
    """Take the sentences of JSONL files, of each an equal share of at most ``limit``."""
    seen: dict[str, None] = {}
    lengths: list[int] = []
    for number, file in enumerate(files, start=1):
        room = limit * number // len(files)
        for _, row in read_jsonl(file):
            for text in _texts(list(row.values())):
                found = sentences_of(text)
                if len(found) > 1:
                    lengths.append(min(len(found), _MOST))
                    seen.update(dict.fromkeys(found))
            if len(seen) >= room:
                break
    if len(seen) < 3:
        raise ValueError("the texts have fewer than three sentences that can be recombined")
    return Pool(list(seen)[:limit], lengths)


def _texts(values: Sequence[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from _texts(value)


def _parts(pool: Pool, number: int, seed: int) -> list[int]:
    """The sentences of a document, by their numbers."""
    size = len(pool.sentences)
    if not 0 <= number < pool.capacity:
        raise ValueError(f"{size:,} sentences make {pool.capacity:,} documents, not {number + 1:,}")
    turn, place = divmod(number, size)
    step = max(1, round(0.618 * size))  # goes through all sentences, far apart
    while gcd(step, size) > 1:
        step += 1
    first = (place * step + seed) % size
    choose = Random(f"{seed} {number}")
    rest = range(choose.choice(pool.lengths) - 2)
    near = [(first + choose.randint(-_NEAR, _NEAR)) % size for _ in rest]
    return [first, (first + 1 + turn) % size, *near]


def document(pool: Pool, number: int, seed: int) -> dict[str, Any]:
    """Make a document: ``id``, ``text`` and ``year``."""
    text = " ".join(pool.sentences[part] for part in _parts(pool, number, seed))
    begin, many = _YEARS
    return {"id": f"d{number}", "text": text, "year": begin + number % many}


def query(pool: Pool, number: int, seed: int) -> dict[str, str]:
    """Make a query for a document: words of its first two sentences, in their order."""
    choose = Random(f"query {seed} {number}")
    words = " ".join(pool.sentences[part] for part in _parts(pool, number, seed)[:2]).split()
    kept = [word for word in words if choose.random() < _KEPT]
    return {"id": f"q{number}", "text": " ".join(kept or words), "document": f"d{number}"}


def planted(count: int, documents: int, seed: int) -> list[int]:
    """Numbers of the documents that queries are made for."""
    return Random(f"planted {seed}").sample(range(documents), min(count, documents))
