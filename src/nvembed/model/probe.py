"""Which tokens a model pools, found by running it and not by reading its settings.

Letters: L tokens of one text, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def probe_pooled(modules: Sequence[nn.Module], features: dict[str, Any]) -> Tensor | None:
    """Find which token states enter the embedding of one text, bool ``(L,)`` without padding.

    A token is pooled when the embedding has a gradient with respect to its state. So the answer is
    that of the code that runs; for a pooling that mixes tokens (self attention), every token that
    has a say counts. ``features`` are what the model's ``preprocess`` gave. ``None`` if the model
    has no token states.
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
