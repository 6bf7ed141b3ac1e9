"""Linear layers in 8 bits: whole numbers and scales by hand, exact sums, and layers around them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nvembed.core.errors import ModelError
from nvembed.core.files import write_jsonl
from nvembed.encoding.export.stock import write_stock
from nvembed.encoding.files import encode_file
from nvembed.kernels import int8
from nvembed.kernels.int8 import Int8Linear, rows_to_int8
from nvembed.kernels.layers import _runs, available, restore
from nvembed.model.embedder import NVEmbed
from nvembed.model.encoder import load_encoder
from nvembed.model.quantization import quantize_backbone

DTYPES = [torch.float32, torch.bfloat16]
TEXTS = ["a cat sleeps on the mat", "the moon", "x", "bread and soup on the table " * 3]


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(int8, "library", lambda name: None)
    elif int8.library("int8.cpp") is None:
        pytest.skip("no compiler")
    return str(request.param)


def by_hand(x_TI: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of each row the largest size is 127."""
    rows = x_TI.double().numpy()
    top_T = np.abs(rows).max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(top_T[:, None] > 0, rows * 127 / top_T[:, None], 0.0)
    return scaled, top_T / 127


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 33])
def test_rows_in_eight_bits(way: str, dtype: torch.dtype, width: int) -> None:
    x_TI = (torch.randn(9, width) * torch.logspace(-3, 3, 9)[:, None]).to(dtype)
    x_TI[4] = 0
    found, scale_T = rows_to_int8(x_TI)
    scaled, expected_T = by_hand(x_TI)
    # Rounded to the nearest: off by half at most, but for the last bits of float32.
    assert np.abs(found.numpy() - scaled).max() < 0.5 + 1e-4
    assert np.abs(found.numpy()).max(axis=1).tolist() == [127] * 4 + [0] + [127] * 4
    np.testing.assert_allclose(scale_T.numpy(), expected_T, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_that_of_whole_numbers(way: str, dtype: torch.dtype, bias: bool) -> None:
    layer = nn.Linear(64, 48, bias=bias).to(dtype)
    made = Int8Linear(layer)
    x = torch.randn(2, 20, 64).to(dtype)
    out = made(x)
    assert (out.shape, out.dtype, made.dtype) == ((2, 20, 48), dtype, dtype)
    x_TI, scale_T = rows_to_int8(x.flatten(0, 1))
    weight_OI, scale_O = rows_to_int8(layer.weight.detach().float())
    sums = x_TI.numpy().astype(np.int64) @ weight_OI.numpy().astype(np.int64).T
    exact = sums * scale_T.double().numpy()[:, None] * scale_O.double().numpy()
    if bias:
        exact += layer.bias.detach().double().numpy()
    rounded = 2.0**-8 if dtype is torch.bfloat16 else 1e-6
    found = out.flatten(0, 1).double().numpy()
    np.testing.assert_allclose(found, exact, rtol=rounded, atol=1e-6)
    plain = nn.functional.linear(x.double(), *(p.detach().double() for p in layer.parameters()))
    error = np.linalg.norm(found - plain.flatten(0, 1).numpy()) / plain.norm().item()
    assert 1e-4 < error < 0.02
    # A token's numbers depend on no other token.
    torch.testing.assert_close(made(x[1:, 3:4])[0, 0], out[1, 3], rtol=0, atol=0)


@pytest.fixture
def folder(wide_decoder_dir: Path, tmp_path: Path) -> Path:
    model = NVEmbed.from_pretrained(wide_decoder_dir, max_tokens=64)
    model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    return tmp_path / "model"


def test_whole_layers_compute_around_them(folder: Path) -> None:
    model = NVEmbed.from_pretrained(folder, dtype="int8")
    linears = [m for m in model.backbone.model.modules() if isinstance(m, Int8Linear)]
    assert len(linears) == 12
    assert type(model.backbone.model.layers[1].mlp.down_proj) is nn.Linear
    layer: Any = model.backbone.model.layers[0]
    hidden = torch.zeros(1, 3, 64, dtype=model.backbone.dtype)
    with torch.inference_mode():
        assert _runs(layer, hidden) == available()
    plain = copy.deepcopy(model)
    restore(plain)
    cosine_N = (model.encode(TEXTS) * plain.encode(TEXTS)).sum(axis=1)
    assert cosine_N.min() > (0.9999 if model.backbone.dtype == torch.float32 else 0.999)


def test_vectors_of_a_model_in_int8(folder: Path, tmp_path: Path) -> None:
    whole = NVEmbed.from_pretrained(folder).encode(TEXTS)
    model = load_encoder(str(folder), "int8")
    vectors = model.encode_document(TEXTS)
    assert 0.99 < (vectors * whole).sum(axis=1).min() < 1 - 1e-6
    alone = np.concatenate([model.encode_document([text]) for text in TEXTS])
    assert (alone * vectors).sum(axis=1).min() > 0.9999
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    places = (tmp_path / "texts.jsonl", tmp_path / "v.npy")
    encode_file(str(folder), *places, task=None, dtype="int8")
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), vectors, atol=1e-6)
    with pytest.raises(ModelError, match="weights in int8_products are not saved"):
        model.save_pretrained(str(tmp_path / "other"))  # type: ignore[attr-defined]


def test_elsewhere_it_is_refused(folder: Path, tmp_path: Path) -> None:
    model = NVEmbed.from_pretrained(folder)
    write_stock(model, tmp_path, name="stock")
    with pytest.raises(ModelError, match="plain sentence-transformers model in int8"):
        load_encoder(str(tmp_path), "int8")
    with pytest.raises(ModelError, match="plain sentence-transformers model in float32-nf4"):
        load_encoder(str(tmp_path), "float32-nf4")
    with pytest.raises(ModelError, match="products in int8 on meta"):
        quantize_backbone(model.to("meta"), "int8_products")
