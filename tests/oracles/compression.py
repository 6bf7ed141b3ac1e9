"""Pruning by brute force: a changed copy of the model for every question, and plain BPE."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from nvembed.model.embedder import NVEmbed


def without_layers(model: NVEmbed, dropped: Sequence[int]) -> NVEmbed:
    """A copy whose list of layers is shorter."""
    other = copy.deepcopy(model)
    inner: Any = other.backbone.model
    kept = [n for n in range(len(inner.layers)) if n not in dropped]
    for key in ("layer_types", "no_rope_layers"):
        if (values := getattr(inner.config, key, None)) is not None:
            setattr(inner.config, key, [values[n] for n in kept])
    inner.layers = torch.nn.ModuleList(inner.layers[n] for n in kept)
    inner.config.num_hidden_layers = len(kept)
    return other


def change(model: NVEmbed, other: NVEmbed, texts: Sequence[str]) -> float:
    """Mean of 1 − cosine of two models' vectors, each text encoded alone."""
    total = 0.0
    for text in texts:
        first, second = (
            m.encode([text], convert_to_tensor=True)[0].double() for m in (model, other)
        )
        total += 1 - float(torch.cosine_similarity(first, second, dim=0))
    return total / len(texts)


def greedy(model: NVEmbed, texts: Sequence[str], keep: int) -> list[tuple[int, float]]:
    """Layers that go, in order, with what the vectors have changed by then."""
    dropped: list[tuple[int, float]] = []
    while True:
        gone = [n for n, _ in dropped]
        left = [n for n in range(len(model.backbone.model.layers)) if n not in gone]
        if len(left) == keep:
            return dropped
        changes = {n: change(model, without_layers(model, [*gone, n]), texts) for n in left}
        dropped.append(min(changes.items(), key=lambda item: item[1]))


@torch.no_grad()
def channel_lengths(mlp: Any, given: Sequence[torch.Tensor]) -> list[float]:
    """Mean length of ``silu(gate x) · up x`` times a channel's column, token by token."""
    found = []
    for f in range(mlp.gate_proj.weight.shape[0]):
        lengths = []
        for x_TD in given:
            for x_D in x_TD.double():
                gate = float(x_D @ mlp.gate_proj.weight[f].double())
                up = float(x_D @ mlp.up_proj.weight[f].double())
                gated = gate / (1 + torch.exp(torch.tensor(-gate))) * up
                lengths.append(float((gated * mlp.down_proj.weight[:, f].double()).norm()))
        found.append(sum(lengths) / len(lengths))
    return found
