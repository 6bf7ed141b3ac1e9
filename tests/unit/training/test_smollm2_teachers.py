"""Joined vectors of several teachers, as a recipe's ``teacher.file`` reads them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from hash_encoder import HashEncoder
from nvembed.core.config import load_config
from nvembed.core.files import write_jsonl
from nvembed.data.instructions import Side
from nvembed.training.config import TrainConfig
from nvembed.training.trainer import train
from smollm2 import teachers

PAIRS = [{"query": f"the number {n}", "positive": f"number {n} is {n * n}"} for n in range(12)]


@pytest.fixture
def recipe(tmp_path: Path, tiny_decoder_dir: Path) -> Path:
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    files = {"vectors": "taught/vectors.npy", "texts": "taught/texts.jsonl"}
    stage = {"name": "one", "steps": 3, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1}
    stage |= {"in_batch_negatives": True, "temperature": 0.1, "num_negatives": 0}
    shutil.copytree(tiny_decoder_dir, tmp_path / "decoder")
    settings = {
        "output": str(tmp_path / "run"),
        "model": {"backbone": "decoder", "max_tokens": 32, "pooling": {"kind": "mean"}},
        "lora": None,
        "precision": "float32",
        "datasets": [
            {
                "name": "pairs",
                "path": "pairs.jsonl",
                "kind": "retrieval",
                "instruction": "Find it",
                "stages": [1],
            }
        ],
        "stages": [stage | {"teacher": {"file": files}}],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings), "utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def run(monkeypatch: pytest.MonkeyPatch, recipe: Path, *arguments: str) -> None:
    given = [str(recipe), "--to", str(recipe.parent / "taught"), *arguments]
    monkeypatch.setattr(sys, "argv", ["teachers.py", *given])
    teachers.main()


def test_cosines_are_the_weighted_means_and_a_run_learns_from_them(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = {"a": HashEncoder(24, 0.0), "b": HashEncoder(40, 0.0)}
    asked: list[tuple[str, int]] = []

    def embed_as(name: str) -> teachers.Embed:
        def embed(side: Side, texts: Sequence[str]) -> NDArray[np.float32]:
            asked.append((side, len(texts)))
            vectors: NDArray[np.float32] = 3 * encoders[name].encode_document(list(texts))
            return vectors  # not of unit length

        return embed

    monkeypatch.setattr(teachers, "sentence_transformer", embed_as)
    monkeypatch.setattr(teachers, "WINDOW", 5)
    run(monkeypatch, recipe, "--teacher", "a", "3", "--teacher", "b", "1")
    texts = [row["text"] for row in read(tmp_path / "taught" / "texts.jsonl")]
    assert sorted(texts) == sorted(text for pair in PAIRS for text in pair.values())
    assert sorted(asked) == sorted(2 * [(s, n) for s in ("document", "query") for n in (2, 5, 5)])
    found = np.load(tmp_path / "taught" / "vectors.npy")
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)
    one, other = (encoders[name].encode_document(texts) for name in "ab")
    expected = 0.75 * one @ one.T + 0.25 * other @ other.T
    np.testing.assert_allclose(found @ found.T, expected, atol=2e-3)  # kept in 16 bit
    assert np.abs(found @ found.T - one @ one.T).max() > 0.05
    train(load_config(TrainConfig, recipe), base_dir=tmp_path)
    rows = read(tmp_path / "run" / "metrics.jsonl")
    assert all(row["parts"]["similarities"] > 0 for row in rows)

    # What is there is never written over, and parts of the same texts are not made again.
    with pytest.raises(SystemExit, match=r"vectors\.npy: is there already"):
        run(monkeypatch, recipe, "--teacher", "a", "1")
    (tmp_path / "taught" / "vectors.npy").unlink()
    asked.clear()
    run(monkeypatch, recipe, "--teacher", "a", "1")
    assert not asked
    (tmp_path / "taught" / "vectors.npy").unlink()
    write_jsonl(tmp_path / "pairs.jsonl", [{"query": "new", "positive": "text"}, *PAIRS[1:]])
    with pytest.raises(SystemExit, match="holds other texts"):
        run(monkeypatch, recipe, "--teacher", "a", "1")
