"""Pruning by brute force: a changed copy of the model for every question, and plain BPE."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nvembed.model.embedder import NVEmbed
from nvembed.model.packing import flatten


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


def change_of_run(model: NVEmbed, texts: Sequence[str], packs: Any, first: int, end: int) -> float:
    """Mean of 1 − cosine without the layers from one up to another, the one in front fitted."""
    run = range(first, end)
    other = fit(model, packs, run, only=first - 1)[0] if packs else without_layers(model, run)
    return change(model, other, texts)


def cheapest(changes: np.ndarray, keep: int) -> tuple[float, tuple[int, ...]]:
    """The least sum over the runs between layers that stay, of all choices, and these layers."""
    count, found = len(changes), []
    for stay in itertools.combinations(range(count), keep):
        fronts, ends = [-1, *stay], [*stay, count]
        runs = [(f + 1, e) for f, e in zip(fronts, ends, strict=True) if f + 1 < e]
        found.append((float(sum(changes[run] for run in runs)), stay))
    return min(found)


@torch.no_grad()
def states(
    model: NVEmbed, number: int, packs: Sequence[Any]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each pack the states behind a layer, and what its down projection is given."""
    layer: Any = model.backbone.model.layers[number]
    found, behind, given = [], [], []
    hooks = [
        layer.register_forward_hook(
            lambda _, args, out: behind.append(out[0] if isinstance(out, tuple) else out)
        ),
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: given.append(args[0])),
    ]
    for pack in packs:
        model({"flat": flatten(pack)})
        pair = (behind[-1], given[-1])
        found.append(tuple(x.detach().flatten(0, -2).double().numpy() for x in pair))
    for hook in hooks:
        hook.remove()
    return found


def fit(
    model: NVEmbed,
    packs: Sequence[Any],
    dropped: Sequence[int],
    kept: Sequence[Any] | None = None,
    only: int | None = None,
) -> tuple[NVEmbed, list[tuple[int, float, float]]]:
    """A fitted copy without layers, with zeros in the columns of channels that go, and its errors.

    Every layer's states are those of a full forward of the copy as it is by then, and least squares
    have rows for the ridge.
    """
    stay = [n for n in range(len(model.backbone.model.layers)) if n not in dropped]
    small, found = without_layers(model, dropped), []
    for place, number in enumerate(stay):
        end = ([*stay[1:], len(model.backbone.model.layers)])[place] - 1
        weight = small.backbone.model.layers[place].mlp.down_proj.weight.data
        channels = np.arange(weight.shape[1]) if kept is None else kept[number].numpy()
        gone = np.setdiff1d(np.arange(weight.shape[1]), channels)
        weight[:, gone] = 0
        parts: dict[str, list[Any]] = {"fit": [], "choose": []}
        for (whole, _), (own, gated) in zip(
            states(model, end, packs), states(small, place, packs), strict=True
        ):
            scale = 1 / np.sqrt((whole**2).mean(axis=1, keepdims=True))
            rows = [gated[:, channels] * scale, (whole - own) * scale, whole * scale]
            cut = len(whole) - len(whole) // 5
            parts["fit"].append([row[:cut] for row in rows])
            parts["choose"].append([row[cut:] for row in rows])
        fitting, choosing = (
            [np.concatenate(rows) for rows in zip(*part, strict=True)] for part in parts.values()
        )

        def solved(ridge: float, *tokens: Any) -> np.ndarray:
            gated, missing = (np.concatenate([t[n] for t in tokens]) for n in (0, 1))
            level = np.sqrt(ridge * (gated**2).sum() / gated.shape[1])
            rows = np.concatenate([gated, level * np.eye(gated.shape[1])])
            zeros = np.zeros((gated.shape[1], missing.shape[1]))
            return np.linalg.lstsq(rows, np.concatenate([missing, zeros]), rcond=None)[0]

        size = (choosing[2] ** 2).sum()
        errors = {None: (choosing[1] ** 2).sum() / size} | {
            ridge: ((choosing[1] - choosing[0] @ solved(ridge, fitting)) ** 2).sum() / size
            for ridge in (1e-3, 1e-2, 1e-1, 1.0)
        }
        best = min(errors, key=lambda ridge: errors[ridge])
        if only not in (None, number):
            best = None
        if best is not None:
            change = solved(best, fitting, choosing)
            weight[:, channels] += torch.from_numpy(change.T).to(weight.dtype)
        found.append((number, errors[None], errors[best]))
    return small, found


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
