"""``benchmarks/learning_curve.py``: models of checkpoints, and curves over seeds."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from nvembed.core.files import write_jsonl
from nvembed.model.embedder import NVEmbed
from nvembed.training.config import TrainConfig
from nvembed.training.trainer import train
from task_folders import write_task
from tiny_run import DATASET, PAIRS, STAGE

FILE = Path(__file__).parents[3] / "benchmarks" / "learning_curve.py"
TEXTS = ["some text", "another one"]


@pytest.fixture
def curve():
    spec = importlib.util.spec_from_file_location("learning_curve", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["learning_curve"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["learning_curve"]


def test_a_checkpoint_is_scored_as_the_model_that_it_was(
    curve, tmp_path: Path, tiny_decoder_dir: Path, monkeypatch, capsys
) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    stage = {**STAGE, "name": "one", "in_batch_negatives": True, "learning_rate": 1e-2, "steps": 4}
    config = TrainConfig.model_validate(
        {
            "output": str(tmp_path / "run"),
            "model": {"backbone": str(tiny_decoder_dir), "pooling": {"kind": "mean"}},
            "lora": {"rank": 2, "alpha": 4, "dropout": 0.0, "save_adapter": True},
            "datasets": [DATASET | {"stages": [1]}],
            "stages": [stage],
            "precision": "float32",
            "checkpoint_every": 2,
            "keep_checkpoints": 9,
        }
    )
    train(config, base_dir=tmp_path)
    write_task(tmp_path / "tasks" / "sts", "STS")
    given = ["--curve", "plain", str(tmp_path / "run"), str(tmp_path / "run" / "checkpoints")]
    more = ["--tasks", str(tmp_path / "tasks"), "--names", "sts", "--dtype", "float32"]
    argv = ["curve", *given, "--reference", "BM25", "50", *more, "--to", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    curve.main()
    rows = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert [row["step"] for row in rows] == [2, 4]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    tokens = [json.loads(line)["tokens"] for line in lines]
    assert [row["tokens"] for row in rows] == [sum(tokens[:2]), sum(tokens)]
    first, last = (
        NVEmbed.from_pretrained(tmp_path / "out" / "run" / f"step-{step}").encode(TEXTS)
        for step in (2, 4)
    )
    final = NVEmbed.from_pretrained(tmp_path / "run" / "adapter").encode(TEXTS)
    np.testing.assert_array_equal(last, final)
    assert np.abs(first - final).max() > 1e-3
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(curve, "evaluate", None)  # all is known
    capsys.readouterr()
    curve.main()
    assert capsys.readouterr().out.count("tokens: ") == 2


def test_seeds_are_one_point_with_its_range(curve) -> None:
    points = {"a": {10: [(900_000, 50.0), (1_100_000, 53.0)], 20: [(2e6, 60.0)]}, "b": {20: []}}
    assert curve.table(points).splitlines()[2:] == [
        "| 1.00 M | 51.5 (50.0 to 53.0, 2 seeds) | – |",
        "| 2.00 M | 60.0 | – |",
    ]
