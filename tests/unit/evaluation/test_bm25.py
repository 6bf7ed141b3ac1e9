from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nvembed.data.bm25 import BM25
from nvembed.evaluation.local_scores import score_bm25
from nvembed.evaluation.metrics import ranking_values
from nvembed.evaluation.task_files import RetrievalData
from nvembed.evaluation.tasks import LocalTask, load_task
from oracles import bm25 as oracle
from task_folders import write_task

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "dog",
    "ran",
    "far",
    "away",
    "under",
    "über",
    "42",
    "don't",
    "Moon",
    "MOON",
]


def bm25_ndcgs(task: LocalTask) -> list[float]:
    items = score_bm25(task).items
    assert items is not None
    found: list[float] = items.arrays["values_N"].tolist()
    return found


def _texts(count: int, length: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(0, length))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.2, 0.75), (2.0, 0.0), (0.0, 1.0)])
def test_scores_equal_the_plain_loops(seed: int, k1: float, b: float) -> None:
    documents = [*_texts(30, 12, seed), "cat", "cat"]
    queries = [*_texts(8, 6, seed + 100), "cat cat dog", "unknown words", ""]
    scores, indices = BM25(documents, k1=k1, b=b).top_k(queries, len(documents))
    for query, row, order in zip(queries, scores, indices, strict=True):
        expected = oracle.rank(documents, query, k1, b)
        found = {int(i): float(s) for i, s in zip(order, row, strict=True) if s > 0}
        assert found == pytest.approx(expected, abs=1e-12)
        assert (np.diff(row) <= 0).all()
        assert sorted(order) == list(range(len(documents)))
        one_by_one = BM25(documents, k1=k1, b=b).scores([query] * len(order), order)
        assert one_by_one == pytest.approx(row, abs=1e-12)


def test_top_k_is_the_start_of_the_full_order_with_ties_by_index() -> None:
    documents = ["dog", "cat mat", "cat mat", "mat", "cat mat", "moon"]
    searcher = BM25(documents)
    _, everything = searcher.top_k(["cat"], 6)
    assert everything.tolist() == [[1, 2, 4, 0, 3, 5]]
    for k in range(1, 6):
        scores, indices = searcher.top_k(["cat"], k)
        assert indices.tolist() == [everything[0, :k].tolist()]
        assert scores.shape == (1, k)
    assert searcher.top_k(["cat"], 99)[1].shape == (1, 6)
    assert searcher.top_k([], 2)[1].shape == (0, 2)


def test_no_words_at_all() -> None:
    scores, indices = BM25(["...", "!"]).top_k(["cat", "?"], 2)
    assert scores.tolist() == [[0, 0], [0, 0]]
    assert indices.tolist() == [[0, 1], [0, 1]]


def test_blocks_give_the_same_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    documents, queries = _texts(40, 10, 1), _texts(23, 5, 2)
    whole = BM25(documents).top_k(queries, 7)
    monkeypatch.setattr("nvembed.data.bm25._BLOCK_CELLS", 100)
    blocks = BM25(documents).top_k(queries, 7)
    assert np.array_equal(whole[0], blocks[0])
    assert np.array_equal(whole[1], blocks[1])


def test_ndcg_by_hand() -> None:
    def ndcg(grades: list[int], k: int) -> float:
        ranked = np.array([grades], dtype=np.int64)
        return float(ranking_values(ranked, [np.array([2, 1])])[f"ndcg_at_{k}"][0])

    # DCG = 1/log2(2) + 2/log2(4) = 2; the best order gives 2 + 1/log2(3).
    assert ndcg([1, 0, 2], 10) == pytest.approx(2 / (2 + 1 / np.log2(3)))
    assert ndcg([1, 0, 2], 1) == pytest.approx(1 / 2)
    assert ndcg([2, 1], 10) == 1
    assert ndcg([], 10) == 0


def test_unmatched_documents_are_not_ranked(tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path / "r", "Retrieval"))
    data = task.data
    assert isinstance(data, RetrievalData)
    odd = RetrievalData(("d",), ("moon",), ("q",), ("cat",), {"q": {"d": 1}})
    assert not any(bm25_ndcgs(dataclasses.replace(task, data=odd)))
    expected = []
    for query_id, query in zip(data.query_ids, data.queries, strict=True):
        scores = oracle.rank(list(data.documents), query)
        ranked = [data.document_ids[n] for n in sorted(scores, key=lambda n: (-scores[n], n))]
        expected.append(oracle.ndcg(ranked, dict(data.judgements[query_id])))
    assert bm25_ndcgs(task) == pytest.approx(expected)


README_TABLE = {
    "cranfield": 0.3332,
    "squad_test": 0.8674,
    "cisi": 0.2955,
    "nfcorpus": 0.3097,
    "msmarco_dl19": 0.6854,
    "dbpedia_entity": 0.3521,
    "stackfaq": 0.7803,
    "pubmedqa_test": 0.9687,
}


@pytest.mark.shared
@pytest.mark.parametrize("name", README_TABLE)
def test_reference_table_of_the_data(name: str, shared: Callable[[str], Path]) -> None:
    task = load_task(shared(f"data/tasks/{name}"))
    assert round(float(np.mean(bm25_ndcgs(task))), 4) == README_TABLE[name]
