"""Scoring without mteb, against mteb: every score that both give, to 1e-6."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nvembed.evaluation.local_scores import score_local
from nvembed.evaluation.task_files import (
    ClassificationData,
    LabelledTexts,
    PairData,
    RerankingData,
    RetrievalData,
    SummarizationData,
)
from nvembed.evaluation.tasks import TASK_TYPES, LocalTask, load_task
from nvembed.inference.fake import HashEncoder
from task_folders import write_task


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
