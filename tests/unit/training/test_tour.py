"""The five files of docs/architecture.md lie on the path of a training step, in that order.

How many others it passes is counted.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml

import nvembed
from nvembed.core.files import write_jsonl
from nvembed.training.config import TrainConfig
from nvembed.training.trainer import train

ROOT = Path(nvembed.__file__).parent
DOCS = ROOT.parents[1] / "docs"
RECIPE = """
model: {max_tokens: 32, pooling: {kind: latent, num_latents: 2, num_heads: 2}}
precision: float32
memory_gb: 1.0
datasets: [{name: pairs, path: pairs.jsonl, kind: retrieval, instruction: find, stages: [1]}]
stages: [{name: one, steps: 1, batch_size: 4, learning_rate: 1.0e-3, in_batch_negatives: true,
  num_negatives: 1}]
"""


def tour() -> list[str]:
    text = (DOCS / "architecture.md").read_text("utf-8")
    table = text.split("in five files", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^\| `([\w/]+\.py)`", table, re.MULTILINE)


def test_a_step_passes_the_files_of_the_tour_in_order(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tour()
    assert len(files) == 5
    pairs = [{"query": f"what is {word}", "positive": f"{word} it is"} for word in "abcdefgh"]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    settings = yaml.safe_load(RECIPE) | {"output": str(tmp_path / "run")}
    settings["model"]["backbone"] = str(tiny_decoder_dir)
    config = TrainConfig.model_validate(settings)
    passed: list[str] = []
    walked: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event == "return" and name.startswith(str(ROOT)):
            file = Path(name).relative_to(ROOT).as_posix()
            walked.add(file)
            if file in files and passed[-1:] != [file]:
                passed.append(file)

    sys.setprofile(note)
    try:
        train(config, base_dir=tmp_path)
    finally:
        sys.setprofile(None)
    found = iter(passed)
    assert all(file in found for file in files), passed
    # The house has no corridors: 38, and the compiler of kernels where none was loaded before.
    assert len(walked - {"kernels/build.py"}) <= 38, sorted(walked)
