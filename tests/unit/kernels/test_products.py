"""Products by either library: the values and gradients of torch in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nvembed.kernels import functions as products
from nvembed.kernels.functions import product, transposed_times
from nvembed.kernels.layers import accelerate

SHAPES = [(5, 3, 4), (64, 32, 16), (33, 16, 96), (7, 1, 2)]


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def onednn(request, monkeypatch) -> bool:
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "onednn_pays", lambda: request.param)
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients(onednn: bool, shape: tuple[int, int, int], bias: bool) -> None:
    rows, inner, columns = shape
    tensors = [torch.randn(rows, inner), torch.randn(columns, inner)]
    tensors += [torch.randn(columns)] if bias else []
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    grad = torch.randn(rows, columns)
    out = product(*leaves)
    expected = nn.functional.linear(*exact)
    out.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)
    for leaf, want in zip(leaves, exact, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.double(), want.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_a_weight(onednn: bool, shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    y, x = torch.randn(rows, columns), torch.randn(rows, inner)
    expected = (y.double().T @ x.double()).float()
    torch.testing.assert_close(transposed_times(y, x), expected, atol=1e-4, rtol=1e-4)


def test_only_what_needs_a_gradient_gets_one(onednn: bool) -> None:
    weight = torch.randn(4, 3)
    x = torch.randn(2, 3, requires_grad=True)
    product(x, weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_layers_keep_names_weights_and_results(onednn: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5, bias=False))
    x = torch.randn(2, 7, 8)
    expected = model(x)
    names = [name for name, _ in model.named_parameters()]
    fast = copy.deepcopy(model)
    assert accelerate(fast) == {"linear": 2}
    assert ["forward" in vars(m) for m in fast] == [True, False, True]
    assert [name for name, _ in fast.named_parameters()] == names
    torch.testing.assert_close(fast(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(copy.deepcopy(fast)(x), fast(x), atol=0, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), model(x))
    half = copy.deepcopy(fast).bfloat16()
    assert torch.equal(half(x.bfloat16()), copy.deepcopy(model).bfloat16()(x.bfloat16()))
    assert fast(torch.empty(0, 8)).shape == (0, 5)


def test_an_exported_graph_has_no_onednn(onednn: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    accelerate(model)
    graph = torch.export.export(model, (torch.randn(2, 8),)).graph
    assert not any("mkldnn" in str(node.target) for node in graph.nodes)


def test_the_choice_is_a_measurement() -> None:
    assert products.onednn_pays() in (True, False)
