"""Cleaning in plain Python: sets of strings, and every text compared with every other."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
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


def same(first: str, second: str) -> bool:
    return " ".join(first.lower().split()) == " ".join(second.lower().split())


def best_single(
    items: Sequence[tuple[str, ...]], text: str, threshold: float, size: int
) -> tuple[str, float, tuple[str, ...]] | None:
    """Rule, score and evaluation text for a text: the first equal one, else the most similar.

    Of texts that are equally similar the one counts that came first, alone or in a pair.
    """
    singles = [item for item in items if len(item) == 1]
    for (other,) in singles:
        if same(text, other):
            return "exact", 1.0, (other,)
    seen = [other for item in items for other in item]
    found = []
    for item in singles:
        place = next(at for at, other in enumerate(seen) if same(other, item[0]))
        # A text is compared in the spelling that came first.
        if (similarity := plain_jaccard(text, seen[place], size)) >= threshold - 1e-9:
            found.append((-similarity, place, item))
    if not found:
        return None
    similarity, _, item = min(found, key=lambda one: one[:2])
    return "near", -similarity, item


def best_pair(
    items: Sequence[tuple[str, ...]], first: str, second: str, threshold: float, size: int
) -> tuple[str, float, tuple[str, ...]] | None:
    """The same for a pair, in the better of both orders; its less similar side decides."""
    pairs = [item for item in items if len(item) == 2]
    orders = ((first, second), (second, first))
    for pair in pairs:
        if any(same(a, pair[0]) and same(b, pair[1]) for a, b in orders):
            return "exact", 1.0, pair
    seen = [other for item in items for other in item]
    found = []
    for pair in pairs:
        places = [next(at for at, o in enumerate(seen) if same(o, side)) for side in pair]
        similarity = max(
            min(
                plain_jaccard(text, seen[place], size)
                for text, place in zip(o, places, strict=True)
            )
            for o in orders
        )
        if similarity >= threshold - 1e-9:
            found.append((-similarity, sorted(places), pair))
    if not found:
        return None
    similarity, _, pair = min(found, key=lambda one: one[:2])
    return "near", -similarity, pair
