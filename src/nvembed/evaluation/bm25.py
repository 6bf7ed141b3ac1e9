"""nDCG of BM25 on a retrieval task: the baseline that a retriever should beat."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from nvembed.encoding.bm25 import BM25
from nvembed.evaluation.task_files import RetrievalData


def bm25_ndcgs(
    data: RetrievalData, k: int = 10, *, ignore_identical_ids: bool = False
) -> list[float]:
    """nDCG@k of BM25 per query of a retrieval task; documents without a shared word do not rank.

    Args:
        data: of the task.
        k: length of the rankings.
        ignore_identical_ids: a document with the id of the query does not rank either.
    """
    scores, indices = BM25(data.documents).top_k(data.queries, k + ignore_identical_ids)
    values = []
    for query, row_scores, row in zip(data.query_ids, scores, indices, strict=True):
        ranked = [data.document_ids[i] for i in row[row_scores > 0]]
        if ignore_identical_ids:
            ranked = [document for document in ranked if document != query]
        values.append(ndcg(ranked, data.judgements[query], k))
    return values


def ndcg(ranked: Sequence[str], judged: Mapping[str, int], k: int) -> float:
    """DCG of the first ``k`` document ids over that of the best possible order; gain = grade.

    0 where nothing is relevant.
    """
    gained = _dcg([judged.get(document, 0) for document in ranked[:k]])
    best = _dcg(sorted(judged.values(), reverse=True)[:k])
    return gained / best if best else 0.0


def _dcg(grades: Sequence[int]) -> float:
    return sum(grade / math.log2(rank + 2) for rank, grade in enumerate(grades))
