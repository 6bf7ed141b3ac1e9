"""Near-duplicates the slow way: every pair compared, sets of word triples by plain loops."""

from __future__ import annotations


def triples(text: str) -> set[tuple[str, ...]]:
    """All runs of three words; the whole text where it is shorter."""
    words = "".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split()
    if len(words) < 3:
        return {tuple(words)}
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def keep_distinct(texts: list[str], threshold: float) -> list[int]:
    """Keep a text unless its Jaccard similarity to a kept one reaches the threshold."""
    kept: list[int] = []
    for position, text in enumerate(texts):
        own = triples(text)
        similar = False
        for other in kept:
            theirs = triples(texts[other])
            similar |= len(own & theirs) / len(own | theirs) >= threshold
        if not similar:
            kept.append(position)
    return kept
