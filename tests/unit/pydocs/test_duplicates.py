"""Near-duplicates: the same texts go as in a comparison of all pairs."""

from __future__ import annotations

import random

import pytest

from oracles import demo as oracle
from pydocs.duplicates import keep_distinct, shingles


def mutated_texts(seed: int) -> list[str]:
    """Random sentences of a small vocabulary and copies with a few words changed."""
    rng = random.Random(seed)
    words = [f"w{number}" for number in range(30)]
    texts: list[str] = []
    for _ in range(120):
        if texts and rng.random() < 0.6:
            copy = rng.choice(texts).split()
            for _ in range(rng.randrange(4)):
                copy[rng.randrange(len(copy))] = rng.choice(words)
            texts.append(" ".join(copy))
        else:
            texts.append(" ".join(rng.choices(words, k=rng.randrange(1, 40))))
    return texts


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.6, 0.75, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_same_as_comparing_all_pairs(seed: int, threshold: float) -> None:
    texts = mutated_texts(seed)
    kept = keep_distinct(texts, threshold=threshold)
    assert kept == oracle.keep_distinct(texts, threshold)
    assert 0 < len(kept) < len(texts)  # something was found, and not everything


def test_earlier_text_wins_and_case_and_punctuation_do_not_count() -> None:
    texts = ["Fit the model to X, y.", "something else entirely here", "fit THE model -- to x y"]
    assert keep_distinct(texts, threshold=1.0) == [0, 1]


def test_a_near_duplicate_of_a_removed_text_alone_is_kept() -> None:
    # b resembles a and goes; c resembles b but not a, so it stays.
    a, b, c = "p q r s t u v w", "q r s t u v w x", "s t u v w x y z"
    assert keep_distinct([b, c], threshold=0.4) == [0]
    assert keep_distinct([a, b, c], threshold=0.4) == [0, 2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One two, THREE four", {"one two three", "two three four"}),
        ("one two", {"one two"}),
        ("", {""}),
    ],
)
def test_shingles(text: str, expected: set[str]) -> None:
    assert shingles(text) == expected
