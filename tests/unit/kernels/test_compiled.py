"""Compiled norms and activations: the values and gradients of the model as it is."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch

from nvembed.kernels.layers import compile_elementwise
from nvembed.model.embedder import NVEmbed
from nvembed.model.packing import flatten


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_values_and_gradients(tiny_decoder_dir: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    model = NVEmbed.from_pretrained(tiny_decoder_dir, device="cpu")
    compiled = copy.deepcopy(model)
    # Per layer two norms and an MLP, and the last norm.
    assert compile_elementwise(compiled.backbone.model) == 2 * 3 + 1
    for texts in (["some text", "other"], ["one that is longer than those"]):
        flat = flatten(model.backbone.tokenize_texts(texts))
        states = [each.backbone.hidden(flat) for each in (model, compiled)]
        torch.testing.assert_close(states[1], states[0], atol=1e-5, rtol=1e-5)
        for each, state in zip((model, compiled), states, strict=True):
            each.zero_grad()
            (state**2).sum().backward()
        gradients = dict(compiled.named_parameters())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(
                    gradients[name].grad, parameter.grad, atol=1e-3, rtol=1e-4
                )
