"""Cleaning in plain Python: sets of strings, and every text compared with every other."""

from __future__ import annotations

import math
import re
from functools import lru_cache


def plain_jaccard(first: str, second: str, size: int) -> float:
    one, other = _runs(first, size), _runs(second, size)
    return len(one & other) / len(one | other)


@lru_cache(maxsize=10_000)
def _runs(text: str, size: int) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return frozenset(tuple(words[at : at + size]) for at in range(max(1, len(words) - size + 1)))


def bm25_share(query: str, document: str, documents: list[str]) -> float:
    """The lower of two shares: of the document's score for itself, and of the query's weight."""
    of_document = _bm25(query, document, documents) / _bm25(document, document, documents)
    words = set(query.split())
    shared = sum(_idf(word, documents) for word in words & set(document.split()))
    return min(of_document, shared / sum(_idf(word, documents) for word in words))


def _idf(word: str, documents: list[str]) -> float:
    found_in = sum(word in other.split() for other in documents)
    return math.log(1 + (len(documents) - found_in + 0.5) / (found_in + 0.5))


def _bm25(query: str, document: str, documents: list[str]) -> float:
    words = document.split()
    mean = sum(len(other.split()) for other in documents) / len(documents)
    total = 0.0
    for word in set(query.split()):
        count = words.count(word)
        idf = _idf(word, documents)
        total += idf * count * 1.9 / (count + 0.9 * (0.6 + 0.4 * len(words) / mean))
    return total
