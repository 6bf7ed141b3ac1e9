"""Scoring without mteb, against mteb: every score that both give, to 1e-6."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hash_encoder import HashEncoder
from nvembed.core.errors import ModelError
from nvembed.evaluation import local_scores
from nvembed.evaluation.local_scores import score_local
from nvembed.evaluation.task_files import (
    TASK_TYPES,
    ClassificationData,
    LabelledTexts,
    PairData,
    RerankingData,
    RetrievalData,
    SummarizationData,
)
from nvembed.evaluation.tasks import LocalTask, load_task
from task_folders import rows_of, write_rows, write_task


@pytest.fixture(scope="module")
def mteb_score() -> Any:
    """The scoring function; importing all that mteb uses takes seconds: once, outside the tests."""
    import sentence_transformers  # noqa: F401

    from nvembed.evaluation.mteb_adapter import score

    return score


class NoisyEncoder(HashEncoder):
    """Bags of words with a little noise: no two texts are exactly alike."""

    def _encode(self, texts: Sequence[str], task: str | None) -> NDArray[np.float32]:
        vectors = super()._encode(texts, task)
        noise = np.stack([np.random.default_rng(len(t)).normal(size=self.dimension) for t in texts])
        vectors += 0.03 * noise.astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def assert_equal_scores(task: LocalTask, encoder: HashEncoder, mteb_score: Any) -> None:
    expected = mteb_score(task, encoder)
    found = score_local(task, encoder).scores
    assert set(found) == set(expected)
    wrong = {
        name: (found[name], value)
        for name, value in expected.items()
        if found[name] != (value if value is None else pytest.approx(value, abs=1e-6))
    }
    assert not wrong
    assert found[task.main_score] is not None


@pytest.mark.parametrize("kind", TASK_TYPES)
@pytest.mark.parametrize("make", [HashEncoder, NoisyEncoder])
def test_every_type_equals_mteb(
    kind: str, make: type[HashEncoder], mteb_score: Any, tmp_path: Path
) -> None:
    task = load_task(write_task(tmp_path, kind))
    assert_equal_scores(task, make(64), mteb_score)


def _cut(task: LocalTask, count: int) -> LocalTask:
    """Keep the first ``count`` queries, pairs, texts or articles of a task."""

    def texts(part: LabelledTexts) -> LabelledTexts:
        return LabelledTexts(part.texts[:count], part.labels[:count])

    data: Any = task.data
    if isinstance(data, RetrievalData):
        queries = data.query_ids[:count]
        data = dataclasses.replace(
            data,
            query_ids=queries,
            queries=data.queries[:count],
            judgements={query: data.judgements[query] for query in queries},
        )
    elif isinstance(data, ClassificationData):
        test = texts(data.test)
        data = ClassificationData(data.train, test)
    elif isinstance(data, LabelledTexts):
        data = texts(data)
    elif isinstance(data, (RerankingData, PairData, SummarizationData)):
        names = [field.name for field in dataclasses.fields(data)]
        data = type(data)(*(getattr(data, name)[:count] for name in names))
    return dataclasses.replace(task, data=data)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("stackfaq", 200),  # 125 documents
        ("cisi", 40),  # 1,460: more than are kept
        ("trecqa", 40),
        ("wikiqa", 60),
        ("stsb", 400),
        ("rqe", 230),
        ("amazon_counterfactual", 300),
        ("banking77", 300),
        ("summeval", 12),
    ],
)
def test_real_tasks_equal_mteb(
    name: str, count: int, mteb_score: Any, shared: Callable[[str], Path]
) -> None:
    task = _cut(load_task(shared(f"data/tasks/{name}")), count)
    assert_equal_scores(task, NoisyEncoder(96), mteb_score)
    if name != "cisi":  # of equal similarities around rank 1,000 mteb keeps some, we the first
        assert_equal_scores(task, HashEncoder(96), mteb_score)


def test_chunks_and_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    words = np.array(["cat", "dog", "soup", "moon", "star", "bread", "apple", "rice"])
    rows = [{"_id": f"d{i}", "text": " ".join(rng.choice(words, 12))} for i in range(70)]
    task = load_task(_retrieval_of(tmp_path, rows))
    expected = score_local(task, NoisyEncoder(64)).scores
    monkeypatch.setattr(local_scores, "CHUNK_DOCUMENTS", 13)
    monkeypatch.setattr(local_scores, "_BLOCK_SCORES", 30)
    monkeypatch.setattr(local_scores, "_TILE_DOCUMENTS", 5)
    assert score_local(task, NoisyEncoder(64)).scores == pytest.approx(expected, nan_ok=True)


def _retrieval_of(folder: Path, documents: list[dict[str, Any]]) -> Path:
    write_task(folder, "Retrieval")
    write_rows(folder / "corpus.jsonl", documents)
    return folder


def test_equal_documents_are_ranked_by_id(tmp_path: Path, mteb_score: Any) -> None:
    # d2 is relevant and of the highest id among the equal ones of q1; of q2 d5 is the second.
    rows = [{"_id": f"d{i}", "text": "the cat sleeps"} for i in (2, 1, 0)]
    rows += [{"_id": f"d{i}", "text": "soup with bread"} for i in (3, 5, 6, 4)]
    task = load_task(_retrieval_of(tmp_path, rows))
    found = score_local(task, HashEncoder(64)).scores
    assert found["mrr_at_1"] == pytest.approx(1 / 3)
    assert found["mrr_at_3"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert_equal_scores(task, HashEncoder(64), mteb_score)


class Recorder(HashEncoder):
    """Remembers what it was asked to encode."""

    def __init__(self) -> None:
        super().__init__(64)
        self.asked: list[tuple[str, str, str | None]] = []

    def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> NDArray[np.float32]:
        self.asked += [("query", text, task) for text in texts]
        return super().encode_query(texts, task=task)

    def encode_document(
        self, texts: Sequence[str], *, task: str | None = None
    ) -> NDArray[np.float32]:
        self.asked += [("document", text, task) for text in texts]
        return super().encode_document(texts, task=task)


@pytest.mark.parametrize("kind", TASK_TYPES)
def test_sides_and_instructions_are_those_of_mteb(
    kind: str, mteb_score: Any, tmp_path: Path
) -> None:
    task = load_task(write_task(tmp_path, kind))
    theirs, ours = Recorder(), Recorder()
    mteb_score(task, theirs)
    score_local(task, ours)
    assert sorted(ours.asked) == sorted(theirs.asked)
    assert len(set(ours.asked)) == len(ours.asked)  # each text once per side
    assert {side for side, *_ in ours.asked} == (
        {"query", "document"} if kind in ("Retrieval", "Reranking") else {"query"}
    )


def test_articles_without_an_order_are_left_out(tmp_path: Path, mteb_score: Any) -> None:
    write_task(tmp_path, "Summarization")
    rows = rows_of("Summarization")["test.jsonl"]
    rows.insert(1, {**rows[0], "relevance": [2, 2, 2]})
    write_rows(tmp_path / "test.jsonl", rows)
    task = load_task(tmp_path)
    assert_equal_scores(task, HashEncoder(64), mteb_score)
    items = score_local(task, HashEncoder(64)).items
    assert items is not None
    assert np.isnan(items.arrays["values_N"]).tolist() == [False, True, False]


def test_constant_vectors_have_no_correlation(tmp_path: Path) -> None:
    class Constant(HashEncoder):
        def _encode(self, texts: Sequence[str], task: str | None) -> NDArray[np.float32]:
            return super()._encode(["one"] * len(texts), None)

    task = load_task(write_task(tmp_path, "STS"))
    scored = score_local(task, Constant(64))
    assert scored.scores["cosine_spearman"] is None
    assert scored.items is None


def test_vectors_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    class Broken(HashEncoder):
        def _encode(self, texts: Sequence[str], task: str | None) -> NDArray[np.float32]:
            return super()._encode(texts, task) * np.float32(np.nan)

    with pytest.raises(ModelError, match="NaN"):
        score_local(load_task(write_task(tmp_path, "STS")), Broken(64))
