"""Near-duplicate texts: found exactly, without comparing all pairs.

Enters: texts in order of preference. Leaves: which of them to keep, so that no two kept texts share
more than a given part of their word shingles. Copied documentation (the ``fit`` and ``set_params``
of every estimator) would otherwise be on both sides of the split and have many right answers.

Two texts are near-duplicates when the Jaccard similarity of their sets of word 3-grams reaches the
threshold t. The search is exact (prefix filter of AllPairs, Bayardo et al. 2007): if J(x, y) >= t,
the two share at least ceil(t |x|) shingles, so one of the |x| - ceil(t |x|) + 1 rarest shingles of
x is among the rarest of y as well, and only texts that meet there are compared. MinHash would be
an approximation of the same and is not needed below some hundred thousand texts.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

SHINGLE_WORDS = 3


def shingles(text: str) -> frozenset[str]:
    """Return the set of runs of `SHINGLE_WORDS` words, lower-cased; a shorter text is one run."""
    words = re.findall(r"\w+", text.lower())
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return frozenset(" ".join(words[start : start + SHINGLE_WORDS]) for start in range(last))


def keep_distinct(texts: Sequence[str], *, threshold: float) -> list[int]:
    """Return the positions of the texts to keep, ascending.

    A text is kept unless it is a near-duplicate of one kept before it, so earlier texts win.

    Args:
        texts: In order of preference.
        threshold: Jaccard similarity in (0, 1] from which two texts count as duplicates.
    """
    sets = [shingles(text) for text in texts]
    frequency = Counter(shingle for shingle_set in sets for shingle in shingle_set)
    kept: list[int] = []
    kept_with: defaultdict[str, list[int]] = defaultdict(list)
    for position, own in enumerate(sets):
        # Rarest first; the text itself breaks ties, so that all sets are sorted alike.
        ordered = sorted(own, key=lambda shingle: (frequency[shingle], shingle))
        prefix = ordered[: len(own) - math.ceil(threshold * len(own)) + 1]
        candidates = {other for shingle in prefix for other in kept_with[shingle]}
        if any(_jaccard_reaches(own, sets[other], threshold) for other in candidates):
            continue
        kept.append(position)
        for shingle in prefix:
            kept_with[shingle].append(position)
    return kept


def _jaccard_reaches(one: frozenset[str], two: frozenset[str], threshold: float) -> bool:
    shorter, longer = sorted((len(one), len(two)))
    if shorter < threshold * longer:
        return False
    shared = len(one & two)
    return shared >= threshold * (len(one) + len(two) - shared)
