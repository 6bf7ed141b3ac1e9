"""Scores a local task without mteb: its protocols and scores, at a small part of its cost.

In: a ``LocalTask`` and an ``Encoder``; out: the scores that ``mteb_adapter.score`` gives, equal to
1e-6, and the items that they are made of. Beside the vectors of the texts, retrieval holds
``CHUNK_DOCUMENTS`` documents and a block of their similarities at a time.

Letters: Q queries, N documents or items, M documents of a chunk, D width, K results per query.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from nvembed.encoding.embed import InputType, encode_texts
from nvembed.encoding.encoder import Encoder
from nvembed.encoding.nearest import RunningTopK
from nvembed.evaluation import metrics
from nvembed.evaluation.metrics import correlations
from nvembed.evaluation.ranking_metrics import (
    TOP_K,
    order_with_ties,
    ranking_scores,
    ranking_values,
)
from nvembed.evaluation.results import ItemKind, Items, task_hash
from nvembed.evaluation.task_files import (
    ClassificationData,
    LabelledTexts,
    PairData,
    RerankingData,
    RetrievalData,
    SummarizationData,
)
from nvembed.evaluation.tasks import LocalTask

CHUNK_DOCUMENTS = 50_000
"""Documents encoded and searched at once; mteb's number, so that products are rounded alike."""

_BLOCK_SCORES = 64_000_000  # similarities at once, 256 MB
_TILE_DOCUMENTS = 2048
_ALIASES = {"map": f"map_at_{TOP_K}", "mrr": f"mrr_at_{TOP_K}"}
_CORRELATED = ("similarity", "cosine", "manhattan", "euclidean")

_Found = tuple[dict[str, float], ItemKind | None, Mapping[str, NDArray[Any]]]


@dataclass(frozen=True)
class Scored:
    """What a task gave.

    Attributes:
        scores: by mteb's names, the main score among them; ``None`` where undefined.
        items: for resampling the main score; ``None`` where it cannot be resampled (``ami``, or
            an undefined score).
    """

    scores: dict[str, float | None]
    items: Items | None


def score_local(task: LocalTask, encoder: Encoder) -> Scored:
    """Evaluate ``encoder`` on ``task``, each text encoded once per side.

    Equal similarities of different documents are told apart by id, as in mteb. Where queries are
    too many for one block of similarities, the products may differ from mteb's in the last bit.

    Raises:
        ModelError: the encoder gives vectors of another shape or that are not finite.
    """
    match task.data:
        case RetrievalData() as data:
            found = _retrieval(task, data, encoder)
        case RerankingData() as data:
            found = _reranking(task, data, encoder)
        case PairData() as data:
            found = (_sts if task.type == "STS" else _pairs)(task, data, encoder)
        case ClassificationData() as data:
            found = _classification(task, data, encoder)
        case LabelledTexts() as data:
            found = _clustering(task, data, encoder)
        case SummarizationData() as data:
            found = _summarization(task, data, encoder)
        case never:
            assert_never(never)
    values, kind, arrays = found
    scores = {name: value if math.isfinite(value) else None for name, value in values.items()}
    main = scores[_ALIASES.get(task.main_score, task.main_score)]
    scores["main_score"] = scores[task.main_score] = main
    if kind is None or main is None:
        return Scored(scores, None)
    return Scored(scores, Items(kind, task.main_score, task_hash(task), arrays))


def encode_distinct(
    encoder: Encoder, texts: Sequence[str], side: InputType, instruction: str | None, name: str
) -> NDArray[np.float32]:
    """Encode texts for the task ``name``, one row each; equal texts once."""
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    vectors = encode_texts(encoder, list(rows), side=side, task=instruction, description=name)
    return vectors if len(rows) == len(texts) else vectors[[rows[text] for text in texts]]


def _encode(
    task: LocalTask, encoder: Encoder, texts: Sequence[str], side: InputType
) -> NDArray[np.float32]:
    """Encode documents bare, all others with the instruction of the task."""
    instruction = None if side == "document" else task.instruction
    return encode_distinct(encoder, texts, side, instruction, task.name)


# --- rankings -------------------------------------------------------------------------------------


def _retrieval(task: LocalTask, data: RetrievalData, encoder: Encoder) -> _Found:
    queries_QD = _encode(task, encoder, data.queries, "query")
    best = RunningTopK(len(queries_QD), min(TOP_K, len(data.documents)))
    for start in range(0, len(data.documents), CHUNK_DOCUMENTS):
        texts = data.documents[start : start + CHUNK_DOCUMENTS]
        _offer(best, queries_QD, _encode(task, encoder, texts, "document"))
    scores_QK, rows_QK = best.results()
    scores_QK = scores_QK.astype(np.float64)
    row_of = {name: row for row, name in enumerate(data.document_ids)}
    counted_QK = np.ones(rows_QK.shape, dtype=bool)
    if task.ignore_identical_ids:
        own_Q = np.array([row_of.get(query, -1) for query in data.query_ids])
        counted_QK = rows_QK != own_Q[:, None]
    by_id = sorted(range(len(data.document_ids)), key=data.document_ids.__getitem__)
    tie_rank_N = np.empty(len(by_id), dtype=np.int64)
    tie_rank_N[by_id] = np.arange(len(by_id))
    # What does not count goes behind everything else, where its grade is 0.
    order = order_with_ties(np.where(counted_QK, scores_QK, -np.inf), tie_rank_N[rows_QK])
    grades_QK, relevant = _grades(data, np.where(counted_QK, rows_QK, -1), row_of)
    scores = [row[counted] for row, counted in zip(scores_QK, counted_QK, strict=True)]
    return _ranked(task, np.take_along_axis(grades_QK, order, axis=1), relevant, scores)


def _grades(
    data: RetrievalData, rows_QK: NDArray[np.int64], row_of: Mapping[str, int]
) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
    """Look up the grades of the results, and per query those above 0 of all judged documents.

    A judged document that is not in the corpus is relevant and found by nobody, as in trec_eval.
    """
    grades_QK = np.zeros(rows_QK.shape, dtype=np.int64)
    relevant = []
    for number, query in enumerate(data.query_ids):
        judged = [(row_of.get(name, -1), g) for name, g in data.judgements[query].items() if g]
        relevant.append(np.array([grade for _, grade in judged], dtype=np.int64))
        judged = [pair for pair in judged if pair[0] >= 0]
        if not judged:
            continue
        rows, grades = np.array(judged, dtype=np.int64).T
        by_row = np.argsort(rows)
        at_K = by_row[np.searchsorted(rows, rows_QK[number], sorter=by_row) % len(rows)]
        grades_QK[number] = np.where(rows[at_K] == rows_QK[number], grades[at_K], 0)
    return grades_QK, relevant


def _offer(
    best: RunningTopK, queries_QD: NDArray[np.float32], documents_MD: NDArray[np.float32]
) -> None:
    """Let a chunk of documents compete for the best results of all queries."""
    num_rows = max(_BLOCK_SCORES // len(documents_MD), 1)
    for first in range(0, len(queries_QD), num_rows):
        rows = slice(first, min(first + num_rows, len(queries_QD)))
        scores_BM = _cosines(queries_QD[rows], documents_MD)
        for start in range(0, len(documents_MD), _TILE_DOCUMENTS):
            tile = scores_BM[:, start : start + _TILE_DOCUMENTS]
            best.offer(np.ascontiguousarray(tile), rows, best.num_seen + start)
    best.num_seen += len(documents_MD)


def _reranking(task: LocalTask, data: RerankingData, encoder: Encoder) -> _Found:
    queries_QD = _encode(task, encoder, data.queries, "query")
    candidates = [
        [*positives, *negatives]
        for positives, negatives in zip(data.positives, data.negatives, strict=True)
    ]
    vectors = _encode(task, encoder, [t for texts in candidates for t in texts], "document")
    ends = np.cumsum([len(texts) for texts in candidates])
    width = min(max(map(len, candidates)), TOP_K)
    grades_QK = np.zeros((len(candidates), width), dtype=np.int64)
    scores = []
    for row, end in enumerate(ends.tolist()):
        own_MD = vectors[end - len(candidates[row]) : end]
        scores_M = _cosines(queries_QD[row : row + 1], own_MD)[0].astype(np.float64)
        # A tie counts against the model: the irrelevant candidate goes first.
        wrong_M = (np.arange(len(own_MD)) >= len(data.positives[row])).astype(np.int64)
        order = order_with_ties(scores_M[None], wrong_M[None])[0, :TOP_K]
        grades_QK[row, : len(order)] = 1 - wrong_M[order]
        scores.append(scores_M[order])
    relevant = [np.ones(len(positives), dtype=np.int64) for positives in data.positives]
    return _ranked(task, grades_QK, relevant, scores)


def _cosines(
    queries_QD: NDArray[np.float32], documents_MD: NDArray[np.float32]
) -> NDArray[np.float32]:
    # As mteb rounds them: other products would break other ties.
    import torch

    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        units = [
            torch.nn.functional.normalize(torch.from_numpy(np.ascontiguousarray(vectors)), dim=1)
            for vectors in (queries_QD, documents_MD)
        ]
        cosines_QM: NDArray[np.float32] = (units[0] @ units[1].T).numpy()
    return cosines_QM


def _ranked(
    task: LocalTask,
    grades_QK: NDArray[np.int64],
    relevant: Sequence[NDArray[np.int64]],
    scores: Sequence[NDArray[np.float64]],
) -> _Found:
    values = ranking_values(grades_QK, relevant)
    main = values[_ALIASES.get(task.main_score, task.main_score)]
    return ranking_scores(values, scores), "values", {"values_N": main}


# --- pairs and summaries --------------------------------------------------------------------------


def _similarities(
    task: LocalTask, data: PairData, encoder: Encoder
) -> dict[str, NDArray[np.float64]]:
    vectors = _encode(task, encoder, [*data.first, *data.second], "query")
    return metrics.pair_similarities(vectors[: len(data.first)], vectors[len(data.first) :])


def _sts(task: LocalTask, data: PairData, encoder: Encoder) -> _Found:
    gold_N = np.array(data.values) / 5  # as mteb divides
    similarities = _similarities(task, data, encoder)
    scores: dict[str, float] = {}
    for name in _CORRELATED:
        prefix = "" if name == "similarity" else f"{name}_"
        pair = correlations(gold_N, similarities[name])
        scores[f"{prefix}pearson"], scores[f"{prefix}spearman"] = pair
    own = similarities["cosine" if task.main_score.startswith("cosine") else "similarity"]
    return scores, "correlation", {"gold_N": gold_N, "similarities_N": own}


def _pairs(task: LocalTask, data: PairData, encoder: Encoder) -> _Found:
    labels_N = np.array(data.values).astype(np.int64)
    similarities = _similarities(task, data, encoder)
    found = {name: metrics.pair_metrics(v, labels_N) for name, v in similarities.items()}
    scores = {f"{name}_{m}": v for name, each in found.items() for m, v in each.items()}
    for metric in metrics.PAIR_METRICS:
        scores[f"max_{metric}"] = max(each[metric] for each in found.values())
    which = task.main_score.partition("_")[0]
    used = list(similarities.values()) if which == "max" else [similarities[which]]
    return scores, "pairs", {"gold_N": labels_N, "similarities_SN": np.stack(used)}


def _summarization(task: LocalTask, data: SummarizationData, encoder: Encoder) -> _Found:
    texts = [text for texts in (*data.human, *data.machine) for text in texts]
    vectors = _encode(task, encoder, texts, "query")
    counts = [len(texts) for texts in (*data.human, *data.machine)]
    parts = np.split(vectors, np.cumsum(counts)[:-1])
    found: dict[str, list[float]] = {
        f"{prefix}{name}": [] for prefix in ("", "cosine_", "dot_") for name in _NAMES
    }
    ranked: list[bool] = []
    for human_HD, machine_MD, relevance in zip(
        parts[: len(data.human)], parts[len(data.human) :], data.relevance, strict=True
    ):
        gold_M = (np.array(relevance) - 1) / 4  # as mteb brings 1 … 5 to 0 … 1
        best = _best_similarities(machine_MD, human_HD)
        ranked.append(all(len(set(v.tolist())) > 1 for v in (gold_M, *best.values())))
        if not ranked[-1]:  # mteb leaves the article out
            best = dict.fromkeys(best, np.full(len(gold_M), math.nan))
        for prefix, values_M in best.items():
            for name, value in zip(_NAMES, correlations(gold_M, values_M), strict=True):
                found[f"{prefix}{name}"].append(value)
    scores = {
        name: float(np.mean(np.array(values)[ranked])) if any(ranked) else math.nan
        for name, values in found.items()
    }
    return scores, "values", {"values_N": np.array(found[task.main_score])}


_NAMES = ("pearson", "spearman")


def _best_similarities(
    machine_MD: NDArray[np.float32], human_HD: NDArray[np.float32]
) -> Mapping[str, NDArray[np.float64]]:
    """Give each machine summary its similarity with the nearest human one, three ways."""
    dots = [(row[None] @ human_HD.T).max() for row in machine_MD]
    cosines = [_cosines(row[None], human_HD).max() for row in machine_MD]
    both = np.array(cosines, dtype=np.float64)
    return {"": both, "cosine_": both, "dot_": np.array(dots, dtype=np.float64)}


# --- labels ---------------------------------------------------------------------------------------


def _classification(task: LocalTask, data: ClassificationData, encoder: Encoder) -> _Found:
    names = sorted(set(data.train.labels))
    codes = {label: code for code, label in enumerate(names)}
    train = np.array([codes[label] for label in data.train.labels])
    gold_N = np.array([codes[label] for label in data.test.labels])
    chosen = metrics.undersample(train)
    used = np.unique(np.concatenate(chosen))
    texts = [data.train.texts[row] for row in used.tolist()]
    vectors = _encode(task, encoder, [*texts, *data.test.texts], "query")
    train_vectors, test_vectors = vectors[: len(used)], vectors[len(used) :]
    predicted_EN = np.stack(
        [
            metrics.predict(train_vectors[np.searchsorted(used, rows)], train[rows], test_vectors)
            for rows in chosen
        ]
    )
    found = [metrics.class_scores(gold_N, predicted_N) for predicted_N in predicted_EN]
    scores = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    scores = {"ap": math.nan, "ap_weighted": math.nan} | scores
    small = np.min_scalar_type(len(names))
    return (
        scores,
        "classes",
        {"gold_N": gold_N.astype(small), "predicted_EN": predicted_EN.astype(small)},
    )


def _clustering(task: LocalTask, data: LabelledTexts, encoder: Encoder) -> _Found:
    names = sorted(set(data.labels))
    gold_N = np.array([names.index(label) for label in data.labels])
    vectors_ND = _encode(task, encoder, data.texts, "query")
    assigned_EN = np.zeros((metrics.EXPERIMENTS, len(gold_N)), dtype=np.int32)
    drawn_EN = np.zeros(assigned_EN.shape, dtype=np.int32)
    found = []
    for number, (texts_S, clusters_S) in enumerate(metrics.cluster(vectors_ND, len(names))):
        found.append(metrics.cluster_scores(gold_N[texts_S], clusters_S))
        assigned_EN[number, texts_S] = clusters_S
        drawn_EN[number] = np.bincount(texts_S, minlength=len(gold_N))
    scores: dict[str, float] = {}
    for name in found[0]:
        values = [one[name] for one in found]
        scores[name], scores[f"{name}_std"] = float(np.mean(values)), float(np.std(values))
    arrays = {"gold_N": gold_N.astype(np.int32), "assigned_EN": assigned_EN, "drawn_EN": drawn_EN}
    return scores, "clusters" if task.main_score == "v_measure" else None, arrays
