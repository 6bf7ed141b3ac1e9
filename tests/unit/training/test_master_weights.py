"""Weights of 16 bits are trained in float32, and saved in 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from interruption import interrupt_after
from nvembed.core.errors import TrainingError
from nvembed.core.files import write_jsonl
from nvembed.model.embedder import NVEmbed
from nvembed.model.memory import weight_bytes
from nvembed.training.checkpoint import latest_checkpoint, trained_parameters
from nvembed.training.config import TrainConfig
from nvembed.training.dry_run import dry_run
from nvembed.training.model import starting_model
from nvembed.training.stages import build_optimizer
from nvembed.training.trainer import train
from tiny_run import DATASET, PAIRS, STAGE


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory, tiny_decoder_dir: Path) -> Path:
    """A model whose weights, those of its head too, are numbers of 16 bits, saved as such."""
    folder = tmp_path_factory.mktemp("rounded")
    options: dict[str, Any] = {"pooling": "latent", "num_heads": 2, "num_latents": 4}
    model = NVEmbed.from_pretrained(tiny_decoder_dir, dtype="bfloat16", device="cpu", **options)
    model.save_pretrained(str(folder / "start"))
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    return folder


def recipe(output: Path, dtype: str | None = None, **changes: Any) -> TrainConfig:
    rate = {"learning_rate": 2e-5, "steps": 30, "batch_size": 8, "num_negatives": 0}
    data = {
        "output": str(output),
        "model": {"backbone": "start", "dtype": dtype, "max_tokens": 64},
        "lora": None,
        "datasets": [{**DATASET, "stages": [1]}],
        "stages": [{"name": "one", "in_batch_negatives": True, **STAGE, **rate}],
        "precision": "float32",
        "checkpoint_every": 10,
        "keep_checkpoints": 9,
    }
    return TrainConfig.model_validate(data | changes)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        head = "1." if path.parent != folder else ""
        tensors |= {head + name: value for name, value in load_file(path).items()}
    return tensors


def test_all_weights_move_and_end_as_those_of_a_float32_run(rounded: Path, tmp_path: Path) -> None:
    half = train(recipe(tmp_path / "half", "bfloat16"), base_dir=rounded)
    full = train(recipe(tmp_path / "full", "float32"), base_dir=rounded)
    last = latest_checkpoint(tmp_path / "half/checkpoints")
    assert last is not None
    masters = load_file(last / "weights.safetensors")
    assert {value.dtype for value in masters.values()} == {torch.float32}
    before = NVEmbed.from_pretrained(rounded / "start", dtype="float32", device="cpu").state_dict()
    moved = total = 0
    for name, value in masters.items():
        if name.startswith("0.") and "embed_tokens" not in name:  # most words are in no text
            moved += int((value != before[name]).sum())
            total += value.numel()
    assert moved / total > 0.99
    half_weights, full_weights = saved(half), saved(full)
    assert half_weights.keys() == full_weights.keys()
    for name, value in half_weights.items():
        assert value.dtype is torch.bfloat16
        assert full_weights[name].dtype is torch.float32
        assert torch.equal(value, full_weights[name].bfloat16()), name
    again = NVEmbed.from_pretrained(half, device="cpu")
    assert again.backbone.dtype is torch.bfloat16


def test_a_run_of_two_stages_resumes_exactly(
    rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = {"in_batch_negatives": True, **STAGE, "batch_size": 8, "learning_rate": 1e-4}
    changes: dict[str, Any] = {
        "stages": [{"name": "one", **stage}, {"name": "two", **stage}],
        "datasets": [{**DATASET, "stages": [1, 2]}],
        "checkpoint_every": 2,
    }
    train(recipe(tmp_path / "whole", **changes), base_dir=rounded)
    parts = recipe(tmp_path / "parts", **changes)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        with pytest.raises(TrainingError, match="interrupted after step 7"):
            train(parts, base_dir=rounded)
    train(parts, base_dir=rounded)
    for folder in ("model-one", "model"):
        one, other = saved(tmp_path / "whole" / folder), saved(tmp_path / "parts" / folder)
        assert {value.dtype for value in one.values()} == {torch.bfloat16}
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    last = latest_checkpoint(tmp_path / "whole/checkpoints")
    assert last is not None
    masters = load_file(last / "weights.safetensors")
    assert any((value != value.bfloat16()).any() for value in masters.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["adapters", "head", "everything"])
def test_what_is_trained_is_float32_and_all_of_it_moves(
    rounded: Path, tmp_path: Path, precision: str, what: str
) -> None:
    changes: dict[str, Any] = {
        "precision": precision,
        "lora": {"rank": 2, "dropout": 0.0} if what == "adapters" else None,
        "backbone": "freeze" if what == "head" else "train",
        "stages": [{"name": "one", "in_batch_negatives": True, **STAGE, "learning_rate": 2e-5}],
        "checkpoint_every": 1,
    }
    config = recipe(tmp_path / "run", **changes)
    folder = train(config, base_dir=rounded)
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("step-*/weights.safetensors"))
    first, last = load_file(checkpoints[0]), load_file(checkpoints[-1])
    assert {value.dtype for value in last.values()} == {torch.float32}
    assert any("lora" in name for name in last) == (what == "adapters")
    moved = [(value != first[name]).float().mean() for name, value in last.items()]
    assert sum(share > 0.9 for share in moved) >= len(moved) - 1  # but for words of no text
    assert {value.dtype for value in saved(folder).values()} == {torch.bfloat16}


def test_what_is_trained_takes_four_bytes_and_its_moments_eight(
    rounded: Path, tmp_path: Path
) -> None:
    def held(dtype: str, **changes: Any) -> tuple[int, ...]:
        """Elements, trained ones; bytes of weights and buffers, gradients, moments."""
        config = recipe(tmp_path / "run", dtype, **changes)
        model = starting_model(config, rounded, device="cpu")
        trained = trained_parameters(model)
        optimizer = build_optimizer(trained, model.pooling, config.stages[0], config.optimizer)
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        found = dry_run(config, base_dir=rounded).memory
        assert found is not None
        assert found.elements == sum(parameter.numel() for parameter in model.parameters())
        assert found.trained == sum(parameter.numel() for parameter in trained.values())
        return (
            found.elements,
            found.trained,
            sum(weight_bytes(model).values()),
            sum(parameter.grad.nbytes for parameter in trained.values()),
            sum(value.nbytes for value in states if value.ndim),
        )

    full_elements, _, full_weights, _, full_moments = held("float32")
    elements, trained, weights, gradients, moments = held("bfloat16")
    assert trained == elements == full_elements
    assert weights == full_weights >= 4 * elements
    assert gradients == 4 * elements
    assert moments == full_moments == 8 * elements
    buffers = full_weights - 4 * full_elements
    elements, trained, weights, gradients, _ = held("bfloat16", lora={"rank": 2})
    assert gradients == 4 * trained
    assert weights == 2 * (elements - trained) + 4 * trained + buffers
