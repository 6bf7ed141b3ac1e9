"""Packed linear layers: the products of plain ones to the bit, in layers, models and the server."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nvembed.kernels import packed
from nvembed.kernels.functions import has_onednn, onednn
from nvembed.kernels.layers import _runs, available
from nvembed.kernels.packed import PackedLinear, pack_linears
from nvembed.model.embedder import NVEmbed
from nvembed.serving import server
from nvembed.serving.config import ServerConfig

TEXTS = ["x", "a cat sleeps on the mat", "bread and soup on the table " * 3]

CPU = packed.this_cpu()
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not (CPU.may_multiply_bfloat16 and CPU.has_wide_registers),
            reason="this CPU has no instructions for bfloat16, so it packs no such weights",
        ),
    ),
]
pytestmark = pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU for whose float32 oneDNN is the one to multiply."""
    monkeypatch.setattr(packed, "onednn_pays", lambda: True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_plain_weights(dtype: torch.dtype, bias: bool) -> None:
    layer = nn.Linear(64, 48, bias=bias).to(dtype)
    made = PackedLinear(layer)
    assert (made.in_features, made.out_features, made.dtype) == (64, 48, dtype)
    for rows in (2, 7, 40, 300):
        x_TI = torch.randn(rows, 64).to(dtype)
        expected_TO = onednn(x_TI, layer.weight.detach(), layer.bias)
        if dtype is torch.bfloat16:
            torch.testing.assert_close(made(x_TI), layer(x_TI), atol=0, rtol=0)
            torch.testing.assert_close(made(x_TI), expected_TO, atol=0, rtol=0)
        else:  # another product of few rows, on some CPUs
            torch.testing.assert_close(made(x_TI), expected_TO, atol=1e-6, rtol=1e-6)
    exact = nn.functional.linear(
        x_TI.double(), layer.weight.double(), layer.bias.double() if bias else None
    )
    bound = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(made(x_TI[None])[0].double(), exact, atol=bound, rtol=bound)
    assert made(torch.empty(1, 0, 64, dtype=dtype)).shape == (1, 0, 48)


def test_only_what_onednn_multiplies_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).half(), nn.Linear(8, 8).bfloat16())
    none = packed.this_cpu()._replace(may_multiply_bfloat16=False)
    monkeypatch.setattr(packed, "this_cpu", lambda: none)
    monkeypatch.setattr(packed, "onednn_pays", lambda: False)
    assert pack_linears(copy.deepcopy(model)) == 0
    monkeypatch.setattr(packed, "onednn_pays", lambda: True)
    assert pack_linears(model) == 1
    assert [type(layer) for layer in model] == [PackedLinear, nn.Linear, nn.Linear]
    assert [name for name, _ in model.named_parameters()] == [
        *("1.weight", "1.bias"),
        *("2.weight", "2.bias"),
    ]  # the plain weight is gone


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_model_has_the_same_vectors(
    tiny_decoder_dir: Path, everywhere: None, dtype: torch.dtype
) -> None:
    model = NVEmbed.from_pretrained(tiny_decoder_dir, dtype=dtype, device="cpu")
    expected = [model.encode(text) for text in TEXTS]
    layers = model.backbone.model.layers
    assert pack_linears(model.backbone) == 7 * len(layers)
    if available():  # whole layers compute as before
        with torch.no_grad():
            assert all(_runs(layer, torch.zeros(1, 3, model.dimension)) for layer in layers)
    found = [model.encode(text) for text in TEXTS]
    bound = 0 if dtype is torch.bfloat16 else 1e-6
    np.testing.assert_allclose(found, expected, atol=bound, rtol=0)
    # The vacuity guard: texts are told apart.
    assert abs(expected[0] @ expected[1]) < 0.9999


def test_a_server_packs_its_models(tiny_decoder_dir: Path, everywhere: None, monkeypatch) -> None:
    seen: list[NVEmbed] = []
    build = server.build_engine

    def built(encoder, forwards):
        seen.append(encoder)
        return build(encoder, forwards)

    monkeypatch.setattr(server, "build_engine", built)
    server._load(str(tiny_decoder_dir), "float32", ServerConfig(), torch.get_num_threads())
    kinds = {type(layer) for layer in seen[0].backbone.modules()}
    assert PackedLinear in kinds
    assert nn.Linear not in kinds
