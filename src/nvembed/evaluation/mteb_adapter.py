"""Scores a local task with mteb: its metrics and protocols, on data that is already here.

It and ``hub.py`` are the only files that import mteb. mteb's settings are kept but for one of
clustering, noted at ``_CLASSES``.
"""

from __future__ import annotations

import functools
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import mteb
import numpy as np
from datasets import Dataset, DatasetDict
from mteb import abstasks
from mteb.abstasks import AbsTask
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.types import PromptType
from numpy.typing import NDArray

from nvembed.core.runs import capture_rng, restore_rng
from nvembed.data.instructions import Side
from nvembed.evaluation.local_scores import encode_distinct
from nvembed.evaluation.task_files import RerankingData, TaskType
from nvembed.evaluation.tasks import LocalTask
from nvembed.model.encoder import Encoder

# Classes and settings. Reranking is retrieval from each query's own candidates, as in mteb's
# current tasks of that type. Of clustering mteb's default is a sample of 4 % of the texts, for
# collections of a million; its own tasks set the number they need, and here all texts take part.
# Of the scores of summaries it has no default, and correlations do not depend on them.
_CLASSES: dict[TaskType, tuple[type[AbsTask], dict[str, Any]]] = {
    "Retrieval": (abstasks.AbsTaskRetrieval, {}),
    "Reranking": (abstasks.AbsTaskRetrieval, {}),
    "Clustering": (abstasks.AbsTaskClustering, {"max_fraction_of_documents_to_embed": None}),
    "PairClassification": (abstasks.AbsTaskPairClassification, {"label_column_name": "label"}),
    "Classification": (abstasks.AbsTaskClassification, {}),
    "STS": (abstasks.AbsTaskSTS, {}),
    "Summarization": (abstasks.AbsTaskSummarization, {"min_score": 1, "max_score": 5}),
}
_MTEB_NAMES = {"map": "map_at_1000", "mrr": "mrr_at_1000"}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep mteb's output from the terminal, and put back the random generators that it seeds."""
    logger = logging.getLogger("mteb")
    level, bars, rng = logger.level, datasets.are_progress_bars_disabled(), capture_rng()
    # This one evaluator shows its bar whatever show_progress_bar says.
    summarization: Any = sys.modules[abstasks.AbsTaskSummarization.evaluator.__module__]
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
        restore_rng(rng)
        if not bars:
            datasets.enable_progress_bars()


@quiet()
def score(task: LocalTask, encoder: Encoder) -> dict[str, float | None]:
    """Evaluate ``encoder`` on ``task``: mteb's scores by name, ``None`` where undefined."""
    result = run_mteb(local_encoder(task, encoder), _mteb_task(task), cache=None)
    found = result.task_results[0].scores["test"][0]
    scores = {name: finite_or_none(v) for name, v in found.items() if isinstance(v, float)}
    scores[task.main_score] = scores[_MTEB_NAMES.get(task.main_score, task.main_score)]
    return scores


@quiet()
def run_mteb(encoder: MtebEncoder, task: AbsTask, **options: Any) -> Any:
    """Call ``mteb.evaluate``."""
    return mteb.evaluate(
        encoder,
        task,
        co2_tracker=False,
        show_progress_bar=False,
        encode_kwargs={"batch_size": 512, "show_progress_bar": False},
        **options,
    )


def finite_or_none(value: float) -> float | None:
    """Return a score as a float, ``None`` where it is undefined."""
    return float(value) if math.isfinite(value) else None


class MtebEncoder(AbsEncoder):
    """mteb's encoder protocol over ours; ``known`` keeps vectors that mteb asks for again."""

    mteb_model_meta: ModelMeta

    def __init__(
        self,
        encoder: Encoder,
        meta: ModelMeta,
        instruction_of: Callable[[TaskMetadata, Side], str | None],
        known: dict[tuple[Side, str], NDArray[np.float32]] | None = None,
    ) -> None:
        self.mteb_model_meta = meta
        self._encoder = encoder
        self._instruction_of = instruction_of
        self._known = known

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: TaskMetadata,
        prompt_type: PromptType | None = None,
        **_: Any,
    ) -> NDArray[np.float32]:
        """Encode the texts of a dataloader, one row each; equal texts once."""
        side: Side = "document" if prompt_type == PromptType.document else "query"
        name, instruction = task_metadata.name, self._instruction_of(task_metadata, side)

        def encode(texts: Sequence[str]) -> NDArray[np.float32]:
            return encode_distinct(self._encoder, texts, side, instruction, name)

        texts = [text for batch in inputs for text in batch["text"]]
        if (known := self._known) is None:
            return encode(texts)
        if new := [text for text in dict.fromkeys(texts) if (side, text) not in known]:
            known.update(((side, t), row) for t, row in zip(new, encode(new), strict=True))
        return np.stack([known[side, text] for text in texts])


def local_encoder(task: LocalTask, encoder: Encoder) -> MtebEncoder:
    """Make an encoder for one task that is here: documents bare, all else with its instruction."""

    def instruction_of(_: TaskMetadata, side: Side) -> str | None:
        return None if side == "document" else task.instruction

    return MtebEncoder(encoder, ModelMeta.create_empty(), instruction_of, {})


def _mteb_task(task: LocalTask) -> AbsTask:
    base, settings = _CLASSES[task.type]
    metadata = TaskMetadata(
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
    attributes = {"metadata": metadata, **settings}
    if task.type == "Retrieval":
        attributes["ignore_identical_ids"] = task.ignore_identical_ids
    made = type(f"Local{task.type}", (base,), attributes)()
    made.dataset = _mteb_data(task)
    made.data_loaded = True
    return made


def _mteb_data(task: LocalTask) -> Mapping[str, Any]:
    data: Any = task.data
    if task.type == "Retrieval":
        corpus = {"id": data.document_ids, "text": data.documents}
        queries = {"id": data.query_ids, "text": data.queries}
        return _retrieval_data(corpus, queries, data.judgements)
    if task.type == "Reranking":
        return _reranking_data(data)
    if task.type == "Classification":
        parts = {"train": data.train, "test": data.test}
        return {
            split: _Columns(text=part.texts, label=_codes(part.labels, data.train.labels))
            for split, part in parts.items()
        }
    if task.type == "Clustering":
        columns = {"sentences": data.texts, "labels": _codes(data.labels, data.labels)}
    elif task.type == "Summarization":
        columns = {"text": data.articles, "human_summaries": data.human}
        columns |= {"machine_summaries": data.machine, "relevance": data.relevance}
    elif task.type == "STS":
        columns = {"sentence1": data.first, "sentence2": data.second, "score": data.values}
    else:
        labels = [int(value) for value in data.values]
        columns = {"sentence1": data.first, "sentence2": data.second, "label": labels}
    return DatasetDict({"test": Dataset.from_dict(columns)})


class _Columns:
    """What mteb's classification uses of a ``Dataset``, in plain lists: 1 s in place of 41 s."""

    def __init__(self, **columns: Sequence[Any]) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, name: str) -> list[Any]:
        return list(self._columns[name])

    def select(self, rows: Sequence[int]) -> _Columns:
        """Keep the given rows, in their order."""
        return _Columns(**{n: [values[row] for row in rows] for n, values in self._columns.items()})


def _codes(labels: Sequence[str], known: Sequence[str]) -> list[int]:
    # mteb's average precision of two classes needs numbers.
    codes = {label: code for code, label in enumerate(sorted(set(known)))}
    return [codes[label] for label in labels]


def _reranking_data(data: RerankingData) -> dict[str, Any]:
    corpus: dict[str, list[str]] = {"id": [], "text": []}
    judgements: dict[str, dict[str, int]] = {}
    for number, (right, wrong) in enumerate(zip(data.positives, data.negatives, strict=True)):
        # mteb breaks ties by id, last first: "n" after "a" lets a tie count against the model.
        own = {f"{number}-a{i}": 1 for i in range(len(right))}
        own |= {f"{number}-n{i}": 0 for i in range(len(wrong))}
        judgements[str(number)] = own
        corpus["id"] += own
        corpus["text"] += [*right, *wrong]
    candidates = {query: list(own) for query, own in judgements.items()}
    queries = {"id": list(judgements), "text": data.queries}
    return _retrieval_data(corpus, queries, judgements, candidates)


def _retrieval_data(
    corpus: Any, queries: Any, judgements: Mapping[str, Mapping[str, int]], candidates: Any = None
) -> dict[str, Any]:
    split = RetrievalSplitData(
        corpus=Dataset.from_dict(corpus),
        queries=Dataset.from_dict(queries),
        relevant_docs={query: dict(grades) for query, grades in judgements.items()},
        top_ranked=candidates,
    )
    return {"default": {"test": split}}
