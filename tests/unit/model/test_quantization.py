"""Quantised backbones: fewer bytes, nearly the same vectors, and only the linear layers touched."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nvembed.core.errors import ModelError
from nvembed.model.backbone import add_lora
from nvembed.model.embedder import NVEmbed
from nvembed.model.memory import weight_bytes
from nvembed.model.quantization import quantize_backbone
from nvembed.model.settings import LoraSettings

LIBRARIES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
# Smallest cosine to float32 on a random model of width 64; the error of 4 bits is the largest.
COSINES = {"int8": 0.999, "fp8": 0.99, "nf4": 0.95}
TEXTS = ["a cat sleeps on the mat", "the moon turns around the earth", "bread and soup"]


def load(folder: Path) -> NVEmbed:
    return NVEmbed.from_pretrained(folder, pooling="latent", device="cpu")


@pytest.mark.filterwarnings("ignore")  # of the libraries, about kernels for other devices
@pytest.mark.parametrize("kind", LIBRARIES)
def test_fewer_bytes_and_nearly_the_same_vectors(wide_decoder_dir: Path, kind) -> None:
    pytest.importorskip(LIBRARIES[kind])
    model = load(wide_decoder_dir)
    expected = model.encode_query(TEXTS, task="find it")
    linear = sum(
        m.weight.numel() for m in model.backbone.model.modules() if isinstance(m, nn.Linear)
    )
    rest = sum(p.numel() for p in model.backbone.model.parameters()) - linear
    quantize_backbone(model, kind)
    bits = 4 if kind == "nf4" else 8
    counted = sum(weight_bytes(model.backbone.model).values())
    assert counted < rest * 4 + linear * bits / 8 * 1.3 + 2048  # scales, and buffers
    assert counted >= rest * 4 + linear * bits / 8
    vectors = model.encode_query(TEXTS, task="find it")
    cosine = (vectors * expected).sum(1)
    assert cosine.min() > COSINES[kind]
    assert np.abs(vectors - expected).max() > 1e-6  # something was quantised
    with pytest.raises(ModelError, match="quantised already"):
        quantize_backbone(model, kind)


@pytest.mark.filterwarnings("ignore")
def test_the_head_and_the_embeddings_stay(tiny_decoder_dir: Path) -> None:
    pytest.importorskip("torchao")
    model = load(tiny_decoder_dir)
    table = model.backbone.model.get_input_embeddings().weight.clone()
    head = {name: value.clone() for name, value in model.pooling.state_dict().items()}
    quantize_backbone(model, "int8")
    assert torch.equal(model.backbone.model.get_input_embeddings().weight, table)
    assert all(torch.equal(model.pooling.state_dict()[name], v) for name, v in head.items())


@pytest.mark.filterwarnings("ignore")
def test_adapters_and_a_missing_library_are_told(tiny_decoder_dir: Path, monkeypatch) -> None:
    model = load(tiny_decoder_dir)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    for kind in LIBRARIES:
        with pytest.raises(ModelError, match=r"pip install 'nvembed\[quantization\]'"):
            quantize_backbone(model, kind)
    add_lora(model.backbone, LoraSettings(rank=2))
    with pytest.raises(ModelError, match="has adapters"):
        quantize_backbone(model, "int8")


@pytest.mark.filterwarnings("ignore")
def test_widths_that_four_bits_cannot_take(tiny_decoder_dir: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ModelError, match=r"nf4 cannot take .* 32 × 32.* Use int8"):
        quantize_backbone(load(tiny_decoder_dir), "nf4")
