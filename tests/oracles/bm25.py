"""BM25 and nDCG@10 as plain loops: the script of the data README, cut into functions."""

from __future__ import annotations

import collections
import json
import math
import re
from pathlib import Path


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def rank(documents: list[str], query: str, k1: float = 0.9, b: float = 0.4) -> dict[int, float]:
    """Score of every document that shares a word with the query."""
    counts = [collections.Counter(words(text)) for text in documents]
    lengths = [sum(count.values()) for count in counts]
    mean = sum(lengths) / len(documents)
    scores: dict[int, float] = collections.defaultdict(float)
    for word in words(query):
        hits = [n for n, count in enumerate(counts) if word in count]
        idf = math.log(1 + (len(documents) - len(hits) + 0.5) / (len(hits) + 0.5))
        for n in hits:
            f = counts[n][word]
            scores[n] += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * lengths[n] / mean))
    return dict(scores)


def dcg(grades: list[int], k: int = 10) -> float:
    return sum(grade / math.log2(i + 2) for i, grade in enumerate(grades[:k]))


def ndcg(ranked: list[str], judged: dict[str, int], k: int = 10) -> float:
    best = dcg(sorted(judged.values(), reverse=True), k)
    return dcg([judged.get(document, 0) for document in ranked], k) / best


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file.read().split("\n") if line]


def judgements(path: Path) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = collections.defaultdict(dict)
    with open(path, encoding="utf-8") as file:
        for line in list(file)[1:]:
            query, document, grade = line.rstrip("\n").split("\t")
            found[query][document] = int(grade)
    return found
