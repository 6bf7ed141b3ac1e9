"""Queries from summaries: the rules, one by one, and their determinism."""

from __future__ import annotations

import random
from unittest import mock

import pytest

from pydocs.questions import (
    QUERY_STYLES,
    QueryStyle,
    base_verb,
    keywords,
    make_query,
    question,
    split_verb,
)


class First(random.Random):
    """Chooses the first of everything and leaves nothing out."""

    def choice(self, seq):  # type: ignore[no-untyped-def]
        return seq[0]

    def random(self) -> float:
        return 0.9


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        ("Return the minimum of an array.", "How do I get the minimum of an array?"),
        ("Returns the minimum of an array.", "How do I get the minimum of an array?"),
        ("Applies a filter to the image", "How do I apply a filter to the image?"),
        ("Lazily compute the sum.", "How do I compute the sum lazily?"),
        ("This function computes the rank (see x).", "How do I compute the rank?"),
        ("Check whether two graphs are equal.", "How do I check if two graphs are equal?"),
        ("Return True if x is odd.", "How do I check if x is odd?"),
        ("A sparse matrix.", "What can I use for a sparse matrix?"),
        ("DFT of a real signal.", "What can I use for DFT of a real signal?"),
        ("Encode the box in the format into (x, y).", "How do I encode the box in the format?"),
        (
            "Return a flat copy of the mask, where nested fields are gone.",
            "How do I get a flat copy of the mask?",
        ),
    ],
)
def test_question(summary: str, expected: str) -> None:
    assert question(summary, First(), is_class=False) == expected


def test_kind_is_named_in_some_questions() -> None:
    asked = {question("Sort a list.", random.Random(n), is_class=True) for n in range(60)}
    assert "class to order a list" in asked
    assert not any("function" in text for text in asked)
    assert len(asked) > 10  # templates and verbs vary


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        ("Return the minimum of an array along an axis.", "minimum array along axis"),
        ("Compute x.", "compute x"),  # too short to leave words out
        ("A list of the names in the list.", "list names"),
    ],
)
def test_keywords(summary: str, expected: str) -> None:
    assert keywords(summary, First()) == expected


def test_long_keywords_lose_words_but_not_their_order() -> None:
    summary = "Alpha beta gamma delta epsilon zeta eta theta iota kappa."
    words = summary.lower().strip(".").split()
    found = {keywords(summary, random.Random(n)) for n in range(20)}
    assert len(found) > 5
    for text in found:
        kept = text.split()
        assert len(kept) == 6
        assert kept == sorted(kept, key=words.index)


def test_leading_verb_is_left_out_half_of_the_time() -> None:
    texts = [keywords("Sort the rows by name.", random.Random(n)) for n in range(200)]
    assert set(texts) == {"sort rows name", "rows name"}
    assert 60 < texts.count("rows name") < 140


@pytest.mark.parametrize(
    ("word", "verb"),
    [
        ("Returns", "return"),
        ("applies", "apply"),
        ("Pushes", "push"),
        ("Matches", "match"),
        ("Process", "process"),
        ("Matrix", None),
        ("Class", None),
    ],
)
def test_base_verb(word: str, verb: str | None) -> None:
    assert base_verb(word) == verb


def test_adverb_in_front_moves_behind() -> None:
    assert split_verb("Recursively deletes a folder") == ("delete", "a folder recursively")
    assert split_verb("Family of curves") == (None, "of curves")


@pytest.mark.parametrize("style", QUERY_STYLES)
def test_same_seed_same_query(style: QueryStyle) -> None:
    summary = "Compute the weighted average of all elements along the given axis of an array."
    one, two = (make_query(summary, style, random.Random(7), is_class=False) for _ in range(2))
    assert one == two


def test_summary_style_is_the_summary_without_its_full_stop() -> None:
    rng = mock.Mock()
    assert make_query("Sort a list.", "summary", rng, is_class=False) == "Sort a list"
    assert not rng.mock_calls
