"""Fewer layers, and narrower MLPs, whose channels are chosen by what given texts show.

A channel of a gated MLP adds ``h · w`` to a token's state, its activation times its column of the
down projection: those go whose additions are shortest on average. Which layers go: ``depth.py``.
Letters: T tokens, D width, F channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nvembed.core.errors import ModelError
from nvembed.kernels.layers import accelerate, restore
from nvembed.model.embedder import NVEmbed
from nvembed.model.packs import embed_pack
from nvembed.model.tokens import TokenizedText

Packs = Sequence[Sequence[TokenizedText]]


def decoder_layers(model: NVEmbed) -> nn.ModuleList:
    """The layers of the backbone; a ModelError where it does not have them in one list."""
    backbone = model.backbone.model
    layers = getattr(backbone, "layers", None)
    wanted = getattr(backbone.config, "num_hidden_layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != wanted:
        raise ModelError(
            f"the layers of the {backbone.config.model_type} family cannot be taken out",
            where="layers",
            expected="a decoder such as Llama, Mistral, Qwen or Gemma",
        )
    return layers


# --- Depth ----------------------------------------------------------------------------------------


def leave_out_layers(model: NVEmbed, dropped: Sequence[int]) -> None:
    """Take layers out of the backbone, and out of what its configuration lists layer by layer."""
    layers, config = decoder_layers(model), model.backbone.model.config
    count = len(layers)
    kept = [number for number in range(count) if number not in set(dropped)]
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == count:
            setattr(config, name, [value[number] for number in kept])
    model.backbone.model.layers = nn.ModuleList(layers[number] for number in kept)
    config.num_hidden_layers = len(kept)
    for number, layer in enumerate(model.backbone.model.layers):
        modules: list[Any] = list(layer.modules())
        for module in modules:
            if hasattr(module, "layer_idx"):
                module.layer_idx = number


# --- Width ----------------------------------------------------------------------------------------


def gated_mlps(model: NVEmbed) -> list[Any]:
    """The MLPs of all layers; a ModelError where they are not gated or not of one width."""
    mlps: list[Any] = [getattr(layer, "mlp", None) for layer in decoder_layers(model)]
    names = ("gate_proj", "up_proj", "down_proj")
    if not all(isinstance(getattr(mlp, name, None), nn.Linear) for mlp in mlps for name in names):
        message = f"the MLPs of the {model.backbone.model.config.model_type} family cannot be cut"
        raise ModelError(message, where="mlp", expected=f"layers with an mlp of {', '.join(names)}")
    return mlps


@torch.inference_mode()
def channel_lengths(model: NVEmbed, packs: Packs) -> list[Tensor]:
    """Mean length ``(F,)`` of what each channel of each layer's MLP adds to a token's state."""
    model.eval()
    mlps = gated_mlps(model)
    sums = [torch.zeros(mlp.down_proj.in_features, dtype=torch.float64) for mlp in mlps]

    def note(number: int, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        sums[number] += given[0].flatten(0, -2).abs().sum(dim=0, dtype=torch.float64).cpu()

    hooks = [
        mlp.down_proj.register_forward_pre_hook(partial(note, number))
        for number, mlp in enumerate(mlps)
    ]
    try:
        for pack in packs:
            embed_pack(model, pack)
    finally:
        for hook in hooks:
            hook.remove()
    tokens = sum(len(text) for pack in packs for text in pack)
    return [
        total_F / tokens * mlp.down_proj.weight.double().norm(dim=0).cpu()
        for total_F, mlp in zip(sums, mlps, strict=True)
    ]


def longest(lengths: Sequence[Tensor], width: int) -> list[Tensor]:
    """The numbers of the ``width`` longest of each layer's channels, rising."""
    return [length_F.topk(width).indices.sort().values for length_F in lengths]


@torch.no_grad()
def cut_mlps(model: NVEmbed, lengths: Sequence[Tensor], width: int) -> None:
    """Keep the ``width`` channels of each MLP whose additions are longest, in place."""
    for mlp, kept_F in zip(gated_mlps(model), longest(lengths, width), strict=True):
        kept_F = kept_F.to(mlp.down_proj.weight.device)
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight = _part(projection.weight, kept_F, 0)
            if projection.bias is not None:
                projection.bias = _part(projection.bias, kept_F, 0)
            projection.out_features = width
        mlp.down_proj.weight = _part(mlp.down_proj.weight, kept_F, 1)
        mlp.down_proj.in_features = width
        mlp.intermediate_size = width
    model.backbone.model.config.intermediate_size = width
    restore(model)  # what computes a layer depends on its widths
    accelerate(model)


def _part(value: nn.Parameter, kept: Tensor, dim: int) -> nn.Parameter:
    return nn.Parameter(value.index_select(dim, kept).contiguous(), value.requires_grad)
