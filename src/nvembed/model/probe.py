"""Probes: what a loaded model does, found by running it and not by reading its settings.

``probe_direction`` changes the last token of a sequence and watches the first state;
``probe_pooled`` asks the gradient which token states enter an embedding. Used at load
(``model/backbone.py``) and by ``nvembed doctor``.

Letters: T tokens of all rows end to end, L tokens of one text, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nvembed.model.settings import AttentionDirection

States = Callable[[Sequence[Sequence[int]]], Tensor]
"""Rows of token ids to their last hidden states ``(T, D)``, end to end in the order given."""

_PROBE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class DirectionFinding:
    """What ``probe_direction`` saw.

    Attributes:
        direction: ``bidirectional`` if the last token moves the first state.
        neighbours_seen: texts that are encoded together change each other.
    """

    direction: AttentionDirection
    neighbours_seen: bool


@torch.no_grad()
def probe_direction(states: States, vocabulary: int) -> DirectionFinding:
    """Change the last token of a sequence and see whether the first state moves.

    Also tells whether texts that are encoded together see each other.

    Args:
        states: the model, in evaluation mode. It is given the longer row first.
        vocabulary: number of token ids.
    """
    ids = [(7 * i + 11) % vocabulary for i in range(_PROBE_TOKENS)]
    changed = [*ids[:-1], (ids[-1] + vocabulary // 2) % vocabulary]
    first_TD, moved_TD, packed_TD = (states(rows) for rows in ([ids], [changed], [ids, ids[1:]]))
    scale = float(first_TD.float().std()) or 1.0
    seen = float((first_TD[0] - moved_TD[0]).float().abs().max()) / scale > 1e-6
    # Kernels round differently for other shapes; in 16 bit by up to some per cent of the spread.
    tolerance = 1e-3 if first_TD.dtype == torch.float32 else 0.1
    difference = float((first_TD - packed_TD[:_PROBE_TOKENS]).float().abs().max()) / scale
    return DirectionFinding("bidirectional" if seen else "causal", difference > tolerance)


def probe_pooled(modules: Sequence[nn.Module], features: dict[str, Any]) -> Tensor | None:
    """Find which token states enter the embedding of one text.

    A token is pooled when the embedding has a gradient with respect to its state. So the answer is
    that of the code that runs; for a pooling that mixes tokens (self attention), every token that
    has a say counts.

    Args:
        modules: those of a sentence-transformers model; the first makes the states.
        features: what its ``preprocess`` gave for one text, on the model's device.

    Returns:
        bool ``(L,)`` on the CPU, padding left out; ``None`` if the model has no token states.
    """
    with torch.no_grad():
        features = modules[0](features)
    states = features.get("token_embeddings")
    if states is None:
        return None
    # Not an inference tensor and no view of one, so that a gradient can be taken.
    states = states.detach().clone().requires_grad_(True)
    features = {**features, "token_embeddings": states}
    with torch.enable_grad():
        for module in modules[1:]:
            features = module(features)
            if "sentence_embedding" in features:
                break
        embedding_D = features["sentence_embedding"].flatten().float()
        # Uneven weights: a plain sum could cancel, and does behind a layer norm.
        weight_D = torch.linspace(0.5, 1.5, embedding_D.numel(), device=embedding_D.device).sin()
        (gradient,) = torch.autograd.grad((embedding_D * weight_D).sum(), states)
    pooled = gradient.abs().amax(-1) > 0
    if "attention_mask" in features and pooled.dim() == 2:
        pooled = pooled[features["attention_mask"].bool()]
    return pooled.flatten().cpu()
