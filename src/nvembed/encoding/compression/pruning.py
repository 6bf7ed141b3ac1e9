"""Fewer layers and narrower MLPs, chosen by what given texts show.

A layer goes whose absence changes the *vectors* least, one after the other, each time measured
without those that went before. A channel of a gated MLP adds ``h · w`` to a token's state, its
activation times its column of the down projection: those go whose additions are shortest on
average. Letters: N texts, T tokens, D width, F channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nvembed.core.errors import ModelError
from nvembed.kernels.layers import accelerate, restore
from nvembed.model.embedder import NVEmbed
from nvembed.model.packs import embed_pack
from nvembed.model.tokens import TokenizedText

Packs = Sequence[Sequence[TokenizedText]]


class LeftOut(NamedTuple):
    """A layer that goes."""

    layer: int  # counted from 0 in the whole model
    change: float  # mean of 1 − cosine to the whole model's vectors, without it and those before


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


class _Watched(nn.Module):
    """A layer that can be passed over, or give again what it gave before."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.skipped = False
        self.output: Any = None
        self.known = False

    def forward(self, hidden_states: Any, *arguments: Any, **options: Any) -> Any:
        if self.skipped:
            return hidden_states
        if not self.known:
            self.output = self.layer(hidden_states, *arguments, **options)
        return self.output


@contextmanager
def _watched(layers: nn.ModuleList) -> Iterator[list[_Watched]]:
    own = list(layers)
    watched = [_Watched(layer) for layer in own]
    try:
        for place, layer in enumerate(watched):
            layers[place] = layer
        yield watched
    finally:
        for place, kept in enumerate(own):
            layers[place] = kept


@torch.inference_mode()
def layers_to_leave_out(
    model: NVEmbed, packs: Packs, keep: int, done: Callable[[], None] = lambda: None
) -> list[LeftOut]:
    """The layers that go until ``keep`` are left, in the order in which they go.

    Of equally dispensable layers the first goes. ``done`` is told after each. The states before a
    layer are computed once for all candidates behind it, so a round costs half of one full forward
    per candidate.
    """
    model.eval()
    whole = [embed_pack(model, pack).float() for pack in packs]
    count, found = sum(map(len, packs)), list[LeftOut]()
    with _watched(decoder_layers(model)) as layers, model.pooling.fixed_weights():
        left = list(range(len(layers)))
        while len(left) > keep:
            changes = torch.zeros(len(left), dtype=torch.float64)
            for pack, whole_ND in zip(packs, whole, strict=True):
                changes += _changes(
                    [layers[n] for n in left], partial(embed_pack, model, pack), whole_ND
                )
            least = int(changes.argmin())
            found.append(LeftOut(left.pop(least), float(changes[least]) / count))
            layers[found[-1].layer].skipped = True
            done()
    return found


def _changes(layers: Sequence[_Watched], embed: Callable[[], Tensor], whole_ND: Tensor) -> Tensor:
    """Sums of 1 − cosine over the texts of a pack, without each of the layers in turn."""
    sums = []
    for number, layer in enumerate(layers):
        layer.skipped = True
        cosine_N = torch.cosine_similarity(embed().float(), whole_ND, dim=1)
        layer.skipped = False
        sums.append(float((1 - cosine_N).double().sum()))
        if number:  # the layer before has now run behind all those before it
            layers[number - 1].known = True
    for layer in layers:
        layer.known, layer.output = False, None
    return torch.tensor(sums, dtype=torch.float64)


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


@torch.no_grad()
def cut_mlps(model: NVEmbed, lengths: Sequence[Tensor], width: int) -> None:
    """Keep the ``width`` channels of each MLP whose additions are longest, in place."""
    for mlp, length_F in zip(gated_mlps(model), lengths, strict=True):
        kept_F = length_F.topk(width).indices.sort().values.to(mlp.down_proj.weight.device)
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
