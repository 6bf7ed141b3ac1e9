"""The scores of mteb on our data, against plain re-statements on the same vectors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hash_encoder import HashEncoder
from nvembed.core.errors import ModelError
from nvembed.evaluation.task_files import TASK_TYPES
from nvembed.evaluation.tasks import MAIN_SCORES as ALLOWED_SCORES
from nvembed.evaluation.tasks import load_task
from oracles import bm25 as oracle
from task_folders import MAIN_SCORES, rows_of, write_rows, write_task

INSTRUCTION = "Find what fits"


@pytest.fixture(scope="module")
def score() -> Any:
    """The scoring function; importing all that mteb uses takes seconds: once, outside the tests."""
    import sentence_transformers  # noqa: F401

    from nvembed.evaluation.mteb_adapter import score

    return score


class Recorder(HashEncoder):
    """Remembers what it was asked to encode."""

    def __init__(self, dimension: int = 64) -> None:
        super().__init__(dimension, instruction_weight=0.3)
        self.queries: list[tuple[str, str | None]] = []
        self.documents: list[tuple[str, str | None]] = []

    def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> NDArray[np.float32]:
        self.queries += [(text, task) for text in texts]
        return super().encode_query(texts, task=task)

    def encode_document(
        self, texts: Sequence[str], *, task: str | None = None
    ) -> NDArray[np.float32]:
        self.documents += [(text, task) for text in texts]
        return super().encode_document(texts, task=task)


def _encode(texts: Sequence[str]) -> NDArray[np.float32]:
    return Recorder().encode_query(texts, task=INSTRUCTION)


# --- values ---------------------------------------------------------------------------------------


def test_retrieval_is_ndcg(score: Any, tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path / "r", "Retrieval"))
    encoder = Recorder()
    found = score(task, encoder)
    data: Any = task.data
    similarity = (
        encoder.encode_query(data.queries, task=INSTRUCTION)
        @ encoder.encode_document(data.documents).T
    )
    expected = []
    for query, row in zip(data.query_ids, similarity, strict=True):
        ranked = [data.document_ids[n] for n in np.argsort(-row)]
        expected.append(oracle.ndcg(ranked, data.judgements[query]))
    assert found["ndcg_at_10"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert 0.5 < np.mean(expected) < 0.999  # not a value that any ranking gets


def test_reranking_is_mean_average_precision(score: Any, tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path / "r", "Reranking"))
    encoder = Recorder()
    found = score(task, encoder)
    expected = []
    for row in rows_of("Reranking")["test.jsonl"]:
        query = encoder.encode_query([row["query"]], task=INSTRUCTION)[0]
        candidates = [*row["positive"], *row["negative"]]
        order = np.argsort(-(encoder.encode_document(candidates) @ query))
        hits = [rank for rank, n in enumerate(order, 1) if n < len(row["positive"])]
        expected.append(np.mean([i / rank for i, rank in enumerate(hits, 1)]))
    assert found["map"] == found["map_at_1000"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert np.mean(expected) < 0.999


def test_ties_in_reranking_count_against_the_model(score: Any, tmp_path: Path) -> None:
    folder = write_task(tmp_path / "r", "Reranking")
    write_rows(folder / "test.jsonl", [{"query": "q", "positive": ["x"], "negative": ["x", "x"]}])
    assert score(load_task(folder), HashEncoder(8))["map"] == pytest.approx(1 / 3, abs=1e-5)


def test_sts_is_spearman(score: Any, tmp_path: Path) -> None:
    from scipy.stats import pearsonr, spearmanr

    task = load_task(write_task(tmp_path / "s", "STS"))
    data: Any = task.data
    cosine = (_encode(data.first) * _encode(data.second)).sum(axis=1)
    found = score(task, Recorder())
    assert found["cosine_spearman"] == pytest.approx(spearmanr(cosine, data.values)[0])
    assert found["cosine_pearson"] == pytest.approx(pearsonr(cosine, data.values)[0], abs=1e-6)


def test_pair_classification_is_the_best_average_precision(score: Any, tmp_path: Path) -> None:
    from sklearn.metrics import average_precision_score

    task = load_task(write_task(tmp_path / "p", "PairClassification"))
    data: Any = task.data
    first, second = _encode(data.first), _encode(data.second)
    by_cosine = average_precision_score(data.values, (first * second).sum(axis=1))
    by_manhattan = average_precision_score(data.values, -abs(first - second).sum(axis=1))
    found = score(task, Recorder())
    assert found["cosine_ap"] == pytest.approx(by_cosine)
    assert found["max_ap"] == pytest.approx(max(by_cosine, by_manhattan))


def test_classification_is_mean_accuracy_of_ten_small_classifiers(
    score: Any, tmp_path: Path
) -> None:
    from sklearn.linear_model import LogisticRegression

    task = load_task(write_task(tmp_path / "c", "Classification"))
    data: Any = task.data
    # mteb's protocol: the order of the last experiment, shuffled again with the same seed; then the
    # first 8 texts of each label.
    order = list(range(len(data.train.texts)))
    accuracies = []
    for _ in range(10):
        np.random.RandomState(42).shuffle(order)
        labels = [data.train.labels[i] for i in order]
        chosen = [i for n, i in enumerate(order) if labels[:n].count(data.train.labels[i]) < 8]
        classifier = LogisticRegression(max_iter=100, random_state=42)
        classifier.fit(
            _encode([data.train.texts[i] for i in chosen]), [data.train.labels[i] for i in chosen]
        )
        predicted = classifier.predict(_encode(data.test.texts))
        accuracies.append(np.mean(predicted == np.array(data.test.labels)))
    found = score(task, Recorder())
    assert found["accuracy"] == pytest.approx(np.mean(accuracies))
    assert 0.5 < np.mean(accuracies) < 1


def test_clustering_is_mean_v_measure_of_ten_samples(score: Any, tmp_path: Path) -> None:
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.metrics import v_measure_score

    task = load_task(write_task(tmp_path / "c", "Clustering"))
    data: Any = task.data
    vectors, labels = _encode(data.texts), np.array(data.labels)
    draw = random.Random(42)
    kmeans = MiniBatchKMeans(n_clusters=3, batch_size=512, n_init=1, random_state=42)
    expected = []
    for _ in range(10):
        sample = draw.choices(range(len(labels)), k=16_384)
        expected.append(v_measure_score(labels[sample], kmeans.fit_predict(vectors[sample])))
    found = score(task, Recorder())
    assert found["v_measure"] == pytest.approx(np.mean(expected))
    assert 0.05 < np.mean(expected) < 1


def test_summarization_is_spearman_of_the_best_match(score: Any, tmp_path: Path) -> None:
    from scipy.stats import spearmanr

    task = load_task(write_task(tmp_path / "s", "Summarization"))
    data: Any = task.data
    expected = []
    for human, machine, relevance in zip(data.human, data.machine, data.relevance, strict=True):
        best = (_encode(machine) @ _encode(human).T).max(axis=1)
        expected.append(spearmanr(best, relevance)[0])
    assert score(task, Recorder())["cosine_spearman"] == pytest.approx(np.mean(expected))


# --- who gets the instruction, and how often ------------------------------------------------------


@pytest.mark.parametrize("kind", ["Retrieval", "Reranking"])
def test_queries_get_the_instruction_and_documents_do_not(
    score: Any, tmp_path: Path, kind: str
) -> None:
    task = load_task(write_task(tmp_path / "t", kind))
    encoder = Recorder()
    score(task, encoder)
    data: Any = task.data
    assert sorted(encoder.queries) == sorted((text, INSTRUCTION) for text in data.queries)
    documents = (
        set(data.documents)
        if kind == "Retrieval"
        else {text for texts in (*data.positives, *data.negatives) for text in texts}
    )
    assert sorted(encoder.documents) == sorted((text, None) for text in documents)


@pytest.mark.parametrize(
    "kind", ["STS", "PairClassification", "Classification", "Clustering", "Summarization"]
)
def test_symmetric_types_instruct_every_text_once(score: Any, tmp_path: Path, kind: str) -> None:
    encoder = Recorder()
    score(load_task(write_task(tmp_path / "t", kind)), encoder)
    assert encoder.documents == []
    assert {task for _, task in encoder.queries} == {INSTRUCTION}
    texts = [text for text, _ in encoder.queries]
    assert len(texts) == len(set(texts)) > 4


def test_no_instruction_is_none(score: Any, tmp_path: Path) -> None:
    encoder = Recorder()
    score(load_task(write_task(tmp_path / "t", "STS", instruction=None)), encoder)
    assert {task for _, task in encoder.queries} == {None}


def test_a_text_that_is_query_and_document_is_encoded_as_both(score: Any, tmp_path: Path) -> None:
    folder = write_task(tmp_path / "t", "Reranking")
    write_rows(folder / "test.jsonl", [{"query": "cat", "positive": ["cat"], "negative": ["dog"]}])
    encoder = Recorder()
    score(load_task(folder), encoder)
    assert encoder.queries == [("cat", INSTRUCTION)]
    assert sorted(encoder.documents) == [("cat", None), ("dog", None)]


# --- the rest -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TASK_TYPES)
def test_every_allowed_main_score_is_there(score: Any, tmp_path: Path, kind: str) -> None:
    found = score(load_task(write_task(tmp_path / "t", kind)), HashEncoder(32))
    assert set(ALLOWED_SCORES[kind]) - set(found) <= {"map", "mrr"}  # type: ignore[index]
    assert found[MAIN_SCORES[kind]] is not None
    aliased = {
        name: score(load_task(write_task(tmp_path / name, kind, main_score=name)), HashEncoder(32))
        for name in ("map", "mrr")
        if name in ALLOWED_SCORES[kind]  # type: ignore[index]
    }
    for name, scores in aliased.items():
        assert scores[name] == scores[f"{name}_at_1000"]


def test_scores_are_repeatable_and_leave_the_random_state_alone(score: Any, tmp_path: Path) -> None:
    import torch

    task = load_task(write_task(tmp_path / "t", "Clustering"))
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    first = score(task, HashEncoder(32))
    drawn = random.random(), np.random.random(), torch.rand(1).item()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    assert drawn == (random.random(), np.random.random(), torch.rand(1).item())
    assert score(task, HashEncoder(32)) == first


def test_constant_vectors_have_no_correlation(score: Any, tmp_path: Path) -> None:
    class Constant(HashEncoder):
        def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> Any:
            return np.tile(np.float32([0.6, 0.8]), (len(texts), 1))

    found = score(load_task(write_task(tmp_path / "t", "STS")), Constant(2))
    assert found["cosine_spearman"] is None


def test_vectors_with_nan_are_refused(score: Any, tmp_path: Path) -> None:
    class Broken(HashEncoder):
        def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> Any:
            vectors = super().encode_query(texts, task=task)
            vectors[1, 0] = np.nan
            return vectors

    with pytest.raises(ModelError, match="NaN"):
        score(load_task(write_task(tmp_path / "t", "STS")), Broken(8))


def test_nothing_is_printed(
    score: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: Any
) -> None:
    for kind in TASK_TYPES:
        score(load_task(write_task(tmp_path / kind, kind)), HashEncoder(16))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
