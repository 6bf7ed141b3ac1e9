"""The loop on a tiny decoder: it learns, resumes exactly, and stops before harm is done."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nvembed.core.errors import TrainingError
from nvembed.core.files import write_jsonl
from nvembed.model.embedder import NVEmbed
from nvembed.training import trainer
from nvembed.training.checkpoint import latest_checkpoint
from nvembed.training.config import TrainConfig
from nvembed.training.optim import schedule
from nvembed.training.trainer import train

COLOURS = ["red", "blue", "green", "fox", "owl", "cat", "tree", "lake"]
WORDS = [*COLOURS, "hill", "sun", "moon", "star", "rain", "snow", "wind", "fire"]
PAIRS = [
    {"query": f"{word} {i}", "positive": f"{i * 7 % 16} of {word[::-1]}"}
    for i, word in enumerate(WORDS)
]
CLASSES = [{"text": f"{word} {kind}", "label": kind} for word in WORDS for kind in ("a", "b", "c")]


def recipe(folder: Path, decoder: Path, **changes) -> TrainConfig:
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    write_jsonl(folder / "classes.jsonl", CLASSES)
    data = {
        "output": str(folder / "run"),
        "model": {
            "backbone": str(decoder),
            "max_tokens": 64,
            "pooling": {"kind": "latent", "num_latents": 8, "num_heads": 2},
        },
        "datasets": [
            {"name": "pairs", "path": "pairs.jsonl", "kind": "retrieval", "instruction": "find"},
            {
                "name": "classes",
                "path": "classes.jsonl",
                "kind": "classification",
                "instruction": "sort",
                "stages": [2],
            },
        ],
        "stages": [stage("one", in_batch_negatives=True), stage("two", in_batch_negatives=False)],
        "checkpoint_every": 3,
    }
    return TrainConfig.model_validate({**data, **changes})


def stage(name: str, **changes) -> dict:
    common = {
        "steps": 5,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "temperature": 0.1,
    }
    return {"name": name, "num_negatives": 2, **common, **changes}


def one_stage(**changes) -> dict:
    datasets = [
        {
            "name": "pairs",
            "path": "pairs.jsonl",
            "kind": "retrieval",
            "instruction": "find",
            "stages": [1],
        }
    ]
    return {
        "datasets": datasets,
        "stages": [stage("one", **{"in_batch_negatives": True, **changes})],
    }


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.parent.name}/{k}": v for k, v in load_file(path).items()}
    return found


def test_a_tiny_model_overfits_sixteen_pairs(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    config = recipe(
        tmp_path,
        tiny_decoder_dir,
        lora=None,
        **one_stage(steps=60, batch_size=16, learning_rate=3e-3, warmup_steps=3),
    )
    model = NVEmbed.from_pretrained(train(config, base_dir=tmp_path), device="cpu")
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert losses[0] > 1.0
    assert losses[-1] < 0.05
    queries = model.encode_query([pair["query"] for pair in PAIRS], task="find")
    documents = model.encode_document([pair["positive"] for pair in PAIRS])
    assert ((queries @ documents.T).argmax(1) == np.arange(16)).all()
    np.testing.assert_array_equal(
        queries, model.encode_query([pair["query"] for pair in PAIRS])
    )  # the instruction was saved as the query prompt


@pytest.mark.parametrize("stop_at", [2, 3, 5, 7])
def test_resumed_equals_uninterrupted_exactly(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch, stop_at: int
) -> None:
    whole = recipe(tmp_path, tiny_decoder_dir, output=str(tmp_path / "whole"))
    train(whole, base_dir=tmp_path)
    parts = recipe(tmp_path, tiny_decoder_dir, output=str(tmp_path / "parts"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, stop_at)
        with pytest.raises(TrainingError, match=f"interrupted after step {stop_at};"):
            train(parts, base_dir=tmp_path)
    assert not (tmp_path / "parts" / "model").exists()
    train(parts, base_dir=tmp_path)
    one, other = (rows(tmp_path / name) for name in ("whole", "parts"))
    assert [row["loss"] for row in one] == [row["loss"] for row in other]
    assert [row["step"] for row in other] == list(range(1, 11))
    first, second = (weights(tmp_path / name / "model") for name in ("whole", "parts"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    started = weights(tiny_decoder_dir)
    assert any("layers" in name for name in first)  # the vacuity guard: training moved the weights
    assert not all(
        torch.equal(value, started[f"{tiny_decoder_dir.name}/model.{name.split('/')[1]}"])
        for name, value in first.items()
        if "layers" in name and "pooling" not in name.lower()
    )


def interrupt_after(patch, step: int) -> None:
    """Send SIGINT to this process while the given step runs."""
    original = trainer.contrastive_step
    calls = []

    def noted(*arguments, **options):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments, **options)

    patch.setattr(trainer, "contrastive_step", noted)


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch
) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, **one_stage(steps=8))
    original = trainer.contrastive_step
    calls = []

    def broken(*arguments, **options):
        result = original(*arguments, **options)
        calls.append(1)
        if len(calls) == 5:
            return trainer.StepResult(
                result.loss * float("nan"), result.statistics, 0.0, result.num_tokens, 1
            )
        return result

    seen = []
    original_step = torch.optim.AdamW.step
    monkeypatch.setattr(trainer, "contrastive_step", broken)
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a: (seen.append(1), original_step(self, *a))[1]
    )
    with pytest.raises(TrainingError, match=r"loss of step 5 \(one\) is nan.*step-0000000003"):
        train(config, base_dir=tmp_path)
    assert len(seen) == 4
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").name == "step-0000000003"


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch
) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, **one_stage(steps=8))
    original = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "step-0000000006" in str(self) and self.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")
        return original(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(Exception, match=r"step-0000000006: cannot write: No space left") as caught:
        train(config, base_dir=tmp_path)
    assert "\n" not in str(caught.value)
    checkpoints = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == ["step-0000000003"]
    monkeypatch.undo()
    train(config, base_dir=tmp_path)
    assert len(rows(tmp_path / "run")) == 8


def test_the_frozen_base_is_not_in_checkpoints(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, **one_stage(steps=1))
    train(config, base_dir=tmp_path)
    saved = load_file(latest_checkpoint(tmp_path / "run" / "checkpoints") / "weights.safetensors")
    assert all("lora" in name or name.startswith("1.") for name in saved)
    assert any("lora" in name for name in saved)
    assert any("latents" in name for name in saved)
    assert not list((tmp_path / "run").rglob("*.pt"))


def test_mining_before_a_stage_gives_negatives(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    stages = [
        stage("one", in_batch_negatives=True, steps=1),
        stage(
            "two", in_batch_negatives=False, steps=1, mine={"strategy": "top_k", "num_negatives": 3}
        ),
    ]
    config = recipe(tmp_path, tiny_decoder_dir, stages=stages)
    train(config, base_dir=tmp_path)
    mined = (tmp_path / "run" / "mined" / "two" / "pairs.jsonl").read_text().splitlines()
    assert all(len(json.loads(line)["negative"]) == 3 for line in mined)
    assert rows(tmp_path / "run")[1]["effective_negatives"] == 2.0
    settings = tmp_path / "run" / "model-one" / "config_sentence_transformers.json"
    prompts = json.loads(settings.read_text())["prompts"]
    assert prompts["SciFact"].startswith("Instruct: Given a scientific claim, retrieve")
    assert prompts["query"] == prompts["pairs"] != prompts["SciFact"]
    # Starting over must not use what an earlier model mined.
    for path in (tmp_path / "run" / "mined" / "two").iterdir():
        path.write_text("stale")
    train(config, base_dir=tmp_path, fresh=True)
    assert (tmp_path / "run" / "mined" / "two" / "pairs.jsonl").read_text().splitlines() == mined


def test_the_same_folder_with_other_settings_is_refused(
    tmp_path: Path, tiny_decoder_dir: Path
) -> None:
    train(recipe(tmp_path, tiny_decoder_dir, **one_stage(steps=1)), base_dir=tmp_path)
    other = recipe(tmp_path, tiny_decoder_dir, **one_stage(steps=2))
    with pytest.raises(TrainingError, match="another configuration"):
        train(other, base_dir=tmp_path)
    train(other, base_dir=tmp_path, fresh=True)
    assert len(rows(tmp_path / "run")) == 2


def test_contradictions_of_a_recipe_are_named(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    with pytest.raises(ValueError, match="nothing to contrast with"):
        recipe(tmp_path, tiny_decoder_dir, **one_stage(in_batch_negatives=False, num_negatives=0))
    with pytest.raises(ValueError, match="no data set is used in stage 3"):
        recipe(
            tmp_path,
            tiny_decoder_dir,
            stages=[stage(name, in_batch_negatives=True) for name in ("a", "b", "c")],
        )


def test_schedule_is_a_ramp_and_a_line_to_zero() -> None:
    shares = [schedule(step, steps=10, warmup_steps=4) for step in range(10)]
    np.testing.assert_allclose(shares, [0.2, 0.4, 0.6, 0.8, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert schedule(0, steps=1, warmup_steps=0) == 1.0
