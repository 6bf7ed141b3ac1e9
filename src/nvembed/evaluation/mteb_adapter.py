"""Scores a local task with mteb: its metrics and protocols, on data that is already here.

It and ``hub.py`` are the only files that import mteb. mteb's settings are kept but for one of
clustering, noted at ``_SETTINGS``.
"""

from __future__ import annotations

import functools
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import mteb
import numpy as np
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTask,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
    AbsTaskSummarization,
)
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.models_protocols import EncoderProtocol
from mteb.types import PromptType
from numpy.typing import NDArray

from nvembed.core.seeding import capture_rng, restore_rng
from nvembed.encoding.encoder import Encoder
from nvembed.evaluation.local_scores import encode_distinct
from nvembed.evaluation.task_files import (
    ClassificationData,
    LabelledTexts,
    PairData,
    RerankingData,
    RetrievalData,
    SummarizationData,
)
from nvembed.evaluation.tasks import LocalTask, TaskType
from nvembed.text.instructions import Side

# Reranking is retrieval from each query's own candidates, as in mteb's current tasks of that type.
_CLASSES: dict[TaskType, type[AbsTask]] = {
    "Retrieval": AbsTaskRetrieval,
    "Reranking": AbsTaskRetrieval,
    "Clustering": AbsTaskClustering,
    "PairClassification": AbsTaskPairClassification,
    "Classification": AbsTaskClassification,
    "STS": AbsTaskSTS,
    "Summarization": AbsTaskSummarization,
}

_SETTINGS: dict[TaskType, dict[str, Any]] = {
    # mteb's default is a sample of 4 % of the texts, for collections of a million; its own tasks
    # set the number they need. Here all texts take part.
    "Clustering": {"max_fraction_of_documents_to_embed": None},
    "PairClassification": {"label_column_name": "label"},
    # mteb has no default for these; correlations do not depend on them.
    "Summarization": {"min_score": 1, "max_score": 5},
}

_MTEB_NAMES = {"map": "map_at_1000", "mrr": "mrr_at_1000"}


def score(task: LocalTask, encoder: Encoder) -> dict[str, float | None]:
    """Evaluate ``encoder`` on ``task``.

    Returns:
        mteb's scores by name, with ``task.main_score`` among them; ``None`` where a score is
        undefined (a correlation with vectors that are all alike).

    Raises:
        ModelError: the encoder gives vectors of another shape or that are not finite.
    """
    with same_random_state():
        result = run_mteb(_TaskEncoder(task, encoder), _mteb_task(task), cache=None)
    found = result.task_results[0].scores["test"][0]
    scores = {
        name: finite_or_none(value) for name, value in found.items() if isinstance(value, float)
    }
    scores[task.main_score] = scores[_MTEB_NAMES.get(task.main_score, task.main_score)]
    return scores


def run_mteb(encoder: EncoderProtocol, task: AbsTask, **options: Any) -> Any:
    """Call ``mteb.evaluate`` without its output; the global random generators stay as they are."""
    with quiet(), same_random_state():
        return mteb.evaluate(
            encoder,
            task,
            co2_tracker=False,
            show_progress_bar=False,
            encode_kwargs={"batch_size": 512, "show_progress_bar": False},
            **options,
        )


@contextmanager
def same_random_state() -> Iterator[None]:
    """Put the global generators back at the end: mteb seeds and draws from them."""
    rng = capture_rng()
    try:
        yield
    finally:
        restore_rng(rng)


def finite_or_none(value: float) -> float | None:
    """Return a score as a float, ``None`` where it is undefined."""
    return float(value) if math.isfinite(value) else None


class _TaskEncoder(AbsEncoder):
    """mteb's encoder protocol over ours, for one task.

    Documents are encoded bare, everything else with the instruction of the task: the queries of
    retrieval and reranking, and all texts of the other types, which are symmetric or have one side.
    mteb asks for some texts several times; each is encoded once per side.
    """

    mteb_model_meta: ModelMeta

    def __init__(self, task: LocalTask, encoder: Encoder) -> None:
        self.mteb_model_meta = ModelMeta.create_empty()
        self._task = task
        self._encoder = encoder
        self._known: dict[tuple[bool, str], NDArray[np.float32]] = {}

    def encode(
        self, inputs: Any, *, prompt_type: PromptType | None = None, **_: Any
    ) -> NDArray[np.float32]:
        """Encode the texts of a dataloader, one row each."""
        is_document = prompt_type == PromptType.document
        texts = [text for batch in inputs for text in batch["text"]]
        new = [text for text in dict.fromkeys(texts) if (is_document, text) not in self._known]
        if new:
            side: Side = "document" if is_document else "query"
            instruction = None if is_document else self._task.instruction
            vectors = encode_distinct(self._encoder, new, side, instruction, self._task.name)
            self._known.update(((is_document, t), v) for t, v in zip(new, vectors, strict=True))
        return np.stack([self._known[is_document, text] for text in texts])


def _mteb_task(task: LocalTask) -> AbsTask:
    attributes = {"metadata": _metadata(task), **_SETTINGS.get(task.type, {})}
    if task.type == "Retrieval":
        attributes["ignore_identical_ids"] = task.ignore_identical_ids
    made = type(f"Local{task.type}", (_CLASSES[task.type],), attributes)()
    made.dataset = _mteb_data(task)
    made.data_loaded = True
    return made


def _metadata(task: LocalTask) -> TaskMetadata:
    return TaskMetadata(
        name=task.name,
        description=f"Local task in {task.folder.name}",
        dataset={"path": str(task.folder), "revision": "local"},
        type=task.type,
        category="t2c" if task.type in ("Classification", "Clustering") else "t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=_MTEB_NAMES.get(task.main_score, task.main_score),
        prompt=task.instruction,
    )


def _mteb_data(task: LocalTask) -> Mapping[str, Any]:
    match task.data:
        case RetrievalData() as data:
            corpus = {"id": data.document_ids, "text": data.documents}
            queries = {"id": data.query_ids, "text": data.queries}
            return _retrieval_data(corpus, queries, data.judgements, None)
        case RerankingData() as data:
            return _reranking_data(data)
        case PairData(first, second, values):
            key = "score" if task.type == "STS" else "label"
            gold = values if task.type == "STS" else [int(value) for value in values]
            return _splits({"sentence1": first, "sentence2": second, key: gold})
        case LabelledTexts(texts, labels):
            codes = _codes(labels)
            return _splits({"sentences": texts, "labels": [codes[label] for label in labels]})
        case ClassificationData(train, test):
            codes = _codes(train.labels)
            return {
                split: _Columns(text=part.texts, label=tuple(codes[label] for label in part.labels))
                for split, part in (("train", train), ("test", test))
            }
        case SummarizationData(articles, human, machine, relevance):
            return _splits(
                {
                    "text": articles,
                    "human_summaries": human,
                    "machine_summaries": machine,
                    "relevance": relevance,
                }
            )


class _Columns:
    """What mteb's classification uses of a ``Dataset``, in plain lists.

    mteb walks the labels dozens of times per experiment, and a column of a ``Dataset`` decodes each
    row anew each time: with 4,999 test texts that took 41 s where this takes 1 s.
    """

    def __init__(self, **columns: Sequence[Any]) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, name: str) -> list[Any]:
        return list(self._columns[name])

    def select(self, rows: Sequence[int]) -> _Columns:
        """Keep the given rows, in their order."""
        return _Columns(**{n: [values[row] for row in rows] for n, values in self._columns.items()})


def _splits(columns: dict[str, Any]) -> DatasetDict:
    return DatasetDict({"test": Dataset.from_dict(columns)})


def _codes(labels: Sequence[str]) -> dict[str, int]:
    # mteb's average precision of two classes needs numbers.
    return {label: code for code, label in enumerate(sorted(set(labels)))}


def _reranking_data(data: RerankingData) -> dict[str, Any]:
    ids: list[str] = []
    texts: list[str] = []
    judgements: dict[str, dict[str, int]] = {}
    candidates: dict[str, list[str]] = {}
    for number, (positives, negatives) in enumerate(
        zip(data.positives, data.negatives, strict=True)
    ):
        # mteb breaks ties by id, last first: "n" after "a" lets a tie count against the model.
        own = {f"{number}-a{i}": 1 for i in range(len(positives))}
        own |= {f"{number}-n{i}": 0 for i in range(len(negatives))}
        judgements[str(number)], candidates[str(number)] = own, list(own)
        ids += own
        texts += [*positives, *negatives]
    queries = {"id": list(judgements), "text": data.queries}
    return _retrieval_data({"id": ids, "text": texts}, queries, judgements, candidates)


def _retrieval_data(
    corpus: dict[str, Any],
    queries: dict[str, Any],
    judgements: Mapping[str, Mapping[str, int]],
    candidates: dict[str, list[str]] | None,
) -> dict[str, Any]:
    split = RetrievalSplitData(
        corpus=Dataset.from_dict(corpus),
        queries=Dataset.from_dict(queries),
        relevant_docs={query: dict(grades) for query, grades in judgements.items()},
        top_ranked=candidates,
    )
    return {"default": {"test": split}}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep mteb's log lines, warnings and progress bars from the terminal."""
    logger = logging.getLogger("mteb")
    level = logger.level
    bars = datasets.are_progress_bars_disabled()
    # This one evaluator shows its bar whatever show_progress_bar says.
    summarization: Any = sys.modules[AbsTaskSummarization.evaluator.__module__]
    bar = summarization.tqdm
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    summarization.tqdm = functools.partial(bar, disable=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(mteb|sklearn|scipy|datasets)\b")
            yield
    finally:
        logger.setLevel(level)
        summarization.tqdm = bar
        if not bars:
            datasets.enable_progress_bars()
