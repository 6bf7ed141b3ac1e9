"""Small cases in which one rule of the scores decides, against mteb or plain re-statements."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hash_encoder import HashEncoder
from nvembed.evaluation import local_scores
from nvembed.evaluation.local_scores import score_local
from nvembed.evaluation.metrics import pair_similarities
from nvembed.evaluation.task_files import PairData, RerankingData, RetrievalData, TaskType
from nvembed.evaluation.tasks import LocalTask, load_task
from oracles.evaluation import average_precision
from task_folders import rows_of, write_rows, write_task


@pytest.fixture(scope="module")
def mteb_score() -> Any:
    """The scoring function; importing all that mteb uses takes seconds: once, outside the tests."""
    import sentence_transformers  # noqa: F401

    from nvembed.evaluation.mteb_adapter import score

    return score


class RandomEncoder(HashEncoder):
    """A random direction for each text, nearer to texts with the same first word."""

    def _encode(self, texts: Sequence[str], task: str | None) -> NDArray[np.float32]:
        rows = []
        for text in texts:
            own = np.random.default_rng(list(text.encode())).normal(size=self.dimension)
            first = np.random.default_rng(list(text.split()[0].encode()))
            rows.append(own + 0.5 * first.normal(size=self.dimension))
        vectors = np.array(rows, dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def task_of(kind: TaskType, main_score: str, data: Any, *, ignore: bool = False) -> LocalTask:
    folder = Path("made-up")
    return LocalTask("made up", kind, None, main_score, folder, data, ignore_identical_ids=ignore)


def assert_scores_of_mteb(task: LocalTask, mteb_score: Any) -> dict[str, float | None]:
    expected = mteb_score(task, RandomEncoder(24))
    found = score_local(task, RandomEncoder(24)).scores
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == (value if value is None else pytest.approx(value, abs=1e-6)), name
    return found


# --- rankings -------------------------------------------------------------------------------------


def long_retrieval(count: int) -> RetrievalData:
    """A corpus of ``count`` documents; the relevant ones of a query share its first word."""
    queries = [f"topic{number} asked" for number in range(6)]
    documents = [f"topic{number % 40} text {number}" for number in range(count)]
    return RetrievalData(
        document_ids=tuple(f"d{number:05}" for number in range(count)),
        documents=tuple(documents),
        query_ids=tuple(f"q{number}" for number in range(6)),
        queries=tuple(queries),
        judgements={
            f"q{number}": {f"d{row:05}": 1 + row % 2 for row in range(number, count, 40)}
            for number in range(6)
        },
    )


def test_more_documents_than_are_kept(mteb_score: Any) -> None:
    """Only the first 1,000 count: in recall, and in the spread of a query's similarities."""
    task = task_of("Retrieval", "ndcg_at_10", long_retrieval(1100))
    found = assert_scores_of_mteb(task, mteb_score)
    assert found["recall_at_1000"] is not None
    assert 0.5 < found["recall_at_1000"] < 1.0


def test_more_candidates_than_are_kept(mteb_score: Any) -> None:
    data = RerankingData(
        queries=("topic1 asked", "topic2 asked", "topic3 asked"),
        positives=tuple(tuple(f"topic{n} right {m}" for m in range(5)) for n in (1, 2, 3)),
        negatives=tuple(
            tuple(f"topic{m % 4} wrong {m} {n}" for m in range(size))
            for n, size in ((1, 1040), (2, 7), (3, 1))
        ),
    )
    found = assert_scores_of_mteb(task_of("Reranking", "mrr", data), mteb_score)
    assert found["mrr"] == found["mrr_at_1000"] != found["map_at_1000"]
    values = score_local(task_of("Reranking", "mrr", data), RandomEncoder(24)).items
    assert values is not None
    assert float(values.arrays["values_N"].mean()) == pytest.approx(found["mrr"])
    by_map = score_local(task_of("Reranking", "map", data), RandomEncoder(24))
    assert by_map.scores["map"] == found["map_at_1000"]


def test_ties_of_candidates_count_against_the_model() -> None:
    data = RerankingData(("same",), (("same", "same"),), (("same", "same"),))
    found = score_local(task_of("Reranking", "map", data), RandomEncoder(24)).scores
    assert found["mrr_at_10"] == pytest.approx(1 / 3)
    assert found["map"] == pytest.approx((1 / 3 + 2 / 4) / 2, abs=1e-5)


def ignoring() -> RetrievalData:
    """Queries inside and outside the corpus, with relevant documents inside and outside."""
    words = ["topic0", "topic1", "topic2", "topic3"]
    return RetrievalData(
        document_ids=("first", "second", "q1", "q2", "last"),
        documents=tuple(f"{word} document" for word in (*words, "topic4")),
        query_ids=("outside", "q1", "q2"),
        queries=("topic1 outside", "topic2 document", "topic3 document"),
        judgements={
            "outside": {"first": 1, "second": 1, "gone": 2},
            "q1": {"second": 1, "gone": 1},
            "q2": {"first": 2, "q2": 1, "gone": 3},
        },
    )


@pytest.mark.parametrize("ignore", [True, False])
def test_identical_ids_beside_documents_that_are_not_there(ignore: bool, mteb_score: Any) -> None:
    task = task_of("Retrieval", "ndcg_at_10", ignoring(), ignore=ignore)
    found = assert_scores_of_mteb(task, mteb_score)
    # Of 3, 2 and 3 relevant documents, one is nowhere, and one of the third is the query itself.
    third = (1 if ignore else 2) / 3
    assert found["recall_at_1000"] == pytest.approx((2 / 3 + 1 / 2 + third) / 3, abs=1e-5)
    items = score_local(task, RandomEncoder(24)).items
    assert items is not None
    assert float(items.arrays["values_N"].mean()) == pytest.approx(found["ndcg_at_10"], abs=1e-5)


def test_blocks_are_as_large_as_they_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    cosines = local_scores._cosines

    def noted(queries: Any, documents: Any) -> Any:
        shapes.append((len(queries), len(documents)))
        return cosines(queries, documents)

    monkeypatch.setattr(local_scores, "_cosines", noted)
    monkeypatch.setattr(local_scores, "CHUNK_DOCUMENTS", 20)
    monkeypatch.setattr(local_scores, "_BLOCK_SCORES", 80)
    data = long_retrieval(50)
    score_local(task_of("Retrieval", "ndcg_at_10", data), RandomEncoder(24))
    assert shapes == [(4, 20), (2, 20), (4, 20), (2, 20), (6, 10)]
    shapes.clear()
    monkeypatch.setattr(local_scores, "_BLOCK_SCORES", 5)  # less than one query's
    score_local(task_of("Retrieval", "ndcg_at_10", data), RandomEncoder(24))
    assert set(shapes) == {(1, 20), (1, 10)}


def test_chunks_are_those_of_mteb() -> None:
    wrappers = pytest.importorskip("mteb.models.search_wrappers")
    default = inspect.signature(wrappers.SearchEncoderWrapper).parameters["corpus_chunk_size"]
    assert default.default == local_scores.CHUNK_DOCUMENTS


# --- pairs ----------------------------------------------------------------------------------------


def pairs(count: int, values: Sequence[float]) -> PairData:
    first = tuple(f"topic{number % 7} one {number}" for number in range(count))
    second = tuple(f"topic{number * 3 % 7} two {number}" for number in range(count))
    return PairData(first, second, tuple(values))


def test_similarities_that_rank_pairs_differently(mteb_score: Any) -> None:
    rng = np.random.default_rng(3)
    data = pairs(40, rng.integers(0, 2, 40).tolist())
    found = assert_scores_of_mteb(task_of("PairClassification", "max_ap", data), mteb_score)
    names = ("similarity", "cosine", "manhattan", "euclidean", "dot")
    aps = [found[f"{name}_ap"] for name in names]
    assert len({round(ap or 0.0, 6) for ap in aps}) > 1
    assert found["max_ap"] == max(ap or 0.0 for ap in aps)


@pytest.mark.parametrize(("main", "kinds"), [("max_ap", 5), ("cosine_ap", 1)])
def test_items_of_pairs(main: str, kinds: int) -> None:
    data = pairs(20, [1, 0, 0, 1] * 5)
    scored = score_local(task_of("PairClassification", main, data), RandomEncoder(24))
    items = scored.items
    assert items is not None
    assert (items.kind, items.score) == ("pairs", main)
    assert items.arrays["gold_N"].tolist() == [1, 0, 0, 1] * 5
    similarities = items.arrays["similarities_SN"]
    assert similarities.shape == (kinds, 20)
    best = max(average_precision(row.tolist(), [1, 0, 0, 1] * 5) for row in similarities)
    assert scored.scores[main] == pytest.approx(best)


@pytest.mark.parametrize(
    ("main", "which"),
    [("cosine_spearman", "cosine"), ("cosine_pearson", "cosine"), ("spearman", "similarity")],
)
def test_items_of_sts(main: str, which: str) -> None:
    data = pairs(30, [number % 6 for number in range(30)])
    scored = score_local(task_of("STS", main, data), RandomEncoder(24))
    items = scored.items
    assert items is not None
    assert (items.kind, items.score) == ("correlation", main)
    assert items.arrays["gold_N"].tolist() == [number % 6 / 5 for number in range(30)]
    encoder = RandomEncoder(24)
    vectors = encoder.encode_query(data.first), encoder.encode_query(data.second)
    expected = pair_similarities(*vectors)
    assert items.arrays["similarities_N"].tolist() == expected[which].tolist()
    assert expected["cosine"].tolist() != expected["similarity"].tolist()  # in the last bit


# --- summaries, classes, clusters -----------------------------------------------------------------


def test_the_first_article_may_have_no_order(tmp_path: Path, mteb_score: Any) -> None:
    write_task(tmp_path, "Summarization")
    rows = rows_of("Summarization")["test.jsonl"]
    write_rows(tmp_path / "test.jsonl", [{**rows[0], "relevance": [2, 2, 2]}, *rows])
    task = load_task(tmp_path)
    found = assert_scores_of_mteb(task, mteb_score)
    items = score_local(task, RandomEncoder(24)).items
    assert items is not None
    assert (items.kind, items.score) == ("values", "cosine_spearman")
    values = items.arrays["values_N"]
    assert np.isnan(values).tolist() == [True, False, False]
    assert float(np.nanmean(values)) == pytest.approx(found["cosine_spearman"])


def test_items_of_classes(tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path, "Classification"))
    scored = score_local(task, HashEncoder(64))
    items = scored.items
    assert items is not None
    assert (items.kind, items.score) == ("classes", "accuracy")
    assert set(items.arrays) == {"gold_N", "predicted_EN"}
    right = items.arrays["predicted_EN"] == items.arrays["gold_N"]
    assert right.shape == (10, 24)
    assert scored.scores["accuracy"] == pytest.approx(right.mean())
    assert scored.scores["ap"] is None  # three classes


def test_items_of_clusters(tmp_path: Path) -> None:
    from sklearn.metrics import v_measure_score

    task = load_task(write_task(tmp_path, "Clustering"))
    scored = score_local(task, HashEncoder(64))
    items = scored.items
    assert items is not None
    assert (items.kind, items.score) == ("clusters", "v_measure")
    gold, assigned, drawn = (items.arrays[name] for name in ("gold_N", "assigned_EN", "drawn_EN"))
    measures = [
        v_measure_score(np.repeat(gold, times), np.repeat(clusters, times))
        for clusters, times in zip(assigned, drawn, strict=True)
    ]
    assert scored.scores["v_measure"] == pytest.approx(float(np.mean(measures)))
    assert scored.scores["v_measure_std"] == pytest.approx(float(np.std(measures)))
    by_ami = score_local(dataclasses.replace(task, main_score="ami"), HashEncoder(64))
    assert by_ami.scores["main_score"] == scored.scores["ami"] is not None
    assert by_ami.items is None


def test_items_of_rankings(tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path, "Retrieval", main_score="recall_at_3"))
    scored = score_local(task, HashEncoder(64))
    items = scored.items
    assert items is not None
    assert (items.kind, items.score) == ("values", "recall_at_3")
    assert set(items.arrays) == {"values_N"}
    assert len(items) == 3
    assert scored.scores["main_score"] == scored.scores["recall_at_3"]
    assert float(items.arrays["values_N"].mean()) == pytest.approx(
        scored.scores["recall_at_3"], abs=1e-5
    )
