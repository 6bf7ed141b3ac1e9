"""What of a task must not be trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from nvembed.building.contamination import Contamination, EvaluationText, evaluation_texts
from nvembed.data.loading import read_records
from nvembed.data.records import LabelRecord
from nvembed.evaluation.tasks import load_task, load_tasks
from task_folders import MAIN_SCORES, rows_of, write_rows, write_task

EXPECTED = {
    "Retrieval": ("query", "queries.jsonl", ["text"]),
    "Reranking": ("query", "test.jsonl", ["query"]),
    "Classification": ("text", "test.jsonl", ["text"]),
    "Clustering": ("text", "test.jsonl", ["text"]),
    "STS": ("pair", "test.jsonl", ["sentence1", "sentence2"]),
    "PairClassification": ("pair", "test.jsonl", ["sentence1", "sentence2"]),
    "Summarization": ("article", "test.jsonl", ["text"]),
}


@pytest.mark.parametrize("kind", sorted(MAIN_SCORES))
def test_test_parts_of_every_type(kind: str, tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path, kind, "mine"))
    part, file, keys = EXPECTED[kind]
    rows = [row for row in rows_of(kind)[file] if row.get("_id") != "unjudged"]
    expected = [EvaluationText(tuple(row[key] for key in keys), "mine", part) for row in rows]  # type: ignore[arg-type]
    if kind == "Summarization":
        expected += [
            EvaluationText((text,), "mine", "summary")
            for row in rows
            for text in (*row["human_summaries"], *row["machine_summaries"])
        ]
    assert list(evaluation_texts([task])) == expected


def test_a_published_beir_folder_is_decontaminated_against(tmp_path: Path) -> None:
    """What ``evaluate`` reads, the build reads: no task.json, integer ids, TREC's columns."""
    folder = tmp_path / "tasks" / "scifact"
    (folder / "qrels").mkdir(parents=True)
    write_rows(folder / "corpus.jsonl", [{"_id": 1, "title": None, "text": "a document"}])
    write_rows(folder / "queries.jsonl", [{"_id": n, "text": f"claim {n}"} for n in range(3)])
    (folder / "qrels" / "test.tsv").write_text("0 0 1 1\n2 0 7 1\n")
    assert list(evaluation_texts(load_tasks([tmp_path / "tasks"]))) == [
        EvaluationText(("claim 0",), "scifact", "query"),
        EvaluationText(("claim 2",), "scifact", "query"),
    ]


@pytest.mark.shared
def test_training_files_hold_no_test_text_and_planted_ones_are_found(
    shared: Callable[[str], Path],
) -> None:
    items = list(evaluation_texts(load_tasks([shared("data/tasks/emotion")])))
    records = read_records(shared("data/train/emotion.jsonl.gz"), "classification")
    records[::300] = [
        LabelRecord(item.texts[0], "planted") for item in items[: len(records[::300])]
    ]
    contamination = Contamination(items)
    found = Counter(
        (match.rule, record.label == "planted")
        for record in records
        if (match := contamination.check_record(record))
    )
    assert found == {("exact", True): len(records[::300])}
