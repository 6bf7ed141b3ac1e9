from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings

from nvembed.core.errors import DataError
from nvembed.data.batch import build_batch
from nvembed.data.examples import Example, ExampleSource, make_source
from nvembed.data.records import Kind, LabelRecord, PairRecord, StsRecord


def source(records: Sequence[Any], kind: Kind, **options: Any) -> ExampleSource:
    options = {"name": "set", "instruction": "find"} | options
    return make_source(list(records), kind, **options)  # type: ignore[arg-type]


def draws(of: ExampleSource, index: int, num_negatives: int, count: int = 400) -> list[Example]:
    rng = np.random.default_rng(0)
    return [of.example(index, rng, num_negatives) for _ in range(count)]


def assert_uniform(counts: Counter[str], expected: set[str]) -> None:
    """Each expected item comes about as often as the others, and nothing else comes."""
    assert set(counts) == expected
    share = counts.total() / len(expected)
    # 5 standard deviations of a binomial count: fails by chance less than once in a million.
    assert all(abs(count - share) < 5 * share**0.5 for count in counts.values()), counts


# --- retrieval, nli -------------------------------------------------------------------------------


def test_pairs_draw_one_positive_and_different_negatives() -> None:
    records = [PairRecord("q", ("p1", "p2", "p3"), ("n1", "n2", "n3", "n4"))]
    examples = draws(source(records, "retrieval"), 0, num_negatives=2)
    assert_uniform(Counter(example.positive for example in examples), {"p1", "p2", "p3"})
    assert_uniform(
        Counter(text for example in examples for text in example.negatives),
        {"n1", "n2", "n3", "n4"},
    )
    for example in examples:
        assert len(set(example.negatives)) == 2
        assert example == Example(
            query="q",
            positive=example.positive,
            negatives=example.negatives,
            known_positives=("p1", "p2", "p3"),
            labels=(),
            instruction="find",
            symmetric=False,
            dataset="set",
        )


def test_a_record_with_an_instruction_uses_it_in_place_of_the_sets() -> None:
    records = [PairRecord("q", ("p",)), PairRecord("q", ("p",), instruction="its own")]
    of = source(records, "retrieval")
    rng = np.random.default_rng(0)
    assert [of.example(index, rng, 0).instruction for index in (0, 1)] == ["find", "its own"]
    of = source(records, "retrieval", instruction=None)
    assert [of.example(index, rng, 0).instruction for index in (0, 1)] == [None, "its own"]


def test_pairs_draw_several_positives_beside_what_they_drew_before() -> None:
    records = [PairRecord("q", ("p1", "p2", "p3"), ("n1", "n2", "n3", "n4"))]
    of = source(records, "retrieval")
    seen: Counter[tuple[str, ...]] = Counter()
    for seed in range(300):
        one, two, many = (of.example(0, np.random.default_rng(seed), 2, n) for n in (1, 2, 5))
        assert one == of.example(0, np.random.default_rng(seed), 2)
        assert one.further_positives == ()
        assert (one.positive, one.negatives) == (two.positive, two.negatives)
        assert (one.positive, one.negatives) == (many.positive, many.negatives)
        assert len(two.further_positives) == 1
        seen[(two.positive, *two.further_positives)] += 1
        assert {many.positive, *many.further_positives} == {"p1", "p2", "p3"}
        assert len(many.further_positives) == 2
    assert len(seen) == 6
    assert min(seen.values()) > 25
    only = source([PairRecord("q", ("p",))], "nli").example(0, np.random.default_rng(0), 2, 3)
    assert only.further_positives == ()


def test_one_positive_draws_what_earlier_versions_drew() -> None:
    # Values of the version before there were several: runs keep their data.
    records = [PairRecord("q", tuple("abcde"), tuple("uvwxyz"))]
    of = source(records, "retrieval")
    drawn = [of.example(0, np.random.default_rng(seed), 3) for seed in range(4)]
    assert ["".join((e.positive, *e.negatives)) for e in drawn] == ["eyvw", "cxzw", "evzu", "evyu"]


def test_scores_follow_the_texts_that_are_drawn() -> None:
    record = PairRecord("q", ("p1", "p2"), ("n1", "q", "n2", "p2"), (0.1, 0.2), (1, 2, 3, 4))
    score_of = {"p1": 0.1, "p2": 0.2, "n1": 1, "n2": 3}
    of = source([record], "nli")
    for seed in range(20):
        got = of.example(0, np.random.default_rng(seed), 2, 2)
        assert set(got.negatives) == {"n1", "n2"}
        assert got.negative_scores == tuple(score_of[text] for text in got.negatives)
        positives = (got.positive, *got.further_positives)
        assert got.positive_scores == tuple(score_of[text] for text in positives)
    bare = source([PairRecord("q", ("p",), ("n",))], "nli").example(0, np.random.default_rng(0), 1)
    assert (bare.positive_scores, bare.negative_scores) == ((), ())


@pytest.mark.parametrize(("asked", "given_"), [(0, 0), (1, 1), (2, 2), (9, 2)])
def test_pairs_give_fewer_negatives_where_there_are_fewer(asked: int, given_: int) -> None:
    of = source([PairRecord("q", ("p",), ("n1", "n2"))], "nli")
    assert len(of.example(0, np.random.default_rng(0), asked).negatives) == given_
    assert (
        source([PairRecord("q", ("p",))], "nli")
        .example(0, np.random.default_rng(0), asked)
        .negatives
        == ()
    )


def test_a_query_in_two_records_knows_the_positives_of_both() -> None:
    records = [
        PairRecord("q", ("p1",), ("p2", "n", "q")),
        PairRecord("q", ("p2",), ("p1",)),
        PairRecord("other", ("p3",), ("p1",)),
    ]
    of = source(records, "retrieval")
    first, second, third = (of.example(i, np.random.default_rng(0), 5) for i in range(3))
    assert first.known_positives == second.known_positives == ("p1", "p2")
    assert (first.positive, second.positive) == ("p1", "p2")
    assert first.negatives == ("n",)  # neither the other record's positive nor the query itself
    assert second.negatives == ()
    assert third.negatives == ("p1",)


# --- sts ------------------------------------------------------------------------------------------

STS = [
    StsRecord("a", "b", 5.0),
    StsRecord("a", "c", 4.0),
    StsRecord("a", "d", 3.9),
    StsRecord("e", "e", 5.0),
    StsRecord("f", "g", 0.0),
]


def test_sts_gives_both_directions_of_close_pairs() -> None:
    of = source(STS, "sts")
    assert len(of) == 4
    examples = [of.example(i, np.random.default_rng(0), 1) for i in range(4)]
    pairs = [(example.query, example.positive) for example in examples]
    assert pairs == [("a", "b"), ("b", "a"), ("a", "c"), ("c", "a")]
    assert [example.known_positives for example in examples] == [
        ("b", "c"),
        ("a",),
        ("b", "c"),
        ("a",),
    ]
    assert all(example.symmetric and example.instruction == "find" for example in examples)


def test_sts_negatives_are_sentences_not_known_as_positives() -> None:
    of = source(STS, "sts")
    examples = draws(of, 0, num_negatives=2)
    counts = Counter(text for example in examples for text in example.negatives)
    assert_uniform(counts, {"d", "e", "f", "g"})
    assert all(len(set(example.negatives)) == 2 for example in examples)
    assert set(of.example(1, np.random.default_rng(0), 99).negatives) == {"c", "d", "e", "f", "g"}


def test_sts_prefers_mined_negatives() -> None:
    records = [*STS, StsRecord("h", "i", 4.5, ("m1", "m2", "h")), StsRecord("h", "j", 4, ("i",))]
    of = source(records, "sts")
    assert {*of.example(4, np.random.default_rng(0), 9).negatives} == {"m1", "m2"}
    # Nothing is left of mined negatives that are positives: others are drawn.
    assert {*of.example(6, np.random.default_rng(0), 99).negatives} == set("abcdefg")


def test_sts_without_close_pairs_is_refused() -> None:
    with pytest.raises(DataError, match="no pair of different sentences scores 4 or more") as error:
        source([StsRecord("a", "b", 1.0), StsRecord("c", "c", 5.0)], "sts", name="mine")
    assert error.value.where == "mine"


# --- classes --------------------------------------------------------------------------------------

LABELLED = [LabelRecord(f"{label}{n}", label) for label in ("red", "blue", "green") for n in "123"]


def test_classes_by_example_draw_from_own_and_other_classes() -> None:
    of = source(LABELLED, "clustering")
    assert len(of) == 9
    examples = draws(of, 4, num_negatives=2)  # "blue2"
    assert_uniform(Counter(example.positive for example in examples), {"blue1", "blue3"})
    assert_uniform(
        Counter(text for example in examples for text in example.negatives),
        {"red1", "red2", "red3", "green1", "green2", "green3"},
    )
    for example in examples:
        assert example.query == "blue2"
        assert example.labels == example.positive_labels == ("blue",)
        assert example.symmetric
        assert len(set(example.negatives)) == 2
        labels = tuple((text.rstrip("123"),) for text in example.negatives)
        assert example.negative_labels == labels


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 8), st.sampled_from("xyz")), min_size=2, max_size=16),
    st.integers(0, 12),
    st.integers(0, 2**32),
)
def test_classes_by_example_hold_for_texts_with_several_labels(
    rows: list[tuple[int, str]], num_negatives: int, seed: int
) -> None:
    records = [LabelRecord(f"t{text}", label) for text, label in rows]
    texts_of = {label: {r.text for r in records if r.label == label} for _, label in rows}
    assume(len(texts_of) > 1 and all(len(texts) > 1 for texts in texts_of.values()))
    of = source(records, "classification")
    assert len(of) == len(records)
    for index, record in enumerate(records):
        example = of.example(index, np.random.default_rng(seed), num_negatives)
        own = {label for label, texts in texts_of.items() if record.text in texts}
        allowed = {r.text for r in records}.difference(*(texts_of[label] for label in own))
        assert example.query == record.text
        assert example.positive in texts_of[record.label] - {record.text}
        assert len(example.negatives) == min(num_negatives, len(allowed))
        assert set(example.negatives) <= allowed
        assert len(set(example.negatives)) == len(example.negatives)
        assert set(example.labels) == own
        texts = (example.positive, *example.negatives)
        every = (example.positive_labels, *example.negative_labels)
        for text, labels in zip(texts, every, strict=True):
            assert set(labels) == {label for label, members in texts_of.items() if text in members}


def test_a_text_of_two_classes_is_a_negative_for_neither_in_a_batch() -> None:
    """All four queries of the set at once: only texts without a common class stand against."""
    classes = {"both": "xy", "x1": "x", "x2": "x", "y1": "y", "y2": "y", "z1": "z", "z2": "z"}
    records = [LabelRecord(text, label) for text, labels in classes.items() for label in labels]
    of = source(records, "classification")
    examples = [of.example(index, np.random.default_rng(index), 9) for index in range(len(of))]
    batch = build_batch(examples, in_batch_negatives=True)
    documents = [batch.texts[row][1] for row in batch.document_N]
    assert set(documents) == set(classes)
    for example, against_N in zip(examples, batch.negative_BN, strict=True):
        found = {documents[column] for column in np.flatnonzero(against_N)}
        own = set(classes[example.query])
        assert found == {text for text, labels in classes.items() if not own & set(labels)}


def test_classes_by_label_text() -> None:
    records = [
        LabelRecord("where is it", "card_arrival"),
        LabelRecord("where is it", "lost card"),
        LabelRecord("send it back", "refund"),
        LabelRecord("good day", "greeting"),
    ]
    of = source(records, "classification", conversion="label")
    examples = draws(of, 0, num_negatives=1)
    assert_uniform(Counter(text for e in examples for text in e.negatives), {"refund", "greeting"})
    example = of.example(2, np.random.default_rng(0), 9)
    assert (example.query, example.positive) == ("send it back", "refund")
    assert set(example.negatives) == {"card arrival", "lost card", "greeting"}
    assert set(example.negative_labels) == {("card_arrival",), ("lost card",), ("greeting",)}
    assert examples[0].positive == "card arrival"
    assert examples[0].known_positives == ("card arrival", "lost card")
    assert examples[0].labels == ("card_arrival", "lost card")
    assert examples[0].positive_labels == ("card_arrival",)
    assert not examples[0].symmetric


def test_classes_that_cannot_be_converted_are_refused() -> None:
    alone = [*LABELLED, LabelRecord("x", "alone")]
    with pytest.raises(DataError, match="colours: label 'alone' has one text only"):
        source(alone, "clustering", name="colours")
    assert len(source(alone, "clustering", conversion="label")) == 10
    with pytest.raises(DataError, match="says nothing as a text"):
        source([LabelRecord("x", "1"), LabelRecord("y", "2")], "clustering", conversion="label")


# --- all kinds ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("records", "kind", "options"),
    [
        ([PairRecord("q", tuple("abc"), tuple("defgh"))] * 3, "retrieval", {}),
        (STS, "sts", {}),
        (LABELLED, "classification", {}),
        (LABELLED, "classification", {"conversion": "label"}),
    ],
)
def test_the_generator_alone_decides(
    records: Sequence[Any], kind: Kind, options: dict[str, Any]
) -> None:
    of, again = source(records, kind, **options), source(records, kind, **options)
    got = [of.example(1, np.random.default_rng(seed), 2) for seed in range(20)]
    of.example(0, np.random.default_rng(5), 2)  # what came before does not matter
    assert got == [again.example(1, np.random.default_rng(seed), 2) for seed in range(20)]
    assert len({example.negatives for example in got}) > 1


def test_max_records_spreads_over_the_file_and_keeps_the_rest_for_drawing() -> None:
    records = [LabelRecord(f"{label}{n}", label) for label in "abcd" for n in range(25)]
    of = source(records, "clustering", max_records=4)
    assert len(of) == 4
    assert of.name == "set"
    rng = np.random.default_rng(0)
    assert [of.example(i, rng, 0).query for i in range(4)] == ["a0", "b0", "c0", "d0"]
    positives = {of.example(0, rng, 0).positive for _ in range(500)}
    assert positives == {f"a{n}" for n in range(1, 25)}
    assert len(source(records, "clustering", max_records=1000)) == 100
    assert len(source(records, "clustering", max_records=100)) == 100


@pytest.mark.parametrize("kind", ["retrieval", "nli", "classification"])
def test_no_records_are_refused(kind: Kind) -> None:
    with pytest.raises(DataError, match="set: the set holds no records"):
        source([], kind)
