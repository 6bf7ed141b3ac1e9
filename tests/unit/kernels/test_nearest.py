from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.kernels import nearest as search
from nvembed.kernels.nearest import _pack, top_k
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


def sorted_by_score(
    queries: np.ndarray, documents: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """A full sort, for vectors of small whole numbers, whose products are exact."""
    scores = (queries @ documents.T).astype(np.int16)  # which NumPy sorts by counting
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


@pytest.mark.parametrize("order", ["mixed", "rising", "falling"])
def test_default_blocks_with_many_ties(order: str) -> None:
    """Two blocks and two slabs, with tiles that hold more than there is room for, or less."""
    rng = np.random.default_rng(0)
    queries = rng.integers(-1, 3, (258, 3)).astype(np.float32)
    documents = rng.integers(-2, 3, (9000, 3)).astype(np.float32)
    if order != "mixed":  # rising: every tile replaces what was found; falling: none does
        rising = np.argsort(documents.sum(axis=1), kind="stable")
        documents = documents[rising if order == "rising" else rising[::-1]]
    expected, rows = sorted_by_score(queries, documents, len(documents))
    for k in (1, 10, 256, 300, 1500, 2500):
        # Equal scores stand on both sides of the end, so the lower rows must have been kept.
        assert (expected[:, k] == expected[:, k - 1]).mean() > 0.5
        scores, indices = top_k(queries, documents, k)
        assert np.array_equal(indices, rows[:, :k])
        assert np.array_equal(scores, expected[:, :k])


@pytest.mark.parametrize("sizes", [[100, 5000], [40, 40, 40, 3000], [300, 1, 299, 2000, 10]])
@pytest.mark.parametrize("k", [40, 120, 300])
def test_parts_smaller_than_a_tile_come_first(sizes: list[int], k: int) -> None:
    rng = np.random.default_rng(len(sizes))
    queries = rng.integers(-2, 3, (20, 3)).astype(np.float32)
    documents = rng.integers(-2, 3, (sum(sizes), 3)).astype(np.float32)
    parts = np.split(documents, np.cumsum(sizes)[:-1])
    expected, rows = sorted_by_score(queries, documents, k)
    for searched in (parts, iter(parts)):  # of few queries the parts are gone through once
        scores, indices = top_k(queries, searched, k)
        assert np.array_equal(indices, rows)
        assert np.array_equal(scores, expected)


def test_only_as_many_queries_as_a_group_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "GROUP_QUERIES", 5)
    held = []

    class Watched(search.RunningTopK):
        def __init__(self, num_queries: int, k: int) -> None:
            held.append((num_queries, k))
            super().__init__(num_queries, k)
            # What the memory of a search is said to be.
            assert self._keys.shape == (num_queries, k + max(k, search.FEWEST_NEW))

    monkeypatch.setattr(search, "RunningTopK", Watched)
    rng = np.random.default_rng(0)
    queries = rng.integers(-3, 4, (11, 2)).astype(np.float32)
    documents = rng.integers(-3, 4, (700, 2)).astype(np.float32)
    for k, used in ((7, 7), (650, 650), (2000, 700)):
        held.clear()
        scores, indices = top_k(queries, documents, k)
        assert held == [(5, used), (5, used), (1, used)]
        expected, rows = sorted_by_score(queries, documents, k)
        assert np.array_equal(indices, rows)
        assert np.array_equal(scores, expected)


def test_tiles_and_slabs_have_the_sizes_that_were_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    product = search._product

    def watched(queries_BD: np.ndarray, tile_MD: np.ndarray) -> np.ndarray:
        seen.append((len(queries_BD), len(tile_MD)))
        return product(queries_BD, tile_MD)

    monkeypatch.setattr(search, "_product", watched)
    rng = np.random.default_rng(0)
    queries, documents = rng.standard_normal((2, 5000, 2)).astype(np.float32)
    top_k(queries[:300], documents, 3)
    # A block of queries meets the tiles of a slab, then the next block does.
    one = [(256, 2048), (256, 2048), (256, 904), (44, 2048), (44, 2048), (44, 904)]
    assert sorted(seen) == sorted(one)
    seen.clear()
    top_k(queries[:3], documents[:100], 3, block_queries=2, block_documents=30)
    tiles = [30, 30, 30, 10]
    assert sorted(seen) == sorted((rows, tile) for rows in (2, 1) for tile in tiles)
    seen.clear()
    top_k(queries[:3], documents[:100], 3)
    assert seen == [(3, 100)]
    widths = [part.shape for part in search._slabs([documents[:9], documents[9:11]], 2, 4)]
    assert widths == [(4, 2), (4, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize("k", [1, 10, 100])
def test_only_scores_above_the_floor_of_a_query_are_looked_at(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((8, 16)).astype(np.float32)
    queries *= np.logspace(-2, 2, 8, dtype=np.float32)[:, None]  # each with a floor of its own
    documents = rng.standard_normal((20_000, 16)).astype(np.float32)
    looked = 0
    pack = search._pack

    def watched(scores: np.ndarray, indices: np.ndarray) -> np.ndarray:
        nonlocal looked
        looked += scores.size
        return pack(scores, indices)

    monkeypatch.setattr(search, "_pack", watched)
    top_k(queries, documents, k)
    # A floor is at least as old as the room between two counts.
    room = max(k, search.FEWEST_NEW)
    assert looked / len(queries) < k + 2 * room + 2 * k * np.log(len(documents) / k)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int64])
def test_other_types_and_layouts_are_taken(dtype: type) -> None:
    rng = np.random.default_rng(0)
    queries = rng.integers(-3, 4, (9, 4))
    documents = rng.integers(-3, 4, (50, 4))
    expected, rows = sorted_by_score(queries, documents, 6)
    given = [np.asfortranarray(x.astype(dtype)) for x in (queries, documents)]
    for x in given:
        x.flags.writeable = False
    for searched in (given[1], list(np.split(given[1], [7]))):
        scores, indices = top_k(given[0], searched, 6)
        assert np.array_equal(indices, rows)
        assert np.array_equal(scores, expected)
        assert (scores.dtype, indices.dtype) == (np.float32, np.int64)


def test_nothing_to_search_gives_empty_results() -> None:
    vectors = np.ones((3, 2), np.float32)
    for documents in (vectors[:0], [], [vectors[:0], vectors[:0]]):
        scores, indices = top_k(vectors, documents, 4)
        assert scores.shape == indices.shape == (3, 0)
        assert (scores.dtype, indices.dtype) == (np.float32, np.int64)
    scores, indices = top_k(vectors[:0], vectors, 2)
    assert scores.shape == indices.shape == (0, 2)


def test_a_row_with_few_results_does_not_lose_what_comes_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scores of minus infinity are no results, but what is above them is."""
    monkeypatch.setattr(search, "FEWEST_NEW", 4)  # the other query's results are counted often
    queries = np.array([[1, 0], [0, 1e30]], np.float32)
    best = [4, 7, 500, 600, 899]
    for seed in range(20):
        documents = np.full((900, 2), -1e30, np.float32)
        documents[:, 0] = np.random.default_rng(seed).permutation(900)
        documents[best, 1] = [-1e-30, -2e-30, -3e-30, -4e-30, -5e-30]
        scores, indices = top_k(queries, documents, 5, block_documents=12)
        assert scores[0].tolist() == [899, 898, 897, 896, 895]
        assert indices[1].tolist() == best
        np.testing.assert_allclose(scores[1], [-1, -2, -3, -4, -5], rtol=1e-6)


def test_refuses_what_makes_no_sense() -> None:
    vectors = np.eye(3, dtype=np.float32)
    for k, rows, columns in ((0, 1, 1), (1, 0, 1), (1, 1, 0), (-1, 2, 3)):
        message = f"k={k}, block_queries={rows}, block_documents={columns}: all must be at least 1"
        with pytest.raises(ValueError, match=f"^{message}$"):
            top_k(vectors, vectors, k, block_queries=rows, block_documents=columns)
    with pytest.raises(ValueError, match=r"^widths differ: 3 and 2$"):
        top_k(vectors, vectors[:, :2], 1)
    for queries, documents in (
        (vectors[0], vectors),
        (vectors, vectors[0]),
        (vectors, [vectors[0]]),
    ):
        with pytest.raises(ValueError, match=r"^top_k takes two matrices, one vector a row$"):
            top_k(queries, documents, 1)
