"""What is left of a model, fitted to what it was: the last product of each layer, by least squares.

Where layers or channels go, every layer behind them reads states that it never learned to read. The
down projection of an MLP adds ``h W`` to a token's state, so the change of W that brings the states
behind a layer nearest to those of the whole model has a closed form. Layer by layer, each on what
the ones before it now give, it needs no gradient and few texts. Letters: T tokens, D width, F
channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nvembed.encoding.compression.pruning import Packs, decoder_layers
from nvembed.model.embedder import NVEmbed
from nvembed.model.packs import embed_pack
from nvembed.model.tokens import TokenizedText

_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # times the mean of the diagonal
_HELD_OUT = 5  # every fifth part of a pack's tokens chooses among them
_SMALLEST = 1e-12


class Fitted(NamedTuple):
    """What became of a layer.

    Attributes:
        layer: counted from 0 in the model as it came.
        before: the squared distance of its states to the whole model's, over their own squares, of
            tokens that were held out of the fit.
        after: the same once it is fitted.
    """

    layer: int
    before: float
    after: float


class Stream:
    """States of a pack before a layer, and what the model tells its layers besides.

    Attributes:
        whole: ``(1, T, D)`` of the whole model.
        own: the same of the one that is fitted.
    """

    def __init__(self, model: NVEmbed, texts: Sequence[TokenizedText]) -> None:
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: list[Tensor] = []

        def note(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            named = dict(named)
            first.append(given[0] if given else named.pop("hidden_states"))
            self._calls.append((given[1:], named))

        layers = decoder_layers(model)
        hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
        try:
            embed_pack(model, texts)
        finally:
            for hook in hooks:
                hook.remove()
        self.texts = texts
        self.whole = self.own = first[0]

    def through(self, layer: nn.Module, number: int, state: Tensor) -> Tensor:
        """The state behind a layer."""
        given, named = self._calls[number]
        found: Any = layer(state, *given, **named)
        return found[0] if isinstance(found, tuple) else found

    def watched(self, layer: nn.Module, number: int) -> tuple[Tensor, Tensor]:
        """The own state behind a layer ``(T, D)``, and what its MLP adds from ``(T, F)``."""
        seen: list[Tensor] = []
        down = down_projection(layer)
        hook = down.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            state = self.through(layer, number, self.own)
        finally:
            hook.remove()
        return flat(state), flat(seen[0])


def flat(state: Tensor) -> Tensor:
    """Rows in float32."""
    return state.flatten(0, -2).float()


def down_projection(layer: nn.Module) -> Any:
    """The last product of a layer's MLP, or ``None``."""
    return getattr(getattr(layer, "mlp", None), "down_proj", None)


def can_be_fitted(layers: Iterable[nn.Module], stream: Stream) -> bool:
    """Whether what the down projections give is added to the states as it is."""
    layers = list(layers)
    if not all(isinstance(down_projection(layer), nn.Linear) for layer in layers):
        return False
    down = down_projection(layers[0])
    whole_TD, gated_TF = stream.watched(layers[0], 0)
    hook = down.register_forward_hook(lambda _, given, out: torch.zeros_like(out))
    try:
        without_TD, _ = stream.watched(layers[0], 0)
    finally:
        hook.remove()
    bias_D = None if down.bias is None else down.bias.float()
    added_TD = nn.functional.linear(gated_TF, down.weight.float(), bias_D)
    off = (whole_TD - without_TD - added_TD).abs().max()
    return bool(off <= 0.02 * added_TD.abs().max())


# --- Least squares --------------------------------------------------------------------------------


class Solution(NamedTuple):
    """The change of a product that brings states nearest to others.

    Attributes:
        change_FD: to be added to its weight; ``None`` where none helps.
        before: the squared distance over the squares of what there should be, of held-out tokens.
        after: the same with the change.
    """

    change_FD: Tensor | None
    before: float
    after: float


class _Sums:
    """Products over tokens: of channels, of channels and what is missing, and of the latter."""

    def __init__(self, channels: int, width: int) -> None:
        self.gram_FF = torch.zeros(channels, channels, dtype=torch.float64)
        self.cross_FD = torch.zeros(channels, width, dtype=torch.float64)
        self.missing = self.size = 0.0

    def add(self, gated_TF: Tensor, missing_TD: Tensor, size: float) -> None:
        self.gram_FF += (gated_TF.T @ gated_TF).double()
        self.cross_FD += (gated_TF.T @ missing_TD).double()
        self.missing += float(missing_TD.double().square().sum())
        self.size += size

    def change(self, ridge: float, more: _Sums | None = None) -> Tensor:
        """Least squares with a ridge, ``(F, D)``; of these tokens and some more."""
        gram_FF = self.gram_FF if more is None else self.gram_FF + more.gram_FF
        cross_FD = self.cross_FD if more is None else self.cross_FD + more.cross_FD
        level = ridge * gram_FF.diagonal().mean() + _SMALLEST
        regular_FF = gram_FF + level * torch.eye(len(gram_FF), dtype=gram_FF.dtype)
        factor_FF, failed = torch.linalg.cholesky_ex(regular_FF)
        if int(failed):
            return torch.zeros_like(cross_FD)
        return torch.cholesky_solve(cross_FD, factor_FF)

    def error(self, change_FD: Tensor | None) -> float:
        """What is missing after a change, over the size of what there should be."""
        left = self.missing
        if change_FD is not None:
            fitted_FD = self.gram_FF @ change_FD
            left += float((change_FD * (fitted_FD - 2 * self.cross_FD)).sum())
        return left / max(self.size, _SMALLEST)


def solve(packs: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Solution:
    """Fit states ``(T, D)`` to those of the whole model ``(T, D)`` by channels ``(T, F)``.

    Errors count by the size of the state that a token has in the whole model, for norms undo it.
    How far weights may go is chosen on the last fifth of each pack, which is fitted to as well
    once that is settled. ``packs`` gives the whole model's states, the own ones and the channels.
    """
    fitting = choosing = None
    for whole_TD, state_TD, gated_TF in packs:
        if fitting is None or choosing is None:
            fitting, choosing = (_Sums(gated_TF.shape[1], whole_TD.shape[1]) for _ in range(2))
        scale_T1 = (whole_TD.square().mean(dim=1, keepdim=True) + _SMALLEST).rsqrt()
        rows = (gated_TF * scale_T1, (whole_TD - state_TD) * scale_T1, whole_TD * scale_T1)
        cut = len(whole_TD) - len(whole_TD) // _HELD_OUT
        for sums, part in ((fitting, slice(cut)), (choosing, slice(cut, None))):
            gated_tF, missing_tD, size_tD = (row[part] for row in rows)
            sums.add(gated_tF, missing_tD, float(size_tD.square().sum()))
    assert fitting is not None
    assert choosing is not None
    before = after = choosing.error(None)
    best = None
    for ridge in _RIDGES:
        if (error := choosing.error(fitting.change(ridge))) < after:
            best, after = ridge, error
    change_FD = None if best is None else fitting.change(best, choosing).float()
    return Solution(change_FD, before, after)


# --- A model --------------------------------------------------------------------------------------


@torch.no_grad()
def fit_layers(
    model: NVEmbed,
    packs: Packs,
    dropped: Collection[int],
    kept: Sequence[Tensor] | None = None,
    done: Callable[[], None] = lambda: None,
) -> list[Fitted]:
    """Fit each layer that stays to the states before the next one that does, in place.

    Args:
        model: as it came; its layers and channels are left out by the caller, afterwards.
        packs: texts, as they are read.
        dropped: layers that will go.
        kept: channels ``(F',)`` of each layer that will stay; ``None`` is all of them.
        done: told after each layer.

    Returns:
        A row for each layer that stays; nothing where an MLP has no ``down_proj``, or does not
        simply add to the states (Gemma's have a norm behind them).
    """
    model.eval()
    layers = decoder_layers(model)
    streams = [Stream(model, pack) for pack in packs]
    if not can_be_fitted(layers, streams[0]):
        return []
    stay = [number for number in range(len(layers)) if number not in dropped]
    found, place = list[Fitted](), 0
    for number, after in zip(stay, [*stay[1:], len(layers)], strict=True):
        for stream in streams:
            for passed in range(place, after):
                stream.whole = stream.through(layers[passed], passed, stream.whole)
        place = after
        channels = None if kept is None else kept[number]
        found.append(_fit(layers[number], number, streams, channels))
        done()
    return found


def _fit(
    layer: nn.Module, number: int, streams: Sequence[Stream], channels: Tensor | None
) -> Fitted:
    """Fit one layer on all packs, and take their own states behind it."""
    down = down_projection(layer)
    if channels is None:
        channels = torch.arange(down.in_features)
    gone = torch.ones(down.in_features, dtype=torch.bool)
    gone[channels] = False
    gone_DG = down.weight.float()[:, gone]
    states = []
    for stream in streams:
        state_TD, gated_TF = stream.watched(layer, number)
        states.append((state_TD - gated_TF[:, gone] @ gone_DG.T, gated_TF[:, channels]))
    found = solve((flat(s.whole), *own) for s, own in zip(streams, states, strict=True))
    if found.change_FD is not None:
        down.weight[:, channels] += found.change_FD.T.to(down.weight.dtype)
    for stream, (state_TD, gated_TF) in zip(streams, states, strict=True):
        if found.change_FD is not None:
            state_TD = state_TD + gated_TF @ found.change_FD
        stream.own = state_TD.to(stream.whole.dtype).reshape(stream.own.shape)
    return Fitted(number, found.before, found.after)
