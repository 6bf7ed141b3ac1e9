"""Quantised backbones: fewer bytes, nearly the same vectors, and only the linear layers touched."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import official_folders
from families import make_family
from gguf_files import write_gguf
from nvembed.core.errors import ConfigError, ModelError
from nvembed.model import backbone as backbones
from nvembed.model import quantization, transformer_load
from nvembed.model.backbone import add_lora
from nvembed.model.embedder import NVEmbed
from nvembed.model.memory import inner_tensors, weight_bytes
from nvembed.model.quantization import FrozenLinear, Quantizer, quantize_backbone
from nvembed.model.settings import LoraSettings
from peak_bytes import PeakBytes

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


# --- While a model is loaded ----------------------------------------------------------------------

KINDS = {**LIBRARIES, "int8_products": "torch"}


class Coarse:
    """In place of torchao: a weight is a whole number of 32nds of the largest of its row."""

    Int8WeightOnlyConfig = Float8WeightOnlyConfig = object

    @staticmethod
    def quantize_(holder: nn.Sequential, config: Any) -> None:
        for layer in holder:
            step_O1 = layer.weight.abs().amax(dim=1, keepdim=True) / 32
            weight = (layer.weight / step_O1).round() * step_O1
            layer.weight = nn.Parameter(weight.detach(), requires_grad=False)


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "_library", lambda kind: Coarse)


def write_layout(layout: str, place: Path, decoder: Path, tokenizer: Any, monkeypatch) -> Path:
    """A folder or file of each kind that a backbone is read from."""
    if layout == "language model":
        return decoder
    if layout == "saved":
        load(decoder).save_pretrained(str(place))
        return place
    if layout == "gguf":
        pytest.importorskip("gguf", reason="needs the extra gguf")
        folder = make_family("llama", place / "llama", tokenizer)
        return write_gguf(folder, place / "m.gguf", "llama")
    wide = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
    monkeypatch.setattr(official_folders, "SMALL", official_folders.SMALL | wide)
    return official_folders.write_official(place, tokenizer, shards=2)


def held(model: NVEmbed) -> dict[str, list[torch.Tensor]]:
    backbone = model.backbone.model
    tensors = [*backbone.named_parameters(), *backbone.named_buffers()]
    return {name: inner_tensors(tensor) for name, tensor in tensors}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["language model", "saved", "official", "gguf"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_while_loading_is_quantised_afterwards(
    kind, layout, tmp_path, wide_decoder_dir, byte_level_tokenizer, monkeypatch
) -> None:
    pytest.importorskip(KINDS[kind])
    if kind == "nf4" and layout == "gguf":
        pytest.skip("its widths are not multiples of 64")
    place = write_layout(layout, tmp_path, wide_decoder_dir, byte_level_tokenizer, monkeypatch)
    expected = NVEmbed.from_pretrained(place, device="cpu", dtype="float32")
    quantize_backbone(expected, kind)

    def whole(*_: Any, **options: Any) -> None:
        raise AssertionError("loaded whole")

    monkeypatch.setattr(transformer_load.AutoModel, "from_pretrained", whole)
    given: dict[str, Any] = {"quantize": Quantizer(kind)}
    model = NVEmbed.from_pretrained(place, device="cpu", dtype="float32", **given)
    # First: bitsandbytes packs weights anew when they are first used.
    np.testing.assert_array_equal(model.encode(TEXTS), expected.encode(TEXTS))
    found, wanted = held(model), held(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(a, b) for n in wanted for a, b in zip(found[n], wanted[n], strict=True))
    assert model.backbone.model.training == expected.backbone.model.training
    with pytest.raises(ModelError, match=f"weights in {kind} are not saved"):
        model.save_pretrained(str(tmp_path / "again"))


@pytest.mark.parametrize("layout", ["language model", "official"])
def test_no_more_than_one_weight_is_whole(
    layout, tmp_path, wide_decoder_dir, byte_level_tokenizer, monkeypatch
) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 512}
    monkeypatch.setattr(official_folders, "SMALL", official_folders.SMALL | wide)
    place = official_folders.write_official(tmp_path / "a", byte_level_tokenizer, shards=2)
    if layout == "language model":
        backbone = NVEmbed.from_pretrained(place, device="cpu").backbone
        place = tmp_path / "b"
        backbone.model.save_pretrained(place)
        backbone.tokenizer.save_pretrained(place)
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
    with PeakBytes() as plain:
        NVEmbed.from_pretrained(place, **options)
    with PeakBytes() as counted:
        model = NVEmbed.from_pretrained(place, quantize=Quantizer("int8_products"), **options)
    bytes_held = sum(weight_bytes(model).values())
    largest = 4 * 256 * 512
    # Of one tensor there are the stored form, the wanted one, and numbers of it on the way.
    assert bytes_held * 0.9 < counted.peak < bytes_held + 3 * largest
    if layout == "official":  # transformers loads in other threads, where nothing is counted
        assert plain.peak > bytes_held + 6 * largest


def test_what_is_stored_in_another_form_is_quantised_after_loading(
    tmp_path, wide_decoder_dir, coarse, monkeypatch
) -> None:
    expected = load(wide_decoder_dir)
    quantize_backbone(expected, "int8")
    monkeypatch.setattr(backbones, "load_quantized", lambda *_: None)
    model = NVEmbed.from_pretrained(wide_decoder_dir, device="cpu", quantize="int8")
    found, wanted = held(model), held(expected)
    assert all(torch.equal(found[name][0], wanted[name][0]) for name in wanted)


def test_frozen_layers_are_those_of_adapters(wide_decoder_dir, coarse) -> None:
    model = NVEmbed.from_pretrained(wide_decoder_dir, quantize=Quantizer("int8", frozen=True))
    linear = [m for m in model.backbone.model.modules() if isinstance(m, nn.Linear)]
    assert [type(layer) for layer in linear] == [FrozenLinear] * 14
    assert not any(p.requires_grad for layer in linear for p in layer.parameters())
    add_lora(model.backbone, LoraSettings(rank=2))
    loss = model.backbone.states([[3, 4, 5]]).sum()
    loss.backward()
    given = {n: p.grad for n, p in model.backbone.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in given)
    assert any(float(gradient.abs().sum()) > 0 for gradient in given.values())


def test_what_cannot_be_is_one_line(wide_decoder_dir, tmp_path, byte_level_tokenizer, coarse):
    with pytest.raises(ConfigError, match=r"dtype int8 and quantize.*one of them"):
        NVEmbed.from_pretrained(wide_decoder_dir, dtype="int8", quantize="nf4")
    with pytest.raises(ConfigError, match=r"quantize with a device_map.*one device"):
        NVEmbed.from_pretrained(wide_decoder_dir, device_map="auto", quantize="nf4")
    with pytest.raises(ConfigError, match="quantize"):
        NVEmbed.from_pretrained(wide_decoder_dir, quantize="int4")  # type: ignore[arg-type]
    place = official_folders.write_official(tmp_path, byte_level_tokenizer)
    with pytest.raises(ModelError, match=r"nf4 cannot take .*; expected rows in multiples of 32"):
        NVEmbed.from_pretrained(place, quantize="nf4")


def test_a_weight_that_is_no_number_is_named_before_it_is_rounded(
    tmp_path, byte_level_tokenizer, coarse
) -> None:
    place = official_folders.write_official(tmp_path, byte_level_tokenizer)
    file, name = place / "model.safetensors", "embedding_model.layers.1.self_attn.k_proj.weight"
    tensors = load_file(file)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ModelError, match=f"{name} is not finite: 1 of"):
        NVEmbed.from_pretrained(place, quantize="int8")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_a_saved_folder_is_mapped_unless_weights_change(tmp_path, wide_decoder_dir) -> None:
    NVEmbed.from_pretrained(wide_decoder_dir, dtype="bfloat16").save_pretrained(str(tmp_path))
    file = str(tmp_path / "model.safetensors")

    def mapped(**options: Any) -> bool:
        model = NVEmbed.from_pretrained(tmp_path, device="cpu", **options)
        found = file in Path("/proc/self/maps").read_text()
        assert model.dimension == 64
        return found

    assert mapped(dtype="bfloat16")
    gc.collect()
    assert not mapped(dtype="bfloat16", quantize=Quantizer("int8_products", frozen=False))
