"""A recipe whose data sets take a moment to build, with something for every step to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nvembed.core.files import write_jsonl
from task_folders import rows_of, write_task

WORDS = ["red", "blue", "green", "fox", "owl", "cat", "tree", "lake", "hill", "sun", "moon", "star"]

PAIRS: list[dict[str, Any]] = [
    {"query": f"{word} {other}", "positive": f"a {other} text on {word}"}
    for word in WORDS
    for other in WORDS[:4]
]
PAIRS[5] = {"query": "red owl", "positive": []}  # bad
PAIRS[9] = {"query": "same", "positive": "Same "}  # bad: its own positive
PAIRS += [
    PAIRS[1],  # equal
    {"query": "Blue  red", "positive": "another one"},  # merged
    {"query": "what is asked", "positive": "the answer"},  # of the evaluation
]
STS: list[dict[str, Any]] = [
    {"sentence1": f"the {word} is here", "sentence2": f"here is the {word}", "score": 4.5}
    for word in WORDS
]
STS += [{"sentence1": "here is the fox", "sentence2": "the fox is here", "score": 1.0}]  # equal
CLASSES: list[dict[str, Any]] = [
    {"text": f"{word} number {number}", "label": label}
    for label, words in (("animals", WORDS[3:6]), ("places", WORDS[6:9]), ("sky", WORDS[9:]))
    for word in words
    for number in range(4)
]
CLASSES += [{"text": "alone", "label": "single"}]  # a label with one text
SETS = {"pairs": PAIRS, "sts": STS, "classes": CLASSES}
KINDS = {"pairs": "retrieval", "sts": "sts", "classes": "classification"}


def recipe(**build: Any) -> dict[str, Any]:
    return {
        "output": "run",
        "model": {"backbone": "decoder", "max_tokens": 64, "pooling": {"kind": "mean"}},
        "datasets": [
            {
                "name": name,
                "path": f"{name}.jsonl",
                "kind": kind,
                "instruction": "find",
                "max_records": 30 if name == "pairs" else None,
                "licence": "CC0-1.0" if name == "sts" else None,
            }
            for name, kind in KINDS.items()
        ],
        "build": {
            "folder": "built",
            "tasks": ["task"],
            "near": None,
            "max_refused": 0.1,
            "rows_per_shard": 12,
            "mine": {"teacher": "bm25", "num_negatives": 2, "strategy": "top_k"},
            **build,
        },
        "stages": [
            {"name": name, "steps": 1, "batch_size": 4, "in_batch_negatives": True}
            for name in ("one", "two")
        ],
    }


def write_inputs(folder: Path, **build: Any) -> Path:
    """Write sets, a task and the recipe into a folder and return the recipe's path."""
    for name, rows in SETS.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    write_task(folder / "task", "Retrieval")
    queries = [row | {"text": "What is  asked"} for row in rows_of("Retrieval")["queries.jsonl"]]
    write_jsonl(folder / "task" / "queries.jsonl", queries)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(**build)))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
