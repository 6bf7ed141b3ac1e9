"""Scores a local task without mteb: its protocols and scores, at a small part of its cost.

Beside the vectors, retrieval holds ``CHUNK_DOCUMENTS`` documents and a block of similarities.

Letters: Q queries, N documents or items, M documents of a chunk, D width, K results per query, E
experiments, S kinds of similarity or texts of a sample, H human summaries.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nvembed.data.instructions import Side
from nvembed.evaluation import metrics
from nvembed.evaluation.metrics import TOP_K, Floats, Ints
from nvembed.evaluation.results import ItemKind, Items
from nvembed.evaluation.task_files import RetrievalData, TaskType
from nvembed.evaluation.tasks import LocalTask, task_hash
from nvembed.kernels.nearest import RunningTopK
from nvembed.model.bulk import encode_texts
from nvembed.model.encoder import Encoder

CHUNK_DOCUMENTS = 50_000
"""Documents encoded and searched at once; mteb's number, so that products are rounded alike."""

_BLOCK_SCORES = 64_000_000  # similarities at once, 256 MB
_TILE_DOCUMENTS = 2048
_SAMPLE_TEXTS = 16_384  # of an experiment of clustering, as mteb's
_ALIASES = {"map": f"map_at_{TOP_K}", "mrr": f"mrr_at_{TOP_K}"}

Vectors = NDArray[np.float32]
_Found = tuple[dict[str, float], ItemKind | None, Mapping[str, NDArray[Any]]]
_Encode = Callable[[Sequence[str], Side], Vectors]


class Scored(NamedTuple):
    """Scores by mteb's names, and the items of the main one, where it can be resampled."""

    scores: dict[str, float | None]
    items: Items | None


def score_local(task: LocalTask, encoder: Encoder) -> Scored:
    """Evaluate ``encoder`` on ``task``, each text encoded once per side; ties as in mteb."""

    def encode(texts: Sequence[str], side: Side) -> Vectors:
        # Documents are encoded bare, all others with the instruction of the task.
        instruction = None if side == "document" else task.instruction
        return encode_distinct(encoder, texts, side, instruction, task.name)

    values, kind, arrays = _SCORERS[task.type](task, task.data, encode)
    scores = {name: value if math.isfinite(value) else None for name, value in values.items()}
    main = scores[_ALIASES.get(task.main_score, task.main_score)]
    scores["main_score"] = scores[task.main_score] = main
    if kind is None or main is None:
        return Scored(scores, None)
    return Scored(scores, Items(kind, task.main_score, task_hash(task), arrays))


def encode_distinct(
    encoder: Encoder, texts: Sequence[str], side: Side, instruction: str | None, name: str
) -> Vectors:
    """Encode texts for the task ``name``, one row each; equal texts once."""
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    vectors = encode_texts(encoder, list(rows), side=side, task=instruction, description=name)
    return vectors if len(rows) == len(texts) else vectors[[rows[text] for text in texts]]


# --- rankings -------------------------------------------------------------------------------------


def _retrieval(task: LocalTask, data: Any, encode: _Encode) -> _Found:
    queries_QD = encode(data.queries, "query")
    best = RunningTopK(len(queries_QD), min(TOP_K, len(data.documents)))
    for start in range(0, len(data.documents), CHUNK_DOCUMENTS):
        documents_MD = encode(data.documents[start : start + CHUNK_DOCUMENTS], "document")
        num_rows = max(_BLOCK_SCORES // len(documents_MD), 1)
        for first in range(0, len(queries_QD), num_rows):
            rows = slice(first, min(first + num_rows, len(queries_QD)))
            scores_BM = _cosines(queries_QD[rows], documents_MD)
            for column in range(0, len(documents_MD), _TILE_DOCUMENTS):
                tile = np.ascontiguousarray(scores_BM[:, column : column + _TILE_DOCUMENTS])
                best.offer(tile, rows, start + column)
        best.num_seen += len(documents_MD)
    scores_QK, rows_QK = best.results()
    scores_QK = scores_QK.astype(np.float64)
    counted_QK, grades_QK, relevant = _grades(task, data, rows_QK)
    by_id = sorted(range(len(data.document_ids)), key=data.document_ids.__getitem__)
    tie_rank_N = np.argsort(by_id)
    # What does not count goes behind everything else, where its grade is 0.
    counting_QK = np.where(counted_QK, scores_QK, -np.inf)
    order = metrics.order_with_ties(counting_QK, tie_rank_N[rows_QK])
    scores = [row[counted] for row, counted in zip(scores_QK, counted_QK, strict=True)]
    return _ranked(task, np.take_along_axis(grades_QK, order, axis=1), relevant, scores)


def score_bm25(task: LocalTask) -> Scored:
    """Score BM25 on a Retrieval task with nDCG@10; documents without a shared word do not rank."""
    from nvembed.data.bm25 import BM25  # needs scipy, which is optional

    data: Any = task.data
    scores_QK, rows_QK = BM25(data.documents).top_k(data.queries, 10 + task.ignore_identical_ids)
    counted_QK, grades_QK, relevant = _grades(task, data, rows_QK)
    order = np.argsort(~(counted_QK & (scores_QK > 0)), axis=1, kind="stable")
    grades_QK = np.take_along_axis(grades_QK * (scores_QK > 0), order, axis=1)
    values_N = metrics.ranking_values(grades_QK, relevant)["ndcg_at_10"]
    items = Items("values", task.main_score, task_hash(task), {"values_N": values_N})
    return Scored({task.main_score: float(values_N.mean())}, items)


def _grades(
    task: LocalTask, data: RetrievalData, rows_QK: Ints
) -> tuple[NDArray[np.bool_], Ints, list[Ints]]:
    """Tell which results count, their grades, and those above 0 of each query, found or not."""
    row_of = {name: row for row, name in enumerate(data.document_ids)}
    counted_QK = np.ones(rows_QK.shape, dtype=bool)
    if task.ignore_identical_ids:
        own_Q = np.array([row_of.get(query, -1) for query in data.query_ids])
        counted_QK = rows_QK != own_Q[:, None]
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
    return counted_QK, grades_QK * counted_QK, relevant


def _reranking(task: LocalTask, data: Any, encode: _Encode) -> _Found:
    queries_QD = encode(data.queries, "query")
    candidates = [[*a, *b] for a, b in zip(data.positives, data.negatives, strict=True)]
    vectors = encode([text for texts in candidates for text in texts], "document")
    parts = np.split(vectors, np.cumsum([len(texts) for texts in candidates])[:-1])
    width = min(max(map(len, candidates)), TOP_K)
    grades_QK = np.zeros((len(candidates), width), dtype=np.int64)
    scores = []
    for row, own_MD in enumerate(parts):
        scores_M = _cosines(queries_QD[row : row + 1], own_MD)[0].astype(np.float64)
        # A tie counts against the model: the irrelevant candidate goes first.
        wrong_M = (np.arange(len(own_MD)) >= len(data.positives[row])).astype(np.int64)
        order = metrics.order_with_ties(scores_M[None], wrong_M[None])[0, :TOP_K]
        grades_QK[row, : len(order)] = 1 - wrong_M[order]
        scores.append(scores_M[order])
    relevant = [np.ones(len(positives), dtype=np.int64) for positives in data.positives]
    return _ranked(task, grades_QK, relevant, scores)


def _cosines(queries_QD: Vectors, documents_MD: Vectors) -> Vectors:
    # As mteb rounds them: other products would break other ties.
    import torch

    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        units = [
            torch.nn.functional.normalize(torch.from_numpy(np.ascontiguousarray(vectors)), dim=1)
            for vectors in (queries_QD, documents_MD)
        ]
        return (units[0] @ units[1].T).numpy()


def _ranked(
    task: LocalTask, grades_QK: Ints, relevant: Sequence[Ints], scores: Sequence[Floats]
) -> _Found:
    values = metrics.ranking_values(grades_QK, relevant)
    main = values[_ALIASES.get(task.main_score, task.main_score)]
    return metrics.ranking_scores(values, scores), "values", {"values_N": main}


# --- pairs and summaries --------------------------------------------------------------------------


def _similarities(data: Any, encode: _Encode) -> dict[str, Floats]:
    first_ND, second_ND = np.split(encode([*data.first, *data.second], "query"), 2)
    return metrics.pair_similarities(first_ND, second_ND)


def _sts(task: LocalTask, data: Any, encode: _Encode) -> _Found:
    gold_N = np.array(data.values) / 5  # as mteb divides
    similarities = _similarities(data, encode)
    scores: dict[str, float] = {}
    for name in ("similarity", "cosine", "manhattan", "euclidean"):
        prefix = "" if name == "similarity" else f"{name}_"
        pair = metrics.correlations(gold_N, similarities[name])
        scores[f"{prefix}pearson"], scores[f"{prefix}spearman"] = pair
    own = similarities["cosine" if task.main_score.startswith("cosine") else "similarity"]
    return scores, "correlation", {"gold_N": gold_N, "similarities_N": own}


def _pairs(task: LocalTask, data: Any, encode: _Encode) -> _Found:
    labels_N = np.array(data.values).astype(np.int64)
    similarities = _similarities(data, encode)
    found = {name: metrics.pair_metrics(v, labels_N) for name, v in similarities.items()}
    scores = {f"{name}_{m}": value for name, each in found.items() for m, value in each.items()}
    for metric in found["cosine"]:
        scores[f"max_{metric}"] = max(each[metric] for each in found.values())
    which = task.main_score.partition("_")[0]
    used = list(similarities.values()) if which == "max" else [similarities[which]]
    return scores, "pairs", {"gold_N": labels_N, "similarities_SN": np.stack(used)}


def _summarization(task: LocalTask, data: Any, encode: _Encode) -> _Found:
    groups = [*data.human, *data.machine]
    vectors = encode([text for texts in groups for text in texts], "query")
    parts = np.split(vectors, np.cumsum(list(map(len, groups)))[:-1])
    count = len(data.human)
    found: dict[str, list[float]] = {}
    ranked: list[bool] = []
    for human_HD, machine_MD, relevance in zip(
        parts[:count], parts[count:], data.relevance, strict=True
    ):
        gold_M = (np.array(relevance) - 1) / 4  # as mteb brings 1 … 5 to 0 … 1
        # The similarity of each machine summary with the nearest human one.
        cosines = [_cosines(row[None], human_HD).max() for row in machine_MD]
        dots = [(row[None] @ human_HD.T).max() for row in machine_MD]
        best = {"": cosines, "cosine_": cosines, "dot_": dots}
        ranked.append(all(len(set(values)) > 1 for values in (relevance, cosines, dots)))
        for prefix, values in best.items():
            pair = math.nan, math.nan  # mteb leaves the article out
            if ranked[-1]:
                pair = metrics.correlations(gold_M, np.array(values, dtype=np.float64))
            for name, value in zip(("pearson", "spearman"), pair, strict=True):
                found.setdefault(f"{prefix}{name}", []).append(value)
    scores = {
        name: float(np.mean(np.array(values)[ranked])) if any(ranked) else math.nan
        for name, values in found.items()
    }
    return scores, "values", {"values_N": np.array(found[task.main_score])}


# --- labels ---------------------------------------------------------------------------------------


def _classification(task: LocalTask, data: Any, encode: _Encode) -> _Found:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    names = sorted(set(data.train.labels))
    codes = {label: code for code, label in enumerate(names)}
    labels_N, gold_N = (
        np.array([codes[label] for label in part.labels]) for part in (data.train, data.test)
    )
    chosen = metrics.undersample(labels_N)
    used = np.unique(np.concatenate(chosen))
    texts = [data.train.texts[row] for row in used.tolist()]
    train_ND, test_ND = np.split(encode([*texts, *data.test.texts], "query"), [len(used)])
    predicted = []
    for rows in chosen:
        model = LogisticRegression(max_iter=100, random_state=metrics.SEED)  # mteb's
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=ConvergenceWarning)
            model.fit(train_ND[np.searchsorted(used, rows)], labels_N[rows])
        predicted.append(model.predict(test_ND))
    found = [metrics.class_scores(gold_N, predicted_N) for predicted_N in predicted]
    scores = {"ap": math.nan, "ap_weighted": math.nan}
    scores |= {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    small = np.min_scalar_type(len(names))
    arrays = {"gold_N": gold_N.astype(small), "predicted_EN": np.stack(predicted).astype(small)}
    return scores, "classes", arrays


def _clustering(task: LocalTask, data: Any, encode: _Encode) -> _Found:
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.metrics.cluster import adjusted_mutual_info_score, v_measure_score

    vectors_ND = encode(data.texts, "query")
    names = sorted(set(data.labels))
    gold_N = np.array([names.index(label) for label in data.labels], dtype=np.int32)
    assigned_EN, drawn_EN = np.zeros((2, metrics.EXPERIMENTS, len(gold_N)), dtype=np.int32)
    found: dict[str, list[float]] = {"v_measure": [], "ami": []}
    draw = random.Random(metrics.SEED)  # sampling (with replacement), k-means and seeds are mteb's
    for assigned_N, drawn_N in zip(assigned_EN, drawn_EN, strict=True):
        texts_S = np.array(draw.choices(range(len(gold_N)), k=_SAMPLE_TEXTS))
        model = MiniBatchKMeans(len(names), batch_size=512, n_init=1, random_state=metrics.SEED)
        clusters_S = model.fit_predict(vectors_ND[texts_S])
        found["v_measure"].append(v_measure_score(gold_N[texts_S], clusters_S))
        found["ami"].append(adjusted_mutual_info_score(gold_N[texts_S], clusters_S))
        assigned_N[texts_S] = clusters_S
        drawn_N[:] = np.bincount(texts_S, minlength=len(gold_N))
    scores: dict[str, float] = {}
    for name, values in found.items():
        scores[name], scores[f"{name}_std"] = float(np.mean(values)), float(np.std(values))
    arrays = {"gold_N": gold_N, "assigned_EN": assigned_EN, "drawn_EN": drawn_EN}
    return scores, "clusters" if task.main_score == "v_measure" else None, arrays


_SCORERS: dict[TaskType, Callable[[LocalTask, Any, _Encode], _Found]] = {
    "Retrieval": _retrieval,
    "Reranking": _reranking,
    "Clustering": _clustering,
    "PairClassification": _pairs,
    "Classification": _classification,
    "STS": _sts,
    "Summarization": _summarization,
}
