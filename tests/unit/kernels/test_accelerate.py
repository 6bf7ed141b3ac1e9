"""The one hook of the kernels: on, off, and through every way a model is copied or sent."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralModel

from nvembed.kernels.layers import KINDS, accelerate, restore
from nvembed.model.backbone import add_lora, merge_lora
from nvembed.model.embedder import NVEmbed
from nvembed.model.settings import LoraSettings

TEXTS = ["one", "two words", "rather a longer text, with commas in it"]


@pytest.fixture(scope="module")
def decoder_dir(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of widths that all kernels take."""
    config = MistralConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    folder = tmp_path_factory.mktemp("decoder")
    MistralModel(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["mean", "latent"])
def model(request: pytest.FixtureRequest, decoder_dir: Path) -> NVEmbed:
    return NVEmbed.from_pretrained(decoder_dir, pooling=request.param, device="cpu")


def forwards(model: torch.nn.Module) -> dict[str, str]:
    return {
        name: vars(module)["forward"].func.__name__
        for name, module in model.named_modules()
        if "forward" in vars(module)
    }


def through_joblib(model: NVEmbed, folder: Path) -> NVEmbed:
    joblib.dump(model, folder / "model.joblib")
    loaded: NVEmbed = joblib.load(folder / "model.joblib")
    return loaded


@pytest.mark.parametrize(
    "copied",
    [
        lambda model, _: pickle.loads(pickle.dumps(model)),
        lambda model, _: copy.deepcopy(model),
        through_joblib,
    ],
    ids=["pickle", "deepcopy", "joblib"],
)
def test_a_copy_gives_the_same_bits(
    model: NVEmbed, copied: Callable[[NVEmbed, Path], NVEmbed], tmp_path: Path
) -> None:
    wanted = model.encode(TEXTS)
    other = copied(model, tmp_path)
    assert forwards(other) == forwards(model)
    assert "decoder_layer" in forwards(other).values()
    np.testing.assert_array_equal(other.encode(TEXTS), wanted)
    for parameter in model.parameters():
        parameter.data.zero_()  # a copy computes with weights of its own
    np.testing.assert_array_equal(other.encode(TEXTS), wanted)


def test_a_model_works_in_processes_of_joblib(decoder_dir: Path) -> None:
    model = NVEmbed.from_pretrained(decoder_dir, device="cpu")
    (found,) = joblib.Parallel(n_jobs=2, backend="loky")([joblib.delayed(model.encode)(TEXTS)])
    np.testing.assert_allclose(found, model.encode(TEXTS), atol=1e-6)


def test_restored_modules_are_plain_and_give_close_vectors(model: NVEmbed) -> None:
    wanted = model.encode(TEXTS)
    restore(model)
    assert not forwards(model)
    np.testing.assert_allclose(model.encode(TEXTS), wanted, atol=1e-5)
    counts = accelerate(model)
    assert counts["decoder_layer"] == len(model.backbone.model.layers)
    assert not accelerate(model)
    np.testing.assert_array_equal(model.encode(TEXTS), wanted)


def test_the_forward_of_another_library_is_left_alone() -> None:
    linear = torch.nn.Linear(2, 3)
    other = linear.forward
    linear.forward = other  # type: ignore[method-assign]
    assert not accelerate(linear)
    restore(linear)
    assert vars(linear)["forward"] is other


def test_every_class_of_the_table_exists() -> None:
    for name in KINDS:
        module, _, cls = name.rpartition(".")
        assert isinstance(getattr(__import__(module, fromlist=[cls]), cls), type)


def test_adapters_are_copied_and_merged(model: NVEmbed) -> None:
    add_lora(model.backbone, LoraSettings(rank=4, alpha=8, dropout=0.0))
    adapters: Any = [m for m in model.backbone.model.modules() if hasattr(m, "lora_B")]
    for module in adapters:
        torch.nn.init.normal_(module.lora_B["default"].weight, std=0.02)
    wanted = model.encode(TEXTS)
    other = pickle.loads(pickle.dumps(model))
    assert "fused_lora" in forwards(other).values()
    np.testing.assert_array_equal(other.encode(TEXTS), wanted)
    merge_lora(other.backbone)
    assert "fused_lora" not in forwards(other).values()
    np.testing.assert_allclose(other.encode(TEXTS), wanted, atol=1e-4)
