"""Which layers go: the runs of layers whose absence changes the vectors least.

A layer that stays can stand for the ones behind it, once its last product is fitted to the states
behind those (``fitting.py``). What a run of layers is worth is what the *vectors* change without
it, everything else being whole; long runs in the middle cost little more than short ones. The
cheapest choice of runs is found among all, by dynamic programming over their sums. Letters: T
tokens, D width, F channels, L layers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nvembed.encoding.compression.fitting import Stream, can_be_fitted, flat, solve
from nvembed.encoding.compression.pruning import Packs, decoder_layers
from nvembed.model.embedder import NVEmbed
from nvembed.model.packs import embed_pack

_LONGEST = 6  # layers of a run, where the model is to become no shorter than a third


class Run(NamedTuple):
    """Layers that go together.

    Attributes:
        layers: counted from 0 in the whole model.
        change: mean of 1 − cosine to the whole model's vectors, without this run alone and with
            the layer in front of it fitted.
    """

    layers: tuple[int, ...]
    change: float


@torch.no_grad()
def layers_to_leave_out(
    model: NVEmbed,
    choosing: Packs,
    fitting: Packs,
    keep: int,
    done: Callable[[], None] = lambda: None,
) -> list[Run]:
    """The runs that go so that ``keep`` layers are left, whose changes have the least sum.

    Args:
        model: it is left as it is.
        choosing: texts by which changes are measured.
        fitting: texts by which layers are fitted.
        keep: layers that stay.
        done: told after each layer that runs begin behind.
    """
    model.eval()
    count = len(decoder_layers(model))
    longest = min(count - keep, max(_LONGEST, 2 * math.ceil(count / keep)))
    with model.pooling.fixed_weights():
        changes = changes_of_runs(model, choosing, fitting, longest, done)
    return cheapest_runs(changes, keep)


def cheapest_runs(changes: NDArray[np.float64], keep: int) -> list[Run]:
    """Choose runs by the sum of their changes.

    ``changes`` ``(L, L + 1)`` has what the run from a layer up to another one changes, which is not
    among them; infinite where that was not measured, 0 where nothing is between.
    """
    count = len(changes)
    # Of what begins at a layer: the least sum, by how many layers stay, and the end of its run.
    least = np.full((keep + 1, count + 1), np.inf)
    ends = np.zeros((keep + 1, count + 1), dtype=int)
    least[0, count] = 0.0
    for first in range(count, -1, -1):
        for stays in range(keep + 1):
            for end in range(first, count + 1):
                change = changes[first, end] if first < count else 0.0
                # A layer stays at the end of the run, unless nothing is left.
                rest = least[stays - 1, end + 1] if stays and end < count else np.inf
                rest = 0.0 if end == count and stays == 0 else rest
                if change + rest < least[stays, first]:
                    least[stays, first], ends[stays, first] = change + rest, end
    found, first = list[Run](), 0
    for stays in range(keep, -1, -1):
        end = int(ends[stays, first])
        if end > first:
            found.append(Run(tuple(range(first, end)), float(changes[first, end])))
        first = end + 1
    return found


# --- Measuring ------------------------------------------------------------------------------------


class _Given(nn.Module):
    """A layer that can be passed over, or give a state that is known."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.passed = False
        self.state: Tensor | None = None

    def forward(self, hidden_states: Any, *arguments: Any, **options: Any) -> Any:
        if self.state is not None:
            return self.state
        if self.passed:
            return hidden_states
        return self.layer(hidden_states, *arguments, **options)


@contextmanager
def _given(layers: nn.ModuleList) -> Iterator[list[_Given]]:
    own = list(layers)
    given = [_Given(layer) for layer in own]
    try:
        for place, layer in enumerate(given):
            layers[place] = layer
        yield given
    finally:
        for place, kept in enumerate(own):
            layers[place] = kept


class _Ahead:
    """States of the whole model before some layers in a row, of one pack."""

    def __init__(self, stream: Stream, layers: Sequence[nn.Module]) -> None:
        self.stream, self._layers = stream, layers
        self._first, self._held = 0, deque([stream.whole])

    def before(self, number: int) -> Tensor:
        """The state before a layer; behind the last one where there is none."""
        while len(self._held) <= number - self._first:
            behind = self._first + len(self._held) - 1
            self._held.append(self.stream.through(self._layers[behind], behind, self._held[-1]))
        return self._held[number - self._first]

    def drop_before(self, number: int) -> None:
        """Forget what lies before a layer."""
        self.before(number)
        while self._first < number:
            self._held.popleft()
            self._first += 1

    def behind(self, front: int, *, watch: bool) -> tuple[Tensor, Tensor | None]:
        """The state behind a layer, and what its MLP adds from where that is wanted."""
        if not watch:
            return flat(self.before(front + 1)), None
        self.stream.own = self.before(front)
        return self.stream.watched(self._layers[front], front)


def changes_of_runs(
    model: NVEmbed,
    choosing: Packs,
    fitting: Packs,
    longest: int,
    done: Callable[[], None] = lambda: None,
) -> NDArray[np.float64]:
    """Measure every run of up to ``longest`` layers, each alone; see ``cheapest_runs``."""
    layers = list(decoder_layers(model))
    count = len(layers)
    changes = np.full((count, count + 1), np.inf)
    np.fill_diagonal(changes, 0.0)
    seen, taught = (
        [_Ahead(Stream(model, pack), layers) for pack in packs] for packs in (choosing, fitting)
    )
    fits = can_be_fitted(layers, taught[0].stream)
    wanted = [embed_pack(model, one.stream.texts).float() for one in seen]
    with _given(decoder_layers(model)) as given:
        for front in range(-1, count - 1):  # the layer in front of a run; -1 is the table of tokens
            watch = fits and front >= 0
            own_seen, own_taught = (
                [one.behind(front, watch=watch) for one in ones] for ones in (seen, taught)
            )
            for end in range(front + 2, min(front + 1 + longest, count) + 1):
                change_FD = _solved(taught, own_taught, end) if watch else None
                states = []
                for one, (state_TD, gated_TF) in zip(seen, own_seen, strict=True):
                    if change_FD is not None and gated_TF is not None:
                        state_TD = state_TD + gated_TF @ change_FD
                    like = one.before(end)
                    states.append(state_TD.to(like.dtype).reshape(like.shape))
                changes[front + 1, end] = _change(model, given, end, seen, states, wanted)
            for one in (*seen, *taught):
                one.drop_before(front + 1)
            done()
    return changes


def _solved(
    taught: Sequence[_Ahead], own: Sequence[tuple[Tensor, Tensor | None]], end: int
) -> Tensor | None:
    """The change that fits what is before a run to what is behind it."""

    def packs() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for one, (state_TD, gated_TF) in zip(taught, own, strict=True):
            assert gated_TF is not None
            yield flat(one.before(end)), state_TD, gated_TF

    return solve(packs()).change_FD


def _change(
    model: NVEmbed,
    given: Sequence[_Given],
    end: int,
    seen: Sequence[_Ahead],
    states: Sequence[Tensor],
    wanted: Sequence[Tensor],
) -> float:
    """Mean of 1 − cosine with other states before a layer; before the final norm at the last."""
    total, texts = 0.0, 0
    for layer in given[: end - 1]:
        layer.passed = True
    for one, state, wanted_ND in zip(seen, states, wanted, strict=True):
        given[end - 1].state = state
        vectors_ND = embed_pack(model, one.stream.texts).float()
        cosine_N = torch.cosine_similarity(vectors_ND, wanted_ND, dim=1)
        total, texts = total + float((1 - cosine_N).double().sum()), texts + len(cosine_N)
    for layer in given[:end]:
        layer.passed, layer.state = False, None
    return total / texts
