"""Mining in plain loops over Python lists: sort everything, look at everything."""

from __future__ import annotations

import re
from collections.abc import Sequence


def dot(first: Sequence[float], second: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(first, second, strict=True))


def top_k(
    queries: Sequence[Sequence[float]], documents: Sequence[Sequence[float]], k: int
) -> list[list[tuple[float, int]]]:
    """Sort all documents for every query, by falling score, then by row."""
    results = []
    for query in queries:
        scored = [(dot(query, document), row) for row, document in enumerate(documents)]
        results.append(sorted(scored, key=lambda pair: (-pair[0], pair[1]))[:k])
    return results


def passes(strategy: str, threshold: float, positive: float, score: float) -> bool:
    """Decide about one candidate."""
    if strategy == "percent_of_positive":
        return positive > 0 and score < threshold * positive
    if strategy == "margin":
        return score < positive - threshold
    if strategy == "absolute":
        return score < threshold
    return True


def after_first(eligible: Sequence[bool], skip: int) -> list[bool]:
    keep = []
    seen = 0
    for flag in eligible:
        seen += flag
        keep.append(bool(flag) and seen > skip)
    return keep


def same(first: str, second: str) -> bool:
    return re.sub(r"\s+", " ", first).strip().lower() == re.sub(r"\s+", " ", second).strip().lower()


def mine(
    records: Sequence[tuple[str, Sequence[str], Sequence[str]]],
    extra: Sequence[str],
    vector_of: dict[str, Sequence[float]],
    *,
    strategy: str,
    threshold: float,
    num_negatives: int,
    search_depth: int,
    skip_top: int = 0,
) -> list[list[str]]:
    """Mine for (query, positives, given negatives), keeping the given ones, taking the nearest."""
    documents: list[str] = []
    for text in [t for _, pos, neg in records for t in [*pos, *neg]] + list(extra):
        if not any(same(text, other) for other in documents):
            documents.append(text)
    vectors = [vector_of[text] for text in documents]
    mined = []
    for query, positives, given in records:
        refused = [query]
        for other_query, other_positives, _ in records:
            if same(query, other_query):
                refused += other_positives
        kept = [text for text in given if not any(same(text, r) for r in refused)]
        spelled = [next(d for d in documents if same(d, text)) for text in positives]
        positive = min(dot(vector_of[query], vector_of[text]) for text in spelled)
        near = top_k([vector_of[query]], vectors, search_depth)[0]
        found = []
        passed_over = 0
        for score, row in near:
            if any(same(documents[row], text) for text in [*refused, *kept]):
                continue
            passed_over += 1
            if passed_over <= skip_top:
                continue
            if passes(strategy, threshold, positive, score):
                found.append(documents[row])
        mined.append(kept + found[: max(num_negatives - len(kept), 0)])
    return mined
