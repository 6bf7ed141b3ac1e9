from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.mining import search
from nvembed.mining.search import _pack, top_k
from oracles import mining as oracle


@settings(max_examples=150, deadline=None)
@given(
    num_queries=st.integers(0, 6),
    num_documents=st.integers(0, 40),
    k=st.integers(1, 45),
    block_queries=st.integers(1, 7),
    block_documents=st.integers(1, 41),
    spread=st.sampled_from([0, 1, 3, 50]),
    seed=st.integers(0, 10_000),
)
def test_equals_a_full_sort_with_ties_by_row(
    num_queries: int,
    num_documents: int,
    k: int,
    block_queries: int,
    block_documents: int,
    spread: int,
    seed: int,
) -> None:
    # Whole numbers: sums are exact in any order, and a small spread gives many ties.
    rng = np.random.default_rng(seed)
    queries = rng.integers(-spread, spread + 1, (num_queries, 5)).astype(np.float32)
    documents = rng.integers(-spread, spread + 1, (num_documents, 5)).astype(np.float32)
    scores, indices = top_k(
        queries, documents, k, block_queries=block_queries, block_documents=block_documents
    )
    expected = oracle.top_k(queries.tolist(), documents.tolist(), k)
    assert indices.tolist() == [[row for _, row in result] for result in expected]
    assert scores.tolist() == [[score for score, _ in result] for result in expected]
    assert scores.dtype == np.float32


def test_real_vectors_score_as_in_float64() -> None:
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((9, 64)).astype(np.float32)
    documents = rng.standard_normal((1000, 64)).astype(np.float32)
    scores, indices = top_k(queries, documents, 20, block_queries=4, block_documents=64)
    exact = queries.astype(np.float64) @ documents.astype(np.float64).T
    assert indices.tolist() == np.argsort(-exact, axis=1, kind="stable")[:, :20].tolist()
    # float32 sums of 64 products of size about 1
    np.testing.assert_allclose(scores, np.take_along_axis(exact, indices, 1), atol=2e-5)


def test_the_precision_of_a_training_run_does_not_show() -> None:
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((9, 64)).astype(np.float32)
    documents = rng.standard_normal((100, 64)).astype(np.float32)
    plain = top_k(queries, documents, 20)
    with torch.autocast("cpu", torch.bfloat16):
        inside = top_k(queries, documents, 20)
    for left, right in zip(plain, inside, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("k", [1, 7, 300])
def test_groups_slabs_and_parts_do_not_show(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    # Whole numbers below 2**24 in all sums: every order of summing gives the same bits.
    rng = np.random.default_rng(4)
    queries = rng.integers(-9, 10, (150, 12)).astype(np.float32)
    documents = rng.integers(-9, 10, (2000, 12)).astype(np.float32)
    documents[500:900] = documents[:400]  # ties between tiles
    scores = queries @ documents.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    monkeypatch.setattr(search, "GROUP_QUERIES", 64)
    parts = np.split(documents, [1, 3, 700, 701, 1500])
    for searched in (documents, parts, np.sort(documents, axis=0)[:0]):
        found, indices = top_k(queries, searched, k, block_queries=16, block_documents=64)
        wanted = order if len(searched) else order[:, :0]
        assert np.array_equal(indices, wanted)
        assert np.array_equal(found, np.take_along_axis(scores, wanted, 1))


def test_documents_that_get_better_and_better() -> None:
    # Every tile replaces the whole result: nothing may be lost when the buffer runs over.
    documents = np.arange(1000, dtype=np.float32)[:, None]
    scores, indices = top_k(np.ones((3, 1), np.float32), documents, 10, block_documents=32)
    assert indices.tolist() == [list(range(999, 989, -1))] * 3
    assert np.array_equal(scores, indices)


def test_the_number_of_threads_does_not_show() -> None:
    rng = np.random.default_rng(5)
    queries, documents = rng.standard_normal((2, 700, 33)).astype(np.float32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(top_k(queries, documents, 50, block_documents=128))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for scores, indices in results[1:]:
        assert np.array_equal(scores, results[0][0])
        assert np.array_equal(indices, results[0][1])


def test_zero_and_minus_zero_tie() -> None:
    # Whether a product can be -0.0 is up to the BLAS, hence the inner function.
    keys = _pack(np.array([-0.0, 0.0, -1e-45, 1e-45], dtype=np.float32), np.arange(4))
    assert np.argsort(-keys).tolist() == [3, 0, 1, 2]


def test_memory_mapped_documents(tmp_path: Path) -> None:
    documents = np.random.default_rng(2).standard_normal((50, 8)).astype(np.float32)
    np.save(tmp_path / "d.npy", documents)
    mapped = np.load(tmp_path / "d.npy", mmap_mode="r")
    scores, indices = top_k(documents[:3], mapped, 5, block_documents=7)
    expected = oracle.top_k(documents[:3].tolist(), documents.tolist(), 5)
    assert indices.tolist() == [[row for _, row in result] for result in expected]
    np.testing.assert_allclose(scores, [[s for s, _ in result] for result in expected], rtol=1e-5)


def test_refuses_what_makes_no_sense() -> None:
    vectors = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match="k=0"):
        top_k(vectors, vectors, 0)
    with pytest.raises(ValueError, match="widths differ: 3 and 2"):
        top_k(vectors, vectors[:, :2], 1)
    with pytest.raises(ValueError, match="two matrices"):
        top_k(vectors[0], vectors, 1)
