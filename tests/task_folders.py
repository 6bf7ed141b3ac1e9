"""Small evaluation tasks of every type, written as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TOPICS = {
    "animals": ["cat", "dog", "horse", "sheep", "goat", "mouse"],
    "food": ["bread", "cheese", "apple", "soup", "honey", "rice"],
    "sky": ["star", "moon", "comet", "planet", "galaxy", "nebula"],
}

MAIN_SCORES = {
    "Retrieval": "ndcg_at_10",
    "Reranking": "map",
    "STS": "cosine_spearman",
    "PairClassification": "max_ap",
    "Classification": "accuracy",
    "Clustering": "v_measure",
    "Summarization": "cosine_spearman",
}


def labelled(seed: int, count: int) -> list[dict[str, str]]:
    """Texts of four words, three of them of their topic."""
    names = list(TOPICS)
    rows = []
    for i in range(count):
        own, other = names[i % 3], names[(i + 1) % 3]
        words = [TOPICS[own][(i * k + seed) % 6] for k in (1, 2, 3)] + [TOPICS[other][i % 6]]
        rows.append({"text": " ".join([*words, f"n{seed}x{i}"]), "label": own})
    return rows


def rows_of(kind: str) -> dict[str, list[dict[str, Any]]]:
    """The JSONL files of a valid task of this type."""
    if kind == "Retrieval":
        return {
            "corpus.jsonl": [
                {"_id": "d1", "title": "cats", "text": "a cat sleeps on the mat all day"},
                {"_id": "d2", "title": "", "text": "a dog chases a cat and the cat runs"},
                {"_id": "d3", "title": "moon", "text": "the moon turns around the earth"},
                {"_id": "d4", "title": "soup", "text": ""},
                {"_id": "d5", "text": "bread and cheese with soup"},
            ],
            "queries.jsonl": [
                {"_id": "q1", "text": "where does the cat sleep"},
                {"_id": "q2", "text": "soup with bread"},
                {"_id": "q3", "text": "what does the moon turn around"},
                {"_id": "unjudged", "text": "nothing is known about this one"},
            ],
        }
    if kind == "Reranking":
        return {
            "test.jsonl": [
                {"query": "cat dog", "positive": ["a cat and dog"], "negative": ["moon", "a cat"]},
                {
                    "query": "soup bread",
                    "positive": ["bread rice", "soup"],
                    "negative": ["soup bread stars", "apple"],
                },
            ]
        }
    if kind == "STS":
        return {"test.jsonl": _pairs("score", [5.0, 3.2, 0.5, 4, 1.5])}
    if kind == "PairClassification":
        return {"test.jsonl": _pairs("label", [1, 0, 0, 1, 0])}
    if kind == "Classification":
        return {"train.jsonl": labelled(0, 36), "test.jsonl": labelled(1, 24)}
    if kind == "Clustering":
        return {"test.jsonl": labelled(2, 30)}
    return {
        "test.jsonl": [
            {
                "text": "an article about cats",
                "human_summaries": ["cats sleep", "a cat sleeps a lot"],
                "machine_summaries": ["cats sleep a lot", "dogs bark", "the moon"],
                "relevance": [5, 2.5, 1],
            },
            {
                "text": "an article about soup",
                "human_summaries": ["soup with bread"],
                "machine_summaries": ["stars", "bread", "soup bread", "soup apple"],
                "relevance": [1, 4, 3, 2.0],
            },
        ]
    }


QRELS = (
    "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t1\nq1\td3\t0\nq2\td5\t1\nq2\td4\t2\nq3\td3\t1\n"
)


def _pairs(key: str, values: list[float]) -> list[dict[str, Any]]:
    texts = [
        ("a cat sleeps", "the cat sleeps"),
        ("a dog runs far", "a horse runs"),
        ("soup and bread", "the moon and a star"),
        ("apple with honey", "honey with an apple"),
        ("one comet", "a comet and one planet near a star"),
    ]
    return [
        {"sentence1": first, "sentence2": second, key: value}
        for (first, second), value in zip(texts, values, strict=True)
    ]


def write_task(folder: Path, kind: str, name: str | None = None, **header: Any) -> Path:
    """Write a valid task; ``header`` replaces keys of task.json."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "name": folder.name if name is None else name,
        "type": kind,
        "instruction": "Find what fits",
        "main_score": MAIN_SCORES[kind],
        **header,
    }
    (folder / "task.json").write_text(json.dumps(values), encoding="utf-8")
    for file, rows in rows_of(kind).items():
        write_rows(folder / file, rows)
    if kind == "Retrieval":
        (folder / "qrels").mkdir(exist_ok=True)
        (folder / "qrels" / "test.tsv").write_text(QRELS, encoding="utf-8")
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
