from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


def test_zero_and_minus_zero_tie() -> None:
    # Whether a product can be -0.0 is up to the BLAS, hence the inner function.
    keys = _pack(np.array([[-0.0, 0.0, -1e-45, 1e-45]], dtype=np.float32), first_index=0)[0]
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
