"""``nvembed evaluate`` under kill -9: the same command again does what is missing and no more."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nvembed.cli.main import run
from nvembed.core.ownership import MARK
from nvembed.evaluation.results import items_folder, read_items, read_results
from nvembed.model import encoder
from task_folders import write_task

# Says so and waits in the middle of the second task, its queries being embedded.
DRIVER = """
import sys, time
from nvembed.cli.main import run
from nvembed.evaluation import local_scores

encode = local_scores.encode_texts

def stalling(encoder, texts, *, side, task, description):
    if description == "second" and side == "document":
        print("in the second task", flush=True)
        time.sleep(600)
    return encode(encoder, texts, side=side, task=task, description=description)

local_scores.encode_texts = stalling
run(sys.argv[1:])
"""


class Noting:
    """An encoder that remembers what it was asked for."""

    def __init__(self, encoder: Any, asked: list[str]) -> None:
        self._encoder, self._asked = encoder, asked
        self.dimension = encoder.dimension
        self.max_seq_length = encoder.max_seq_length

    def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> Any:
        self._asked += texts
        return self._encoder.encode_query(texts, task=task)

    def encode_document(self, texts: Sequence[str], *, task: str | None = None) -> Any:
        self._asked += texts
        return self._encoder.encode_document(texts, task=task)


def test_killed_in_the_second_task(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task(tmp_path / "tasks" / "first", "Reranking")
    write_task(tmp_path / "tasks" / "second", "Retrieval")
    output, whole = tmp_path / "results.json", tmp_path / "whole.json"
    words = ["evaluate", str(tiny_decoder_dir), "--tasks", str(tmp_path / "tasks")]
    words += ["--dtype", "float32"]
    again = [*words, "--output", str(output), "--cache", str(tmp_path / "vectors")]

    command = [sys.executable, "-c", DRIVER, *again]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the second task\n"
        process.kill()
    assert process.returncode == -9
    kept = read_results(output)
    assert list(kept) == ["first"]

    asked: list[str] = []
    original = encoder.load_encoder
    monkeypatch.setattr(encoder, "load_encoder", lambda *of: Noting(original(*of), asked))
    assert run(again) == 0
    results = read_results(output)
    assert results["first"] == kept["first"]  # its seconds too: it was not done again
    # Of the second the documents alone, since its queries were kept as vectors; and of those not
    # "soup", which the first has too.
    assert len(asked) == 4
    assert all(text.split()[0] in ("cats", "a", "moon", "bread") for text in asked)

    assert run([*words, "--output", str(whole)]) == 0
    expected = read_results(whole)
    assert list(results) == list(expected) == ["first", "second"]
    for name, result in expected.items():
        assert results[name].scores == result.scores
        ours, theirs = (read_items(items_folder(path), name) for path in (output, whole))
        assert ours is not None
        assert theirs is not None
        assert ours.arrays["values_N"].tolist() == theirs.arrays["values_N"].tolist()
    assert [path.name for path in tmp_path.glob(".*")] == [MARK]
