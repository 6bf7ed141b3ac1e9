"""Real texts of many lengths."""

from __future__ import annotations

import random
from pathlib import Path

_DOCS = Path(__file__).resolve().parents[2] / "docs"


def real_words() -> list[str]:
    """The words of this project's pages, in their order."""
    pages = sorted(_DOCS.glob("*.md"))
    return " ".join(page.read_text("utf-8") for page in pages).split()


def real_texts(count: int, longest: int, seed: int = 0) -> list[str]:
    """Texts of 3 to ``longest`` words, half of them below 40; no two are equal."""
    rng, words = random.Random(seed), real_words()
    found: dict[str, None] = {}
    while len(found) < count:
        length = min(longest, max(3, round(rng.lognormvariate(3.7, 1.0))))
        start = rng.randrange(len(words) - length)
        found[" ".join(words[start : start + length])] = None
    return list(found)
