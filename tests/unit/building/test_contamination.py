"""Contamination: evaluation texts in training records."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.building.contamination import (
    Bm25Index,
    Contamination,
    EvaluationText,
    Match,
    ShingleIndex,
)
from nvembed.data.bm25 import BM25
from nvembed.data.records import LabelRecord, PairRecord, StsRecord
from oracles.cleaning import best_pair, best_single, bm25_share, plain_jaccard

ITEMS = [
    EvaluationText(("What is my  Balance?",), "banking", "text"),
    EvaluationText(("A man sleeps.", "A woman runs."), "sts", "pair"),
]
few_texts = st.lists(
    st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=9).map(" ".join),
    min_size=2,
    max_size=25,
)
thresholds = st.sampled_from([0.2, 1 / 3, 0.5, 0.6, 0.75, 0.9, 1.0])


def test_records_are_compared_by_what_they_bring() -> None:
    check = Contamination(ITEMS, near=None).check_record
    match = check(LabelRecord("what is my balance?", "balance"))
    assert match is not None
    assert (match.rule, match.score, match.found) == ("exact", 1.0, ITEMS[0])
    assert match.texts == ("what is my balance?",)
    assert check(LabelRecord("what is my name?", "balance")) is None
    # Documents alone are shared by design, a query is not.
    assert check(PairRecord("q", ("What is my balance?",))) is None
    assert check(PairRecord("what is MY balance?", ("d",))) is not None
    # Pairs match in either order, and only as pairs.
    assert check(StsRecord("a woman runs.", "a man sleeps.", 0.0)) is not None
    assert check(StsRecord("a woman runs.", "a man walks.", 0.0)) is None
    assert check(StsRecord("a woman runs.", "a woman runs.", 0.0)) is None
    assert check(PairRecord("a man sleeps.", ("no", "a woman runs."))) is not None


@settings(max_examples=50, deadline=None)
@given(few_texts, thresholds, st.integers(1, 3))
def test_shingle_search_equals_comparing_with_all(
    texts: list[str], threshold: float, size: int
) -> None:
    query, *documents = texts
    expected = {
        row: similarity
        for row, document in enumerate(documents)
        if (similarity := plain_jaccard(query, document, size)) >= threshold
    }
    assert ShingleIndex(documents, threshold, size).search(query) == expected


@settings(max_examples=50, deadline=None)
@given(few_texts, thresholds)
def test_bm25_search_equals_comparing_with_all(texts: list[str], threshold: float) -> None:
    query, *documents = texts
    shares = {row: bm25_share(query, text, documents) for row, text in enumerate(documents)}
    found = Bm25Index(documents, threshold).search(query)
    assert found == {
        row: pytest.approx(share) for row, share in shares.items() if share >= threshold - 1e-9
    }


def test_bm25_shares_are_those_of_the_search() -> None:
    # Every word of the query stands in the documents' own: the share of the document decides.
    documents = ["one two three four", "two three one", "one three"]
    query = "three one"
    scores, rows = BM25(documents).top_k([query], 3)
    own = {row: BM25(documents).top_k([text], 3) for row, text in enumerate(documents)}
    for score, row in zip(scores[0], rows[0], strict=True):
        itself = own[row][0][0][list(own[row][1][0]).index(row)]
        share = Bm25Index(documents, 0.01).search(query)[int(row)]
        assert share == pytest.approx(score / itself)


def test_near_and_bm25_rules_take_their_turn_and_pairs_need_both_sides() -> None:
    long = "the quick brown fox jumps over the lazy dog at noon"
    other = "several small birds sing in the old oak tree every morning"
    items = [EvaluationText((long,), "t"), EvaluationText((long, other), "s", "pair")]
    check = Contamination(items, near=0.6, bm25=0.8)
    edited, turned = long.replace("noon", "night"), " ".join(long.split()[::-1])
    longer = " ".join([long, *map(str, range(20))])
    match = check.check(edited)
    # 10 pairs of words each, 9 shared.
    assert match == Match("near", pytest.approx(9 / 11), items[0], (edited,))
    match = check.check(turned)
    assert match is not None
    assert match.rule == "bm25"
    assert Contamination(items, near=0.6).check(turned) is None
    assert check.check(longer) is None  # holds all its words, among many others
    match = check.check(other.replace("every", "each"), edited)
    assert match is not None
    assert (match.rule, match.found) == ("near", items[1])
    assert match.score == pytest.approx(8 / 12)  # of the side that is less similar
    assert check.check(edited, "something else") is None
    assert Contamination([items[1]], near=0.6, bm25=0.8).check(long) is None


def planted(rng: random.Random, vocabulary: list[str]) -> str:
    return " ".join(rng.choice(vocabulary) for _ in range(rng.randrange(10, 30)))


def lightly_edited(rng: random.Random, text: str) -> str:
    words = text.split()
    place = rng.randrange(len(words))
    match rng.randrange(4):
        case 0:
            words.insert(place, "really")
        case 1:
            del words[place]
        case 2:
            words[place] = words[place][:-1] + "e"
        case _:
            return text.upper().replace(" ", ", ") + "!"
    return " ".join(words)


def test_planted_texts_are_found_and_nothing_else() -> None:
    rng = random.Random(0)
    vocabulary = ["w" + "".join(rng.choice("aeioklmnrst") for _ in range(5)) for _ in range(3000)]
    tests = [planted(rng, vocabulary) for _ in range(1000)]
    check = Contamination([EvaluationText((text,), "task") for text in tests]).check
    exact = [check("  ".join(text.upper().split())) for text in tests[:50]]
    assert [match and match.rule for match in exact] == ["exact"] * 50
    assert [match.found.texts[0] for match in exact if match] == tests[:50]
    edited = [check(lightly_edited(rng, text)) for text in tests[50:100]]
    found = [match.found.texts[0] for match in edited if match]
    assert len(found) >= 48
    assert set(found) <= set(tests[50:100])
    assert not any(check(planted(rng, vocabulary)) for _ in range(2000))


# Few words, so that texts are often equal, equally similar, or both sides of a pair.
one_text = st.lists(st.sampled_from(["a", "A", "b", "c"]), min_size=2, max_size=4).map(" ".join)
evaluation_items = st.lists(st.one_of(st.tuples(one_text), st.tuples(one_text, one_text)))


@settings(max_examples=300, deadline=None)
@given(evaluation_items, one_text, one_text, st.sampled_from([0.3, 0.5, 1.0]), st.integers(1, 2))
def test_single_texts_and_pairs_equal_comparing_with_all(
    texts: list[tuple[str] | tuple[str, str]], first: str, second: str, near: float, size: int
) -> None:
    items = [EvaluationText(own, f"task {number}") for number, own in enumerate(texts)]
    contamination = Contamination(items, near=near, shingle_words=size)
    for match, expected, asked in (
        (contamination.check(first), best_single(texts, first, near, size), (first,)),
        (
            contamination.check(first, second),
            best_pair(texts, first, second, near, size),
            (first, second),
        ),
    ):
        if expected is None:
            assert match is None
            continue
        rule, score, found = expected
        assert match is not None
        assert (match.rule, match.texts) == (rule, asked)
        assert match.score == pytest.approx(score)
        # Of items that are one text in several spellings, the first.
        assert match.found == items[texts.index(found)]


def test_the_first_of_equal_evaluation_texts_is_reported_and_counted_once() -> None:
    items = [
        EvaluationText(("One text",), "first"),
        EvaluationText(("one  TEXT",), "second"),
        EvaluationText(("one side", "other side"), "third", "pair"),
        EvaluationText(("Other side", "One side"), "fourth", "pair"),
        EvaluationText(("other side",), "fifth"),
    ]
    contamination = Contamination(items)
    assert len(contamination) == 3  # two texts and a pair
    assert len(Contamination([])) == 0
    assert contamination.check("ONE text") == Match("exact", 1.0, items[0], ("ONE text",))
    for first, second in (("one side", "OTHER side"), ("OTHER side", "one side")):
        match = contamination.check(first, second)
        assert match == Match("exact", 1.0, items[2], (first, second))
    # A side of a pair is no text of its own, unless it is one as well.
    assert contamination.check("one side") is None
    assert contamination.check("other side") == Match("exact", 1.0, items[4], ("other side",))
    assert contamination.check("one text", "one text") is None


def test_the_defaults_are_two_words_and_six_tenths_and_no_bm25() -> None:
    text = "a b c d e f g h i"
    contamination = Contamination([EvaluationText((text,), "t")])
    # Of a changed word two pairs of words go: 6 of 10 are shared. Of the words alone it is 8 of 10.
    found = EvaluationText((text,), "t", "text")
    changed = "a b c d x f g h i"
    assert contamination.check(changed) == Match("near", pytest.approx(0.6), found, (changed,))
    assert contamination.check("a b c d e x g h y") is None
    assert contamination.check("i h g f e d c b a") is None  # bm25 would find it


def test_every_query_and_pair_of_a_record_is_compared() -> None:
    items = [
        EvaluationText(("first sentence",), "t"),
        EvaluationText(("second sentence",), "t"),
        EvaluationText(("the query", "its answer"), "p", "pair"),
    ]
    check = Contamination(items, near=None).check_record
    found = check(StsRecord("first sentence", "another", 3.0))
    assert found == Match("exact", 1.0, items[0], ("first sentence",))
    found = check(StsRecord("another", "second sentence", 3.0))
    assert found == Match("exact", 1.0, items[1], ("second sentence",))
    found = check(PairRecord("The query", ("x", "its  answer", "y")))
    assert found == Match("exact", 1.0, items[2], ("The query", "its  answer"))
    # Negatives, and pairs of documents, may stand in a task.
    assert check(PairRecord("q", ("the query", "its answer"), ("first sentence",))) is None
    assert check(PairRecord("first sentence", ("its answer",))) is not None
