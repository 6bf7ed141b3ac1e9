"""Near-duplicates: the pairs that comparing every text with every other gives."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.building.duplicates import NearDuplicates
from nvembed.building.shingles import jaccard, shingles


def test_a_text_with_a_word_changed_is_found_and_another_is_not() -> None:
    words = [f"w{number}" for number in range(40)]
    edited = [*words[:20], "other", *words[21:]]
    seen = NearDuplicates(0.8)
    seen.add(7, " ".join(words))
    seen.add(8, "a text about something else entirely")
    # 38 shingles each, 35 of them shared: 35 / 41 = 0.854.
    assert seen.find(" ".join(edited)) == [7]
    assert seen.find(" ".join(words).upper() + "!") == [7]
    assert seen.find(" ".join(words[:20])) == []
    assert len(seen) == 2


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12).map(" ".join),
        min_size=1,
        max_size=60,
    )
)
def test_what_is_found_is_near(texts: list[str]) -> None:
    seen = NearDuplicates(0.7, shingle_words=2)
    for key, text in enumerate(texts):
        found = seen.find(text)
        near = [
            other
            for other in range(key)
            if jaccard(shingles(text, 2), shingles(texts[other], 2)) >= 0.7
        ]
        same = [other for other in range(key) if shingles(text, 2) == shingles(texts[other], 2)]
        assert set(same) <= set(found) <= set(near)
        seen.add(key, text)
