"""Shingles: what two texts have in common when one is an edited copy of the other.

In: a text; out: the set of its runs of words, each run a 64-bit number that is the same in every
process and on every machine. Case, punctuation and white space do not count. Next files:
``duplicates.py``, ``contamination.py``.
"""

from __future__ import annotations

import re
from hashlib import blake2b

from nvembed.mining.pool import text_key

_WORD = re.compile(r"\w+")


def word_list(text: str) -> list[str]:
    """Return the words of a text in order, without case.

    A text without any (a row of signs) is one word, so that it equals itself only.
    """
    return _WORD.findall(text.casefold()) or [text_key(text)]


def shingles(text: str, num_words: int) -> frozenset[int]:
    """Return the runs of ``num_words`` words of a text, hashed; a shorter text is one run.

    Args:
        text: any text.
        num_words: words in a run, at least 1.

    Returns:
        at least one number in [0, 2**64).
    """
    words = word_list(text)
    last = max(1, len(words) - num_words + 1)
    return frozenset(_hash(" ".join(words[start : start + num_words])) for start in range(last))


def jaccard(first: frozenset[int], second: frozenset[int]) -> float:
    """Return intersection over union of two sets of shingles, neither of them empty."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def _hash(run: str) -> int:
    digest = blake2b(run.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
