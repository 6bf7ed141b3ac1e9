"""A mixture of the shared data, compared with the evaluation tasks by plain loops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from nvembed.cli.main import run
from nvembed.core.files import read_jsonl
from nvembed.data.loading import read_records
from oracles.cleaning import plain_jaccard
from tiny_build import recipe as tiny_recipe


def same(text: str) -> str:
    return " ".join(text.lower().split())


@pytest.mark.shared
def test_nothing_of_the_tasks_is_left(tmp_path: Path, shared: Callable[[str], Path]) -> None:
    train, tasks = shared("data/train"), shared("data/tasks")
    names = ("stackfaq", "covid_q", "stsb")
    folders = [str(tasks / name) for name in names]
    recipe = tiny_recipe(tasks=folders, near=0.6, rows_per_shard=1000)
    del recipe["build"]["max_refused"]
    recipe["datasets"] = [
        {"name": name, "path": str(train / f"{name}.jsonl.gz"), "kind": kind, "instruction": None}
        for name, kind in (("covid_faq", "retrieval"), ("stsb", "sts"))
    ]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run(["data", "build", str(tmp_path / "recipe.yaml")]) == 0
    asked = [row["text"] for _, row in read_jsonl(tasks / "stackfaq" / "queries.jsonl")]
    asked += [row["text"] for _, row in read_jsonl(tasks / "covid_q" / "test.jsonl")]
    before = read_records(train / "covid_faq.jsonl.gz", "retrieval")
    after = read_records(tmp_path / "built" / "covid_faq", "retrieval")
    left = [
        record
        for record in before
        if not any(
            same(record.query) == same(text) or plain_jaccard(record.query, text, 2) >= 0.6
            for text in asked
        )
    ]
    assert 0 < len(left) < len(before)
    assert [record.query for record in after] == [record.query for record in left]
    assert sum(len(record.negatives) == 2 for record in after) > len(after) / 2
    positives = {same(record.query): set(map(same, record.positives)) for record in after}
    for record in after:
        assert not positives[same(record.query)] & set(map(same, record.negatives))
