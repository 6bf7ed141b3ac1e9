"""Texts found by their digests, against a dictionary."""

from __future__ import annotations

from nvembed.data.hashed import FirstPlaces, text_digest


def test_the_first_place_of_every_text_is_that_of_a_dictionary() -> None:
    texts = [f"text {number * number % 97}" for number in range(300)] + ["\ud800 half"]
    expected: dict[str, int] = {}
    for place, text in enumerate(texts):
        expected.setdefault(text, place)
    found = FirstPlaces(b"".join(map(text_digest, texts)))
    assert {text: found.find(text_digest(text)) for text in texts} == expected
    assert found.places.tolist() == sorted(expected.values())
    assert len(expected) < 60
    # Below, between and beyond all digests.
    absent = [found.find(text_digest(f"no {number}")) for number in range(300)]
    assert absent == [None] * 300


def test_digests_that_end_with_zeros_are_whole() -> None:
    digests = [b"a" * 14 + b"\0\0", b"a" * 15 + b"\0", b"\0" * 16, b"a" * 15 + b"\1"]
    found = FirstPlaces(b"".join(digests))
    assert [found.find(digest) for digest in digests] == [0, 1, 2, 3]


def test_no_texts_are_no_places() -> None:
    assert FirstPlaces(b"").find(text_digest("")) is None
