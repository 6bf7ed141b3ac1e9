"""Near-duplicates: the pairs that comparing every text with every other gives."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.building.contamination import NearDuplicates, lsh_shape
from nvembed.core.errors import UserError
from nvembed.data.similarity import jaccard, shingles
from oracles.cleaning import plain_jaccard

texts_of_few_words = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12).map(" ".join)


@given(texts_of_few_words, texts_of_few_words, st.integers(1, 4))
def test_hashed_shingles_are_as_similar_as_plain_ones(first: str, second: str, size: int) -> None:
    expected = plain_jaccard(first, second, size)
    assert jaccard(shingles(first, size), shingles(second, size)) == expected


def test_shingles_count_neither_case_nor_signs_and_take_any_text() -> None:
    assert (shingles("A b, C!", 2) == shingles("a  B c", 2)).all()
    for text in ("", "?!", "\ud800", "🙂", "e" * 100_000):
        assert len(shingles(text, 3)) == 1
    assert len({int(shingles(text, 3)[0]) for text in ("?", "!", "🙂", "a", "a a", "a b")}) == 6


def test_a_text_with_a_word_changed_is_found_and_another_is_not() -> None:
    words = [f"w{number}" for number in range(40)]
    edited = [*words[:20], "other", *words[21:]]
    seen = NearDuplicates(0.8)
    assert seen.find_or_add(7, " ".join(words)) == []
    assert seen.find_or_add(8, "a text about something else entirely") == []
    # 38 shingles each, 35 of them shared: 35 / 41 = 0.854.
    assert seen.find_or_add(9, " ".join(edited)) == [7]
    assert seen.find_or_add(9, " ".join(words).upper() + "!") == [7]
    assert seen.find_or_add(10, " ".join(words[:20])) == []
    assert seen.find_or_add(11, "new words are taken in") == []
    assert seen.find_or_add(12, "new words are taken in") == [11]


@settings(max_examples=20, deadline=None)
@given(st.lists(texts_of_few_words, min_size=1, max_size=60))
def test_what_is_found_is_near(texts: list[str]) -> None:
    seen = NearDuplicates(0.7, shingle_words=2)
    taken_in: list[int] = []
    for key, text in enumerate(texts):
        found = seen.find_or_add(key, text)
        similarity = {other: plain_jaccard(text, texts[other], 2) for other in taken_in}
        same = {other for other in taken_in if similarity[other] == 1}
        near = {other for other in taken_in if similarity[other] >= 0.7}
        assert same <= set(found) <= near
        taken_in += [] if found else [key]


def edited_copies() -> list[str]:
    rng = random.Random(0)
    texts = []
    for _ in range(60):
        words = [str(rng.randrange(5000)) for _ in range(60)]
        texts.append(" ".join(words))
        for edits in (1, 2, 3, 6):
            copy = list(words)
            for place in rng.sample(range(60), edits):
                copy[place] = "x" + copy[place]
            texts.append(" ".join(copy))
    return texts


def test_of_hundreds_of_edited_texts_next_to_none_is_missed() -> None:
    texts = edited_copies()
    seen, found, near = NearDuplicates(0.8), 0, 0
    taken_in: list[str] = []
    for key, text in enumerate(texts):
        near += sum(plain_jaccard(text, other, 3) >= 0.8 for other in taken_in)
        found += len(some := seen.find_or_add(key, text))
        taken_in += [] if some else [text]
    assert near > 100
    assert 0.98 * near <= found <= near


def test_answers_are_the_same_in_every_process() -> None:
    code = (
        "import sys; sys.path[:0] = ['src', 'tests']\n"
        "from unit.building.test_duplicates import edited_copies\n"
        "from nvembed.building.contamination import NearDuplicates\n"
        "seen = NearDuplicates(0.7)\n"
        "print([seen.find_or_add(*item) for item in enumerate(edited_copies())])"
    )
    seen = NearDuplicates(0.7)
    here = str([seen.find_or_add(*item) for item in enumerate(edited_copies())])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == here


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("num_hashes", [1, 100, 128])
def test_bands_miss_little_at_the_threshold(threshold: float, num_hashes: int) -> None:
    bands, rows = lsh_shape(threshold, num_hashes)
    assert 1 <= bands * rows <= num_hashes
    assert rows == 1 or (1 - threshold**rows) ** bands <= 0.02


def test_without_the_library_the_error_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(UserError, match=r"pip install 'nvembed\[data\]'"):
        NearDuplicates()
