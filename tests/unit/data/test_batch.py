from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from nvembed.data.batch import ContrastiveBatch, build_batch, effective_negatives
from nvembed.data.examples import Example
from oracles.batch import plain_batch


def example(query: str, positive: str, *negatives: str, **changes: Any) -> Example:
    values: dict[str, Any] = {
        "known_positives": (positive,),
        "labels": (),
        "instruction": None,
        "symmetric": False,
        "dataset": "set",
    }
    return Example(query=query, positive=positive, negatives=negatives, **(values | changes))


def negatives(batch: ContrastiveBatch, query: int) -> set[str]:
    """Texts of the documents that stand against a query."""
    return {batch.texts[row][1] for row in batch.document_N[batch.negative_BN[query]]}


@st.composite
def examples(draw: st.DrawFn) -> Example:
    # Few letters, so that queries, positives, negatives and data sets meet often.
    text = st.sampled_from("abcdefg")
    own = tuple(draw(st.lists(text, max_size=3)))
    positive = draw(text)
    classes = st.lists(st.sampled_from("xyz"), min_size=1, max_size=2, unique=True).map(tuple)
    labels = draw(st.just(()) | classes)
    of_negatives = st.lists(classes, min_size=len(own), max_size=len(own)).map(tuple)
    further = tuple(draw(st.lists(text.filter(lambda t: t != positive), max_size=2, unique=True)))
    scored = draw(st.booleans())

    def scores(count: int) -> tuple[float, ...]:
        return tuple(draw(st.lists(st.floats(-1, 1, width=32), min_size=count, max_size=count)))

    return Example(
        query=draw(text),
        positive=positive,
        negatives=own,
        known_positives=tuple(draw(st.lists(text, max_size=2))),
        labels=labels,
        instruction=draw(st.sampled_from([None, "find it"])),
        symmetric=draw(st.booleans()),
        dataset=draw(st.sampled_from(["one", "two"])),
        positive_labels=draw(classes) if labels else (),
        negative_labels=draw(of_negatives) if labels else (),
        further_positives=further,
        positive_scores=scores(1 + len(further)) if scored else (),
        negative_scores=scores(len(own)) if scored else (),
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(examples(), min_size=1, max_size=6), st.booleans())
def test_equals_the_loop_oracle(batch_examples: list[Example], in_batch: bool) -> None:
    batch = build_batch(batch_examples, in_batch_negatives=in_batch)
    plain = plain_batch(batch_examples, in_batch=in_batch)

    assert len(batch.texts) == len(set(batch.texts))
    assert set(batch.texts) == plain.texts
    assert len(set(batch.document_N.tolist())) == len(batch.document_N)
    documents = [batch.texts[row] for row in batch.document_N]
    assert documents == plain.documents
    assert [batch.texts[row] for row in batch.query_B] == plain.queries
    assert [documents[column] for column in batch.positive_B] == plain.positives
    got = [{documents[n] for n in np.flatnonzero(row)} for row in batch.negative_BN]
    assert got == plain.negatives
    mentioned = sum(2 + len(e.further_positives) + len(e.negatives) for e in batch_examples)
    assert batch.mentioned == mentioned
    assert batch.weight_B.dtype == np.float32
    assert batch.weight_B.tolist() == [np.float32(weight) for weight in plain.weights]
    mean = sum(len(row) * w for row, w in zip(got, plain.weights, strict=True))
    assert effective_negatives(batch) == pytest.approx(mean / sum(plain.weights))
    if not any(example.positive_scores for example in batch_examples):
        assert batch.teacher is None
        return
    assert batch.teacher is not None
    assert batch.teacher.column_BK.dtype == np.int64
    assert batch.teacher.score_BK.dtype == np.float32
    assert batch.teacher.column_BK.shape == (len(got), max(map(len, plain.candidates)))
    for columns, scores, expected in zip(
        batch.teacher.column_BK.tolist(), batch.teacher.score_BK, plain.candidates, strict=True
    ):
        assert [documents[n] for n in columns if n >= 0] == [document for document, _ in expected]
        assert columns[len(expected) :] == [-1] * (len(columns) - len(expected))
        given_ = [math.nan if score is None else score for _, score in expected]
        np.testing.assert_array_equal(scores[: len(expected)], np.float32(given_))
        assert np.isnan(scores[len(expected) :]).all()


def test_every_positive_of_a_query_has_a_row_and_the_query_counts_once() -> None:
    batch = build_batch(
        [
            example("q1", "p1", "n1", further_positives=("p2", "p3"), known_positives=()),
            example("q2", "p4"),
        ],
        in_batch_negatives=True,
    )
    assert [batch.texts[row][1] for row in batch.query_B] == ["q1", "q1", "q1", "q2"]
    documents = [batch.texts[row][1] for row in batch.document_N]
    assert documents == ["p1", "p2", "p3", "n1", "p4"]
    assert [documents[column] for column in batch.positive_B] == ["p1", "p2", "p3", "p4"]
    assert batch.weight_B.tolist() == [np.float32(1 / 3)] * 3 + [1.0]
    # No positive of the query stands against it, in none of its rows.
    assert [negatives(batch, b) for b in range(3)] == [{"n1", "p4"}] * 3
    assert negatives(batch, 3) == {"p1", "p2", "p3", "n1"}
    assert effective_negatives(batch) == pytest.approx((2 + 4) / 2)


def test_scores_of_a_teacher_stand_beside_the_own_documents() -> None:
    batch = build_batch(
        [
            example(
                "q1",
                "p1",
                "n1",
                "p2",
                "n2",
                known_positives=("p1", "p2"),
                positive_scores=(0.75,),
                negative_scores=(0.5, 0.625, -0.25),
            ),
            example("q2", "n1", "p1"),
        ],
        in_batch_negatives=True,
    )
    assert batch.teacher is not None
    documents = [batch.texts[row][1] for row in batch.document_N]
    names = [[documents[n] if n >= 0 else None for n in row] for row in batch.teacher.column_BK]
    # What is a positive in truth is no candidate; other queries' documents are none either.
    assert names == [["p1", "n1", "n2"], ["n1", "p1", None]]
    np.testing.assert_array_equal(
        batch.teacher.score_BK, [[0.75, 0.5, -0.25], [math.nan, math.nan, math.nan]]
    )
    assert build_batch([example("q", "p")], in_batch_negatives=True).teacher is None


def test_shapes_and_types() -> None:
    batch = build_batch([example("q1", "p1", "n1"), example("q2", "p2")], in_batch_negatives=True)
    assert batch.texts == (("", "q1"), ("", "q2"), ("", "p1"), ("", "n1"), ("", "p2"))
    np.testing.assert_array_equal(batch.query_B, [0, 1])
    np.testing.assert_array_equal(batch.document_N, [2, 3, 4])
    np.testing.assert_array_equal(batch.positive_B, [0, 2])
    np.testing.assert_array_equal(batch.negative_BN, [[False, True, True], [True, True, False]])
    assert batch.negative_BN.dtype == np.bool_
    assert batch.query_B.dtype == np.int64
    assert effective_negatives(batch) == 2.0


def test_without_in_batch_negatives_only_own_ones_stand_against_a_query() -> None:
    batch = build_batch(
        [example("q1", "p1", "n1", "n2"), example("q2", "p2", "n2"), example("q3", "p3")],
        in_batch_negatives=False,
    )
    assert [negatives(batch, b) for b in range(3)] == [{"n1", "n2"}, {"n2"}, set()]
    assert effective_negatives(batch) == 1.0
    assert len(batch.texts) == 8  # n2 is embedded once


def test_one_document_positive_for_two_queries() -> None:
    batch = build_batch(
        [example("q1", "p"), example("q2", "p"), example("q3", "other")], in_batch_negatives=True
    )
    assert batch.positive_B.tolist() == [0, 0, 1]
    assert [negatives(batch, b) for b in range(3)] == [{"other"}, {"other"}, {"p"}]


def test_known_positives_of_a_query_never_stand_against_it() -> None:
    both = ("p1", "p2")
    batch = build_batch(
        [
            example("q", "p1", "p2", "n", known_positives=both),
            example("q", "p2", known_positives=both),
            example("other", "p3", "p1"),
        ],
        in_batch_negatives=True,
    )
    assert negatives(batch, 0) == {"n", "p3"}  # its own negative p2 is in truth a positive
    assert negatives(batch, 1) == {"n", "p3"}
    assert negatives(batch, 2) == {"p1", "p2", "n"}


def test_a_document_with_the_text_of_the_query_never_stands_against_it() -> None:
    batch = build_batch(
        [
            example("same", "p1", instruction="find"),
            example("q2", "same"),
            example("q3", "p3", "same", instruction="match", symmetric=True),
        ],
        in_batch_negatives=True,
    )
    assert negatives(batch, 0) == {"p3"}
    # With and without the prompt it is two texts to the model and one to the mask.
    prompts = {prompt for prompt, text in batch.texts if text == "same"}
    assert prompts == {"", "Instruct: find\nQuery: ", "Instruct: match\nQuery: "}


def test_query_and_document_of_symmetric_data_share_a_row() -> None:
    batch = build_batch(
        [
            example("a", "b", instruction="match", symmetric=True),
            example("b", "a", instruction="match", symmetric=True),
        ],
        in_batch_negatives=True,
    )
    prompt = "Instruct: match\nQuery: "
    assert batch.texts == ((prompt, "a"), (prompt, "b"))
    assert batch.query_B.tolist() == [0, 1]
    assert batch.document_N.tolist() == [1, 0]
    assert not batch.negative_BN.any()


def test_documents_of_the_same_class_never_stand_against_a_query() -> None:
    shared: dict[str, Any] = {"symmetric": True, "dataset": "colours"}
    red: dict[str, Any] = {"labels": ("red",), "positive_labels": ("red",)}
    blue = ("blue",)
    batch = build_batch(
        [
            example("q1", "red one", "blue one", negative_labels=(blue,), **red, **shared),
            example("q2", "red two", **red, **shared),
            example(
                "q3",
                "blue two",
                "red three",
                labels=blue,
                positive_labels=blue,
                negative_labels=(("red",),),
                **shared,
            ),
            example("q4", "wine", **red, dataset="drinks"),
        ],
        in_batch_negatives=True,
    )
    assert negatives(batch, 0) == {"blue one", "blue two", "wine"}
    assert negatives(batch, 1) == {"blue one", "blue two", "wine"}
    assert negatives(batch, 2) == {"red one", "red two", "red three", "wine"}
    assert negatives(batch, 3) == {"red one", "red two", "red three", "blue one", "blue two"}


def test_equal_queries_of_different_sets_know_the_positives_of_each_other() -> None:
    batch = build_batch(
        [
            example("q", "p1", dataset="one"),
            example("q", "p2", "n", dataset="two", instruction="find", known_positives=("p3",)),
            example("other", "p3"),
        ],
        in_batch_negatives=True,
    )
    assert [negatives(batch, b) for b in range(3)] == [{"n"}, {"n"}, {"p1", "p2", "n"}]


def test_data_does_not_import_torch() -> None:
    code = (
        "import sys, nvembed.data.batch, nvembed.data.examples; "
        "sys.exit(bool({'torch', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
