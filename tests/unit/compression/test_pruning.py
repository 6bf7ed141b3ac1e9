"""Which layers and channels go, against brute force, and what is left of the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import make_family
from nvembed import NVEmbed
from nvembed.core.errors import ModelError
from nvembed.encoding.compression.compress import _packs
from nvembed.encoding.compression.pruning import (
    channel_lengths,
    cut_mlps,
    gated_mlps,
    leave_out_layers,
)
from nvembed.model.packing import flatten
from oracles import compression as oracle

TEXTS = ["a cat", "another text on the moon", "x", "the answer is in the words " * 3, "y y", "zyx"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A random Qwen 2 of 5 layers, every other of them with a sliding window."""
    from transformers import Qwen2Config, Qwen2Model

    folder = tmp_path_factory.mktemp("five")
    config = Qwen2Config(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["full_attention", "sliding_attention"] * 2 + ["full_attention"],
    )
    torch.manual_seed(0)
    model = Qwen2Model(config)
    for layer, size in zip(model.layers, (1.0, 0.3, 1.5, 0.5, 0.8), strict=True):
        layer.mlp.down_proj.weight.data *= size
        layer.self_attn.o_proj.weight.data *= size
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved: Path) -> NVEmbed:
    return NVEmbed.from_pretrained(saved, max_tokens=64)


def packs(model: NVEmbed, *, together: bool = True) -> Any:
    if together:
        return _packs(model, TEXTS)
    return [pack for text in TEXTS for pack in _packs(model, [text])]


def test_what_is_left_is_the_model_without_them(model: NVEmbed, tmp_path: Path) -> None:
    other = oracle.without_layers(model, [1, 3])
    full_only = oracle.without_layers(model, [0, 2, 4])  # layers keep their kind of attention
    whole = copy.deepcopy(model)
    leave_out_layers(model, [3, 1])
    leave_out_layers(whole, [0, 2, 4])
    assert model.backbone.model.config.layer_types == ["full_attention"] * 3
    assert whole.backbone.model.config.layer_types == ["sliding_attention"] * 2
    for pruned, expected in ((model, other), (whole, full_only)):
        folder = tmp_path / str(len(pruned.backbone.model.layers))
        np.testing.assert_array_equal(pruned.encode(TEXTS), expected.encode(TEXTS))
        pruned.save_pretrained(str(folder), create_model_card=False)
        loaded = NVEmbed.from_pretrained(folder)
        np.testing.assert_array_equal(loaded.encode(TEXTS), expected.encode(TEXTS))


def test_channels_are_measured_as_in_brute_force(model: NVEmbed) -> None:
    mlps, given = gated_mlps(model), dict[int, list[torch.Tensor]]()
    hooks = [
        mlp.register_forward_pre_hook(
            lambda _, x, n=number: given.setdefault(n, []).append(x[0].flatten(0, -2).clone())
        )
        for number, mlp in enumerate(mlps)
    ]
    with torch.enable_grad():  # layer by layer by their own code
        for pack in packs(model):
            model({"flat": flatten(pack)})
    for hook in hooks:
        hook.remove()
    found = channel_lengths(model, packs(model))
    for number in (0, 4):
        expected = oracle.channel_lengths(mlps[number], given[number])
        np.testing.assert_allclose(found[number], expected, rtol=1e-4)
        assert np.std(expected) > 1e-3


def test_dead_channels_go_and_the_vectors_stay(model: NVEmbed, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    for mlp in gated_mlps(model):
        dead = torch.randperm(48, generator=generator)[:16]
        mlp.down_proj.weight.data[:, dead[:8]] = 0
        mlp.up_proj.weight.data[dead[8:]] = 0
    before = model.encode(TEXTS)
    lengths = channel_lengths(model, packs(model))
    narrow = copy.deepcopy(model)
    cut_mlps(model, lengths, 32)
    assert model.backbone.model.config.intermediate_size == 32
    np.testing.assert_allclose(model.encode(TEXTS), before, atol=2e-6)
    model.save_pretrained(str(tmp_path / "m"), create_model_card=False)
    loaded = NVEmbed.from_pretrained(tmp_path / "m")
    np.testing.assert_array_equal(loaded.encode(TEXTS), model.encode(TEXTS))
    # One channel more is one that counts, and a width that the compiled layers do not have runs.
    cut_mlps(narrow, lengths, 31)
    assert 1e-7 < 1 - float((narrow.encode(TEXTS) * before).sum(axis=1).mean()) < 0.2


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "smollm3"])
def test_families(family: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = NVEmbed.from_pretrained(make_family(family, tmp_path / "a", tiny_tokenizer))
    other = oracle.without_layers(model, [0])
    leave_out_layers(model, [0])
    np.testing.assert_array_equal(model.encode(TEXTS), other.encode(TEXTS))
    cut_mlps(model, channel_lengths(model, packs(model)), 16)
    model.save_pretrained(str(tmp_path / "b"), create_model_card=False)
    np.testing.assert_array_equal(
        NVEmbed.from_pretrained(tmp_path / "b").encode(TEXTS), model.encode(TEXTS)
    )


def test_families_that_cannot_be_cut(tmp_path: Path, tiny_tokenizer: Any) -> None:
    bert = NVEmbed.from_pretrained(make_family("bert", tmp_path / "bert", tiny_tokenizer))
    with pytest.raises(ModelError, match="layers of the bert family cannot be taken out"):
        leave_out_layers(bert, [1])
    phi = NVEmbed.from_pretrained(make_family("phi3", tmp_path / "phi", tiny_tokenizer))
    with pytest.raises(ModelError, match="MLPs of the phi3 family cannot be cut"):
        channel_lengths(phi, packs(phi))
