"""Adapters on a quantised base: their gradients, and a model that is saved as if it were not."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nvembed.core.errors import ModelError
from nvembed.model.embedder import NVEmbed
from nvembed.model.packs import embed_pack
from nvembed.model.quantization import FrozenLinear, dequantized
from nvembed.training.checkpoint import trained_parameters
from nvembed.training.config import TrainConfig
from nvembed.training.model import build_model, save_model

LIBRARIES = {"int8": "torchao", "nf4": "bitsandbytes"}
TEXTS = ["a cat sleeps on the mat", "the moon turns around the earth", "bread and soup"]

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about other devices


def recipe(decoder: Path, quantization: str | None, **changes) -> TrainConfig:
    data = {
        "output": "run",
        "model": {
            "backbone": str(decoder),
            "max_tokens": 64,
            "pooling": {"kind": "latent", "num_latents": 8, "num_heads": 2},
            "quantization": quantization,
        },
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "datasets": [
            {"name": "d", "path": "d.jsonl", "kind": "sts", "instruction": "x", "stages": [1]}
        ],
        "stages": [{"name": "one", "steps": 1, "in_batch_negatives": True}],
    }
    return TrainConfig.model_validate({**data, **changes})


def build(decoder: Path, kind: str | None) -> NVEmbed:
    """A model with adapters that do something: fresh ones are zero on one side."""
    torch.manual_seed(1)
    model = build_model(recipe(decoder, kind), decoder, device="cpu")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def gradients(model: NVEmbed) -> dict[str, Tensor]:
    model.train()
    embedding_ND = embed_pack(model, model.backbone.tokenize_texts(TEXTS, ""))
    target = torch.randn(embedding_ND.shape, generator=torch.Generator().manual_seed(3))
    (embedding_ND * target).sum().backward()
    return {name: p.grad for name, p in trained_parameters(model).items()}


def layers(model: NVEmbed) -> dict[str, FrozenLinear]:
    modules = model.backbone.model.named_modules()
    return {name: layer for name, layer in modules if isinstance(layer, FrozenLinear)}


@pytest.mark.parametrize("kind", LIBRARIES)
def test_gradients_equal_those_on_the_dequantised_base(wide_decoder_dir: Path, kind: str) -> None:
    pytest.importorskip(LIBRARIES[kind])
    model = build(wide_decoder_dir, kind)
    assert len(layers(model)) == 14  # seven of each of the two blocks
    plain = build(wide_decoder_dir, None)
    original = build(wide_decoder_dir, None)
    for name, layer in layers(model).items():
        target = plain.backbone.model.get_submodule(name)
        assert isinstance(target, nn.Linear)
        with torch.no_grad():
            target.weight.copy_(dequantized(layer.weight))
    found, expected, other = gradients(model), gradients(plain), gradients(original)
    assert found.keys() == expected.keys()
    assert all("lora_" in name or name.startswith("1.") for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    # The vacuity guard: quantisation did change the base.
    assert any(not torch.allclose(found[n], other[n], rtol=1e-3, atol=1e-5) for n in found)


@pytest.mark.parametrize("kind", LIBRARIES)
def test_encoding_between_steps_leaves_the_gradients(wide_decoder_dir: Path, kind: str) -> None:
    """bitsandbytes' own layer would turn its weight into one without a way back."""
    pytest.importorskip(LIBRARIES[kind])
    model = build(wide_decoder_dir, kind)
    before = copy.deepcopy(gradients(model))
    model.zero_grad()
    model.encode_document(TEXTS)
    after = gradients(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def kept_shapes(model: NVEmbed) -> set[tuple[int, ...]]:
    """Shapes of what a forward keeps for the way back, trained parameters apart."""
    kept = set()

    def note(tensor: Tensor) -> Tensor:
        if not (tensor.is_leaf and tensor.requires_grad):
            kept.add(tuple(tensor.shape))
        return tensor

    texts = model.backbone.tokenize_texts(["a" * 7], "")  # no state has the shape of a weight
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        embed_pack(model, texts)
    return kept


@pytest.mark.parametrize("kind", LIBRARIES)
def test_no_whole_weight_is_kept_for_the_way_back(wide_decoder_dir: Path, kind: str) -> None:
    pytest.importorskip(LIBRARIES[kind])
    model = build(wide_decoder_dir, kind)
    sizes = {(layer.in_features, layer.out_features) for layer in layers(model).values()}
    sizes |= {(rows, columns) for columns, rows in sizes}
    assert not sizes & kept_shapes(model)
    assert sizes & kept_shapes(build(wide_decoder_dir, None))  # the vacuity guard


@pytest.mark.parametrize("kind", LIBRARIES)
def test_products_are_taken_in_the_dtype_of_autocast(wide_decoder_dir: Path, kind: str) -> None:
    pytest.importorskip(LIBRARIES[kind])
    layer = next(iter(layers(build(wide_decoder_dir, kind)).values()))
    x = torch.randn(3, 64, requires_grad=True)
    assert layer(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad is not None
    expected = dequantized(layer.weight).sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", LIBRARIES)
@pytest.mark.parametrize("final", [True, False])
def test_the_saved_model_is_the_whole_base_with_adapters(
    tmp_path: Path, wide_decoder_dir: Path, kind: str, final: bool
) -> None:
    pytest.importorskip(LIBRARIES[kind])
    config = recipe(wide_decoder_dir, kind)
    model = build(wide_decoder_dir, kind)
    plain = build(wide_decoder_dir, None)
    with torch.no_grad():
        for head in (model.pooling, plain.pooling):
            next(head.parameters()).add_(0.1)
    torch.manual_seed(5)
    save_model(model, config, tmp_path / "model", base_dir=tmp_path, final=final)
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(5))
    saved = NVEmbed.from_pretrained(tmp_path / "model", device="cpu")
    assert {p.dtype for p in saved.parameters()} == {torch.float32}
    np.testing.assert_allclose(
        saved.encode_document(TEXTS), plain.encode_document(TEXTS), atol=1e-5
    )
    # Unlike the one in training, by what quantisation takes away, which stays as it was.
    difference = np.abs(saved.encode_document(TEXTS) - model.encode_document(TEXTS)).max()
    assert 1e-5 < difference < 0.5
    assert len(layers(model)) == 14


def test_quantisation_without_adapters_or_without_the_library(
    tiny_decoder_dir: Path, monkeypatch
) -> None:
    with pytest.raises(ValueError, match=r"quantization is nf4 and lora is off: .* give lora"):
        recipe(tiny_decoder_dir, "nf4", lora=None)
    with pytest.raises(ValueError, match=r"dora is on and model.quantization is nf4: .* leave one"):
        recipe(tiny_decoder_dir, "nf4", lora={"dora": True})
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    for kind in LIBRARIES:
        with pytest.raises(ModelError, match=r"pip install 'nvembed\[quantization\]'") as caught:
            build_model(recipe(tiny_decoder_dir, kind), tiny_decoder_dir, device="cpu")
        assert "\n" not in str(caught.value)
