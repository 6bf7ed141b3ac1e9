"""``benchmarks/compression.py``: scores of rounded vectors, and rows that are made once."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from hash_encoder import HashEncoder
from nvembed.evaluation.local_scores import score_local
from nvembed.evaluation.tasks import load_tasks
from nvembed.model.embedder import NVEmbed
from nvembed.model.encoder import BaseEncoder
from task_folders import write_task

FILE = Path(__file__).parents[3] / "benchmarks" / "compression.py"


@pytest.fixture
def program():
    spec = importlib.util.spec_from_file_location("compression_table", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compression_table"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["compression_table"]


class Signs(BaseEncoder):
    """The oracle: signs of the other vectors, from the start; of some sides alone."""

    dimension = 24

    def __init__(self, *sides: str) -> None:
        self._sides = sides

    def _encode(self, side, texts, task):
        vectors = HashEncoder(24, 0.3).encode_query(list(texts), task=task)
        if side not in self._sides:
            return vectors
        return np.where(vectors > 0, 1.0, -1.0).astype(np.float32)


def test_rounded_scores_are_those_of_rounded_vectors(program, tmp_path: Path) -> None:
    write_task(tmp_path / "find", "Retrieval")
    (task,) = load_tasks([tmp_path / "find"])
    encoder = HashEncoder(24, 0.3)
    found = program.scores(encoder, task)
    for kind, oracle in (
        ("float", encoder),
        ("binary", Signs("query", "document")),
        ("binary documents", Signs("document")),
    ):
        expected = 100 * score_local(task, oracle).scores[task.main_score]
        assert found[kind] == pytest.approx(expected), kind
    held = program.Rounded(encoder)
    texts = ["one text", "another text", "a third one"]
    plain = held.encode_document(texts)
    held.rounding = "int8"
    eight = held.encode_document(texts)
    step = (plain.max(0) - plain.min(0)) / 255
    assert np.abs(eight - plain).max() > 0
    assert (np.abs(eight - plain) <= 1.01 * step + 1e-6).all()


def test_a_table_is_made_of_kept_rows(
    program, tmp_path: Path, tiny_decoder_dir: Path, monkeypatch, capsys
) -> None:
    NVEmbed.from_pretrained(tiny_decoder_dir, pooling="mean", device="cpu").save_pretrained(
        str(tmp_path / "model")
    )
    for kind in ("Retrieval", "STS"):
        write_task(tmp_path / "tasks" / kind.lower(), kind)
    arguments = ["compression.py", "--tasks", tmp_path / "tasks", "--out", tmp_path / "out"]
    for name, dtype in (("whole", "float32"), ("small", "bfloat16"), ("least", "int8")):
        arguments += ["--model", name, tmp_path / "model", dtype]
    monkeypatch.setattr(sys, "argv", [str(each) for each in arguments])
    program.main()
    rows = (tmp_path / "out" / "results.md").read_text("utf-8").splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[0] for row in cells] == ["whole", "small", "least"]
    assert cells[0][5] == "1.00"
    assert cells[0][7] == "+0.00"
    assert cells[0][2] == cells[1][2] == cells[2][2]
    assert cells[0][-1].endswith("%")
    kept = (tmp_path / "out" / "results.jsonl").read_bytes()
    assert kept.count(b"\n") == 3 * (2 + 3)
    found = [json.loads(line)["found"] for line in kept.splitlines()]
    sizes = [one["megabytes"] for one in found if "megabytes" in one]
    assert sizes[0] > 1.9 * sizes[1] > 1.9 * sizes[2]
    capsys.readouterr()
    program.main()
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == kept
    # A folder that was made anew, under the same name, is another model.
    config = tmp_path / "model" / "nvembed_config.json"
    config.write_text(config.read_text("utf-8") + "\n", "utf-8")
    program.main()
    assert (tmp_path / "out" / "results.jsonl").read_bytes().count(b"\n") == 2 * 3 * (2 + 3)
