"""Layers that are computed again in the backward pass: the same numbers, less kept."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from families import FAMILIES, make_family
from nvembed.core.errors import ModelError
from nvembed.model.backbone import add_lora, recompute_layers
from nvembed.model.embedder import NVEmbed
from nvembed.model.packs import embed_pack
from nvembed.model.settings import LoraSettings
from nvembed.model.tokens import TokenizedText
from nvembed.training.model import counted_graph

PACK = [TokenizedText(tuple(range(3, 3 + length)), 0) for length in (17, 9, 17, 30)]


def loss_and_gradients(model: NVEmbed, *, half: bool) -> tuple[float, dict[str, Any], int]:
    """Of two packs in one autocast block, as in a step; and the bytes that the first one keeps."""
    model.zero_grad()
    model.train()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
        with counted_graph(model) as held:
            first_ND = embed_pack(model, PACK)
        kept = sum(storage.nbytes() for storage in held.values())
        second_ND = embed_pack(model, PACK[1:])
        loss = (first_ND[1:] * second_ND.roll(1, 0)).sum()
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, kept


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "bert", "modernbert"])
def test_same_bits_and_less_kept(
    tmp_path: Path, tiny_tokenizer: Any, family: str, lora: bool, half: bool
) -> None:
    model = NVEmbed.from_pretrained(make_family(family, tmp_path, tiny_tokenizer), device="cpu")
    if lora:
        add_lora(model.backbone, LoraSettings(rank=4, dropout=0.2))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, and with it the gradient of lora_A
                nn.init.normal_(parameter, std=0.1)
    loss, gradients, kept = loss_and_gradients(model, half=half)
    recompute_layers(model.backbone)
    again, same, less = loss_and_gradients(model, half=half)
    assert again == loss
    assert same.keys() == gradients.keys() != set()
    for name, value in gradients.items():
        assert torch.equal(same[name], value), name
    assert any(value.abs().max() > 0 for value in gradients.values())
    assert less < kept / 3
    model.eval()
    with torch.no_grad():
        assert embed_pack(model, PACK).isfinite().all()


def test_a_family_without_such_layers_is_refused(tiny_decoder_dir: Path) -> None:
    model = NVEmbed.from_pretrained(tiny_decoder_dir, device="cpu")
    model.backbone.model.layers = nn.ModuleList([nn.Identity()])
    with pytest.raises(ModelError, match="activation_checkpointing: the layers of mistral cannot"):
        recompute_layers(model.backbone)


def test_every_family_has_such_layers(tmp_path: Path, tiny_tokenizer: Any) -> None:
    for family in FAMILIES:
        folder = make_family(family, tmp_path / family, tiny_tokenizer)
        recompute_layers(NVEmbed.from_pretrained(folder, device="cpu").backbone)
