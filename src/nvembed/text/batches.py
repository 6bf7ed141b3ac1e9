"""Neighbouring texts, as many as memory should hold with all that is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

# Some two million tokens, of which each takes about a hundred bytes while it is described.
BATCH_CHARACTERS = 8 * 2**20


def batches(texts: Iterable[str], count: int) -> Iterator[list[str]]:
    """Cut texts into runs of at most ``count``, and of at most eight million characters.

    A text beyond that is a run of its own. Every text comes once, in order.
    """
    batch: list[str] = []
    characters = 0
    for text in texts:
        if batch and (len(batch) == count or characters + len(text) > BATCH_CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
    if batch:
        yield batch
