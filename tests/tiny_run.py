"""A training run of a second that has all that leaves traces on a disk, and what it must end as.

Two stages with mining between them, dropout, a cached gradient, a learned temperature, evaluation
with the best weights kept, adapters, checkpoints every two steps.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

from faults import Outcome, in_child
from nvembed.cli.main import run as run_command
from nvembed.core.config import dump_config
from nvembed.core.files import write_jsonl
from nvembed.core.ownership import MARK
from nvembed.training.config import TrainConfig
from task_folders import write_task

WORDS = ["red", "blue", "green", "fox", "owl", "cat", "tree", "lake"]
WORDS += ["hill", "sun", "moon", "star", "rain", "snow", "wind", "fire"]
PAIRS = [
    {"query": f"{word} {i}", "positive": f"{i * 7 % 16} of {word[::-1]}"}
    for i, word in enumerate(WORDS)
]
STAGE = {
    "steps": 5,
    "batch_size": 6,
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "temperature": 0.1,
    "num_negatives": 2,
}
MINE = {"strategy": "top_k", "num_negatives": 2}
DATASET = {"name": "pairs", "path": "pairs.jsonl", "kind": "retrieval", "instruction": "find"}


def recipe(decoder: Path) -> TrainConfig:
    """Its graphs hold one pack of 96 tokens of the 250 of a step."""
    return TrainConfig.model_validate(
        {
            "output": "run",
            "model": {
                "backbone": str(decoder),
                "max_tokens": 64,
                "pooling": {"kind": "latent", "num_latents": 4, "num_heads": 2},
            },
            "lora": {"rank": 4, "dropout": 0.1, "save_adapter": True},
            "datasets": [DATASET],
            "stages": [
                {"name": "one", "in_batch_negatives": True, "learn_temperature": True, **STAGE},
                {"name": "two", "in_batch_negatives": False, "mine": MINE, **STAGE},
            ],
            "evaluation": {"tasks": ["task"], "every": 2},
            "checkpoint_every": 2,
            "precision": "float32",
            "pack_tokens": 96,
            "memory_gb": 0.0016,
        }
    )


def write_inputs(folder: Path, decoder: Path) -> None:
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    write_task(folder / "task", "STS")
    (folder / "recipe.yaml").write_text(dump_config(recipe(decoder)), encoding="utf-8")


def command(folder: Path) -> tuple[int, str, str]:
    """``nvembed train`` in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    os.environ["NVEMBED_CACHE"] = str(folder / "cache")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(["train", str(folder / "recipe.yaml"), f"output={folder / 'run'}"])
    return code, out.getvalue(), err.getvalue()


def attempt(folder: Path, **fault: Any) -> Outcome:
    return in_child(lambda: command(folder), folder, **fault)


def finish(folder: Path) -> Outcome:
    done = attempt(folder)
    assert done.error is None, done.error
    assert done.value[0] == 0, done.value
    return done


def trace(folder: Path) -> dict[str, Any]:
    """What must be equal: files of the models, adapters and mined sets, and the metrics."""
    run = folder / "run"
    kept = ("model", "model-one", "adapter", "mined")
    files: dict[str, Any] = {
        path.relative_to(run).as_posix(): without_place(path, folder)
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.relative_to(run).parts[0] in kept
    }
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    files["metrics"] = [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows
    ]
    return files


def without_place(path: Path, folder: Path) -> bytes:
    """What a file holds; a card names the folder, so the list of files has another hash of it."""
    content = path.read_bytes()
    if path.name == MARK:
        lines = content.splitlines(keepends=True)
        return b"".join(line for line in lines if json.loads(line)["name"] != "README.md")
    if path.name == "README.md":
        title = f"\n# {folder.name}".encode()
        return content.replace(bytes(folder), b"").replace(title, b"\n# ")
    return content


def assert_same(folder: Path, whole: dict[str, Any]) -> None:
    found = trace(folder)
    assert found.keys() == whole.keys()
    assert [name for name in whole if found[name] != whole[name]] == []
    # Nothing half-written is left.
    leftovers = [p for p in (folder / "run").rglob(".*") if p.name != MARK]
    assert leftovers == []
