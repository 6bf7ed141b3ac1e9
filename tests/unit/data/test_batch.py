from __future__ import annotations

import subprocess
import sys
from typing import Any

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from nvembed.data.batch import ContrastiveBatch, build_batch, effective_negatives
from nvembed.data.convert import Example
from oracles.batch import plain_batch


def example(query: str, positive: str, *negatives: str, **changes: Any) -> Example:
    values: dict[str, Any] = {
        "known_positives": (positive,),
        "label": None,
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
    label = draw(st.none() | st.sampled_from(["x", "y"]))
    labels = st.lists(st.sampled_from("xyz"), min_size=len(own), max_size=len(own))
    return Example(
        query=draw(text),
        positive=positive,
        negatives=own,
        known_positives=tuple(draw(st.lists(text, max_size=2))),
        label=label,
        instruction=draw(st.sampled_from([None, "find it"])),
        symmetric=draw(st.booleans()),
        dataset=draw(st.sampled_from(["one", "two"])),
        negative_labels=() if label is None else tuple(draw(labels)),
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(examples(), min_size=1, max_size=6), st.booleans(), st.booleans())
def test_equals_the_loop_oracle(
    batch_examples: list[Example], in_batch: bool, same_source_only: bool
) -> None:
    batch = build_batch(
        batch_examples, in_batch_negatives=in_batch, same_source_only=same_source_only
    )
    plain = plain_batch(batch_examples, in_batch=in_batch, same_source_only=same_source_only)

    assert len(batch.texts) == len(set(batch.texts))
    assert set(batch.texts) == plain.texts
    assert len(set(batch.document_N.tolist())) == len(batch.document_N)
    documents = [batch.texts[row] for row in batch.document_N]
    assert documents == plain.documents
    assert [batch.texts[row] for row in batch.query_B] == plain.queries
    assert [documents[column] for column in batch.positive_B] == plain.positives
    got = [{documents[n] for n in np.flatnonzero(row)} for row in batch.negative_BN]
    assert got == plain.negatives
    assert effective_negatives(batch) == sum(map(len, got)) / len(got)


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
    batch = build_batch(
        [
            example("q1", "red one", "blue one", label="red", negative_labels=("blue",), **shared),
            example("q2", "red two", label="red", **shared),
            example(
                "q3", "blue two", "red three", label="blue", negative_labels=("red",), **shared
            ),
            example("q4", "wine", label="red", dataset="drinks"),
        ],
        in_batch_negatives=True,
    )
    assert negatives(batch, 0) == {"blue one", "blue two", "wine"}
    assert negatives(batch, 1) == {"blue one", "blue two", "wine"}
    assert negatives(batch, 2) == {"red one", "red two", "red three", "wine"}
    assert negatives(batch, 3) == {"red one", "red two", "red three", "blue one", "blue two"}


def test_same_source_only_keeps_other_data_sets_out() -> None:
    batch = build_batch(
        [
            example("q1", "p1", dataset="one"),
            example("q2", "p2", "n2", dataset="one"),
            example("q3", "p3", "n2", dataset="two"),
        ],
        in_batch_negatives=True,
        same_source_only=True,
    )
    assert [negatives(batch, b) for b in range(3)] == [{"p2", "n2"}, {"p1", "n2"}, {"n2"}]


def test_data_does_not_import_torch() -> None:
    code = (
        "import sys, nvembed.data.batch, nvembed.data.mixture; "
        "sys.exit(bool({'torch', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
