"""When two texts are the same, and how much two texts have in common.

Texts are the same when they differ in case and white space only; edited copies share shingles,
runs of words as 64-bit numbers that are the same in every process.
"""

from __future__ import annotations

import re
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"\w+")
# Odd, so that multiplying loses nothing; the fraction of the golden ratio in 64 bits.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)


def text_key(text: str) -> str:
    """Return what equal texts have in common: the text without case and with single spaces."""
    return " ".join(text.casefold().split())


def word_list(text: str) -> list[str]:
    """Return the words of a text in order, without case; a text without any is one word."""
    return _WORD.findall(text.casefold()) or [text_key(text)]


def shingles(text: str, num_words: int) -> NDArray[np.uint64]:
    """Return the different runs of ``num_words`` words, ascending; a shorter text is one run."""
    words = word_list(text)
    size = min(num_words, len(words))
    numbers = np.fromiter(
        [crc32(word.encode("utf-8", "surrogatepass")) for word in words], np.uint64, len(words)
    )
    # Not 0, so that the order of words and their number count: "a b" is neither "b a" nor "a b b".
    runs = np.full(len(words) - size + 1, size, dtype=np.uint64)
    for place in range(size):
        runs = (runs + numbers[place : place + len(runs)]) * _MULTIPLIER
        runs ^= runs >> _HALF
    return np.unique(runs)


def jaccard(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> float:
    """Return intersection over union of two sets of shingles, neither of them empty."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)
